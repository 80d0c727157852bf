//! PNG files in and out, as rows of 8-bit red, green and blue.

use std::{
    fs::File,
    io::{BufReader, BufWriter},
    path::Path,
};

use anyhow::{Context, bail, ensure};
use embedded_graphics::{
    Pixel,
    pixelcolor::Rgb888,
    prelude::{DrawTarget, OriginDimensions, Point, RgbColor, Size},
};

/// The most pixels that a picture may have: 8192 by 8192.
const MAX_PIXELS: u64 = 1 << 26;

/// A picture in memory; `embedded-graphics` can draw on it.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Image {
    size: Size,
    /// Always `size.width * size.height` long, row by row from the top.
    pixels: Vec<Rgb888>,
}

impl Image {
    /// Makes a black picture.
    ///
    /// # Errors
    ///
    /// A side is 0, or there are more than 67,108,864 pixels.
    pub fn new(width: u32, height: u32) -> anyhow::Result<Self> {
        ensure!(
            width > 0 && height > 0,
            "a picture of {width}x{height} has no pixels"
        );
        let pixels = u64::from(width) * u64::from(height);
        ensure!(
            pixels <= MAX_PIXELS,
            "{width}x{height} is more than {MAX_PIXELS} pixels"
        );
        Ok(Self {
            size: Size::new(width, height),
            pixels: vec![Rgb888::BLACK; usize::try_from(pixels)?],
        })
    }

    /// Makes a picture of these pixels, row by row from the top.
    ///
    /// # Errors
    ///
    /// As [`Image::new`], and if there are too few or too many pixels.
    pub fn from_pixels(
        width: u32,
        height: u32,
        pixels: impl IntoIterator<Item = Rgb888>,
    ) -> anyhow::Result<Self> {
        let mut image = Self::new(width, height)?;
        let count = image.pixels.len();
        image.pixels.clear();
        image.pixels.extend(pixels.into_iter().take(count + 1));
        ensure!(
            image.pixels.len() == count,
            "{width}x{height} are not {} pixels",
            image.pixels.len()
        );
        Ok(image)
    }

    /// Reads a PNG file. What is transparent is laid over black.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is not a PNG, is damaged, or is larger than [`Image::new`] allows.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Self::decode(BufReader::new(file))
            .with_context(|| format!("cannot read {} as a PNG picture", path.display()))
    }

    fn decode(source: impl std::io::BufRead + std::io::Seek) -> anyhow::Result<Self> {
        let mut decoder = png::Decoder::new(source);
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info()?;
        let mut image = Self::new(reader.info().width, reader.info().height)?;
        let size = reader
            .output_buffer_size()
            .context("it is too large for this machine")?;
        let mut bytes = vec![0; size];
        let frame = reader.next_frame(&mut bytes)?;
        bytes.truncate(frame.buffer_size());
        let over_black = |level: u8, alpha: u8| {
            let product = u16::from(level) * u16::from(alpha);
            u8::try_from((product + 127) / 255).unwrap_or(u8::MAX)
        };
        let colour = |sample: &[u8]| match *sample {
            [grey] => Rgb888::new(grey, grey, grey),
            [grey, alpha] => {
                let grey = over_black(grey, alpha);
                Rgb888::new(grey, grey, grey)
            }
            [red, green, blue] => Rgb888::new(red, green, blue),
            [red, green, blue, alpha, ..] => Rgb888::new(
                over_black(red, alpha),
                over_black(green, alpha),
                over_black(blue, alpha),
            ),
            [] => Rgb888::BLACK,
        };
        let samples = frame.color_type.samples();
        if bytes.len() != image.pixels.len() * samples {
            bail!(
                "it holds {} bytes of pixels, not {}",
                bytes.len(),
                image.pixels.len() * samples
            );
        }
        for (pixel, sample) in image.pixels.iter_mut().zip(bytes.chunks_exact(samples)) {
            *pixel = colour(sample);
        }
        Ok(image)
    }

    /// Writes the picture as a PNG file.
    ///
    /// # Errors
    ///
    /// The file cannot be created or written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut encoder =
            png::Encoder::new(BufWriter::new(file), self.size.width, self.size.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let bytes: Vec<u8> = self
            .pixels
            .iter()
            .flat_map(|pixel| [pixel.r(), pixel.g(), pixel.b()])
            .collect();
        let write = || {
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&bytes)?;
            writer.finish()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Returns the colour at a place, or `None` outside of the picture.
    #[must_use]
    pub fn pixel(&self, x: u32, y: u32) -> Option<Rgb888> {
        let inside = x < self.size.width && y < self.size.height;
        inside.then(|| self.pixels[y as usize * self.size.width as usize + x as usize])
    }

    /// Returns the picture scaled to fit into `area`, with its proportions kept, and black around it.
    ///
    /// # Errors
    ///
    /// As [`Image::new`].
    pub fn fitted(&self, area: Size) -> anyhow::Result<Self> {
        let mut fitted = Self::new(area.width, area.height)?;
        let [width, height, room_x, room_y] =
            [self.size.width, self.size.height, area.width, area.height].map(|side| side as usize);
        // At most 2^26 pixels have sides of at most 2^26, whose products fit into 64 bits.
        let (scaled_x, scaled_y) = if width * room_y > height * room_x {
            (room_x, (height * room_x / width).max(1))
        } else {
            ((width * room_y / height).max(1), room_y)
        };
        let (left, top) = ((room_x - scaled_x) / 2, (room_y - scaled_y) / 2);
        for y in 0..scaled_y {
            let rows = source_range(y, scaled_y, height);
            for x in 0..scaled_x {
                let colour = self.average(source_range(x, scaled_x, width), rows.clone());
                fitted.pixels[(top + y) * room_x + left + x] = colour;
            }
        }
        Ok(fitted)
    }

    /// Returns the mean colour of a part of the picture that is not empty.
    fn average(&self, columns: std::ops::Range<usize>, rows: std::ops::Range<usize>) -> Rgb888 {
        let mut sums = [0_u64; 3];
        let count = (columns.len() * rows.len()).max(1) as u64;
        for row in rows {
            let start = row * self.size.width as usize;
            for pixel in &self.pixels[start + columns.start..start + columns.end] {
                for (sum, level) in sums.iter_mut().zip([pixel.r(), pixel.g(), pixel.b()]) {
                    *sum += u64::from(level);
                }
            }
        }
        let [red, green, blue] =
            sums.map(|sum| u8::try_from((sum + count / 2) / count).unwrap_or(u8::MAX));
        Rgb888::new(red, green, blue)
    }
}

/// Returns the pixels out of `length` that position `index` out of `scaled` stands for; at least one.
fn source_range(index: usize, scaled: usize, length: usize) -> std::ops::Range<usize> {
    let start = index * length / scaled;
    let end = ((index + 1) * length / scaled).clamp(start + 1, length.max(start + 1));
    start..end
}

impl OriginDimensions for Image {
    fn size(&self) -> Size {
        self.size
    }
}

impl DrawTarget for Image {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Self::Error> {
        for Pixel(Point { x, y }, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
                && x < self.size.width
                && y < self.size.height
            {
                self.pixels[y as usize * self.size.width as usize + x as usize] = colour;
            }
        }
        Ok(())
    }
}

/// Lets `embedded-graphics` draw the picture on anything else.
impl embedded_graphics::Drawable for Image {
    type Color = Rgb888;
    type Output = ();

    fn draw<D: DrawTarget<Color = Rgb888>>(&self, target: &mut D) -> Result<(), D::Error> {
        let area = embedded_graphics::primitives::Rectangle::new(Point::zero(), self.size);
        target.fill_contiguous(&area, self.pixels.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use embedded_graphics::Drawable;

    use super::*;
    use crate::picture::TestCard;

    fn encoded(
        colour: png::ColorType,
        depth: png::BitDepth,
        width: u32,
        height: u32,
        data: &[u8],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(colour);
        encoder.set_depth(depth);
        encoder
            .write_header()
            .unwrap()
            .write_image_data(data)
            .unwrap();
        bytes
    }

    #[test]
    fn a_saved_picture_is_read_back_the_same() {
        let mut image = Image::new(97, 61).unwrap();
        TestCard {
            title: "a",
            detail: "b",
        }
        .draw(&mut image)
        .unwrap();
        let path = std::env::temp_dir().join(format!("examples-image-{}.png", std::process::id()));
        image.save(&path).unwrap();
        assert_eq!(Image::load(&path).unwrap(), image);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn grey_transparent_and_16_bit_pictures_are_understood() {
        let read = |bytes: Vec<u8>| {
            Image::decode(Cursor::new(bytes))
                .unwrap()
                .pixel(0, 0)
                .unwrap()
        };
        let eight = png::BitDepth::Eight;
        assert_eq!(
            read(encoded(png::ColorType::Grayscale, eight, 1, 1, &[7])),
            Rgb888::new(7, 7, 7)
        );
        assert_eq!(
            read(encoded(
                png::ColorType::GrayscaleAlpha,
                eight,
                1,
                1,
                &[200, 0]
            )),
            Rgb888::BLACK
        );
        assert_eq!(
            read(encoded(
                png::ColorType::Rgba,
                eight,
                1,
                1,
                &[255, 10, 0, 128]
            )),
            Rgb888::new(128, 5, 0)
        );
        let sixteen = encoded(
            png::ColorType::Rgb,
            png::BitDepth::Sixteen,
            1,
            1,
            &[1, 0, 2, 0, 3, 0],
        );
        assert_eq!(read(sixteen), Rgb888::new(1, 2, 3));
    }

    #[test]
    fn what_is_not_a_picture_is_refused() {
        assert!(Image::decode(Cursor::new(b"no picture".to_vec())).is_err());
        let mut short = encoded(png::ColorType::Rgb, png::BitDepth::Eight, 4, 4, &[9; 48]);
        short.truncate(short.len() / 2);
        assert!(Image::decode(Cursor::new(short)).is_err());
        assert!(Image::new(0, 4).is_err());
        assert!(Image::new(u32::MAX, u32::MAX).is_err());
    }

    #[test]
    fn a_picture_of_the_right_size_is_fitted_unchanged() {
        let mut image = Image::new(40, 30).unwrap();
        TestCard {
            title: "a",
            detail: "b",
        }
        .draw(&mut image)
        .unwrap();
        assert_eq!(image.fitted(Size::new(40, 30)).unwrap(), image);
    }

    #[test]
    fn a_fitted_picture_keeps_its_proportions() {
        let mut white = Image::new(10, 5).unwrap();
        white.clear(Rgb888::WHITE).unwrap();
        let fitted = white.fitted(Size::new(20, 20)).unwrap();
        assert_eq!(fitted.pixel(10, 4), Some(Rgb888::BLACK));
        assert_eq!(fitted.pixel(0, 5), Some(Rgb888::WHITE));
        assert_eq!(fitted.pixel(19, 14), Some(Rgb888::WHITE));
        assert_eq!(fitted.pixel(10, 15), Some(Rgb888::BLACK));
        let small = white.fitted(Size::new(3, 1)).unwrap();
        assert_eq!(small.pixel(0, 0), Some(Rgb888::WHITE));
        assert_eq!(small.pixel(1, 0), Some(Rgb888::WHITE));
        assert_eq!(small.pixel(2, 0), Some(Rgb888::BLACK));
    }
}
