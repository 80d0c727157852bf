//! A small kernel that finds a disk, a network card and a display, and drives them.
//!
//! It starts in one of the files in [`arch`], which ends in [`start`]; read on from there.

#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod console;
mod error;
mod frames;
mod hal;
mod heap;
mod interrupts;
mod machine;
mod paging;
mod registers;
mod tree;

use arch::{Arch, Architecture, PageTables};
use error::Result;
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
    println!("{} {}", machine.slots.len(), machine.pci.is_some());
    interrupts::sleep_until(0, Arch::now() + core::time::Duration::from_secs(1));
    println!("{:?} {:?}", interrupts::strays_and_ticks(), Arch::now());
    Ok(())
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
