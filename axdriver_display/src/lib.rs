//! The contract between display drivers and the programs that draw on them.
//!
//! A driver implements [`DisplayDriverOps`] and lends its memory as a [`FrameBuffer`]. Programs draw on a [`Canvas`] over
//! it, which knows the stride and the format of the pixels and checks every bound.
//!
//! ```
//! use axdriver_display::{Canvas, Color, DevError, DevResult, DisplayDriverOps};
//!
//! /// Makes the whole screen blue.
//! fn clear<D: DisplayDriverOps + ?Sized>(display: &mut D) -> DevResult {
//!     Canvas::of(display)?.fill(Color::new(0, 0, 0xff));
//!     display.flush()
//! }
//! # #[cfg(feature = "memory")]
//! # {
//! # use axdriver_display::memory::MemoryDisplay;
//!
//! let mut display = MemoryDisplay::new(320, 200)?;
//! clear(&mut display)?;
//! assert_eq!(display.shown(0, 0), Some(Color::new(0, 0, 0xff)));
//! let mut canvas = Canvas::of(&mut display)?;
//! assert_eq!(canvas.set_pixel(320, 0, Color::WHITE), Err(DevError::InvalidParam));
//! # }
//! # Ok::<(), DevError>(())
//! ```
//!
//! # Features
//!
//! * `alloc`: implements the traits for `Box<T>`.
//! * `conformance`: the contract as code for any driver, in the module `conformance`.
//! * `graphics`: [`Canvas`] is a `DrawTarget` of embedded-graphics.
//! * `memory`: a display in memory, `memory::MemoryDisplay`. Needs `alloc`.

#![no_std]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod canvas;
mod capabilities;
#[cfg(feature = "conformance")]
pub mod conformance;
mod forward;
#[expect(unsafe_code, reason = "makes framebuffers of raw memory")]
mod framebuffer;
#[cfg(feature = "graphics")]
mod graphics;
#[cfg(feature = "memory")]
pub mod memory;

#[doc(no_inline)]
pub use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};

pub use self::{
    canvas::{Canvas, Color},
    capabilities::{DisplayCapabilities, PixelFormat},
    framebuffer::FrameBuffer,
};

/// Where the pixels of a display are, and how many.
///
/// How they lie in memory is said by [`DisplayCapabilities`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct DisplayInfo {
    /// The visible width, in pixels.
    pub width: u32,
    /// The visible height, in pixels.
    pub height: u32,
    /// The virtual address of the framebuffer, for mapping it elsewhere. Drawing goes through
    /// [`DisplayDriverOps::fb`], which lends the memory itself.
    pub fb_base_vaddr: usize,
    /// The size of the framebuffer, in bytes: at least the stride times [`height`](Self::height).
    pub fb_size: usize,
}

/// What a display driver implements: a framebuffer, and the way from there to the screen.
pub trait DisplayDriverOps: BaseDriverOps {
    /// Returns where the pixels are and how many.
    ///
    /// Width and height are at least 1, and the framebuffer holds them all.
    fn info(&self) -> DisplayInfo;

    /// Lends the framebuffer, which is [`DisplayInfo::fb_size`] bytes at [`DisplayInfo::fb_base_vaddr`].
    ///
    /// It is memory: what is written stays, over calls of this method and of [`flush`](Self::flush), until it is
    /// written again.
    fn fb(&mut self) -> FrameBuffer<'_>;

    /// Returns whether the screen shows what was drawn only after a [`flush`](Self::flush).
    fn need_flush(&self) -> bool;

    /// Brings the framebuffer to the screen.
    ///
    /// Where [`need_flush`](Self::need_flush) is `false`, there is nothing to do, and the result is `Ok`.
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device failed. What the screen shows is unspecified; the framebuffer is unchanged.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first. The framebuffer is unchanged.
    /// * [`DevError::Again`], [`DevError::NoMemory`]: there is no room for the request at the moment. The screen and
    ///   the framebuffer are unchanged.
    fn flush(&mut self) -> DevResult;

    /// Returns how the pixels lie in the framebuffer.
    ///
    /// The default is what 0.2 took for granted: rows without gaps, of [`PixelFormat::Bgrx8888`].
    fn capabilities(&self) -> DisplayCapabilities {
        DisplayCapabilities::new()
    }
}

/// Proves that the trait can be used behind a pointer.
const _: Option<&dyn DisplayDriverOps> = None;

/// The examples of the README, as tests.
#[cfg(all(doctest, feature = "memory"))]
#[doc = include_str!("../README.md")]
struct Readme;
