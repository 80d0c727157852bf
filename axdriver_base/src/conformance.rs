//! The contract of [`BaseDriverOps`] as code, and what the suites of all device classes report.
//!
//! A suite is a set of functions, one for each rule of a contract, that are generic over the driver. They run on a fake,
//! on an emulated device and on a board alike: they need no `std`, do not panic and do not print.
//!
//! ```
//! use axdriver_base::{BaseDriverOps, DeviceType, conformance};
//!
//! struct Nameless;
//!
//! impl BaseDriverOps for Nameless {
//!     fn device_name(&self) -> &str {
//!         ""
//!     }
//!
//!     fn device_type(&self) -> DeviceType {
//!         DeviceType::Char
//!     }
//! }
//!
//! assert!(conformance::type_is(&Nameless, DeviceType::Char).is_ok());
//! let violation = conformance::check(&Nameless, DeviceType::Char).unwrap_err();
//! assert_eq!(violation.to_string(), "a device has a name");
//! ```

use core::fmt;

use crate::{BaseDriverOps, DevError, DevResult, DeviceType};

/// The result of checking a rule.
pub type Verdict<T = ()> = Result<T, Violation>;

/// A rule of a contract that a driver has broken.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Violation {
    rule: &'static str,
    error: Option<DevError>,
}

impl Violation {
    /// Names the rule that was broken: a sentence that is true of every driver that keeps it.
    #[must_use]
    pub const fn new(rule: &'static str) -> Self {
        Self { rule, error: None }
    }

    /// Names the rule that was broken by returning `error`.
    #[must_use]
    pub const fn with_error(rule: &'static str, error: DevError) -> Self {
        Self {
            rule,
            error: Some(error),
        }
    }

    /// Returns the rule: a sentence that is true of every driver that keeps it.
    #[must_use]
    pub const fn rule(&self) -> &'static str {
        self.rule
    }

    /// Returns the error that the driver returned against the rule, if it was one.
    #[must_use]
    pub const fn error(&self) -> Option<DevError> {
        self.error
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule)?;
        match self.error {
            Some(error) => write!(f, " (the driver returned: {error})"),
            None => Ok(()),
        }
    }
}

impl core::error::Error for Violation {}

/// Reports a violation of `rule` unless it holds.
///
/// # Errors
///
/// * [`Violation`]: `holds` is `false`.
pub const fn ensure(holds: bool, rule: &'static str) -> Verdict {
    if holds {
        Ok(())
    } else {
        Err(Violation::new(rule))
    }
}

/// Reports a violation of `rule` unless the driver returned `Ok`.
///
/// # Errors
///
/// * [`Violation`]: `result` is an error, which the violation names.
pub fn ensure_ok<T>(result: DevResult<T>, rule: &'static str) -> Verdict<T> {
    result.map_err(|error| Violation::with_error(rule, error))
}

/// Reports a violation of `rule` unless the driver returned the error `expected`.
///
/// # Errors
///
/// * [`Violation`]: `result` is `Ok`, or another error, which the violation names.
pub fn ensure_refused<T>(result: DevResult<T>, expected: DevError, rule: &'static str) -> Verdict {
    match result {
        Ok(_) => Err(Violation::new(rule)),
        Err(error) if error == expected => Ok(()),
        Err(error) => Err(Violation::with_error(rule, error)),
    }
}

/// Checks all rules but [`interrupts_can_be_switched`], which a board may not be ready for. Changes nothing.
///
/// # Errors
///
/// * [`Violation`]: the first rule that the driver breaks.
pub fn check<D: BaseDriverOps + ?Sized>(dev: &D, expected: DeviceType) -> Verdict {
    has_a_name(dev)?;
    type_is(dev, expected)
}

/// A device has a name.
///
/// # Errors
///
/// * [`Violation`]: it is empty.
pub fn has_a_name<D: BaseDriverOps + ?Sized>(dev: &D) -> Verdict {
    ensure(!dev.device_name().is_empty(), "a device has a name")
}

/// A device says the type of the trait that its driver implements.
///
/// # Errors
///
/// * [`Violation`]: it says another.
pub fn type_is<D: BaseDriverOps + ?Sized>(dev: &D, expected: DeviceType) -> Verdict {
    ensure(
        dev.device_type() == expected,
        "a device says the type of the trait that its driver implements",
    )
}

/// Interrupts can be asked for and silenced, or neither.
///
/// Interrupts are silenced afterwards. Meanwhile one may come, so a handler has to be there.
///
/// # Errors
///
/// * [`Violation`]: only one of the two is supported, or one fails.
pub fn interrupts_can_be_switched<D: BaseDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const RULE: &str = "interrupts can be asked for and silenced, or neither";
    match dev.enable_interrupts() {
        Err(DevError::Unsupported) => {
            ensure_refused(dev.disable_interrupts(), DevError::Unsupported, RULE)
        }
        enabled => {
            let silenced = ensure_ok(dev.disable_interrupts(), RULE);
            ensure_ok(enabled, RULE).and(silenced)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    /// A driver that supports what it is told to.
    #[derive(Default)]
    struct Device {
        name: &'static str,
        can_enable: bool,
        can_disable: bool,
        fails: bool,
    }

    impl BaseDriverOps for Device {
        fn device_name(&self) -> &str {
            self.name
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Block
        }

        fn enable_interrupts(&mut self) -> DevResult<bool> {
            match (self.can_enable, self.fails) {
                (false, _) => Err(DevError::Unsupported),
                (true, false) => Ok(false),
                (true, true) => Err(DevError::Io),
            }
        }

        fn disable_interrupts(&mut self) -> DevResult {
            self.can_disable.then_some(()).ok_or(DevError::Unsupported)
        }
    }

    #[test]
    fn a_device_without_a_name_is_found() {
        let mut device = Device::default();
        assert_eq!(
            check(&device, DeviceType::Block),
            Err(Violation::new("a device has a name"))
        );
        device.name = "disk";
        assert_eq!(check(&device, DeviceType::Block), Ok(()));
    }

    #[test]
    fn a_device_of_the_wrong_type_is_found() {
        let device = Device {
            name: "disk",
            ..Device::default()
        };
        assert!(check(&device, DeviceType::Net).is_err());
    }

    #[test]
    fn interrupts_that_cannot_be_silenced_are_found() {
        let mut device = Device::default();
        assert_eq!(interrupts_can_be_switched(&mut device), Ok(()));
        device.can_enable = true;
        let violation = interrupts_can_be_switched(&mut device).unwrap_err();
        assert_eq!(violation.error(), Some(DevError::Unsupported));
        device.can_disable = true;
        assert_eq!(interrupts_can_be_switched(&mut device), Ok(()));
        device.can_enable = false;
        assert!(interrupts_can_be_switched(&mut device).is_err());
    }

    #[test]
    fn a_violation_names_the_rule_and_the_error() {
        let mut device = Device {
            can_enable: true,
            can_disable: true,
            fails: true,
            ..Device::default()
        };
        let violation = interrupts_can_be_switched(&mut device).unwrap_err();
        assert_eq!(
            violation.to_string(),
            "interrupts can be asked for and silenced, or neither \
             (the driver returned: input/output error)"
        );
    }
}
