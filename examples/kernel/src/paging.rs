//! Which virtual address is which physical one.
//!
//! The start-up of each architecture leaves a table that shows the kernel's image and, from
//! [`DIRECT_MAP`](PageTables::DIRECT_MAP) on, all of memory. Here come the pages of the heap and of
//! device registers.

use alloc::vec::Vec;
use core::ptr::NonNull;

use spin::Mutex;

use crate::arch::{Arch, Page, PageTables, word};
use crate::error::{Error, Result};
use crate::frames::{self, FRAME};

/// Returns where physical memory is seen.
///
/// The address can be used as long as the memory at `physical` is the caller's.
pub(crate) fn memory_at(physical: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(Arch::DIRECT_MAP + word(physical))
}

/// Shows the frame at `physical` at the virtual address `page`.
///
/// # Errors
///
/// * [`Error::Memory`]: there is no frame for a table.
/// * [`Error::Machine`]: something is shown there already.
fn map(page: usize, physical: u64, kind: Page) -> Result {
    let mut table = Arch::root();
    for level in (0..Arch::LEVELS).rev() {
        let index = (page >> (Arch::PAGE_BITS + 9 * level)) % 512;
        let entry = memory_at(table).cast::<u64>().wrapping_add(index);
        // SAFETY: `table` is a frame that holds a page table, which only this function changes,
        // under the lock of its callers; `index` is below 512, so the entry lies in that frame.
        let value = unsafe { entry.read_volatile() };
        let new = match (Arch::address_in(value), level) {
            (Some(_), 0) => return Err(Error::Machine("a page is in use")),
            (None, 0) => Arch::page_entry(physical, kind),
            (Some(next), _) => {
                table = next;
                continue;
            }
            (None, _) => {
                table = frames::allocate_page().ok_or(Error::Memory("a page table"))?;
                // SAFETY: the frame was just allocated, so it is ours, and the direct map shows it.
                unsafe { memory_at(table).write_bytes(0, FRAME) };
                Arch::table_entry(table)
            }
        };
        // SAFETY: as for the read above; an empty entry is replaced, so nothing that was seen
        // before is seen differently now.
        unsafe { entry.write_volatile(new) };
    }
    Arch::entry_added(page);
    Ok(())
}

/// Returns the physical address of a byte of the heap, of the direct map, or of the kernel's image.
pub(crate) fn physical_address(virtual_address: usize) -> Option<u64> {
    if !(Arch::HEAP..Arch::HEAP + (1 << 30)).contains(&virtual_address) {
        let base = if virtual_address >= Arch::DIRECT_MAP {
            Arch::DIRECT_MAP
        } else {
            Arch::IMAGE
        };
        return Some(virtual_address.checked_sub(base)? as u64);
    }
    let mut address = Arch::root();
    for level in (0..Arch::LEVELS).rev() {
        let index = (virtual_address >> (Arch::PAGE_BITS + 9 * level)) % 512;
        let entry = memory_at(address).cast::<u64>().wrapping_add(index);
        // SAFETY: `address` is that of a page table's frame, and `index` is below 512.
        address = Arch::address_in(unsafe { entry.read_volatile() })?;
    }
    Some(address + (virtual_address % FRAME) as u64)
}

/// Fills `pages` pages of the heap's range with frames, and returns where they begin.
///
/// # Errors
///
/// * [`Error::Memory`]: there are not so many frames. What was shown so far stays.
/// * [`Error::Machine`]: this was called before.
pub(crate) fn map_heap(pages: usize) -> Result<*mut u8> {
    for page in 0..pages {
        let frame = frames::allocate_page().ok_or(Error::Memory("the heap"))?;
        map(Arch::HEAP + page * FRAME, frame, Page::Memory)?;
    }
    Ok(core::ptr::with_exposed_provenance_mut(Arch::HEAP))
}

/// Ranges that are shown already, for good.
static SHOWN: Mutex<Vec<Range>> = Mutex::new(Vec::new());

/// A range of device registers, or of memory past the caches.
struct Range {
    kind: Page,
    physical: u64,
    size: usize,
    page: usize,
}

/// Returns where the `size` bytes of device registers at `physical` are seen.
///
/// # Errors
///
/// * [`Error::Memory`]: there is no frame for a table, or no virtual address left.
pub(crate) fn map_registers(physical: u64, size: usize) -> Result<NonNull<u8>> {
    map_range(physical, size, Page::Registers)
}

/// Returns where the `size` bytes of memory at `physical` are seen past the caches.
///
/// # Errors
///
/// As [`map_registers`].
pub(crate) fn map_uncached(physical: u64, size: usize) -> Result<NonNull<u8>> {
    map_range(physical, size, Page::Uncached)
}

fn map_range(physical: u64, size: usize, kind: Page) -> Result<NonNull<u8>> {
    let offset = word(physical) % FRAME;
    let first = physical - offset as u64;
    let full = size
        .checked_add(offset)
        .and_then(|size| size.checked_next_multiple_of(FRAME))
        .ok_or(Error::Memory("registers"))?;

    let mut shown = SHOWN.lock();
    for range in shown.iter().filter(|range| range.kind == kind) {
        if first >= range.physical && first - range.physical + full as u64 <= range.size as u64 {
            let inside = word(first - range.physical) + offset;
            return at(range.page + inside);
        }
    }
    let page = shown
        .last()
        .map_or(Arch::REGISTERS, |last| last.page + last.size);
    if full > (1 << 30) - (page - Arch::REGISTERS) {
        return Err(Error::Memory("registers"));
    }
    for inside in (0..full).step_by(FRAME) {
        map(page + inside, first + inside as u64, kind)?;
    }
    shown.push(Range {
        kind,
        physical: first,
        size: full,
        page,
    });
    at(page + offset)
}

fn at(virtual_address: usize) -> Result<NonNull<u8>> {
    NonNull::new(core::ptr::with_exposed_provenance_mut(virtual_address))
        .ok_or(Error::Memory("registers"))
}
