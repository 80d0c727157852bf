//! A small kernel that finds a disk, a network card and a display, and drives them.
//!
//! It starts in one of the files in [`arch`], which ends in [`start`]; read on from there.

#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod checksum;
mod console;
mod devices;
mod disk;
mod display;
mod error;
mod faults;
mod frames;
mod hal;
mod heap;
mod interrupts;
mod machine;
mod network;
mod paging;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the host's examples draw the same test card, and more of it"
)]
#[path = "../../src/picture.rs"]
mod picture;
mod registers;
mod slot;
#[cfg_attr(
    target_arch = "x86_64",
    expect(dead_code, reason = "this architecture's machines have none")
)]
mod tree;

use alloc::{format, string::String, vec::Vec};

use axdriver_base::BaseDriverOps;

use arch::{Arch, Architecture, PageTables};
use devices::{Device, Devices};

use error::{Error, Result};
use machine::{Boot, Description, Machine};
use tree::Tree;

unsafe extern "C" {
    /// The end of the kernel's image; see `kernel.ld`.
    safe static __kernel_end: [u8; 0];
}

/// Everything, once an architecture has a stack and its boot tables.
pub(crate) fn start(boot: Boot) -> ! {
    stop(run(&boot))
}

/// Ends the machine with a last line.
pub(crate) fn stop(result: Result) -> ! {
    match &result {
        Ok(()) => println!("kernel: ok"),
        Err(error) => println!("kernel: {error}"),
    }
    Arch::exit(result.is_ok())
}

fn run(boot: &Boot) -> Result {
    println!("kernel: {}, {}", Arch::NAME, boot.command_line);
    console::start_log();

    let tree = match boot.description {
        Description::Tree(bytes) => Some(Tree::new(bytes)?),
        Description::Pc { .. } => None,
    };
    start_memory(boot)?;
    let machine = Machine::discover(boot)?;
    if !machine.coherent {
        hal::keep_out_of_caches()?;
    }
    Arch::start_interrupts(tree.as_ref())?;
    let asked = |what| {
        boot.command_line
            .split_whitespace()
            .any(|word| word == what)
    };
    let mut devices = Devices::find(&machine, asked("interrupt-storm"))?;
    if asked("lose-interrupts") {
        interrupts::lose_all();
    }

    if asked("stray-interrupts")
        && let Some(disk) = devices.disks.first_mut()
    {
        faults::stray_interrupts(disk)?;
    }

    let mut report = Report::default();
    for disk in &mut devices.disks {
        report.work("disk", disk, |driver, _| disk::work(driver));
    }
    if asked("unanswered-request")
        && let Some(disk) = devices.disks.first_mut()
    {
        faults::unanswered_request(disk)?;
        report.work("disk", disk, |driver, _| disk::work(driver));
    }
    if asked("pulled-card") {
        faults::pulled_card(&mut devices)?;
    }
    for display in &mut devices.displays {
        report.work("display", display, |driver, _| display::work(driver));
    }
    for nic in &mut devices.nics {
        report.work("net", nic, network::work);
    }
    // What has changed meanwhile.
    for disk in &mut devices.disks {
        if interrupts::take_changed(disk.source) && disk.driver.reconfigure().is_ok() {
            println!(
                "disk {}: {} blocks now",
                disk.place,
                disk.driver.num_blocks()
            );
        }
    }
    for line in &report.lines {
        println!("{line}");
    }
    let (count, strays, ticks) = interrupts::totals();
    println!("interrupts: {count} of devices, {strays} stray, {ticks} ticks");
    if let Some(count) = hal::flushes() {
        println!("devices do not see the caches, which were flushed {count} times");
    }
    if report.lines.is_empty() {
        return Err(Error::Machine("no device"));
    }
    report.result
}

/// What came of the work with each device.
struct Report {
    /// A line for each device.
    lines: Vec<String>,
    /// What went wrong last.
    result: Result,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            lines: Vec::new(),
            result: Ok(()),
        }
    }
}

impl Report {
    /// Works with a device. It has gone well only if the device has interrupted.
    fn work<D: BaseDriverOps + ?Sized>(
        &mut self,
        kind: &str,
        device: &mut Device<D>,
        work: impl FnOnce(&mut D, usize) -> Result<String>,
    ) {
        let source = device.source;
        let before = interrupts::count_of(source);
        interrupts::watch(source);
        let outcome = work(device.driver.as_mut(), source).and_then(|text| {
            if interrupts::count_of(source) == before && !interrupts::comes(source, before) {
                return Err(Error::Late("the device's interrupt"));
            }
            Ok(text)
        });
        let count = interrupts::count_of(source) - before;
        let (place, name) = (device.place, device.driver.device_name());
        self.lines.push(match outcome {
            Ok(text) => format!("{kind} {place}, {name}: ok, {count} interrupts; {text}"),
            Err(error) => {
                self.result = Err(error);
                format!("{kind} {place}, {name}: failed, {count} interrupts; {error}")
            }
        });
    }
}

/// Puts memory to use and starts the heap.
fn start_memory(boot: &Boot) -> Result {
    let end = (__kernel_end.as_ptr() as usize - Arch::IMAGE) as u64;
    let place = |bytes: &[u8]| {
        let start = paging::physical_address(bytes.as_ptr() as usize).unwrap_or(0);
        start..start + bytes.len() as u64
    };
    let tree = match boot.description {
        Description::Tree(bytes) => place(bytes),
        Description::Pc { .. } => 0..0,
    };
    let memory = boot.memory.start.max(end)..boot.memory.end;
    frames::add_memory(memory.clone(), &[tree, place(boot.command_line.as_bytes())]);
    println!(
        "memory: {memory:#x?}, {} MiB free",
        (frames::free_count() * frames::FRAME) >> 20
    );
    heap::start()
}
