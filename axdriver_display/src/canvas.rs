//! A framebuffer as pixels: with a width, a height, a stride and a format, and checked bounds.

use core::{fmt, ops::Range};

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

/// Where the pixels lie in a piece of memory, counted from its start.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Geometry {
    /// At least 1.
    width: u32,
    /// At least 1.
    height: u32,
    /// At least `row_len`.
    stride: usize,
    /// The length of the pixels of a row, in bytes.
    row_len: usize,
    format: PixelFormat,
}

impl Geometry {
    /// Lays out `height` rows of `width` pixels, or refuses what is empty or does not fit into the address space.
    pub(crate) fn new(
        width: u32,
        height: u32,
        capabilities: &DisplayCapabilities,
    ) -> DevResult<Self> {
        let format = capabilities.format;
        let stride = capabilities.stride_for(width);
        let stride = stride.ok_or(DevError::InvalidParam)?;
        if width == 0 || height == 0 {
            return Err(DevError::InvalidParam);
        }
        // With this product inside the address space, no offset of a pixel overflows.
        stride
            .checked_mul(height as usize)
            .ok_or(DevError::InvalidParam)?;
        Ok(Self {
            width,
            height,
            stride,
            row_len: width as usize * format.bytes_per_pixel(),
            format,
        })
    }

    /// Returns the length of the memory from the first pixel to the last, in bytes.
    pub(crate) const fn used_len(&self) -> usize {
        self.stride * (self.height as usize - 1) + self.row_len
    }

    /// Returns the length of all rows with their padding, in bytes.
    #[cfg(feature = "memory")]
    pub(crate) const fn full_len(&self) -> usize {
        self.stride * self.height as usize
    }

    /// Returns where the pixels of row `y` are, or `None` outside.
    fn row(&self, y: u32) -> Option<Range<usize>> {
        let start = self.stride * y as usize;
        (y < self.height).then_some(start..start + self.row_len)
    }

    /// Returns the colour of a pixel of `memory`, or `None` outside.
    pub(crate) fn pixel(&self, memory: &[u8], x: u32, y: u32) -> Option<Color> {
        let (pixels, _) = memory.get(self.row(y)?)?.as_chunks();
        Some(self.format.decode(*pixels.get(x as usize)?))
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
    /// Holds `geometry.used_len()` bytes or more.
    bytes: &'a mut [u8],
    geometry: Geometry,
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
        let geometry = Geometry::new(width, height, capabilities)?;
        if geometry.used_len() > bytes.len() {
            return Err(DevError::InvalidParam);
        }
        Ok(Self { bytes, geometry })
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
        self.geometry.width
    }

    /// Returns the height, in pixels.
    #[must_use]
    pub const fn height(&self) -> u32 {
        self.geometry.height
    }

    /// Returns the distance from one row to the next, in bytes.
    #[must_use]
    pub const fn stride(&self) -> usize {
        self.geometry.stride
    }

    /// Returns the order of the bytes of a pixel.
    #[must_use]
    pub const fn format(&self) -> PixelFormat {
        self.geometry.format
    }

    /// Returns the colour of the pixel in column `x` of row `y`, or `None` outside.
    #[must_use]
    pub fn pixel(&self, x: u32, y: u32) -> Option<Color> {
        self.geometry.pixel(self.bytes, x, y)
    }

    /// Sets the colour of the pixel in column `x` of row `y`.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: the pixel is outside. Nothing is drawn.
    pub fn set_pixel(&mut self, x: u32, y: u32, color: Color) -> DevResult {
        let bytes = self.geometry.format.encode(color);
        let row = self.row_mut(y).ok_or(DevError::InvalidParam)?;
        let (pixels, _) = row.as_chunks_mut();
        *pixels.get_mut(x as usize).ok_or(DevError::InvalidParam)? = bytes;
        Ok(())
    }

    /// Returns the bytes of the pixels of row `y`, without padding, or `None` outside.
    #[must_use]
    pub fn row(&self, y: u32) -> Option<&[u8]> {
        self.bytes.get(self.geometry.row(y)?)
    }

    /// Returns the bytes of the pixels of row `y`, without padding, to be written, or `None` outside.
    #[must_use]
    pub fn row_mut(&mut self, y: u32) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.geometry.row(y)?)
    }

    /// Fills the rectangle of `width` by `height` pixels whose top left corner is in column `x` of row `y`.
    ///
    /// What lies outside the canvas is left out.
    pub fn fill_rect(&mut self, x: u32, y: u32, width: u32, height: u32, color: Color) {
        let left = x.min(self.width()) as usize;
        let right = x.saturating_add(width).min(self.width()) as usize;
        let bottom = y.saturating_add(height).min(self.height());
        let bytes = self.geometry.format.encode(color);
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
        self.fill_rect(0, 0, self.width(), self.height(), color);
    }
}

impl fmt::Debug for Canvas<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canvas")
            .field("width", &self.width())
            .field("height", &self.height())
            .field("stride", &self.stride())
            .field("format", &self.format())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec;

    use super::*;

    const FORMATS: [PixelFormat; 4] = [
        PixelFormat::Bgrx8888,
        PixelFormat::Rgbx8888,
        PixelFormat::Xrgb8888,
        PixelFormat::Xbgr8888,
    ];

    fn edgy() -> impl Strategy<Value = u32> {
        prop_oneof![0..12_u32, any::<u32>(), u32::MAX - 4..=u32::MAX]
    }

    proptest! {
        #[test]
        fn whatever_is_drawn_changes_the_pixels_inside_and_nothing_else(
            (width, height) in (1..10_u32, 1..10_u32),
            padding in 0..9_usize,
            rest in 0..9_usize,
            format in prop::sample::select(&FORMATS[..]),
            (x, y, w, h) in (edgy(), edgy(), edgy(), edgy()),
        ) {
            let stride = width as usize * 4 + padding;
            let used = stride * (height as usize - 1) + width as usize * 4;
            let mut memory = vec![0x11; used + rest];
            let capabilities = DisplayCapabilities::new()
                .with_stride(Some(stride))
                .with_format(format);
            let color = Color::new(0x22, 0x33, 0x44);
            {
                let fb = FrameBuffer::from_slice(&mut memory);
                let canvas = Canvas::new(fb, width, height, &capabilities);
                let mut canvas = canvas.map_err(|_| TestCaseError::fail("no canvas"))?;
                canvas.fill_rect(x, y, w, h, color);
                let right = u64::from(x) + u64::from(w);
                let bottom = u64::from(y) + u64::from(h);
                for row in 0..height {
                    for column in 0..width {
                        let inside = (u64::from(x)..right).contains(&column.into())
                            && (u64::from(y)..bottom).contains(&row.into());
                        prop_assert_eq!(canvas.pixel(column, row) == Some(color), inside);
                    }
                }
                let is_inside = x < width && y < height;
                prop_assert_eq!(canvas.set_pixel(x, y, color).is_ok(), is_inside);
                prop_assert_eq!(canvas.pixel(x, y), is_inside.then_some(color));
                prop_assert_eq!(canvas.row(y).is_some(), y < height);
            }
            for (offset, byte) in memory.iter().enumerate() {
                if offset % stride >= width as usize * 4 || offset >= used {
                    prop_assert_eq!(*byte, 0x11);
                }
            }
        }

        #[test]
        fn a_canvas_is_refused_unless_all_its_pixels_are_in_the_framebuffer(
            (width, height) in (edgy(), edgy()),
            stride in prop::option::of(prop_oneof![0..64_usize, any::<usize>()]),
            len in 0..512_usize,
        ) {
            let mut memory = vec![0; len];
            let capabilities = DisplayCapabilities::new().with_stride(stride);
            let row = u128::from(width) * 4;
            let stride = stride.map_or(row, |stride| stride as u128);
            let fits = width > 0
                && height > 0
                && stride >= row
                && stride * (u128::from(height) - 1) + row <= len as u128;
            let fb = FrameBuffer::from_slice(&mut memory);
            let refused = Canvas::new(fb, width, height, &capabilities).err();
            prop_assert_eq!(refused, (!fits).then_some(DevError::InvalidParam));
        }
    }

    #[test]
    fn memory_after_the_last_row_is_not_a_row() {
        let mut memory = [0; 3 * 12];
        let fb = FrameBuffer::from_slice(&mut memory);
        let mut canvas = Canvas::new(fb, 3, 2, &DisplayCapabilities::new()).unwrap();
        assert!(canvas.row(1).is_some());
        assert!(canvas.row(2).is_none() && canvas.row_mut(2).is_none());
        assert_eq!(canvas.pixel(0, 2), None);
        let refused = canvas.set_pixel(0, 2, Color::WHITE);
        assert_eq!(refused, Err(DevError::InvalidParam));
    }

    #[test]
    fn a_framebuffer_may_end_with_the_last_pixel_and_not_before() {
        let mut memory = [0; 20 + 12];
        let capabilities = DisplayCapabilities::new().with_stride(Some(20));
        for (len, fits) in [(32, true), (31, false)] {
            let fb = FrameBuffer::from_slice(&mut memory[..len]);
            assert_eq!(Canvas::new(fb, 3, 2, &capabilities).is_ok(), fits);
        }
    }

    #[test]
    fn colours_survive_every_format() {
        for format in FORMATS {
            let color = Color::new(1, 2, 3);
            assert_eq!(format.decode(format.encode(color)), color);
            assert_eq!(format.encode(color).len(), format.bytes_per_pixel());
        }
        let number = u32::from_le_bytes(PixelFormat::Bgrx8888.encode(Color::new(1, 2, 3)));
        assert_eq!(number, 0xff01_0203);
    }
}
