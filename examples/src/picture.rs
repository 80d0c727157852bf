//! A test card, drawn on anything that `embedded-graphics` can draw on.
//!
//! This file needs `core` and `embedded-graphics` and nothing else, so that a kernel can take it as it is.
//!
//! What the parts of the card are for:
//!
//! * The castle-like border shows whether the outermost rows and columns are visible.
//! * The circle is round and the grid is square only when a row is as long as the driver says it is.
//! * The colour bars and the three ramps show the order of the colour channels.
//! * The gratings show whether single columns of pixels arrive unharmed.

use embedded_graphics::{
    Drawable, Pixel,
    geometry::Dimensions,
    mono_font::{
        MonoFont, MonoTextStyle,
        ascii::{FONT_4X6, FONT_6X10, FONT_10X20},
    },
    pixelcolor::Rgb888,
    prelude::{DrawTarget, Point, PointsIter, Primitive, RgbColor, Size},
    primitives::{Circle, Line, PrimitiveStyle, Rectangle},
    text::{Alignment, Baseline, Text, TextStyleBuilder},
};

/// The seven colour bars at 75 % intensity, from left to right.
pub const BARS: [Rgb888; 7] = [
    Rgb888::new(191, 191, 191),
    Rgb888::new(191, 191, 0),
    Rgb888::new(0, 191, 191),
    Rgb888::new(0, 191, 0),
    Rgb888::new(191, 0, 191),
    Rgb888::new(191, 0, 0),
    Rgb888::new(0, 0, 191),
];

const BACKGROUND: Rgb888 = Rgb888::new(56, 64, 80);
const GRID: Rgb888 = Rgb888::new(150, 160, 175);
const LIGHT: Rgb888 = Rgb888::new(208, 208, 208);
const GOLD: Rgb888 = Rgb888::new(191, 160, 0);

/// Bands of the disc, as thousandths of its height from its top; each ends where the next begins.
mod band {
    pub(super) const TITLE: u32 = 120;
    pub(super) const SQUARES: u32 = 240;
    pub(super) const BARS: u32 = 300;
    pub(super) const STAIRCASE: u32 = 500;
    pub(super) const GRATINGS: u32 = 590;
    pub(super) const RAMPS: u32 = 690;
    pub(super) const DETAIL: u32 = 810;
    pub(super) const FOOT: u32 = 900;
}

/// A test card that fills its target, whatever the size of that is.
///
/// ```
/// use embedded_graphics::{Drawable, mock_display::MockDisplay, pixelcolor::Rgb888};
/// use examples::picture::TestCard;
///
/// let mut display = MockDisplay::<Rgb888>::new();
/// display.set_allow_overdraw(true);
/// let card = TestCard { title: "axdriver", detail: "64 x 64" };
/// card.draw(&mut display).unwrap();
/// assert!(display.get_pixel((32, 32).into()).is_some());
/// ```
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub struct TestCard<'a> {
    /// What stands in the upper part of the disc: who drew it.
    pub title: &'a str,
    /// What stands in the lower part of the disc: on what.
    pub detail: &'a str,
}

impl Drawable for TestCard<'_> {
    type Color = Rgb888;
    type Output = ();

    fn draw<D: DrawTarget<Color = Rgb888>>(&self, target: &mut D) -> Result<(), D::Error> {
        let area = target.bounding_box();
        let Size { width, height } = area.size;
        if width == 0 || height == 0 {
            return Ok(());
        }
        target.fill_solid(&area, BACKGROUND)?;
        let cell = (width.min(height) / 14).max(2);
        draw_grid(target, area, cell)?;
        draw_border(target, area, cell)?;
        draw_corners(target, area, cell)?;

        let disc = disc(area);
        target.draw_iter(
            disc.points()
                .map(|point| Pixel(point, disc_colour(disc, point))),
        )?;
        disc.into_styled(PrimitiveStyle::with_stroke(
            Rgb888::WHITE,
            (cell / 16).max(1),
        ))
        .draw(target)?;
        draw_text(target, self.title, disc, band::TITLE, band::SQUARES)?;
        draw_text(target, self.detail, disc, band::DETAIL, band::FOOT)
    }
}

/// Returns the disc in the middle of `area`.
#[must_use]
pub fn disc(area: Rectangle) -> Circle {
    let diameter = (area.size.width.min(area.size.height) / 14 * 12).max(1);
    Circle::with_center(area.center(), diameter)
}

/// Returns the colour of `point` in `disc` before text and outline are drawn over it.
#[must_use]
pub fn disc_colour(disc: Circle, point: Point) -> Rgb888 {
    let diameter = disc.diameter.max(1);
    let x = offset(point.x, disc.top_left.x, diameter);
    let y = offset(point.y, disc.top_left.y, diameter);
    match y * 1000 / diameter {
        ..band::TITLE => LIGHT,
        band::TITLE..band::SQUARES => Rgb888::BLACK,
        band::SQUARES..band::BARS => grey(if (x * 16 / diameter).is_multiple_of(2) {
            0
        } else {
            255
        }),
        band::BARS..band::STAIRCASE => BARS[scaled(x, diameter, 7)],
        band::STAIRCASE..band::GRATINGS => grey(scaled(x, diameter, 10) * 255 / 9),
        band::GRATINGS..band::RAMPS => {
            let half_period = 16 >> scaled(x, diameter, 5);
            grey(if (x / half_period).is_multiple_of(2) {
                255
            } else {
                0
            })
        }
        row @ band::RAMPS..band::DETAIL => {
            let level = channel(scaled(x, diameter, 256));
            match (row - band::RAMPS) * 3 / (band::DETAIL - band::RAMPS) {
                0 => Rgb888::new(level, 0, 0),
                1 => Rgb888::new(0, level, 0),
                _ => Rgb888::new(0, 0, level),
            }
        }
        band::DETAIL..band::FOOT => Rgb888::BLACK,
        _ => GOLD,
    }
}

/// Returns how far `coordinate` is past `start`, kept within `0..length`.
fn offset(coordinate: i32, start: i32, length: u32) -> u32 {
    u32::try_from(coordinate.saturating_sub(start))
        .unwrap_or(0)
        .min(length - 1)
}

/// Returns which of `count` equal parts of `length` holds `x`.
fn scaled(x: u32, length: u32, count: usize) -> usize {
    let part = x as usize * count / length as usize;
    part.min(count - 1)
}

fn channel(level: usize) -> u8 {
    u8::try_from(level).unwrap_or(u8::MAX)
}

fn grey(level: usize) -> Rgb888 {
    Rgb888::new(channel(level), channel(level), channel(level))
}

/// Draws lines `cell` apart, one crossing in the middle of `area`.
fn draw_grid<D: DrawTarget<Color = Rgb888>>(
    target: &mut D,
    area: Rectangle,
    cell: u32,
) -> Result<(), D::Error> {
    let style = PrimitiveStyle::with_stroke(GRID, (cell / 32).max(1));
    let centre = area.center();
    let Some(end) = area.bottom_right() else {
        return Ok(());
    };
    for x in multiples(centre.x, area.top_left.x, end.x, cell) {
        Line::new(Point::new(x, area.top_left.y), Point::new(x, end.y))
            .into_styled(style)
            .draw(target)?;
    }
    for y in multiples(centre.y, area.top_left.y, end.y, cell) {
        Line::new(Point::new(area.top_left.x, y), Point::new(end.x, y))
            .into_styled(style)
            .draw(target)?;
    }
    Ok(())
}

/// Yields the coordinates between `first` and `last` that are a multiple of `step` away from `centre`.
fn multiples(centre: i32, first: i32, last: i32, step: u32) -> impl Iterator<Item = i32> {
    let step = i32::try_from(step).unwrap_or(i32::MAX).max(1);
    (first..=last).filter(move |coordinate| (coordinate - centre) % step == 0)
}

/// Draws a ring of white and black blocks on the outermost pixels.
fn draw_border<D: DrawTarget<Color = Rgb888>>(
    target: &mut D,
    area: Rectangle,
    cell: u32,
) -> Result<(), D::Error> {
    let thickness = (cell / 2).max(1);
    let (columns, rows) = (
        area.size.width.div_ceil(cell),
        area.size.height.div_ceil(cell),
    );
    let blocks = |horizontal: bool| {
        let (count, far) = if horizontal {
            (columns, area.size.height.saturating_sub(thickness))
        } else {
            (rows, area.size.width.saturating_sub(thickness))
        };
        (0..count)
            .flat_map(move |index| [(index, 0), (index, far)])
            .map(move |(index, across)| {
                let along = index * cell;
                let colour = grey(if (index + u32::from(across != 0)) % 2 == 0 {
                    255
                } else {
                    0
                });
                let (x, y, size) = if horizontal {
                    (along, across, Size::new(cell, thickness))
                } else {
                    (across, along, Size::new(thickness, cell))
                };
                let corner = area.top_left + Size::new(x, y);
                (Rectangle::new(corner, size).intersection(&area), colour)
            })
    };
    for (block, colour) in blocks(false).chain(blocks(true)) {
        target.fill_solid(&block, colour)?;
    }
    Ok(())
}

/// Draws a ring in each corner.
fn draw_corners<D: DrawTarget<Color = Rgb888>>(
    target: &mut D,
    area: Rectangle,
    cell: u32,
) -> Result<(), D::Error> {
    let diameter = cell * 3 / 2;
    let near = cell * 3 / 4;
    let far = |length: u32| length.saturating_sub(near + diameter);
    let style = PrimitiveStyle::with_stroke(Rgb888::WHITE, (cell / 12).max(1));
    for x in [near, far(area.size.width)] {
        for y in [near, far(area.size.height)] {
            Circle::new(area.top_left + Size::new(x, y), diameter)
                .into_styled(style)
                .draw(target)?;
        }
    }
    Ok(())
}

/// Writes `text` in the middle of a band of `disc`, as large as fits; not at all where no letter fits.
fn draw_text<D: DrawTarget<Color = Rgb888>>(
    target: &mut D,
    text: &str,
    disc: Circle,
    from: u32,
    to: u32,
) -> Result<(), D::Error> {
    let top = disc.diameter * from / 1000;
    let height = disc.diameter * (to - from) / 1000;
    // The narrower edge of the band is the one that is further from the middle of the disc.
    let edge = if from < 500 { top } else { top + height };
    let width = chord(disc.diameter, edge) * 9 / 10;
    let letters = u32::try_from(text.chars().count())
        .unwrap_or(u32::MAX)
        .max(1);
    let fits = |font: &MonoFont<'_>| {
        let wide = width / font.character_size.width.saturating_mul(letters).max(1);
        wide.min(height * 9 / 10 / font.character_size.height)
    };
    let fonts = [&FONT_10X20, &FONT_6X10, &FONT_4X6].map(|font| (font, fits(font)));
    let height_of = |(font, factor): (&MonoFont<'_>, u32)| font.character_size.height * factor;
    let most = fonts.into_iter().map(height_of).max().unwrap_or(0);
    // A font with finer letters is worth a third of the height.
    let Some((font, factor)) = fonts
        .into_iter()
        .find(|font| font.1 > 0 && height_of(*font) * 3 > most * 2)
    else {
        return Ok(());
    };
    let middle = disc.top_left + Size::new(disc.diameter / 2, top + height / 2);
    let style = TextStyleBuilder::new()
        .alignment(Alignment::Center)
        .baseline(Baseline::Middle)
        .build();
    Text::with_text_style(
        text,
        Point::zero(),
        MonoTextStyle::new(font, Rgb888::WHITE),
        style,
    )
    .draw(&mut Magnified {
        target,
        origin: middle,
        factor,
    })?;
    Ok(())
}

/// Returns the width of a disc of `diameter` at a distance of `y` from its top.
fn chord(diameter: u32, y: u32) -> u32 {
    2 * u64::from(y)
        .saturating_mul(u64::from(diameter.saturating_sub(y)))
        .isqrt()
        .try_into()
        .unwrap_or(u32::MAX / 2)
}

/// Draws each pixel as a block of `factor` by `factor` pixels, `(0, 0)` at `origin`.
struct Magnified<'a, D> {
    target: &'a mut D,
    origin: Point,
    factor: u32,
}

impl<D: DrawTarget> Dimensions for Magnified<'_, D> {
    fn bounding_box(&self) -> Rectangle {
        let area = self.target.bounding_box();
        Rectangle::new(
            (area.top_left - self.origin) / self.signed_factor(),
            area.size / self.factor,
        )
    }
}

impl<D> Magnified<'_, D> {
    fn signed_factor(&self) -> i32 {
        i32::try_from(self.factor).unwrap_or(i32::MAX)
    }
}

impl<D: DrawTarget> DrawTarget for Magnified<'_, D> {
    type Color = D::Color;
    type Error = D::Error;

    fn draw_iter<I: IntoIterator<Item = Pixel<Self::Color>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Self::Error> {
        for Pixel(point, colour) in pixels {
            let block = Rectangle::new(
                self.origin + point * self.signed_factor(),
                Size::new_equal(self.factor),
            );
            self.target.fill_solid(&block, colour)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use embedded_graphics::{
        framebuffer::{Framebuffer, buffer_size},
        image::GetPixel,
        pixelcolor::raw::LittleEndian,
        prelude::*,
    };

    use super::*;

    type Screen<const W: usize, const H: usize, const N: usize> =
        Framebuffer<Rgb888, <Rgb888 as PixelColor>::Raw, LittleEndian, W, H, N>;

    const CARD: TestCard<'_> = TestCard {
        title: "axdriver",
        detail: "a test card",
    };

    #[test]
    fn each_band_of_the_disc_has_its_colours() {
        let mut screen = Box::new(Screen::<640, 480, { buffer_size::<Rgb888>(640, 480) }>::new());
        CARD.draw(screen.as_mut()).unwrap();
        let disc = disc(screen.bounding_box());
        let at = |x: u32, y: u32| {
            screen
                .pixel(
                    disc.top_left + Size::new(disc.diameter * x / 1000, disc.diameter * y / 1000),
                )
                .unwrap()
        };
        assert_eq!(at(500, 60), LIGHT);
        for (bar, colour) in BARS.into_iter().enumerate() {
            let middle = (2 * u32::try_from(bar).unwrap() + 1) * 1000 / 14;
            if (72..=928).contains(&middle) {
                assert_eq!(at(middle, 400), colour, "bar {bar}");
            }
        }
        assert_eq!(at(500, 710), Rgb888::new(128, 0, 0));
        assert_eq!(at(500, 750), Rgb888::new(0, 128, 0));
        assert_eq!(at(500, 790), Rgb888::new(0, 0, 128));
        assert_eq!(at(500, 950), GOLD);
    }

    #[test]
    fn the_corners_are_drawn_so_that_a_lost_edge_is_seen() {
        let mut screen = Box::new(Screen::<200, 100, { buffer_size::<Rgb888>(200, 100) }>::new());
        CARD.draw(screen.as_mut()).unwrap();
        for corner in [(0, 0), (199, 0), (0, 99), (199, 99)] {
            let colour = screen.pixel(corner.into()).unwrap();
            assert!(
                colour == Rgb888::WHITE || colour == Rgb888::BLACK,
                "{corner:?} is {colour:?}"
            );
        }
    }

    #[test]
    fn title_and_detail_are_written_over_the_disc() {
        let mut screen = Box::new(Screen::<640, 480, { buffer_size::<Rgb888>(640, 480) }>::new());
        CARD.draw(screen.as_mut()).unwrap();
        let disc = disc(screen.bounding_box());
        let written = |from: u32, to: u32| {
            disc.points().any(|point| {
                let row = offset(point.y, disc.top_left.y, disc.diameter) * 1000 / disc.diameter;
                (from..to).contains(&row)
                    && disc_colour(disc, point) == Rgb888::BLACK
                    && (point.x - disc.center().x).abs() < 100
                    && screen.pixel(point) == Some(Rgb888::WHITE)
            })
        };
        assert!(written(band::TITLE, band::SQUARES));
        assert!(written(band::DETAIL, band::FOOT));
    }

    #[test]
    fn the_smallest_and_the_flattest_targets_are_drawn_without_harm() {
        CARD.draw(&mut Screen::<1, 1, { buffer_size::<Rgb888>(1, 1) }>::new())
            .unwrap();
        CARD.draw(&mut Screen::<1, 300, { buffer_size::<Rgb888>(1, 300) }>::new())
            .unwrap();
        CARD.draw(&mut Screen::<300, 3, { buffer_size::<Rgb888>(300, 3) }>::new())
            .unwrap();
        CARD.draw(&mut Screen::<0, 0, { buffer_size::<Rgb888>(0, 0) }>::new())
            .unwrap();
    }
}
