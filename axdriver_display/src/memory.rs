//! A display in memory: the reference implementation, and a fake for tests.

use alloc::{boxed::Box, vec::Vec};
use core::fmt;

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};

use crate::{
    Color, DisplayCapabilities, DisplayDriverOps, DisplayInfo, FrameBuffer, canvas::Geometry,
};

/// A display in memory, which keeps what was drawn and what is shown apart: a flush brings the one to the other.
///
/// ```
/// use axdriver_display::{Canvas, Color, DevError, DisplayDriverOps, memory::MemoryDisplay};
///
/// let mut display = MemoryDisplay::new(320, 200)?;
/// Canvas::of(&mut display)?.set_pixel(319, 199, Color::WHITE)?;
/// assert_eq!(display.shown(319, 199), Some(Color::BLACK));
/// display.flush()?;
/// assert_eq!(display.shown(319, 199), Some(Color::WHITE));
///
/// assert_eq!(MemoryDisplay::new(0, 200).err(), Some(DevError::InvalidParam));
/// # Ok::<(), DevError>(())
/// ```
pub struct MemoryDisplay {
    width: u32,
    height: u32,
    capabilities: DisplayCapabilities,
    geometry: Geometry,
    /// What was drawn: `geometry.full_len()` bytes.
    drawn: Box<[u8]>,
    /// What is shown: as many bytes.
    screen: Box<[u8]>,
}

impl MemoryDisplay {
    /// Makes a black display of `width` by `height` pixels.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: width or height is 0, or the pixels do not fit into the address space.
    /// * [`DevError::NoMemory`]: there is not enough for them.
    pub fn new(width: u32, height: u32) -> DevResult<Self> {
        Self::with_capabilities(width, height, DisplayCapabilities::new())
    }

    /// Makes a black display whose pixels lie in memory as `capabilities` says.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: width or height is 0, a row is longer than the stride, or the pixels do not fit
    ///   into the address space.
    /// * [`DevError::NoMemory`]: there is not enough for them.
    pub fn with_capabilities(
        width: u32,
        height: u32,
        capabilities: DisplayCapabilities,
    ) -> DevResult<Self> {
        let geometry = Geometry::new(width, height, &capabilities)?;
        Ok(Self {
            width,
            height,
            capabilities,
            geometry,
            drawn: zeros(geometry.full_len())?,
            screen: zeros(geometry.full_len())?,
        })
    }

    /// Returns what the display shows: the framebuffer as it was at the last flush.
    #[must_use]
    pub const fn screen(&self) -> &[u8] {
        &self.screen
    }

    /// Returns the colour that the display shows in column `x` of row `y`, or `None` outside.
    #[must_use]
    pub fn shown(&self, x: u32, y: u32) -> Option<Color> {
        self.geometry.pixel(&self.screen, x, y)
    }
}

/// Returns `len` zeros.
fn zeros(len: usize) -> DevResult<Box<[u8]>> {
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| DevError::NoMemory)?;
    bytes.resize(len, 0);
    Ok(bytes.into_boxed_slice())
}

impl BaseDriverOps for MemoryDisplay {
    fn device_name(&self) -> &str {
        "memory-display"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Display
    }
}

impl DisplayDriverOps for MemoryDisplay {
    fn info(&self) -> DisplayInfo {
        DisplayInfo {
            width: self.width,
            height: self.height,
            fb_base_vaddr: self.drawn.as_ptr().addr(),
            fb_size: self.drawn.len(),
        }
    }

    fn fb(&mut self) -> FrameBuffer<'_> {
        FrameBuffer::from_slice(&mut self.drawn)
    }

    fn need_flush(&self) -> bool {
        true
    }

    fn flush(&mut self) -> DevResult {
        self.screen.copy_from_slice(&self.drawn);
        Ok(())
    }

    fn capabilities(&self) -> DisplayCapabilities {
        self.capabilities
    }
}

impl fmt::Debug for MemoryDisplay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisplay")
            .field("width", &self.width)
            .field("height", &self.height)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Canvas, PixelFormat};

    #[test]
    fn displays_of_no_or_impossible_size_are_refused() {
        for (width, height) in [(0, 0), (0, 1), (1, 0), (u32::MAX, 0)] {
            let refused = MemoryDisplay::new(width, height).err();
            assert_eq!(refused, Some(DevError::InvalidParam));
        }
        // 2^66 bytes, which 64 bits would cut to 0 or nearly so; and 256 KiB in 32 bits, but 4 GiB in truth.
        let refused = MemoryDisplay::new(u32::MAX, u32::MAX).err();
        assert_eq!(refused, Some(DevError::InvalidParam));
        let geometry = Geometry::new(65536, 16385, &DisplayCapabilities::new());
        assert_eq!(geometry.map(|it| it.full_len()), Ok(65536 * 16385 * 4));
    }

    #[test]
    fn a_stride_shorter_than_a_row_is_refused() {
        let capabilities = DisplayCapabilities::new().with_stride(Some(31));
        let refused = MemoryDisplay::with_capabilities(8, 1, capabilities).err();
        assert_eq!(refused, Some(DevError::InvalidParam));
    }

    #[test]
    fn a_display_shows_what_was_drawn_only_after_a_flush() {
        let capabilities = DisplayCapabilities::new()
            .with_stride(Some(40))
            .with_format(PixelFormat::Xbgr8888);
        let mut display = MemoryDisplay::with_capabilities(8, 4, capabilities).unwrap();
        let red = Color::new(0xff, 0, 0);
        Canvas::of(&mut display).unwrap().fill(red);
        assert_eq!(display.shown(7, 3), Some(Color::BLACK));
        display.flush().unwrap();
        assert_eq!(display.shown(7, 3), Some(red));
        assert_eq!(display.shown(8, 3), None);
        assert_eq!(display.shown(7, 4), None);
        assert_eq!(display.screen()[32..40], [0; 8]);
        let info = display.info();
        assert_eq!(info.fb_size, 160);
        assert_eq!(info.fb_base_vaddr, display.fb().as_bytes().as_ptr().addr());
    }
}
