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

#[cfg(test)]
mod tests {
    use axdriver_base::{BaseDriverOps, DevError, DeviceType};

    use super::*;
    use crate::PixelFormat;

    /// A display none of whose answers is a default.
    struct Display([u8; 4]);

    #[expect(
        clippy::missing_trait_methods,
        reason = "forwarding of these is tested where they are"
    )]
    impl BaseDriverOps for Display {
        fn device_name(&self) -> &str {
            "display"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Display
        }
    }

    impl DisplayDriverOps for Display {
        fn info(&self) -> DisplayInfo {
            DisplayInfo {
                width: 1,
                height: 1,
                fb_base_vaddr: 5,
                fb_size: 4,
            }
        }

        fn fb(&mut self) -> FrameBuffer<'_> {
            FrameBuffer::from_slice(&mut self.0)
        }

        fn need_flush(&self) -> bool {
            true
        }

        fn flush(&mut self) -> DevResult {
            Err(DevError::Io)
        }

        fn capabilities(&self) -> DisplayCapabilities {
            DisplayCapabilities::new().with_format(PixelFormat::Xrgb8888)
        }
    }

    fn answers_as_the_display<D: DisplayDriverOps>(mut driver: D) {
        assert_eq!(driver.device_name(), "display");
        assert_eq!(driver.info().fb_base_vaddr, 5);
        assert_eq!(driver.fb().as_bytes(), [1, 2, 3, 4]);
        assert!(driver.need_flush());
        assert_eq!(driver.flush(), Err(DevError::Io));
        assert_eq!(driver.capabilities().format, PixelFormat::Xrgb8888);
    }

    #[test]
    fn a_borrowed_driver_answers_as_the_driver() {
        let mut display = Display([1, 2, 3, 4]);
        answers_as_the_display(&mut display);
        answers_as_the_display::<&mut dyn DisplayDriverOps>(&mut display);
    }

    #[cfg(feature = "alloc")]
    #[test]
    fn a_boxed_driver_answers_as_the_driver() {
        answers_as_the_display(Box::new(Display([1, 2, 3, 4])));
        answers_as_the_display::<Box<dyn DisplayDriverOps>>(Box::new(Display([1, 2, 3, 4])));
    }
}
