//! Memory that the driver shares with the device. All raw access to such memory is in this file.

use core::{
    marker::PhantomData,
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU32, Ordering},
};

use axdriver_base::{DevError, DevResult};
use log::error;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Whole pages of zeroed memory from the HAL, freed on drop unless [kept](Self::keep).
///
/// The device may read and write the region at any time, so it is only ever accessed through
/// atomics: a device that writes at the same moment changes a value, never the meaning of the
/// program.
pub(crate) struct Dma<H: Hal> {
    paddr: PhysAddr,
    /// Points to `pages` pages which are ours alone (but for the device) until drop.
    vaddr: NonNull<u8>,
    pages: usize,
    kept: bool,
    hal: PhantomData<fn() -> H>,
}

// SAFETY: the region belongs to this value, not to a thread, and `Hal` has no thread of its own:
// its functions are free functions that any thread may call.
unsafe impl<H: Hal> Send for Dma<H> {}

// SAFETY: `&Dma` gives access through atomics only, and addresses.
unsafe impl<H: Hal> Sync for Dma<H> {}

impl<H: Hal> Dma<H> {
    /// Allocates at least `bytes` bytes.
    ///
    /// # Errors
    ///
    /// [`DevError::NoMemory`]: the HAL has none, or `bytes` is 0.
    pub(crate) fn new(bytes: usize, direction: BufferDirection) -> DevResult<Self> {
        let pages = bytes.div_ceil(PAGE_SIZE);
        if pages == 0 {
            return Err(DevError::NoMemory);
        }
        let (paddr, vaddr) = H::dma_alloc(pages, direction);
        if paddr == 0 {
            return Err(DevError::NoMemory);
        }
        Ok(Self {
            paddr,
            vaddr,
            pages,
            kept: false,
            hal: PhantomData,
        })
    }

    /// Returns the address that the device uses for the byte at `offset`.
    pub(crate) fn paddr(&self, offset: usize) -> PhysAddr {
        self.paddr + offset as PhysAddr
    }

    /// Returns the region's size, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// Never gives the memory back: the device may still use it.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }

    /// Returns a pointer to a `T` at `offset`, which lies within the region and is aligned.
    fn at<T>(&self, offset: usize) -> NonNull<T> {
        assert!(
            offset.is_multiple_of(align_of::<T>())
                && offset
                    .checked_add(size_of::<T>())
                    .is_some_and(|end| end <= self.len())
        );
        // SAFETY: `offset` is less than the size of the region that `vaddr` points to.
        unsafe { self.vaddr.byte_add(offset) }.cast()
    }

    /// Returns the 16-bit word at `offset`, a multiple of 2.
    pub(crate) fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `at` gives a valid, aligned pointer (`vaddr` is page-aligned) into memory that
        // lives as long as `self` and is only accessed atomically.
        unsafe { AtomicU16::from_ptr(self.at::<u16>(offset).as_ptr()) }
    }

    /// Returns the 32-bit word at `offset`, a multiple of 4.
    pub(crate) fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u16`.
        unsafe { AtomicU32::from_ptr(self.at::<u32>(offset).as_ptr()) }
    }

    /// Stores `value` at `offset`, a multiple of 2, in little-endian order.
    pub(crate) fn store_le16(&self, offset: usize, value: u16) {
        self.u16(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Stores `value` at `offset`, a multiple of 4, in little-endian order.
    pub(crate) fn store_le32(&self, offset: usize, value: u32) {
        self.u32(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Stores `value` at `offset`, a multiple of 4, in little-endian order, as two halves.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of the value"
    )]
    pub(crate) fn store_le64(&self, offset: usize, value: u64) {
        self.store_le32(offset, value as u32);
        self.store_le32(offset + 4, (value >> 32) as u32);
    }

    /// Loads a little-endian value from `offset`, a multiple of 4.
    pub(crate) fn load_le32(&self, offset: usize) -> u32 {
        u32::from_le(self.u32(offset).load(Ordering::Relaxed))
    }

    /// Zeroes the `len` bytes from `offset`, both multiples of 4.
    pub(crate) fn zero(&self, offset: usize, len: usize) {
        for word in (offset..offset + len).step_by(4) {
            self.store_le32(word, 0);
        }
    }

    /// Returns the first `len` bytes as a slice, at most the region's size.
    ///
    /// # Safety
    ///
    /// The device must not be told to write to the region while the slice lives.
    #[cfg(feature = "gpu")]
    pub(crate) unsafe fn as_mut_slice(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.len());
        // SAFETY: the region is valid for `len` initialised bytes, `&mut self` makes the access
        // exclusive within the program, and the caller promises it of the device.
        unsafe { core::slice::from_raw_parts_mut(self.vaddr.as_ptr(), len) }
    }

    /// Returns the address at which the program sees the region.
    #[cfg(feature = "gpu")]
    pub(crate) fn vaddr(&self) -> usize {
        self.vaddr.as_ptr().expose_provenance()
    }
}

impl<H: Hal> Drop for Dma<H> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // SAFETY: the three values are those of the `dma_alloc` in `new`, and this is the only
        // place that frees them.
        let status = unsafe { H::dma_dealloc(self.paddr, self.vaddr, self.pages) };
        if status != 0 {
            error!(
                "the HAL did not take back {} pages at {:#x}: {status}",
                self.pages, self.paddr
            );
        }
    }
}

/// A buffer of the driver's caller or of its pool which the HAL has shared with the device.
///
/// It has no `Drop`: whether the device is done with the buffer is known by the driver alone.
#[cfg(any(feature = "block", feature = "net"))]
pub(crate) struct Shared<H: Hal> {
    paddr: PhysAddr,
    buffer: NonNull<[u8]>,
    direction: BufferDirection,
    hal: PhantomData<fn() -> H>,
}

// SAFETY: the pointer stands for a buffer that the creator of the value answers for, wherever the
// value goes; see `Shared::new`.
#[cfg(any(feature = "block", feature = "net"))]
unsafe impl<H: Hal> Send for Shared<H> {}

// SAFETY: `&Shared` gives an address only.
#[cfg(any(feature = "block", feature = "net"))]
unsafe impl<H: Hal> Sync for Shared<H> {}

#[cfg(any(feature = "block", feature = "net"))]
impl<H: Hal> Shared<H> {
    /// Shares `buffer`, which is not empty.
    ///
    /// # Safety
    ///
    /// `buffer` must stay valid, and nothing else may access it, until [`unshare`](Self::unshare).
    pub(crate) unsafe fn new(buffer: NonNull<[u8]>, direction: BufferDirection) -> Self {
        // SAFETY: the caller's promise is the one that `share` asks for, and lasts longer.
        let paddr = unsafe { H::share(buffer, direction) };
        Self {
            paddr,
            buffer,
            direction,
            hal: PhantomData,
        }
    }

    /// Returns the address that the device uses for the buffer.
    pub(crate) fn paddr(&self) -> PhysAddr {
        self.paddr
    }

    /// Takes the buffer back from the device.
    ///
    /// # Safety
    ///
    /// The device must be done with the buffer, or have been reset.
    pub(crate) unsafe fn unshare(self) {
        // SAFETY: `paddr` is what `share` returned for the very buffer and direction, which is
        // valid and unused as the creator promised.
        unsafe { H::unshare(self.paddr, self.buffer, self.direction) };
    }
}
