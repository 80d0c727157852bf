//! What can go wrong in this kernel.

use core::fmt;

use axdriver_base::DevError;

/// What went wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Error {
    /// The machine is not as this kernel needs it.
    Machine(&'static str),
    /// There is no memory left for it.
    Memory(&'static str),
    /// A device, or its driver, refused: what was asked of it, and its answer.
    Device(&'static str, DevError),
    /// What a device did was not what had to come of it.
    Wrong(&'static str),
    /// It did not happen in time.
    Late(&'static str),
}

/// The result of what can go wrong in this kernel.
pub(crate) type Result<T = (), E = Error> = core::result::Result<T, E>;

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(what) => write!(formatter, "the machine: {what}"),
            Self::Memory(what) => write!(formatter, "no memory for {what}"),
            Self::Device(what, error) => write!(formatter, "{what}: {error}"),
            Self::Wrong(what) => write!(formatter, "wrong: {what}"),
            Self::Late(what) => write!(formatter, "not in time: {what}"),
        }
    }
}

impl core::error::Error for Error {}
