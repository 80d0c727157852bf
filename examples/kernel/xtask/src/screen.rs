//! The picture: what the display shows, against the same drawing made here.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Size};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::Drawable;

use crate::Result;

#[allow(
    dead_code,
    unreachable_pub,
    reason = "the host's examples draw the same test card, and more of it"
)]
#[path = "../../../src/picture.rs"]
mod picture;

/// Three bytes for each pixel, row by row.
struct Screen {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

impl OriginDimensions for Screen {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Screen {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(point, color) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y)) else {
                continue;
            };
            if x < self.width && y < self.height {
                let index = 3 * (y as usize * self.width as usize + x as usize);
                self.bytes[index..index + 3].copy_from_slice(&[color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// Compares a picture in QEMU's format, PPM, with what the kernel should have drawn.
///
/// # Errors
///
/// It is no such picture, or it shows something else.
pub(crate) fn compare(ppm: &[u8], architecture: &str) -> Result {
    let mut fields = ppm.splitn(4, |byte| byte.is_ascii_whitespace());
    let mut number = |what: &str| -> Result<u32> {
        let field = fields.next().ok_or("the picture is cut off")?;
        let text = std::str::from_utf8(field)?;
        text.trim_start_matches('P')
            .parse()
            .map_err(|_| format!("the picture's {what}: {text}").into())
    };
    let (format, width, height) = (number("format")?, number("width")?, number("height")?);
    let rest = fields.next().ok_or("the picture is cut off")?;
    let found = rest
        .strip_prefix(b"255\n")
        .ok_or("the picture is not of 8 bits")?;
    if format != 6 || (width, height) < (64, 64) {
        return Err("the picture is too small, or no P6".into());
    }
    let mut screen = Screen {
        width,
        height,
        bytes: vec![0; 3 * width as usize * height as usize],
    };
    let card = picture::TestCard {
        title: "axdriver",
        detail: architecture,
    };
    let Ok(()) = card.draw(&mut screen);
    let wrong = screen
        .bytes
        .chunks(3)
        .zip(found.chunks(3))
        .filter(|(one, other)| one != other)
        .count();
    if found.len() != screen.bytes.len() || wrong > 0 {
        return Err(
            format!("{wrong} pixels of {width} x {height} are not as they should be").into(),
        );
    }
    Ok(())
}
