//! What a virtio device is before it is plugged in: its type, what it offers, and how it behaves.

use super::state::State;
use super::watch::Range;
use crate::hostile::Hostile;

/// Bits of the device status (2.1).
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver drives it.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Bits of the features that all types of devices have (6).
pub mod features {
    /// Descriptors may name tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Either side says which index it wants to hear of.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device follows the specification since 1.0.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device's addresses go through the platform's translation.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Barriers must order accesses for real hardware.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
}

/// An interrupt is for used buffers.
pub(crate) const USED: u8 = 1;
/// An interrupt is for a configuration change.
pub(crate) const CHANGED: u8 = 2;

/// A field of a configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub(crate) offset: u64,
    /// Width of an element in bytes; 8 is accessed as two halves.
    pub(crate) width: u8,
    /// Number of elements.
    pub(crate) count: u64,
    /// The field exists with any of these features; 0: always.
    pub(crate) features: u64,
    pub(crate) writable: bool,
}

impl Field {
    pub(crate) const fn new(offset: u64, width: u8, features: u64) -> Self {
        Self {
            offset,
            width,
            count: 1,
            features,
            writable: false,
        }
    }

    pub(crate) const fn array(mut self, count: u64) -> Self {
        self.count = count;
        self
    }

    pub(crate) const fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.width) * self.count
    }

    /// Whether an access fits an element, or half of one of 64 bits.
    pub(super) fn fits(&self, offset: u64, width: u8) -> bool {
        let unit = self.width.min(4);
        offset >= self.offset
            && offset < self.end()
            && width == unit
            && (offset - self.offset).is_multiple_of(u64::from(unit))
    }

    /// Whether it takes several accesses to read it.
    pub(super) fn is_wide(&self) -> bool {
        self.width > 4 || self.count > 1
    }
}

/// A type of device.
pub(crate) trait Model: Send {
    /// The device ID (5).
    fn kind(&self) -> u32;
    /// Features of this type that are offered.
    fn features(&self) -> u64;
    /// The sizes of its queues.
    fn queues(&self) -> &'static [u16];
    fn fields(&self) -> &'static [Field];
    fn config(&mut self, state: &mut State) -> Vec<u8>;
    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}
    /// Whether the configuration changed since the last call.
    fn changed(&mut self) -> bool {
        false
    }
    /// The driver accepted these features.
    fn negotiated(&mut self, _state: &mut State) {}
    /// Looks at what is available in `queue`.
    fn serve(&mut self, queue: u16, state: &mut State);
    /// Does what it has to do without being rung. Returns whether it did anything.
    fn poll(&mut self, _state: &mut State) -> bool {
        false
    }
    fn reset(&mut self);
    /// Memory that the device may touch besides its queues.
    fn ranges(&self) -> Vec<Range> {
        Vec::new()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) offered: u64,
    pub(crate) withheld: u64,
    pub(crate) queue_size: Option<u16>,
    pub(crate) later: bool,
    pub(crate) quiet: bool,
    pub(crate) transitional: bool,
    pub(crate) hostile: Hostile,
}

/// A device that is to be plugged into a board, with what it offers and how it behaves.
///
/// It is made from a [`Disk`](crate::Disk), a [`Nic`](crate::Nic), a [`Display`](crate::Display) or an
/// [`Entropy`](crate::Entropy) source with `Device::from`. It offers VERSION_1 (not behind legacy registers),
/// RING_INDIRECT_DESC and RING_EVENT_IDX unless it is told otherwise.
pub struct Device {
    pub(crate) model: Box<dyn Model>,
    pub(crate) options: Options,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("kind", &self.model.kind())
            .field("options", &self.options)
            .finish()
    }
}

impl Device {
    pub(crate) fn new(model: impl Model + 'static) -> Self {
        Self {
            model: Box::new(model),
            options: Options {
                offered: features::VERSION_1
                    | features::RING_INDIRECT_DESC
                    | features::RING_EVENT_IDX,
                withheld: 0,
                queue_size: None,
                later: false,
                quiet: false,
                transitional: false,
                hostile: Hostile::new(),
            },
        }
    }

    /// Offers these features too.
    #[must_use]
    pub fn offer(mut self, features: u64) -> Self {
        self.options.offered |= features;
        self.options.withheld &= !features;
        self
    }

    /// Does not offer these features.
    #[must_use]
    pub fn withhold(mut self, features: u64) -> Self {
        self.options.withheld |= features;
        self
    }

    /// Offers queues of up to `size` descriptors.
    #[must_use]
    pub fn queue_size(mut self, size: u16) -> Self {
        self.options.queue_size = Some(size);
        self
    }

    /// Answers in [`Board::run`](crate::Board::run), not inside the doorbell.
    #[must_use]
    pub fn answer_later(mut self) -> Self {
        self.options.later = true;
        self
    }

    /// Asks the driver not to ring, and looks in [`Board::run`](crate::Board::run) instead.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.options.later = true;
        self.options.quiet = true;
        self
    }

    /// Has a transitional device ID, where it is a PCI function and its type has one.
    #[must_use]
    pub fn transitional(mut self) -> Self {
        self.options.transitional = true;
        self
    }

    /// Misbehaves.
    #[must_use]
    pub fn hostile(mut self, hostile: Hostile) -> Self {
        self.options.hostile = hostile;
        self
    }
}

/// What a device has counted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct DeviceCounters {
    /// Registers read, those of the transport and of the configuration space.
    pub reads: u64,
    /// Registers written.
    pub writes: u64,
    /// Doorbells, by queue.
    pub kicks: Vec<u64>,
    /// Chains given back, by queue.
    pub completions: Vec<u64>,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Faults committed.
    pub faults: u64,
}
