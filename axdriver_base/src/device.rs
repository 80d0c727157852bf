//! What every driver can say about itself, whatever its device does.

use crate::{DevError, DevResult, InterruptCause};

/// The class of a device, which tells the trait that its driver implements.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum DeviceType {
    /// A block storage device, such as a disk.
    Block,
    /// A character device, such as a serial port.
    Char,
    /// A network device, such as an Ethernet card.
    Net,
    /// A graphic display device, such as a GPU.
    Display,
}

/// What every device driver implements, beside the trait of its device class.
///
/// The interrupt methods have defaults for drivers that only poll. The loop of a driver that sleeps is
///
/// 1. take all the work there is,
/// 2. [`enable_interrupts`](Self::enable_interrupts); on `Ok(true)` go back to 1,
/// 3. sleep until the interrupt, in whose handler [`acknowledge_interrupt`](Self::acknowledge_interrupt) is called,
/// 4. go to 1, with [`disable_interrupts`](Self::disable_interrupts) before it where many completions are expected.
///
/// Step 2 closes the gap in which work that comes in between 1 and 3 would wake nobody.
pub trait BaseDriverOps: Send + Sync {
    /// Returns the name of the device, for people: in logs and listings.
    fn device_name(&self) -> &str;

    /// Returns the class of the device. It never changes.
    fn device_type(&self) -> DeviceType;

    /// Reads what the device's interrupt meant, and acknowledges it at the device.
    ///
    /// A level-triggered line stays asserted until this has been called. An empty set means that the interrupt was
    /// not this device's (lines can be shared), or that its cause is gone already.
    ///
    /// # Errors
    ///
    /// * [`DevError::Unsupported`]: the driver does not know of interrupts. Nothing is acknowledged.
    /// * [`DevError::Io`]: the device failed. The interrupt may still be pending.
    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        Err(DevError::Unsupported)
    }

    /// Asks the device for interrupts, and returns whether work came in meanwhile.
    ///
    /// On `Ok(true)` there is work that no interrupt will announce: look for it before sleeping.
    ///
    /// # Errors
    ///
    /// * [`DevError::Unsupported`]: the driver does not know of interrupts. The caller has to poll.
    /// * [`DevError::Io`]: the device failed. Whether it will interrupt is unknown.
    fn enable_interrupts(&mut self) -> DevResult<bool> {
        Err(DevError::Unsupported)
    }

    /// Asks the device not to interrupt. This is a hint: an interrupt may still come, and is then to be acknowledged.
    ///
    /// # Errors
    ///
    /// * [`DevError::Unsupported`]: the driver does not know of interrupts. Nothing is changed.
    /// * [`DevError::Io`]: the device failed. Whether it will interrupt is unknown.
    fn disable_interrupts(&mut self) -> DevResult {
        Err(DevError::Unsupported)
    }
}

/// Proves that the trait can be used behind a pointer.
const _: Option<&dyn BaseDriverOps> = None;
