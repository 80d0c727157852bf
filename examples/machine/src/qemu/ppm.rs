//! The pictures that QEMU writes.

use crate::emulated::Image;

/// Reads a binary PPM (`P6`) of 8 bits a colour. Returns `None` for anything else.
pub(super) fn image(bytes: &[u8]) -> Option<Image> {
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
    let (separator, rows) = rest.split_first()?;
    if maximum != 255 || !separator.is_ascii_whitespace() {
        return None;
    }
    let (columns, lines) = (usize::try_from(width).ok()?, usize::try_from(height).ok()?);
    let length = columns.checked_mul(3)?;
    // QEMU 7.2 writes each row as it lies in memory: up to a multiple of 4 bytes.
    let padded = length.checked_next_multiple_of(4)?;
    let stride = [length, padded]
        .into_iter()
        .find(|stride| stride.checked_mul(lines) == Some(rows.len()))?;
    let rgba = rows
        .chunks_exact(stride.max(1))
        .flat_map(|row| row[..length].as_chunks::<3>().0)
        .flat_map(|&[r, g, b]| [r, g, b, 255])
        .collect();
    Some(Image {
        width,
        height,
        rgba,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ppm_gives_its_pixels() {
        let image = image(b"P6\n2 1\n255\n\x01\x02\x03\x0a\x20\x30").unwrap();
        assert_eq!((image.width, image.height), (2, 1));
        assert_eq!(image.rgba, [1, 2, 3, 255, 0x0a, 0x20, 0x30, 255]);
    }

    #[test]
    fn what_fills_up_the_rows_is_no_pixel() {
        let image = image(b"P6\n1 2\n255\n\x01\x02\x03\xff\x04\x05\x06\xff").unwrap();
        assert_eq!(image.rgba, [1, 2, 3, 255, 4, 5, 6, 255]);
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
            assert_eq!(image(bytes), None);
        }
    }
}
