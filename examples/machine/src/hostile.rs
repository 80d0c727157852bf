//! Devices that misbehave, by name or by seed.

/// A way in which a device misbehaves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Fault {
    /// Every register reads as all ones, writes are ignored, and no memory is touched any more.
    Vanish,
}
