//! Draws on a [`Canvas`] with embedded-graphics.

use core::convert::Infallible;

use embedded_graphics_core::{
    Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Size},
    pixelcolor::{Rgb888, RgbColor},
    primitives::Rectangle,
};

use crate::{Canvas, Color};

impl From<Rgb888> for Color {
    fn from(color: Rgb888) -> Self {
        Self::new(color.r(), color.g(), color.b())
    }
}

impl From<Color> for Rgb888 {
    fn from(color: Color) -> Self {
        Self::new(color.r, color.g, color.b)
    }
}

impl OriginDimensions for Canvas<'_> {
    fn size(&self) -> Size {
        Size::new(self.width(), self.height())
    }
}

/// What lies outside the canvas is left out, as `DrawTarget` wants it, so drawing cannot fail.
impl DrawTarget for Canvas<'_> {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Self::Error>
    where
        I: IntoIterator<Item = Pixel<Self::Color>>,
    {
        for Pixel(point, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y)) {
                // A pixel outside is refused, which is what is wanted.
                let _ = self.set_pixel(x, y, color.into());
            }
        }
        Ok(())
    }

    fn fill_solid(&mut self, area: &Rectangle, color: Self::Color) -> Result<(), Self::Error> {
        let (x, width) = not_negative(area.top_left.x, area.size.width);
        let (y, height) = not_negative(area.top_left.y, area.size.height);
        self.fill_rect(x, y, width, height, color.into());
        Ok(())
    }
}

/// Returns the start and the length of what is left of a range without the numbers below 0.
fn not_negative(start: i32, len: u32) -> (u32, u32) {
    match u32::try_from(start) {
        Ok(start) => (start, len),
        Err(_) => (0, len.saturating_sub(start.unsigned_abs())),
    }
}

#[cfg(test)]
mod tests {
    use embedded_graphics::{
        prelude::*,
        primitives::{Circle, PrimitiveStyle, Rectangle},
    };

    use super::*;
    use crate::{DisplayCapabilities, FrameBuffer, PixelFormat};

    const SIZE: u32 = 16;

    /// Draws on a canvas of 16 by 16 pixels with padded rows, and returns which pixels are red.
    fn red_pixels(draw: impl FnOnce(&mut Canvas<'_>)) -> [[bool; 16]; 16] {
        let mut memory = [0; 16 * 72];
        let capabilities = DisplayCapabilities::new()
            .with_stride(Some(72))
            .with_format(PixelFormat::Rgbx8888);
        let fb = FrameBuffer::from_slice(&mut memory);
        let mut canvas = Canvas::new(fb, SIZE, SIZE, &capabilities).unwrap();
        draw(&mut canvas);
        let mut red = [[false; 16]; 16];
        for (row, y) in red.iter_mut().zip(0..) {
            for (pixel, x) in row.iter_mut().zip(0..) {
                *pixel = canvas.pixel(x, y) == Some(Color::new(0xff, 0, 0));
            }
        }
        red
    }

    #[test]
    fn shapes_are_cut_off_at_the_edges() {
        let circle = Circle::with_center(Point::new(0, 0), 9);
        let style = PrimitiveStyle::with_fill(Rgb888::RED);
        let red = red_pixels(|canvas| {
            let Ok(()) = circle.into_styled(style).draw(canvas);
        });
        for (row, y) in red.iter().zip(0..) {
            for (pixel, x) in row.iter().zip(0..) {
                assert_eq!(*pixel, circle.contains(Point::new(x, y)));
            }
        }
        assert!(red[0][4] && red[4][0] && !red[4][4]);
    }

    #[test]
    fn filling_an_area_is_as_drawing_its_pixels() {
        for (x, y, width, height) in [
            (-3, -3, 5, 6),
            (14, 2, 100, 3),
            (0, 0, 16, 16),
            (-5, 3, 3, 3),
            (16, 16, 4, 4),
            (i32::MIN, 5, u32::MAX, 1),
            (i32::MAX, i32::MAX, u32::MAX, u32::MAX),
        ] {
            let area = Rectangle::new(Point::new(x, y), Size::new(width, height));
            let filled = red_pixels(|canvas| {
                let Ok(()) = canvas.fill_solid(&area, Rgb888::RED);
            });
            for (row, y) in filled.iter().zip(0..) {
                for (pixel, x) in row.iter().zip(0..) {
                    let (left, top) = (i64::from(area.top_left.x), i64::from(area.top_left.y));
                    let inside = (left..left + i64::from(width)).contains(&x)
                        && (top..top + i64::from(height)).contains(&y);
                    assert_eq!(*pixel, inside, "{area:?} at {x}, {y}");
                }
            }
        }
    }

    #[test]
    fn clearing_fills_the_canvas() {
        let red = red_pixels(|canvas| {
            let Ok(()) = canvas.clear(Rgb888::RED);
        });
        assert!(red.as_flattened().iter().all(|red| *red));
        assert_eq!(Rgb888::from(Color::from(Rgb888::CYAN)), Rgb888::CYAN);
    }
}
