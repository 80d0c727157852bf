//! What one architecture has to say for itself: one file each, behind one small interface.
//!
//! Everything else in this kernel is the same on all of them.

use core::time::Duration;

use crate::{error::Result, tree::Tree};

/// What the kernel asks of an architecture.
///
/// Each file below has one implementer, [`Arch`], a start-up in assembly that ends in
/// [`crate::start`], and its trap entry, which calls [`crate::interrupts`].
pub(crate) trait Architecture {
    /// The architecture's name.
    const NAME: &'static str;

    /// Writes lines of memory back from the caches and forgets them: those of so many bytes from an
    /// address on. `None` where devices see the caches, unless the device tree says
    /// `dma-noncoherent`; elsewhere they do not, unless it says `dma-coherent` (Devicetree
    /// Specification 0.4, 2.3.10 and 2.3.11).
    const FLUSH: Option<fn(usize, usize)> = None;

    /// Sends a byte to the console.
    fn console_write(byte: u8);

    /// Ends the machine, with a status where it has one.
    fn exit(success: bool) -> !;

    /// Returns the time since some moment before the start.
    fn now() -> Duration;

    /// Sets up the clock, the trap entry, the interrupt controller with every line masked, and a
    /// tick, [`TICKS_PER_SECOND`]; then unmasks interrupts at the processor.
    ///
    /// # Errors
    ///
    /// * [`Error::Machine`](crate::error::Error::Machine): the device tree lacks the controller.
    fn start_interrupts(tree: Option<&Tree<'_>>) -> Result;

    /// Unmasks or masks one line of the interrupt controller, level triggered.
    fn set_line(line: u32, enabled: bool);

    /// Masks interrupts at the processor, and returns whether they were unmasked.
    fn mask_interrupts() -> bool;

    /// Unmasks interrupts at the processor.
    fn unmask_interrupts();

    /// Sleeps until an interrupt. Called with interrupts masked; returns with them unmasked, after
    /// the interrupt was served. An interrupt that is pending already ends the sleep.
    fn sleep();

    /// Returns the line that a device tree's interrupt specifier for the controller names.
    fn specified_line(specifier: &[u32]) -> Option<u32>;

    /// Returns the line of `pin` (0 is INTA#) of a PCI device whose firmware tables do not tell it;
    /// `interrupt_line` is what the firmware left in that register of the device.
    fn pci_line(device: u8, pin: u8, interrupt_line: u8) -> Option<u32>;
}

/// What the page tables of an architecture look like. Each table has 512 entries of 64 bits.
pub(crate) trait PageTables {
    /// The base-2 logarithm of a page's size.
    const PAGE_BITS: u32;
    /// How many tables a walk visits.
    const LEVELS: u32;
    /// The virtual address at which physical memory is seen, all of it in one piece.
    const DIRECT_MAP: usize;
    /// What to take off an address in the kernel's image, code, data and stack, for the physical one.
    const IMAGE: usize;
    /// Where virtual addresses for the heap begin: a range of 1 GiB that nothing else uses.
    const HEAP: usize;
    /// Where virtual addresses for device registers begin: a range of 1 GiB that nothing else uses.
    const REGISTERS: usize;

    /// Returns the physical address of the root table for `HEAP` and `REGISTERS`.
    fn root() -> u64;

    /// Makes an entry that names the next table.
    fn table_entry(table: u64) -> u64;

    /// Makes an entry that names a page of the kernel's, not to be executed.
    fn page_entry(page: u64, kind: Page) -> u64;

    /// Returns the physical address in an entry, or `None` if the entry is empty.
    fn address_in(entry: u64) -> Option<u64>;

    /// Makes the processor see an entry that was empty before.
    fn entry_added(virtual_address: usize);
}

/// What a page holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Page {
    /// Memory.
    Memory,
    /// Memory past the caches, where there is a way to [flush](Architecture::FLUSH) them.
    Uncached,
    /// The registers of a device: every access reaches it, in order.
    Registers,
}

/// Returns a number as a word of the processor's, which is as long on all architectures here.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a word has 64 bits, as asserted below"
)]
pub(crate) const fn word(value: u64) -> usize {
    value as usize
}
const _: () = assert!(usize::BITS == u64::BITS);

/// How often the clock interrupts in a second.
pub(crate) const TICKS_PER_SECOND: u64 = 100;

/// Returns the time that a counter shows which counts `hertz`, not 0, in a second.
fn counted_time(count: u64, hertz: u64) -> Duration {
    // Seconds and the rest apart, so that nothing overflows.
    Duration::from_secs(count / hertz) + Duration::from_nanos(count % hertz * 1_000_000_000 / hertz)
}

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::Arch;

#[cfg(target_arch = "loongarch64")]
mod loongarch64;
#[cfg(target_arch = "loongarch64")]
pub(crate) use loongarch64::Arch;

#[cfg(target_arch = "riscv64")]
mod riscv64;
#[cfg(target_arch = "riscv64")]
pub(crate) use riscv64::Arch;

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::Arch;
