//! A framebuffer as pixels: with a width, a height, a stride and a format, and checked bounds.

use core::fmt;

use crate::{
    DevError, DevResult, DisplayCapabilities, DisplayDriverOps, DisplayInfo, FrameBuffer,
    PixelFormat,
};

/// A colour of 8 bits per channel, without transparency.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Color {
    /// The red channel.
    pub r: u8,
    /// The green channel.
    pub g: u8,
    /// The blue channel.
    pub b: u8,
}

impl Color {
    /// Black, as dark as it gets.
    pub const BLACK: Self = Self::new(0, 0, 0);
    /// White, as bright as it gets.
    pub const WHITE: Self = Self::new(0xff, 0xff, 0xff);

    /// Returns the colour of these channels.
    #[must_use]
    pub const fn new(r: u8, g: u8, b: u8) -> Self {
        Self { r, g, b }
    }
}

/// The pixels of a framebuffer.
///
/// The origin is at the top left. A pixel outside is never touched: reading it gives `None`, writing it is refused.
/// Bytes of the framebuffer that belong to no pixel (between rows, after the last one) are left alone.
///
/// ```
/// use axdriver_display::{Canvas, Color, DevError, DisplayCapabilities, FrameBuffer};
///
/// let mut memory = [0; 3 * 2 * 4];
/// let mut canvas = Canvas::new(
///     FrameBuffer::from_slice(&mut memory),
///     3,
///     2,
///     &DisplayCapabilities::new(),
/// )?;
/// canvas.set_pixel(2, 1, Color::new(1, 2, 3))?;
/// assert_eq!(canvas.pixel(2, 1), Some(Color::new(1, 2, 3)));
/// assert_eq!(canvas.set_pixel(3, 1, Color::WHITE), Err(DevError::InvalidParam));
/// assert_eq!(memory[20..], [3, 2, 1, 0xff]);
/// # Ok::<(), DevError>(())
/// ```
pub struct Canvas<'a> {
    /// Holds `stride * (height - 1) + width * bytes per pixel` bytes or more.
    bytes: &'a mut [u8],
    /// At least 1.
    width: u32,
    /// At least 1.
    height: u32,
    /// At least `width * bytes per pixel`.
    stride: usize,
    format: PixelFormat,
}

impl<'a> Canvas<'a> {
    /// Takes the framebuffer as `height` rows of `width` pixels, which lie in it as `capabilities` says.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: width or height is 0, a row is longer than the stride, or the pixels do not fit
    ///   into the framebuffer.
    pub fn new(
        fb: FrameBuffer<'a>,
        width: u32,
        height: u32,
        capabilities: &DisplayCapabilities,
    ) -> DevResult<Self> {
        let bytes = fb.into_bytes();
        let stride = capabilities.stride_for(width);
        let stride = stride.ok_or(DevError::InvalidParam)?;
        let format = capabilities.format;
        if width == 0 || height == 0 {
            return Err(DevError::InvalidParam);
        }
        // The last row needs no padding after it.
        let size = stride
            .checked_mul(height as usize - 1)
            .and_then(|rows| rows.checked_add(width as usize * format.bytes_per_pixel()))
            .ok_or(DevError::InvalidParam)?;
        if size > bytes.len() {
            return Err(DevError::InvalidParam);
        }
        Ok(Self {
            bytes,
            width,
            height,
            stride,
            format,
        })
    }

    /// Takes the framebuffer of `display`, in the size and the format that its driver says.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: what the driver says does not fit together (see [`new`](Self::new)).
    pub fn of<D: DisplayDriverOps + ?Sized>(display: &'a mut D) -> DevResult<Self> {
        let DisplayInfo { width, height, .. } = display.info();
        let capabilities = display.capabilities();
        Self::new(display.fb(), width, height, &capabilities)
    }

    /// Returns the width, in pixels.
    #[must_use]
    pub const fn width(&self) -> u32 {
        self.width
    }

    /// Returns the height, in pixels.
    #[must_use]
    pub const fn height(&self) -> u32 {
        self.height
    }

    /// Returns the distance from one row to the next, in bytes.
    #[must_use]
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// Returns the order of the bytes of a pixel.
    #[must_use]
    pub const fn format(&self) -> PixelFormat {
        self.format
    }

    /// Returns the colour of the pixel in column `x` of row `y`, or `None` outside.
    #[must_use]
    pub fn pixel(&self, x: u32, y: u32) -> Option<Color> {
        let (pixels, _) = self.row(y)?.as_chunks();
        Some(self.format.decode(*pixels.get(x as usize)?))
    }

    /// Sets the colour of the pixel in column `x` of row `y`.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: the pixel is outside. Nothing is drawn.
    pub fn set_pixel(&mut self, x: u32, y: u32, color: Color) -> DevResult {
        let bytes = self.format.encode(color);
        let row = self.row_mut(y).ok_or(DevError::InvalidParam)?;
        let (pixels, _) = row.as_chunks_mut();
        *pixels.get_mut(x as usize).ok_or(DevError::InvalidParam)? = bytes;
        Ok(())
    }

    /// Returns the bytes of the pixels of row `y`, without padding, or `None` outside.
    #[must_use]
    pub fn row(&self, y: u32) -> Option<&[u8]> {
        let (start, end) = self.row_bounds(y)?;
        self.bytes.get(start..end)
    }

    /// Returns the bytes of the pixels of row `y`, without padding, to be written, or `None` outside.
    #[must_use]
    pub fn row_mut(&mut self, y: u32) -> Option<&mut [u8]> {
        let (start, end) = self.row_bounds(y)?;
        self.bytes.get_mut(start..end)
    }

    /// Fills the rectangle of `width` by `height` pixels whose top left corner is in column `x` of row `y`.
    ///
    /// What lies outside the canvas is left out.
    pub fn fill_rect(&mut self, x: u32, y: u32, width: u32, height: u32, color: Color) {
        let left = x.min(self.width) as usize;
        let right = x.saturating_add(width).min(self.width) as usize;
        let bottom = y.saturating_add(height).min(self.height);
        let bytes = self.format.encode(color);
        for y in y..bottom {
            let Some(row) = self.row_mut(y) else { break };
            let (pixels, _) = row.as_chunks_mut();
            if let Some(pixels) = pixels.get_mut(left..right) {
                pixels.fill(bytes);
            }
        }
    }

    /// Fills the whole canvas.
    pub fn fill(&mut self, color: Color) {
        self.fill_rect(0, 0, self.width, self.height, color);
    }

    /// Returns the bounds of the pixels of row `y` in `bytes`, or `None` outside.
    fn row_bounds(&self, y: u32) -> Option<(usize, usize)> {
        if y >= self.height {
            return None;
        }
        let start = self.stride.checked_mul(y as usize)?;
        let len = (self.width as usize).checked_mul(self.format.bytes_per_pixel())?;
        Some((start, start.checked_add(len)?))
    }
}

impl fmt::Debug for Canvas<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canvas")
            .field("width", &self.width)
            .field("height", &self.height)
            .field("stride", &self.stride)
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}
