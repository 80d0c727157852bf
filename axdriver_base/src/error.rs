//! What can go wrong with a device, and what its caller may do about it.

use core::fmt;

/// The result of an operation on a device.
pub type DevResult<T = ()> = Result<T, DevError>;

/// The error of an operation on a device.
///
/// | Error | A retry of the same call |
/// |---|---|
/// | [`Again`](Self::Again) | helps, after work that is done has been collected, or time has passed |
/// | [`ResourceBusy`](Self::ResourceBusy) | helps once whoever holds the resource lets go of it |
/// | [`NoMemory`](Self::NoMemory) | helps once memory or buffers have been given back |
/// | [`Io`](Self::Io) | may help: a bad sector or a noisy cable can recover |
/// | [`BadState`](Self::BadState) | does not help: the device has to be reset or given up |
/// | [`AlreadyExists`](Self::AlreadyExists), [`InvalidParam`](Self::InvalidParam), [`Unsupported`](Self::Unsupported) | never helps: the call itself has to change |
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum DevError {
    /// What is to be made is there already. A retry cannot help.
    AlreadyExists,
    /// There is nothing yet, or no room at the moment, in a call that does not block. A retry helps later.
    Again,
    /// The device or its driver is not in a state for this, or has broken its protocol. A retry does not help before a reset.
    BadState,
    /// An argument is outside what the contract of the method allows. Nothing was done. A retry cannot help.
    InvalidParam,
    /// The device tried and failed. A retry may help.
    Io,
    /// Memory or buffers have run out. A retry helps once some have been given back.
    NoMemory,
    /// Somebody else holds the device or a part of it. A retry helps once they let go.
    ResourceBusy,
    /// The device or its driver does not do this at all. Nothing was done. A retry cannot help.
    Unsupported,
}

impl fmt::Display for DevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyExists => "already exists",
            Self::Again => "not ready yet, try again",
            Self::BadState => "bad state of the device or its driver",
            Self::InvalidParam => "invalid parameter",
            Self::Io => "input/output error",
            Self::NoMemory => "out of memory or buffers",
            Self::ResourceBusy => "device or resource busy",
            Self::Unsupported => "unsupported operation",
        })
    }
}

impl core::error::Error for DevError {}

#[cfg(test)]
mod tests {
    use core::error::Error;
    use std::string::ToString;

    use super::DevError;

    #[test]
    fn errors_can_be_copied_compared_and_boxed() {
        let error = DevError::Io;
        let copy = error;
        assert_eq!(error, copy);
        assert_ne!(error, DevError::Again);
        let boxed: std::boxed::Box<dyn Error> = error.into();
        assert_eq!(boxed.to_string(), "input/output error");
    }

    #[test]
    fn every_error_has_a_text_of_its_own() {
        let texts = [
            DevError::AlreadyExists,
            DevError::Again,
            DevError::BadState,
            DevError::InvalidParam,
            DevError::Io,
            DevError::NoMemory,
            DevError::ResourceBusy,
            DevError::Unsupported,
        ]
        .map(|error| error.to_string());
        let distinct: std::collections::BTreeSet<_> = texts.iter().collect();
        assert_eq!(distinct.len(), texts.len());
    }
}
