//! How the pixels of a display lie in its framebuffer.

use crate::Color;

/// The order of the four bytes of a pixel, from the lowest address to the highest.
///
/// `X` is a byte that the screen does not show; it is written as `0xff`, so that a reader that takes it for an alpha
/// channel sees an opaque picture.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum PixelFormat {
    /// Blue, green, red, X: `0xXXRRGGBB` as a little-endian number. What virtio-gpu and most PC firmware use.
    #[default]
    Bgrx8888,
    /// Red, green, blue, X: `0xXXBBGGRR` as a little-endian number.
    Rgbx8888,
    /// X, red, green, blue: `0xXXRRGGBB` as a big-endian number.
    Xrgb8888,
    /// X, blue, green, red: `0xXXBBGGRR` as a big-endian number.
    Xbgr8888,
}

impl PixelFormat {
    /// Returns the size of a pixel, in bytes.
    #[must_use]
    pub const fn bytes_per_pixel(self) -> usize {
        match self {
            Self::Bgrx8888 | Self::Rgbx8888 | Self::Xrgb8888 | Self::Xbgr8888 => 4,
        }
    }

    /// Returns the bytes of a pixel of this colour, in the order of their addresses.
    #[must_use]
    pub const fn encode(self, color: Color) -> [u8; 4] {
        let Color { r, g, b } = color;
        match self {
            Self::Bgrx8888 => [b, g, r, 0xff],
            Self::Rgbx8888 => [r, g, b, 0xff],
            Self::Xrgb8888 => [0xff, r, g, b],
            Self::Xbgr8888 => [0xff, b, g, r],
        }
    }

    /// Returns the colour of a pixel of these bytes, in the order of their addresses.
    #[must_use]
    pub const fn decode(self, bytes: [u8; 4]) -> Color {
        let [first, second, third, fourth] = bytes;
        match self {
            Self::Bgrx8888 => Color::new(third, second, first),
            Self::Rgbx8888 => Color::new(first, second, third),
            Self::Xrgb8888 => Color::new(second, third, fourth),
            Self::Xbgr8888 => Color::new(fourth, third, second),
        }
    }
}

/// What a display can do, and how its pixels lie in memory.
///
/// Fields may be added, so a driver starts from [`new`](Self::new) and says what it knows:
///
/// ```
/// use axdriver_display::{DisplayCapabilities, PixelFormat};
///
/// // Rows of 800 pixels that begin every 4096 bytes.
/// let padded = DisplayCapabilities::new().with_stride(Some(4096));
/// assert_eq!(padded.format, PixelFormat::Bgrx8888);
/// assert_eq!(padded.stride_for(800), Some(4096));
/// // Without padding a row is as long as its pixels; a width beyond the address space has no stride.
/// assert_eq!(DisplayCapabilities::new().stride_for(800), Some(3200));
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct DisplayCapabilities {
    /// The distance from one row to the next, in bytes. `None`, the default, means rows without gaps.
    pub stride: Option<usize>,
    /// The order of the bytes of a pixel. The default is [`PixelFormat::Bgrx8888`].
    pub format: PixelFormat,
}

impl DisplayCapabilities {
    /// Returns what is true of a display of which nothing is known: rows without gaps, [`PixelFormat::Bgrx8888`].
    #[must_use]
    pub const fn new() -> Self {
        Self {
            stride: None,
            format: PixelFormat::Bgrx8888,
        }
    }

    /// Sets the distance from one row to the next, in bytes; `None` for rows without gaps.
    #[must_use]
    pub const fn with_stride(mut self, stride: Option<usize>) -> Self {
        self.stride = stride;
        self
    }

    /// Sets the order of the bytes of a pixel.
    #[must_use]
    pub const fn with_format(mut self, format: PixelFormat) -> Self {
        self.format = format;
        self
    }

    /// Returns the distance from one row of `width` pixels to the next, in bytes.
    ///
    /// `None` when a row is larger than the address space, or larger than the stride.
    #[must_use]
    pub const fn stride_for(&self, width: u32) -> Option<usize> {
        let Some(row) = (width as usize).checked_mul(self.format.bytes_per_pixel()) else {
            return None;
        };
        match self.stride {
            None => Some(row),
            Some(stride) if stride >= row => Some(stride),
            Some(_) => None,
        }
    }
}
