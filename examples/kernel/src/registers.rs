//! Registers of the board's own devices, such as interrupt controllers.

use core::ops::Range;
use core::ptr::NonNull;

use crate::error::{Error, Result};
use crate::paging;

/// A block of 32-bit registers, which this has for itself.
#[derive(Debug)]
pub(crate) struct Registers {
    /// Shows `size` bytes of registers for ever.
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is the same on every processor, and each access is whole.
unsafe impl Send for Registers {}
// SAFETY: as above.
unsafe impl Sync for Registers {}

impl Registers {
    /// Shows the registers at a range of physical addresses.
    ///
    /// # Errors
    ///
    /// * [`Error::Memory`]: there is no room for them.
    ///
    /// # Safety
    ///
    /// Registers of a device lie there of which no access breaks memory safety.
    pub(crate) unsafe fn new(range: Range<u64>) -> Result<Self> {
        let size = range.end.saturating_sub(range.start);
        let size = usize::try_from(size).map_err(|_| Error::Memory("registers"))?;
        let base = paging::map_registers(range.start, size)?;
        Ok(Self { base, size })
    }

    /// Returns where a register lies; what is outside the block, or misaligned, is the first one.
    fn register(&self, offset: usize) -> *mut u32 {
        debug_assert!(offset % 4 == 0 && offset + 4 <= self.size);
        let inside = offset % 4 == 0 && offset < self.size && self.size - offset >= 4;
        let offset = if inside { offset } else { 0 };
        self.base.cast::<u32>().as_ptr().wrapping_byte_add(offset)
    }

    /// Reads the register at an offset in bytes.
    pub(crate) fn read(&self, offset: usize) -> u32 {
        // SAFETY: the register lies in the mapping, and `new`'s caller promises that this is safe.
        unsafe { self.register(offset).read_volatile() }
    }

    /// Writes the register at an offset in bytes.
    pub(crate) fn write(&self, offset: usize, value: u32) {
        // SAFETY: as for `read`.
        unsafe { self.register(offset).write_volatile(value) };
    }
}
