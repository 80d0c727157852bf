//! A borrowed or boxed display driver is a display driver: every method is forwarded to what stands behind the pointer.

// A method with a default that is not forwarded would answer for the pointer, not for the driver.
#![deny(clippy::missing_trait_methods)]

#[cfg(feature = "alloc")]
use alloc::boxed::Box;

use crate::{DevResult, DisplayCapabilities, DisplayDriverOps, DisplayInfo, FrameBuffer};

impl<T: DisplayDriverOps + ?Sized> DisplayDriverOps for &mut T {
    fn info(&self) -> DisplayInfo {
        T::info(self)
    }

    fn fb(&mut self) -> FrameBuffer<'_> {
        T::fb(self)
    }

    fn need_flush(&self) -> bool {
        T::need_flush(self)
    }

    fn flush(&mut self) -> DevResult {
        T::flush(self)
    }

    fn capabilities(&self) -> DisplayCapabilities {
        T::capabilities(self)
    }
}

#[cfg(feature = "alloc")]
impl<T: DisplayDriverOps + ?Sized> DisplayDriverOps for Box<T> {
    fn info(&self) -> DisplayInfo {
        T::info(self)
    }

    fn fb(&mut self) -> FrameBuffer<'_> {
        T::fb(self)
    }

    fn need_flush(&self) -> bool {
        T::need_flush(self)
    }

    fn flush(&mut self) -> DevResult {
        T::flush(self)
    }

    fn capabilities(&self) -> DisplayCapabilities {
        T::capabilities(self)
    }
}
