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
mod tree;

use alloc::{format, string::String, vec::Vec};

use arch::{Arch, Architecture, PageTables};
use devices::{Device, Devices, Place};
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
    Arch::start_interrupts(tree.as_ref())?;
    let mut devices = Devices::find(&machine)?;
    if boot.command_line.split_whitespace().any(|word| word == "lose-interrupts") {
        interrupts::lose_all();
    }

    let mut lines = Vec::new();
    let mut result = Ok(());
    let mut note = |kind, place: Place, source, name: &str, outcome: Result<String>| {
        let text = match outcome {
            Ok(text) => format!("ok: {text}"),
            Err(error) => {
                result = Err(error);
                format!("failed: {error}")
            }
        };
        let count = interrupts::count_of(source);
        lines.push(format!("{kind} {place}, {name}: {count} interrupts; {text}"));
    };
    for Device { place, source, driver } in &mut devices.disks {
        let outcome = disk::work(driver.as_mut());
        note("disk", *place, *source, driver.device_name(), outcome);
    }
    for Device { place, source, driver } in &mut devices.displays {
        let outcome = display::work(driver.as_mut());
        note("display", *place, *source, driver.device_name(), outcome);
    }
    for Device { place, source, driver } in &mut devices.nics {
        let outcome = network::work(driver.as_mut());
        note("net", *place, *source, driver.device_name(), outcome);
    }
    for line in &lines {
        println!("{line}");
    }
    let (strays, ticks) = interrupts::strays_and_ticks();
    println!("interrupts: {} of devices, {strays} stray, {ticks} ticks", interrupts::count());
    if lines.is_empty() {
        return Err(Error::Machine("no device"));
    }
    result
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
        frames::free_count() * frames::FRAME >> 20
    );
    heap::start()
}
