//! What is done with a display: the test card is drawn.

use alloc::{format, string::String};

use axdriver_display::{Canvas, DisplayDriverOps};
use embedded_graphics::Drawable;

use crate::arch::{Arch, Architecture};
use crate::error::{Error, Result};
use crate::picture::TestCard;

/// Draws the test card and brings it to the screen. Says what came of it.
///
/// # Errors
///
/// * [`Error::Device`]: the display failed.
pub(crate) fn work(display: &mut dyn DisplayDriverOps) -> Result<String> {
    let failed = |error| Error::Device("the display", error);
    let (width, height) = (display.info().width, display.info().height);
    let card = TestCard {
        title: "axdriver",
        detail: Arch::NAME,
    };
    let mut canvas = Canvas::of(&mut *display).map_err(failed)?;
    let Ok(()) = card.draw(&mut canvas);
    if display.need_flush() {
        display.flush().map_err(failed)?;
    }
    Ok(format!("{width} x {height}, drawn"))
}
