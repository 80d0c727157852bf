//! A disk and a NIC that are driven by interrupts alone: the processor sleeps until one comes, and never polls.

use std::{
    cell::{Cell, RefCell},
    process::ExitCode,
    rc::Rc,
};

use anyhow::{Context, ensure};
use axdriver_base::{BaseDriverOps, DeviceType, InterruptCause};
use axdriver_net::smoltcp::SmoltcpDevice;
use axdriver_virtio::{InterruptHandle, WaitPolicy};
use clap::Parser;
use examples::{
    board::{Map, Place, Transport},
    http,
    peer::Peer,
    report::{self, Table},
    say,
    stack::Stack,
    time::{SimulatedClock, Time},
    work,
};
use machine::{Board, Device, Disk, Nic};
use smoltcp::time::Instant;

/// Drives a virtio disk and a virtio NIC by interrupts: between a request and its answer the processor sleeps.
///
/// The devices of this board answer later, as those of a real machine do, and raise an interrupt line when they have. The
/// handler of the line acknowledges the interrupt without touching the driver, which may be in the middle of something.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// How the devices are joined to the board.
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

/// The processor: it runs drivers, or sleeps until an interrupt line is raised and then runs the handlers of that line.
#[derive(Default)]
struct Processor {
    board: RefCell<Option<Rc<Board>>>,
    handlers: RefCell<Vec<Handler>>,
    sleeps: Cell<u64>,
    /// Sleeps that a timer ended.
    timers: Cell<u64>,
    /// Looks at a device that was not done, although an interrupt had come.
    looks_in_vain: Cell<u64>,
}

/// What is called when an interrupt line is raised.
struct Handler {
    line: u32,
    device: &'static str,
    handle: InterruptHandle<'static>,
    interrupts: u64,
}

thread_local! {
    static PROCESSOR: Processor = Processor::default();
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl Processor {
    /// Sleeps. The devices go on meanwhile. Returns whether an interrupt was the reason to wake up.
    fn sleep(&self) -> bool {
        count(&self.sleeps);
        let board = self.board.borrow();
        let lines = board.as_ref().map(|board| board.run()).unwrap_or_default();
        let mut woken = false;
        for handler in self
            .handlers
            .borrow_mut()
            .iter_mut()
            .filter(|handler| lines.contains(&handler.line))
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
}

/// What a driver does between two looks at a device that is not done. `false` ends its wait.
fn sleep_until_interrupt(looks: u64) -> bool {
    PROCESSOR.with(|processor| {
        if looks > 1 {
            count(&processor.looks_in_vain);
        }
        // A device that raises nothing never will: nothing else runs here that could make it.
        processor.sleep()
    })
}

/// A clock that stands while the processor runs. A timer wakes it when nothing else does.
struct InterruptTime(SimulatedClock);

impl Time for InterruptTime {
    fn now(&self) -> Instant {
        self.0.now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        PROCESSOR.with(|processor| {
            if !processor.sleep() {
                count(&processor.timers);
                self.0.advance(until);
            }
        });
    }
}

/// Returns the interrupt line of a device.
fn line(board: &Board, place: Place) -> anyhow::Result<u32> {
    let line = match place {
        Place::Mmio { base, .. } => board
            .mmio_slots()
            .iter()
            .find(|slot| slot.base as u64 == base)
            .map(|slot| slot.line),
        Place::Pci(address) => board
            .pci_functions()
            .iter()
            .find(|function| function.address == address)
            .map(|function| function.line),
    };
    line.with_context(|| format!("there is no interrupt line for {place}"))
}

fn attach(line: u32, device: &'static str, handle: InterruptHandle<'static>) {
    let handler = Handler {
        line,
        device,
        handle,
        interrupts: 0,
    };
    PROCESSOR.with(|processor| processor.handlers.borrow_mut().push(handler));
}

fn drive(args: &Args) -> anyhow::Result<()> {
    let clock = SimulatedClock::new();
    let nic = Nic::new([0x02, 0, 0, 0, 0, 1]);
    nic.attach(Peer::new(clock.clone(), PAGE));
    let disk = Disk::memory(4 << 20);
    let builder = args
        .transport
        .plug(Board::emulated(), Device::from(&disk).answer_later());
    let builder = args
        .transport
        .plug(builder, Device::from(&nic).answer_later());
    let board = Rc::new(
        builder
            .build()
            .context("cannot have the memory of an emulated board")?,
    );
    PROCESSOR.with(|processor| processor.board.replace(Some(board.clone())));

    let map = Map::from(&*board);
    for found in map.probe() {
        let line = line(&board, found.place)?;
        let name = format!(
            "{:?} over {} at {}, line {line}",
            found.device_type, found.transport, found.place
        );
        let done = match found.device_type {
            DeviceType::Block => drive_disk(&map, found.place, line),
            _ => drive_nic(&map, found.place, line, clock.clone()),
        };
        say!("{name}: {}", done?)?;
    }
    let requests = disk.counters();
    let frames = nic.counters();
    summarize(
        requests.reads + requests.writes + requests.flushes,
        frames.sent + frames.received,
    )?;
    let violations = board.violations();
    ensure!(
        violations.is_empty(),
        "the board saw drivers break a rule: {}",
        violations[0]
    );
    // The processor outlives this function, and its board should not.
    PROCESSOR.with(|processor| processor.board.take());
    Ok(())
}

/// Fills and checks a disk.
fn drive_disk(map: &Map, place: Place, line: u32) -> anyhow::Result<String> {
    let wait = WaitPolicy::new().with_relax(sleep_until_interrupt);
    let (mut disk, handle) = map.start_disk_with_interrupt(place, wait)?;
    attach(line, "disk", handle);
    disk.enable_interrupts()
        .context("the disk gives no interrupts")?;
    work::verify(&mut disk, work::Step::Fill, &mut |_| {})?;
    work::verify(&mut disk, work::Step::Check, &mut |_| {})?;
    let size = disk.num_blocks() * disk.block_size() as u64;
    Ok(format!("{} filled and checked", report::size(size)))
}

/// Gets an address and a page.
fn drive_nic(map: &Map, place: Place, line: u32, clock: SimulatedClock) -> anyhow::Result<String> {
    let (nic, handle) = map.start_nic_with_interrupt(place)?;
    attach(line, "NIC", handle);
    let mac = nic.mac_address();
    let mut stack = Stack::new(SmoltcpDevice::new(nic), mac.0, InterruptTime(clock));
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

fn summarize(requests: u64, frames: u64) -> anyhow::Result<()> {
    PROCESSOR.with(|processor| {
        let mut table = Table::new(["device", "requests or frames", "interrupts"]);
        for Handler {
            device, interrupts, ..
        } in processor.handlers.borrow().iter()
        {
            let work = if *device == "disk" { requests } else { frames };
            table.row([
                (*device).to_owned(),
                work.to_string(),
                interrupts.to_string(),
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
        ensure!(vain == 0, "a driver polled");
        Ok(())
    })
}
