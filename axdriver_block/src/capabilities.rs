//! What a disk can do beyond what all disks do.

/// What a block device can do.
///
/// Fields may be added, so a driver starts from [`new`](Self::new) and says what it knows:
///
/// ```
/// use axdriver_block::BlockCapabilities;
///
/// let cd_rom = BlockCapabilities::new()
///     .with_read_only(true)
///     .with_volatile_write_cache(false);
/// assert!(cd_rom.read_only);
/// // What is not known is taken to be there where that is the safe side.
/// assert!(BlockCapabilities::new().volatile_write_cache);
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct BlockCapabilities {
    /// Every write is refused with [`Unsupported`](crate::DevError::Unsupported). The default is `false`.
    pub read_only: bool,
    /// A write may sit in a cache that a loss of power empties, until the next flush. The default is `true`.
    pub volatile_write_cache: bool,
}

impl BlockCapabilities {
    /// Returns what is true of a device of which nothing is known: it may be written to, and it may cache writes.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            read_only: false,
            volatile_write_cache: true,
        }
    }

    /// Sets whether every write is refused.
    #[must_use]
    pub const fn with_read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets whether a write may sit in a cache that a loss of power empties.
    #[must_use]
    pub const fn with_volatile_write_cache(mut self, volatile_write_cache: bool) -> Self {
        self.volatile_write_cache = volatile_write_cache;
        self
    }
}

impl Default for BlockCapabilities {
    fn default() -> Self {
        Self::new()
    }
}
