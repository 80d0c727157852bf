//! What the drivers ask of this kernel: memory for devices, and addresses as devices know them.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use axdriver_virtio::{BufferDirection, PhysAddr, VirtIoHal};
use spin::Once;

use crate::arch::{Arch, Architecture};
use crate::error::{Error, Result};
use crate::frames::{self, FRAME};
use crate::paging;

/// The unit that the drivers count memory in, whatever the size of a page is.
const PAGE_SIZE: usize = 4096;

/// Set where devices do not see the processor's caches: how to flush these.
static FLUSH: Once<fn(usize, usize)> = Once::new();
/// How often that was done.
static FLUSHES: AtomicU32 = AtomicU32::new(0);

/// Keeps what devices are given out of the caches, because they do not see these. It has to be
/// called before the first driver is started.
///
/// # Errors
///
/// * [`Error::Machine`]: nobody knows how.
pub(crate) fn keep_out_of_caches() -> Result {
    let flush = Arch::FLUSH.ok_or(Error::Machine("devices that do not see the caches"))?;
    FLUSH.call_once(|| flush);
    Ok(())
}

/// Returns how often the caches were flushed, or `None` if devices see them.
pub(crate) fn flushes() -> Option<u32> {
    FLUSH.get().map(|_| FLUSHES.load(Ordering::Relaxed))
}

/// Makes devices see what the processor wrote, and the other way round, if they do not anyway.
fn flush(memory: NonNull<u8>, size: usize) {
    if let Some(flush) = FLUSH.get() {
        flush(memory.addr().get(), size);
        FLUSHES.fetch_add(1, Ordering::Relaxed);
    }
}

/// This kernel, to the drivers.
///
/// Devices that do not see the processor's caches get memory that is not cached, and copies, whose
/// cache lines are theirs alone.
pub(crate) struct KernelHal;

// SAFETY: memory for devices comes from the frame allocator, so nobody else has it until it is
// given back, and the direct map shows all of it; buffers are shared where they are, or by a copy.
unsafe impl VirtIoHal for KernelHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let Some((physical, memory)) = allocate(pages * PAGE_SIZE) else {
            // The contract's way to say that there is none.
            return (0, NonNull::dangling());
        };
        // SAFETY: the frames were just allocated, so they are ours, and the direct map shows them.
        unsafe { memory.write_bytes(0, pages * PAGE_SIZE) };
        if FLUSH.get().is_none() {
            return (physical, memory);
        }
        // The direct map shows it still, but nothing is written there any more, so no line of it
        // is written back over what comes now (ARM DDI 0487, B2.8).
        flush(memory, pages * PAGE_SIZE);
        match paging::map_uncached(physical, pages * PAGE_SIZE) {
            Ok(memory) => (physical, memory),
            Err(_) => {
                frames::free(physical, (pages * PAGE_SIZE).div_ceil(FRAME));
                (0, NonNull::dangling())
            }
        }
    }

    unsafe fn dma_dealloc(physical: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        frames::free(physical, (pages * PAGE_SIZE).div_ceil(FRAME));
        0
    }

    unsafe fn mmio_phys_to_virt(physical: PhysAddr, size: usize) -> NonNull<u8> {
        // There is no way to say that it failed.
        match paging::map_registers(physical, size) {
            Ok(registers) => registers,
            Err(error) => crate::stop(Err(error)),
        }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if FLUSH.get().is_none()
            && let Some(physical) = contiguous(buffer)
        {
            return physical;
        }
        let Some((physical, copy)) = allocate(buffer.len()) else {
            return 0;
        };
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller promises that the buffer can be read; the copy is as long, and new.
            unsafe { copy.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        // Also where the device writes: no line may be written back over that.
        flush(copy, buffer.len());
        physical
    }

    unsafe fn unshare(physical: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if contiguous(buffer) == Some(physical) || physical == 0 {
            return;
        }
        if direction != BufferDirection::DriverToDevice {
            let copy = paging::memory_at(physical);
            // What the processor has read ahead of the device is forgotten.
            NonNull::new(copy).inspect(|&copy| flush(copy, buffer.len()));
            // SAFETY: `physical` is that of the copy that `share` made, which is as long and which the
            // device is done with; the caller promises that the buffer can be written.
            unsafe {
                buffer
                    .cast::<u8>()
                    .as_ptr()
                    .copy_from_nonoverlapping(copy, buffer.len())
            };
        }
        frames::free(physical, buffer.len().div_ceil(FRAME));
    }
}

/// Takes memory in one piece, and returns where a device and where the processor sees it.
fn allocate(size: usize) -> Option<(PhysAddr, NonNull<u8>)> {
    let physical = frames::allocate_run(size.div_ceil(FRAME))?;
    Some((physical, NonNull::new(paging::memory_at(physical))?))
}

/// Returns the physical address of a buffer, if its pages lie in one piece of physical memory.
fn contiguous(buffer: NonNull<[u8]>) -> Option<PhysAddr> {
    let start = buffer.cast::<u8>().addr().get();
    let physical = paging::physical_address(start)?;
    let mut page = (start / FRAME + 1) * FRAME;
    while page < start + buffer.len() {
        if paging::physical_address(page)? != physical + (page - start) as u64 {
            return None;
        }
        page += FRAME;
    }
    Some(physical)
}
