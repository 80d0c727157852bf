//! A borrowed or boxed driver is a driver: every method is forwarded to what stands behind the pointer.

// A method with a default that is not forwarded would answer for the pointer, not for the driver.
#![deny(clippy::missing_trait_methods)]

#[cfg(feature = "alloc")]
use alloc::boxed::Box;

use crate::{BaseDriverOps, DevResult, DeviceType, InterruptCause};

impl<T: BaseDriverOps + ?Sized> BaseDriverOps for &mut T {
    fn device_name(&self) -> &str {
        T::device_name(self)
    }

    fn device_type(&self) -> DeviceType {
        T::device_type(self)
    }

    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        T::acknowledge_interrupt(self)
    }

    fn enable_interrupts(&mut self) -> DevResult<bool> {
        T::enable_interrupts(self)
    }

    fn disable_interrupts(&mut self) -> DevResult {
        T::disable_interrupts(self)
    }
}

#[cfg(feature = "alloc")]
impl<T: BaseDriverOps + ?Sized> BaseDriverOps for Box<T> {
    fn device_name(&self) -> &str {
        T::device_name(self)
    }

    fn device_type(&self) -> DeviceType {
        T::device_type(self)
    }

    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        T::acknowledge_interrupt(self)
    }

    fn enable_interrupts(&mut self) -> DevResult<bool> {
        T::enable_interrupts(self)
    }

    fn disable_interrupts(&mut self) -> DevResult {
        T::disable_interrupts(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver none of whose answers is a default.
    struct Device {
        silenced: bool,
    }

    impl BaseDriverOps for Device {
        fn device_name(&self) -> &str {
            "device"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Display
        }

        fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
            Ok(InterruptCause::CONFIGURATION)
        }

        fn enable_interrupts(&mut self) -> DevResult<bool> {
            self.silenced = false;
            Ok(true)
        }

        fn disable_interrupts(&mut self) -> DevResult {
            self.silenced = true;
            Ok(())
        }
    }

    fn answers_as_the_device<D: BaseDriverOps>(mut driver: D) {
        assert_eq!(driver.device_name(), "device");
        assert_eq!(driver.device_type(), DeviceType::Display);
        assert_eq!(
            driver.acknowledge_interrupt(),
            Ok(InterruptCause::CONFIGURATION)
        );
        assert_eq!(driver.enable_interrupts(), Ok(true));
        assert_eq!(driver.disable_interrupts(), Ok(()));
    }

    #[test]
    fn a_borrowed_driver_answers_as_the_driver() {
        let mut device = Device { silenced: false };
        answers_as_the_device(&mut device);
        assert!(device.silenced);
        answers_as_the_device::<&mut dyn BaseDriverOps>(&mut device);
    }

    #[cfg(feature = "alloc")]
    #[test]
    fn a_boxed_driver_answers_as_the_driver() {
        answers_as_the_device(Box::new(Device { silenced: false }));
        answers_as_the_device::<Box<dyn BaseDriverOps>>(Box::new(Device { silenced: false }));
    }
}
