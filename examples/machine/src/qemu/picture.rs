//! What a display shows, as QEMU saw it.

/// A picture of 24-bit pixels.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Picture {
    width: u32,
    height: u32,
    /// Red, green and blue of each pixel, row by row from the top: `3 * width * height` bytes.
    rgb: Vec<u8>,
}

impl Picture {
    /// Reads a binary PPM (`P6`) of 8 bits a colour. Returns `None` for anything else.
    pub fn from_ppm(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(b"P6")?;
        let mut number = || {
            let start = rest.iter().position(u8::is_ascii_digit)?;
            if !rest[..start].iter().all(u8::is_ascii_whitespace) {
                return None;
            }
            let digits = &rest[start..];
            let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
            let number: u32 = std::str::from_utf8(&digits[..end]).ok()?.parse().ok()?;
            rest = &digits[end..];
            Some(number)
        };
        let (width, height, maximum) = (number()?, number()?, number()?);
        let (separator, rgb) = rest.split_first()?;
        let length = usize::try_from(width)
            .ok()?
            .checked_mul(usize::try_from(height).ok()?)?
            .checked_mul(3)?;
        if maximum != 255 || !separator.is_ascii_whitespace() || rgb.len() != length {
            return None;
        }
        Some(Self {
            width,
            height,
            rgb: rgb.to_vec(),
        })
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Returns red, green and blue of each pixel, row by row from the top.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Returns red, green and blue of a pixel, if there is one.
    pub fn pixel(&self, x: u32, y: u32) -> Option<[u8; 3]> {
        if x >= self.width {
            return None;
        }
        let index = u64::from(y) * u64::from(self.width) + u64::from(x);
        let (pixels, _) = self.rgb.as_chunks::<3>();
        pixels.get(usize::try_from(index).ok()?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ppm_gives_its_pixels() {
        let picture = Picture::from_ppm(b"P6\n2 1\n255\n\x01\x02\x03\x0a\x20\x30").unwrap();
        assert_eq!((picture.width(), picture.height()), (2, 1));
        assert_eq!(picture.pixel(1, 0), Some([0x0a, 0x20, 0x30]));
        assert_eq!(picture.pixel(2, 0), None);
        assert_eq!(picture.pixel(0, 1), None);
    }

    #[test]
    fn what_is_no_ppm_is_refused() {
        for bytes in [
            &b""[..],
            b"P5\n1 1\n255\nx",
            b"P6\n1 1\n65535\nxxxxxx",
            b"P6\n1 1\n255\nxx",
            b"P6\n1 1\n255",
            b"P6\n4294967295 4294967295\n255\nx",
        ] {
            assert_eq!(Picture::from_ppm(bytes), None);
        }
    }
}
