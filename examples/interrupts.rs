//! A disk and a NIC that are driven by interrupts alone: the processor sleeps until one comes, and never polls.

use std::{
    cell::{Cell, RefCell},
    process::ExitCode,
    rc::Rc,
};

use anyhow::{Context, ensure};
use axdriver_base::{BaseDriverOps, DeviceType, InterruptCause};
use axdriver_net::smoltcp::SmoltcpDevice;
use axdriver_virtio::WaitPolicy;
use clap::Parser;
use examples::{
    board::{Board, BoardKind, Device, FarEnd, Handle, Map, Medium, Place, Plan, Transport},
    http,
    report::{self, Table},
    say,
    stack::Stack,
    time::Time,
    work,
};
use smoltcp::time::Instant;

/// Drives a virtio disk and a virtio NIC by interrupts: between a request and its answer the processor sleeps.
///
/// The devices answer later, as those of a real machine do, and raise an interrupt line when they have. The handler of
/// the line acknowledges the interrupt without touching the driver, which may be in the middle of something.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The board that the devices are on; behind vhost-user there is a disk alone.
    #[arg(long, value_enum, default_value_t)]
    board: BoardKind,

    /// How the devices are joined to an emulated board or to QEMU's.
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| drive(&args))
}

const PAGE: &str =
    "<!doctype html>\n<title>axdriver</title>\n<p>This page came without polling.</p>\n";

/// The processor: it runs drivers, or sleeps until a device interrupts and then runs the device's handler.
#[derive(Default)]
struct Processor {
    board: RefCell<Option<Rc<dyn Board>>>,
    handlers: RefCell<Vec<Handler>>,
    sleeps: Cell<u64>,
    /// Sleeps that a timer ended.
    timers: Cell<u64>,
    /// Looks at a device that was not done, although an interrupt had come.
    looks_in_vain: Cell<u64>,
}

/// What is called when a device interrupts.
struct Handler {
    place: Place,
    device: &'static str,
    handle: Handle,
    interrupts: u64,
}

thread_local! {
    static PROCESSOR: Processor = Processor::default();
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl Processor {
    /// Sleeps, at most until `until`. The devices go on meanwhile. Returns whether an interrupt was the reason to wake up.
    fn sleep(&self, until: Option<Instant>) -> bool {
        count(&self.sleeps);
        let board = self.board.borrow();
        let places = board.as_ref().map(|board| board.sleep(until));
        let places = places.unwrap_or_else(|| Ok(Vec::new()));
        let places = places.unwrap_or_else(|error| {
            log::warn!("no interrupts: {error:#}");
            Vec::new()
        });
        let mut woken = false;
        for handler in self
            .handlers
            .borrow_mut()
            .iter_mut()
            .filter(|handler| places.contains(&handler.place))
        {
            // This is all that a handler has to do: the line is no longer raised after it.
            let cause = handler.handle.acknowledge();
            if cause.contains(InterruptCause::USED_BUFFERS) {
                handler.interrupts += 1;
                woken = true;
            }
        }
        woken
    }

    fn now(&self) -> Instant {
        let board = self.board.borrow();
        board.as_ref().map_or(Instant::ZERO, |board| board.now())
    }
}

/// What a driver does between two looks at a device that is not done. `false` ends its wait.
fn sleep_until_interrupt(looks: u64) -> bool {
    PROCESSOR.with(|processor| {
        if looks > 1 {
            count(&processor.looks_in_vain);
        }
        // A device that raises nothing by now never will: nobody looks without it.
        processor.sleep(None)
    })
}

/// A clock that sleeps until a device interrupts, or a timer does.
struct InterruptTime;

impl Time for InterruptTime {
    fn now(&self) -> Instant {
        PROCESSOR.with(Processor::now)
    }

    fn pass(&mut self, until: Option<Instant>) {
        /// Of the sleep of a stack that has no timer, in milliseconds.
        const LONGEST: u64 = 10;

        PROCESSOR.with(|processor| {
            let latest = processor.now() + smoltcp::time::Duration::from_millis(LONGEST);
            if !processor.sleep(Some(until.unwrap_or(latest))) {
                count(&processor.timers);
            }
        });
    }
}

fn attach(place: &Place, device: &'static str, handle: Handle) {
    let handler = Handler {
        place: place.clone(),
        device,
        handle,
        interrupts: 0,
    };
    PROCESSOR.with(|processor| processor.handlers.borrow_mut().push(handler));
}

fn drive(args: &Args) -> anyhow::Result<()> {
    let mut plan = Plan::default().watched().delayed();
    plan = plan.with(args.transport, Device::Disk(Medium::Blank(4 << 20)));
    if args.board != BoardKind::VhostUser {
        let nic = Device::Nic(FarEnd::Peer(PAGE.into()));
        plan = plan.with(args.transport, nic);
    }
    let board: Rc<dyn Board> = args.board.start(&plan)?.into();
    PROCESSOR.with(|processor| processor.board.replace(Some(board.clone())));

    let map = board.map();
    for found in map.probe() {
        let name = format!(
            "{:?} over {} at {}",
            found.device_type, found.transport, found.place
        );
        let done = match found.device_type {
            DeviceType::Block => drive_disk(&map, &found.place),
            _ => drive_nic(&map, &found.place),
        };
        say!("{name}: {}", done?)?;
    }
    summarize(board.as_ref(), args.board == BoardKind::Emulated)?;
    let complaints = board.complaints();
    ensure!(
        complaints.is_empty(),
        "the board saw drivers break a rule: {}",
        complaints.join("; ")
    );
    // The processor outlives this function, and its board should not.
    PROCESSOR.with(|processor| {
        processor.handlers.take();
        processor.board.take();
    });
    Ok(())
}

/// Fills and checks a disk.
fn drive_disk(map: &Map, place: &Place) -> anyhow::Result<String> {
    let wait = WaitPolicy::new().with_relax(sleep_until_interrupt);
    let (mut disk, handle) = map.start_disk_with_interrupt(place, wait)?;
    attach(place, "disk", handle);
    disk.enable_interrupts()
        .context("the disk gives no interrupts")?;
    work::verify(&mut disk, work::Step::Fill, &mut |_| {})?;
    work::verify(&mut disk, work::Step::Check, &mut |_| {})?;
    let size = disk.num_blocks() * disk.block_size() as u64;
    Ok(format!("{} filled and checked", report::size(size)))
}

/// Gets an address and a page.
fn drive_nic(map: &Map, place: &Place) -> anyhow::Result<String> {
    let (nic, handle) = map.start_nic_with_interrupt(place)?;
    attach(place, "NIC", handle);
    let mac = nic.mac_address();
    let mut stack = Stack::new(SmoltcpDevice::new(nic), mac.0, InterruptTime);
    // What came in between the last look and this request will not be announced: the driver says so, and is looked at again.
    stack.before_waiting(|device| device.driver_mut().enable_interrupts().unwrap_or(false));
    let lease = stack.dhcp()?;
    let router = lease
        .router
        .context("DHCP gave no way out of the network")?;
    let page = stack.get(router, http::PORT, "/")?;
    ensure!(
        page.status == 200 && page.body == PAGE.as_bytes(),
        "another page came than was sent"
    );
    let long = stack.get(router, http::PORT, "/bytes/500000")?;
    http::check_pattern(0, &long.body)?;
    Ok(format!(
        "{} by DHCP, two pages of {} and {} bytes",
        lease.address,
        page.body.len(),
        long.body.len()
    ))
}

/// Says what it took. On a board whose devices answer in step with the processor, no look may have been in vain.
fn summarize(board: &dyn Board, in_step: bool) -> anyhow::Result<()> {
    PROCESSOR.with(|processor| {
        let mut table = Table::new(["device", "requests or frames", "interrupts"]);
        for handler in processor.handlers.borrow().iter() {
            let work = board.work(&handler.place);
            table.row([
                handler.device.to_owned(),
                work.map_or_else(|| "not counted".to_owned(), |work| work.done.to_string()),
                handler.interrupts.to_string(),
            ]);
        }
        say!("\n{table}")?;
        let (sleeps, timers, vain) = (
            processor.sleeps.get(),
            processor.timers.get(),
            processor.looks_in_vain.get(),
        );
        say!("the processor slept {sleeps} times, and was woken by a timer {timers} times")?;
        say!("looks at a device that was not done: {vain}")?;
        // Elsewhere the interrupt of a request may come after its answer was seen, and end the next sleep.
        ensure!(vain == 0 || !in_step, "a driver polled");
        Ok(())
    })
}
