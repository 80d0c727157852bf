//! The memory that a display shows, as bytes.

use core::fmt;

/// The framebuffer: the memory whose contents a display shows, borrowed from its driver.
///
/// It is plain bytes. [`Canvas`](crate::Canvas) gives them width, height and colours.
///
/// ```
/// use axdriver_display::FrameBuffer;
///
/// let mut memory = [0; 16];
/// let mut fb = FrameBuffer::from_slice(&mut memory);
/// fb.as_bytes_mut()[3] = 7;
/// assert_eq!(fb.as_bytes()[3], 7);
/// assert_eq!(fb.as_bytes().get(16), None);
/// ```
pub struct FrameBuffer<'a> {
    bytes: &'a mut [u8],
}

impl<'a> FrameBuffer<'a> {
    /// Takes the `len` bytes at `ptr` as the framebuffer.
    ///
    /// # Safety
    ///
    /// For the whole of `'a`, the `len` bytes at `ptr` are one initialised allocation of at most [`isize::MAX`] bytes,
    /// valid for reads and writes, that the program reaches in no other way. (That the device reads them is fine.)
    /// `ptr` is not null, also when `len` is 0.
    #[must_use]
    pub const unsafe fn from_raw_parts_mut(ptr: *mut u8, len: usize) -> Self {
        Self {
            // SAFETY: the caller promises a valid allocation of initialised bytes that is ours alone for `'a`; bytes
            // have no alignment to keep.
            bytes: unsafe { core::slice::from_raw_parts_mut(ptr, len) },
        }
    }

    /// Takes `slice` as the framebuffer.
    #[must_use]
    pub const fn from_slice(slice: &'a mut [u8]) -> Self {
        Self { bytes: slice }
    }

    /// Returns the framebuffer as bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8] {
        self.bytes
    }

    /// Returns the framebuffer as bytes to be written.
    #[must_use]
    pub const fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }

    /// Returns the framebuffer as bytes that live as long as the borrow of the driver.
    #[must_use]
    pub const fn into_bytes(self) -> &'a mut [u8] {
        self.bytes
    }
}

impl fmt::Debug for FrameBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameBuffer")
            .field("address", &self.bytes.as_ptr())
            .field("size", &self.bytes.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::FrameBuffer;

    #[test]
    fn a_framebuffer_from_a_pointer_is_the_memory_there() {
        let mut memory = [1, 2, 3, 4];
        // SAFETY: the first three bytes are initialised and not used otherwise while the framebuffer lives.
        let mut fb = unsafe { FrameBuffer::from_raw_parts_mut(memory.as_mut_ptr(), 3) };
        fb.as_bytes_mut()[2] = 9;
        assert_eq!(fb.as_bytes(), [1, 2, 9]);
        assert_eq!(fb.into_bytes(), [1, 2, 9]);
        assert_eq!(memory, [1, 2, 9, 4]);
    }
}

/// There is one framebuffer of a display at a time:
///
/// ```compile_fail,E0499
/// use axdriver_display::DisplayDriverOps;
///
/// fn two(display: &mut dyn DisplayDriverOps) {
///     let (mut one, mut other) = (display.fb(), display.fb());
///     one.as_bytes_mut().swap_with_slice(other.as_bytes_mut());
/// }
/// ```
#[cfg(doctest)]
struct FramebuffersDoNotAlias;
