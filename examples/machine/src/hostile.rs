//! Devices that misbehave: by name, by seed, or as bytes say.
//!
//! An emulated device asks its [`Hostile`] at every occasion to lie, and does what it says. A device without one is honest.
//!
//! ```
//! use machine::{Board, Device, Disk, Version};
//! use machine::hostile::{Fault, Hostile};
//!
//! let disk = Disk::memory(1 << 20);
//! let lies = Hostile::new().after(3, Fault::UsedIdHighBits);
//! let board = Board::emulated()
//!     .mmio(Version::Modern, Device::from(&disk).hostile(lies))
//!     .build()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Whatever a device says, what it does is honest: a request whose status byte or response says success has been done, and
//! only such a one. So the data of a block request may be checked whenever a driver says `Ok`. A frame carries no such proof:
//! a driver has to believe an id and a length that might be true.

use std::fmt;

/// A way in which a device misbehaves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Fault {
    /// From now on every register, also of PCI configuration, reads as all ones, writes are ignored, and no memory is touched.
    Vanish,
    /// One register reads as a number out of the blue.
    RegisterGarbage,

    /// A reset is ignored: the status stays, and the device goes on.
    ResetIgnored,
    /// A reset takes three reads of the status before it reads 0; until then the device may complete requests.
    ResetSlow,
    /// A reset ends in the next `run`, after all requests in flight were completed.
    CompleteAfterReset,
    /// FEATURES_OK does not stay set.
    FeaturesRefused,
    /// VERSION_1 is not offered.
    Version1Withheld,
    /// Instead of completing a request the device sets DEVICE_NEEDS_RESET.
    NeedsReset,

    /// Undefined bits are set where the cause of an interrupt is read.
    InterruptBits,

    /// Configuration space ends after 4 bytes: the rest reads as all ones, and on PCI its capability says so.
    ConfigShort,
    /// The configuration generation is another one at every read.
    ConfigRestless,

    /// The device offers this size for every queue.
    QueueSize(u32),

    /// The used id is in range but not in flight.
    UsedIdWrong,
    /// The used id is the one before, once more.
    UsedIdRepeated,
    /// The used id is that of another request in flight, if there is one.
    UsedIdForeign,
    /// The used id is not below the queue size.
    UsedIdOutOfRange,
    /// The used id is right in its low 16 bits only.
    UsedIdHighBits,
    /// The used length is more than was writable.
    UsedLenLong,
    /// The used length is less than was written.
    UsedLenShort,
    /// The used length is 0.
    UsedLenZero,
    /// Used id and length are numbers out of the blue.
    UsedGarbage,
    /// The used index jumps ahead of what was posted.
    UsedIndexJump,
    /// The used index goes back by one.
    UsedIndexBack,
    /// A request is completed twice.
    CompleteTwice,
    /// A request is done and completed in the next `run` only.
    CompleteLate,
    /// A request is never completed.
    CompleteNever,
    /// A request is completed after the one that follows it, or in the next `run`.
    CompleteOutOfOrder,

    /// The block request is done, and its status byte is this one.
    BlockStatus(u8),
    /// The block request is not done, its status byte is not written, and the length does not count it.
    BlockStatusUnwritten,

    /// `num_buffers` of a received frame is a number out of the blue.
    NetBuffersWrong,
    /// A received frame is shorter than its header.
    FrameRunt,
    /// A received frame is said to be longer than the buffer it is in.
    FrameOversized,

    /// The GPU's response has another type.
    GpuResponseType,
    /// The GPU's response stops in the middle of its header.
    GpuResponseShort,
    /// What follows the header of the GPU's response is one number out of the blue, over and over.
    GpuResponseGarbage,
    /// The display is 0 by 0 pixels.
    DisplayEmpty,
    /// The display is 65536 by 16385 pixels, whose bytes overflow 32 bits.
    DisplayHuge,

    /// Before the usable virtio capabilities there are some with reserved BARs and with one for I/O ports, and one of a reserved
    /// type. A driver has to find its way all the same (4.1.4.1).
    CapabilityDecoys,
    /// The PCI capability list leads back into itself.
    CapabilityLoop,
    /// The PCI capability list leads to the last word of configuration space, which is a virtio capability that does not fit.
    CapabilityOffEnd,
    /// The virtio capabilities name a reserved BAR.
    BarReserved(u8),
    /// The BAR is of a reserved type.
    BarTypeReserved,
    /// The BAR has half of all addresses.
    BarHuge,
    /// Offset and length of the virtio capabilities wrap around 32 bits.
    OffsetWraps,
    /// The structures of the virtio capabilities lie beyond the end of the BAR.
    OffsetBeyondBar,
    /// The notify offset of each queue is outside of the notification structure.
    NotifyOffsetOutOfRange,
    /// The notify multiplier is odd.
    NotifyMultiplierOdd,
}

/// When a device may misbehave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Occasion {
    /// Any access, of which only a fault by name is counted.
    Access,
    /// A register is read.
    Register,
    Reset,
    Negotiation,
    Features,
    Interrupt,
    ConfigRead,
    Generation,
    QueueSize,
    Completion,
    Block,
    Frame,
    GpuResponse,
    DisplayInfo,
    Capabilities,
    NotifyOffset,
}

impl Fault {
    /// One of each fault, and of those with a number the interesting ones.
    pub const ALL: &'static [Self] = &[
        Self::Vanish,
        Self::RegisterGarbage,
        Self::ResetIgnored,
        Self::ResetSlow,
        Self::CompleteAfterReset,
        Self::FeaturesRefused,
        Self::Version1Withheld,
        Self::NeedsReset,
        Self::InterruptBits,
        Self::ConfigShort,
        Self::ConfigRestless,
        Self::QueueSize(0),
        Self::QueueSize(1),
        Self::QueueSize(3),
        Self::QueueSize(4),
        Self::QueueSize(32768),
        Self::UsedIdWrong,
        Self::UsedIdRepeated,
        Self::UsedIdForeign,
        Self::UsedIdOutOfRange,
        Self::UsedIdHighBits,
        Self::UsedLenLong,
        Self::UsedLenShort,
        Self::UsedLenZero,
        Self::UsedGarbage,
        Self::UsedIndexJump,
        Self::UsedIndexBack,
        Self::CompleteTwice,
        Self::CompleteLate,
        Self::CompleteNever,
        Self::CompleteOutOfOrder,
        Self::BlockStatus(1),
        Self::BlockStatus(2),
        Self::BlockStatus(3),
        Self::BlockStatus(255),
        Self::BlockStatusUnwritten,
        Self::NetBuffersWrong,
        Self::FrameRunt,
        Self::FrameOversized,
        Self::GpuResponseType,
        Self::GpuResponseShort,
        Self::GpuResponseGarbage,
        Self::DisplayEmpty,
        Self::DisplayHuge,
        Self::CapabilityDecoys,
        Self::CapabilityLoop,
        Self::CapabilityOffEnd,
        Self::BarReserved(6),
        Self::BarReserved(255),
        Self::BarTypeReserved,
        Self::BarHuge,
        Self::OffsetWraps,
        Self::OffsetBeyondBar,
        Self::NotifyOffsetOutOfRange,
        Self::NotifyMultiplierOdd,
    ];

    pub(crate) fn occasion(self) -> Occasion {
        match self {
            Self::Vanish => Occasion::Access,
            Self::RegisterGarbage => Occasion::Register,
            Self::ResetIgnored | Self::ResetSlow | Self::CompleteAfterReset => Occasion::Reset,
            Self::FeaturesRefused => Occasion::Negotiation,
            Self::Version1Withheld => Occasion::Features,
            Self::InterruptBits => Occasion::Interrupt,
            Self::ConfigShort => Occasion::ConfigRead,
            Self::ConfigRestless => Occasion::Generation,
            Self::QueueSize(_) => Occasion::QueueSize,
            Self::NeedsReset
            | Self::UsedIdWrong
            | Self::UsedIdRepeated
            | Self::UsedIdForeign
            | Self::UsedIdOutOfRange
            | Self::UsedIdHighBits
            | Self::UsedLenLong
            | Self::UsedLenShort
            | Self::UsedLenZero
            | Self::UsedGarbage
            | Self::UsedIndexJump
            | Self::UsedIndexBack
            | Self::CompleteTwice
            | Self::CompleteLate
            | Self::CompleteNever
            | Self::CompleteOutOfOrder => Occasion::Completion,
            Self::BlockStatus(_) | Self::BlockStatusUnwritten => Occasion::Block,
            Self::NetBuffersWrong | Self::FrameRunt | Self::FrameOversized => Occasion::Frame,
            Self::GpuResponseType | Self::GpuResponseShort | Self::GpuResponseGarbage => {
                Occasion::GpuResponse
            }
            Self::DisplayEmpty | Self::DisplayHuge => Occasion::DisplayInfo,
            Self::CapabilityDecoys
            | Self::CapabilityLoop
            | Self::CapabilityOffEnd
            | Self::BarReserved(_)
            | Self::BarTypeReserved
            | Self::BarHuge
            | Self::OffsetWraps
            | Self::OffsetBeyondBar
            | Self::NotifyMultiplierOdd => Occasion::Capabilities,
            Self::NotifyOffsetOutOfRange => Occasion::NotifyOffset,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[derive(Clone, Debug)]
struct Armed {
    fault: Fault,
    /// Occasions to let pass before.
    skip: u32,
    /// How often it still happens.
    times: u32,
}

#[derive(Clone, Debug, Default)]
enum Source {
    #[default]
    None,
    Seed {
        state: u64,
        one_in: u32,
    },
    Bytes {
        bytes: Vec<u8>,
        position: usize,
    },
}

/// What a device does to its driver, and when.
///
/// Faults by name come first; where none is due, the seed or the bytes choose among [`Fault::ALL`] or those that
/// [`only`](Self::only) names.
#[derive(Clone, Debug, Default)]
pub struct Hostile {
    armed: Vec<Armed>,
    source: Source,
    /// What the source may choose; empty: all.
    pool: Vec<Fault>,
}

impl Hostile {
    /// Returns a device's conduct without a fault.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns conduct that chooses faults by chance, the same ones for the same `seed`: at one occasion in 32.
    pub fn seed(seed: u64) -> Self {
        Self {
            source: Source::Seed {
                state: seed,
                one_in: 32,
            },
            ..Self::default()
        }
    }

    /// Returns conduct that reads what to do from `bytes`, one for each occasion: below 192 honest, else a fault, whose numbers
    /// take further bytes. It is honest when they are used up.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self {
            source: Source::Bytes {
                bytes: bytes.to_vec(),
                position: 0,
            },
            ..Self::default()
        }
    }

    /// Lets a seed choose a fault at one occasion in `count`; at 0 never.
    #[must_use]
    pub fn one_in(mut self, count: u32) -> Self {
        if let Source::Seed { one_in, .. } = &mut self.source {
            *one_in = count;
        }
        self
    }

    /// Lets the seed or the bytes choose only among `faults`.
    #[must_use]
    pub fn only(mut self, faults: &[Fault]) -> Self {
        self.pool = faults.to_vec();
        self
    }

    /// Lets `fault` happen at every occasion.
    #[must_use]
    pub fn always(self, fault: Fault) -> Self {
        self.times(u32::MAX, 0, fault)
    }

    /// Lets `fault` happen at the first occasion.
    #[must_use]
    pub fn once(self, fault: Fault) -> Self {
        self.times(1, 0, fault)
    }

    /// Lets `fault` happen once, after `skip` occasions have passed. For [`Fault::Vanish`] these are register accesses.
    #[must_use]
    pub fn after(self, skip: u32, fault: Fault) -> Self {
        self.times(1, skip, fault)
    }

    /// Lets `fault` happen at `times` occasions, after `skip` occasions have passed.
    #[must_use]
    pub fn times(mut self, times: u32, skip: u32, fault: Fault) -> Self {
        self.armed.push(Armed { fault, skip, times });
        self
    }

    /// Chooses the fault for an occasion.
    pub(crate) fn pick(&mut self, occasion: Occasion) -> Option<Fault> {
        let mut due = None;
        for armed in &mut self.armed {
            if armed.fault.occasion() != occasion || armed.times == 0 {
                continue;
            }
            if armed.skip > 0 {
                armed.skip -= 1;
            } else if due.is_none() {
                if armed.times != u32::MAX {
                    armed.times -= 1;
                }
                due = Some(armed.fault);
            }
        }
        if due.is_some() {
            return due;
        }
        if occasion == Occasion::Access {
            return None;
        }
        let choice = match &mut self.source {
            Source::None => return None,
            Source::Seed { state, one_in } => {
                // A device has far more register accesses than other occasions.
                let rarity = if occasion == Occasion::Register {
                    64
                } else {
                    1
                };
                let range = one_in.saturating_mul(rarity);
                if range == 0 || !next(state).is_multiple_of(u64::from(range)) {
                    return None;
                }
                usize::try_from(next(state) >> 40).unwrap_or(0)
            }
            Source::Bytes { bytes, position } => {
                let byte = *bytes.get(*position)?;
                *position += 1;
                usize::from(byte.checked_sub(192)?)
            }
        };
        let pool = if self.pool.is_empty() {
            Fault::ALL
        } else {
            &self.pool
        };
        // What is left to chance vanishes when it is read.
        let mut fitting = pool.iter().filter(|fault| match fault.occasion() {
            Occasion::Access => occasion == Occasion::Register,
            other => other == occasion,
        });
        let count = fitting.clone().count();
        if count == 0 {
            None
        } else {
            fitting.nth(choice % count).copied()
        }
    }

    /// Chooses a number for a fault that needs one.
    pub(crate) fn number(&mut self) -> u32 {
        match &mut self.source {
            Source::None => 0xdead_beef,
            Source::Seed { state, .. } => (next(state) >> 32) as u32,
            Source::Bytes { bytes, position } => {
                let mut number = [0; 4];
                for byte in &mut number {
                    *byte = bytes.get(*position).copied().unwrap_or(0);
                    *position += 1;
                }
                u32::from_le_bytes(number)
            }
        }
    }
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn honest_conduct_never_picks_a_fault() {
        let mut hostile = Hostile::new();
        assert!((0..100).all(|_| hostile.pick(Occasion::Completion).is_none()));
    }

    #[test]
    fn a_named_fault_happens_after_its_occasions_and_once() {
        let mut hostile = Hostile::new().after(2, Fault::UsedLenLong);
        let picks: Vec<_> = (0..5).map(|_| hostile.pick(Occasion::Completion)).collect();
        assert_eq!(picks, [None, None, Some(Fault::UsedLenLong), None, None]);
        assert_eq!(hostile.pick(Occasion::Reset), None);
    }

    #[test]
    fn the_same_seed_picks_the_same_faults() {
        let picks = |seed| {
            let mut hostile = Hostile::seed(seed).one_in(2);
            (0..64)
                .map(|_| hostile.pick(Occasion::Completion))
                .collect::<Vec<_>>()
        };
        assert_eq!(picks(1), picks(1));
        assert_ne!(picks(1), picks(2));
        assert!(picks(1).iter().any(Option::is_some));
    }

    #[test]
    fn bytes_say_what_happens_until_they_are_used_up() {
        let mut hostile = Hostile::bytes(&[0, 255, 192]);
        assert_eq!(hostile.pick(Occasion::Reset), None);
        assert!(hostile.pick(Occasion::Reset).is_some());
        assert_eq!(hostile.pick(Occasion::Reset), Some(Fault::ResetIgnored));
        assert_eq!(hostile.pick(Occasion::Reset), None);
        assert_eq!(hostile.number(), 0);
    }

    #[test]
    fn every_fault_has_an_occasion_that_can_pick_it() {
        for fault in Fault::ALL {
            let mut hostile = Hostile::new().once(*fault);
            assert_eq!(hostile.pick(fault.occasion()), Some(*fault));
        }
    }
}
