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
