//! Registers of the board's own devices, such as interrupt controllers.

use core::ops::Range;
use core::ptr::NonNull;

use crate::error::{Error, Result};
use crate::paging;

/// A block of registers, 32 bits each if not said otherwise, which this has for itself.
///
/// It is at least 4 bytes long.
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
    /// * [`Error::Machine`]: the range holds none.
    ///
    /// # Safety
    ///
    /// Registers of a device lie there of which no access breaks memory safety.
    pub(crate) unsafe fn new(range: Range<u64>) -> Result<Self> {
        let size = range.end.saturating_sub(range.start);
        let size = usize::try_from(size).map_err(|_| Error::Memory("registers"))?;
        if size < size_of::<u32>() {
            return Err(Error::Machine("a device without registers"));
        }
        let base = paging::map_registers(range.start, size)?;
        Ok(Self { base, size })
    }

    /// Returns where a register lies; what is outside the block, or misaligned, is the first one.
    fn register<T>(&self, offset: usize) -> *mut T {
        let inside = offset.is_multiple_of(size_of::<T>())
            && self
                .size
                .checked_sub(offset)
                .is_some_and(|rest| rest >= size_of::<T>());
        debug_assert!(inside);
        let offset = if inside { offset } else { 0 };
        self.base.cast::<T>().as_ptr().wrapping_byte_add(offset)
    }

    /// Writes the 8-bit register at an offset in bytes.
    #[cfg(target_arch = "loongarch64")]
    pub(crate) fn write_u8(&self, offset: usize, value: u8) {
        // SAFETY: as for `read`.
        unsafe { self.register::<u8>(offset).write_volatile(value) };
    }

    /// Reads the register at an offset in bytes.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn read(&self, offset: usize) -> u32 {
        // SAFETY: the register lies in the mapping, and `new`'s caller promises that this is safe.
        unsafe { self.register::<u32>(offset).read_volatile() }
    }

    /// Writes the register at an offset in bytes.
    pub(crate) fn write(&self, offset: usize, value: u32) {
        // SAFETY: as for `read`.
        unsafe { self.register::<u32>(offset).write_volatile(value) };
    }
}
