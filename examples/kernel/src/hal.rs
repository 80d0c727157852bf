//! What the drivers ask of this kernel: memory for devices, and addresses as devices know them.

use core::ptr::NonNull;

use axdriver_virtio::{BufferDirection, PhysAddr, VirtIoHal};

use crate::frames::{self, FRAME};
use crate::paging;

/// The unit that the drivers count memory in, whatever the size of a page is.
const PAGE_SIZE: usize = 4096;

/// This kernel, to the drivers.
///
/// The devices of all machines that it knows see the processor's caches, so nothing is cleaned here.
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
        (physical, memory)
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
        if let Some(physical) = contiguous(buffer) {
            return physical;
        }
        let Some((physical, copy)) = allocate(buffer.len()) else {
            return 0;
        };
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller promises that the buffer can be read; the copy is as long, and new.
            unsafe { copy.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        physical
    }

    unsafe fn unshare(physical: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if contiguous(buffer) == Some(physical) || physical == 0 {
            return;
        }
        if direction != BufferDirection::DriverToDevice {
            let copy = paging::memory_at(physical).cast_const();
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
