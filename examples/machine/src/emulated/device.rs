//! A virtio device without its transport: status, features, queues, configuration, interrupts, and what it makes of them.

use std::collections::VecDeque;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::queue::{Chain, DeviceQueue, LARGEST};
use super::watch::{QueueWatch, Range, Rules, Violation, Violations, overlap};
use crate::hostile::{Fault, Hostile, Occasion};
use crate::memory::Memory;
use crate::trace::Event;

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

    fn end(&self) -> u64 {
        self.offset + u64::from(self.width) * self.count
    }

    /// Whether an access fits an element, or half of one of 64 bits.
    fn fits(&self, offset: u64, width: u8) -> bool {
        let unit = self.width.min(4);
        offset >= self.offset
            && offset < self.end()
            && width == unit
            && (offset - self.offset).is_multiple_of(u64::from(unit))
    }

    /// Whether it takes several accesses to read it.
    fn is_wide(&self) -> bool {
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

/// By which rules registers are named in violations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    LegacyMmio,
    Mmio,
    Pci,
}

/// A request that is done, and whose completion is held back.
#[derive(Debug)]
struct Held {
    queue: u16,
    head: u16,
    len: u32,
    /// Whether it waits for the next `run`, not only for the next completion.
    late: bool,
}

#[derive(Debug, Default)]
struct Lifecycle {
    /// FEATURES_OK was set, and the status read since.
    features_ok_read: bool,
    /// The status was read with DEVICE_NEEDS_RESET.
    needs_reset_read: bool,
    /// A reset was written, and the status has not been read as 0 since.
    reset_unread: bool,
    /// The reads of the generation that frame reads of wide fields.
    generation_read: bool,
    generation_due: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Resetting {
    No,
    /// It is done after so many reads of the status.
    Reads(u8),
    /// It is done in the next `run`.
    Run,
}

/// Everything about a device but its type.
pub(crate) struct State {
    pub(crate) index: usize,
    pub(crate) transport: Transport,
    pub(crate) options: Options,
    pub(crate) memory: Arc<Memory>,
    pub(crate) counters: DeviceCounters,
    pub(crate) status: u32,
    pub(crate) driver_features: u64,
    pub(crate) queues: Vec<DeviceQueue>,
    pub(crate) interrupt: u8,
    pub(crate) generation: u32,
    pub(crate) page_size: u32,
    pub(crate) gone: bool,
    /// Whether the bus lets the device reach memory.
    pub(crate) may_master: bool,
    pub(crate) version_1_withheld: bool,
    watches: Vec<QueueWatch>,
    watching: bool,
    violations: Violations,
    held: VecDeque<Held>,
    lifecycle: Lifecycle,
    resetting: Resetting,
    /// What the device could touch before a reset that was not awaited yet.
    retired: Vec<Range>,
    queue_sizes: Vec<u16>,
    /// Size of configuration space that is shown, when it is less than there is.
    config_limit: Option<u64>,
}

/// A device and its state.
pub(crate) struct Core {
    pub(crate) model: Box<dyn Model>,
    pub(crate) state: State,
}

impl State {
    pub(crate) fn guest(&self) -> Arc<Memory> {
        self.memory.clone()
    }

    pub(crate) fn violation(&self, id: &'static str, what: impl Into<String>) {
        if self.watching {
            self.violations.push(Violation {
                id,
                device: self.index,
                what: what.into(),
            });
        }
    }

    /// Chooses a violation's id by transport.
    pub(crate) fn by_transport(&self, mmio: &'static str, pci: &'static str) -> &'static str {
        if self.transport == Transport::Pci {
            pci
        } else {
            mmio
        }
    }

    pub(crate) fn event(&self, event: Event) {
        self.memory.trace().push(event);
    }

    /// Asks for a fault, and notes it.
    pub(crate) fn fault(&mut self, occasion: Occasion) -> Option<Fault> {
        let fault = self.options.hostile.pick(occasion)?;
        self.counters.faults += 1;
        self.event(Event::Fault {
            device: self.index,
            fault,
        });
        Some(fault)
    }

    pub(crate) fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0
            && self.status & status::DEVICE_NEEDS_RESET == 0
            && !self.gone
            && self.may_master
    }

    fn is_legacy(&self) -> bool {
        self.transport == Transport::LegacyMmio
    }

    fn rules(&self) -> Rules {
        Rules {
            event_idx: self.driver_features & features::RING_EVENT_IDX != 0,
            indirect: self.driver_features & features::RING_INDIRECT_DESC != 0,
        }
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    /// Looks at the chains that were made available in `queue`.
    fn scan(&mut self, queue: usize) {
        if !self.watching {
            return;
        }
        let rules = self.rules();
        let (index, violations) = (self.index, self.violations.clone());
        let (Some(watch), Some(device_queue)) =
            (self.watches.get_mut(queue), self.queues.get(queue))
        else {
            return;
        };
        watch.scan(device_queue, self.memory.guest(), rules, &mut |id, what| {
            violations.push(Violation {
                id,
                device: index,
                what: format!("queue {queue}: {what}"),
            });
        });
    }

    /// Takes the next chain of `queue`.
    pub(crate) fn pop(&mut self, queue: u16) -> Option<Chain> {
        if !self.is_live() {
            return None;
        }
        let queue = usize::from(queue);
        self.scan(queue);
        let memory = self.memory.clone();
        let chain = self.queues.get_mut(queue)?.pop(memory.guest())?;
        if self.watching {
            let (index, violations) = (self.index, self.violations.clone());
            self.watches[queue].taken(chain.head, memory.guest(), &mut |id, what| {
                violations.push(Violation {
                    id,
                    device: index,
                    what: format!("queue {queue}: {what}"),
                });
            });
        }
        Some(chain)
    }

    /// Gives a chain back of which the first `len` writable bytes were written, unless the device is told to lie.
    pub(crate) fn complete(&mut self, queue: u16, head: u16, len: u32) {
        let fault = self.fault(Occasion::Completion);
        let overtaken = self
            .held
            .iter()
            .position(|held| held.queue == queue && !held.late)
            .filter(|_| fault != Some(Fault::CompleteOutOfOrder));
        self.complete_with(queue, head, len, fault);
        // What is held back for the sake of disorder follows.
        if let Some(held) = overtaken.and_then(|index| self.held.remove(index)) {
            self.complete_with(held.queue, held.head, held.len, None);
        }
    }

    fn complete_with(&mut self, queue: u16, head: u16, len: u32, fault: Option<Fault>) {
        let memory = self.memory.clone();
        let guest = memory.guest();
        let index = usize::from(queue);
        let size = self.queues[index].size;
        let watch = &self.watches[index];
        let writable = u32::try_from(watch.writable(head)).unwrap_or(u32::MAX);
        let not_in_flight = |posted: &QueueWatch| {
            let heads: Vec<u16> = posted.heads().collect();
            (0..size).find(|id| u16::try_from(*id).is_ok_and(|id| !heads.contains(&id)))
        };
        let number = if fault.is_some() {
            self.options.hostile.number()
        } else {
            0
        };
        let mut step = 1;
        let (id, len) = match fault {
            None => {
                self.queues[index].complete(guest, head, len);
                self.finish(queue, head, head.into(), len);
                return;
            }
            Some(Fault::CompleteTwice) => {
                self.queues[index].complete(guest, head, len);
                self.queues[index].complete(guest, head, len);
                self.finish(queue, head, head.into(), len);
                return;
            }
            Some(Fault::CompleteNever) => return,
            Some(fault @ (Fault::CompleteLate | Fault::CompleteOutOfOrder)) => {
                self.held.push_back(Held {
                    queue,
                    head,
                    len,
                    late: fault == Fault::CompleteLate,
                });
                return;
            }
            Some(Fault::NeedsReset) => {
                self.needs_reset();
                return;
            }
            Some(Fault::UsedIdWrong) => (not_in_flight(watch).unwrap_or(size), len),
            Some(Fault::UsedIdForeign) => {
                let other = watch.heads().find(|other| *other != head);
                let id = other.map_or_else(|| not_in_flight(watch).unwrap_or(size), u32::from);
                (id, len)
            }
            Some(Fault::UsedIdRepeated) => (self.queues[index].last_id, len),
            Some(Fault::UsedIdOutOfRange) => (size.saturating_add(number), len),
            Some(Fault::UsedIdHighBits) => (u32::from(head) | 0x1_0000, len),
            Some(Fault::UsedLenLong) => (
                head.into(),
                writable.saturating_add(1).saturating_add(number),
            ),
            Some(Fault::UsedLenShort) => (head.into(), number % len.max(1)),
            Some(Fault::UsedLenZero) => (head.into(), 0),
            Some(Fault::UsedIndexJump) => {
                step = (number & 0x7fff) as u16 | 0x100;
                (head.into(), len)
            }
            Some(Fault::UsedIndexBack) => {
                step = u16::MAX;
                (head.into(), len)
            }
            Some(_) => (head.into(), len),
        };
        self.queues[index].complete_raw(guest, id, len, step);
        self.finish(queue, head, id, len);
    }

    fn finish(&mut self, queue: u16, head: u16, id: u32, len: u32) {
        self.watches[usize::from(queue)].completed(head);
        if let Some(count) = self.counters.completions.get_mut(usize::from(queue)) {
            *count += 1;
        }
        self.event(Event::Used {
            device: self.index,
            queue,
            id,
            len,
        });
    }

    /// Completes what was held back.
    fn release_held(&mut self) {
        while let Some(held) = self.held.pop_front() {
            if self.is_live() {
                self.complete_with(held.queue, held.head, held.len, None);
            }
        }
    }

    /// Tells the driver of what was completed, if it wants to know, and asks for the next kick.
    fn settle(&mut self) {
        if !self.is_live() {
            return;
        }
        let memory = self.memory.clone();
        let mut told = false;
        for (queue, watch) in self.queues.iter_mut().zip(&mut self.watches) {
            if queue.live.is_none() {
                continue;
            }
            if !queue.kicked {
                queue.ask_for_kicks(memory.guest(), !self.options.quiet);
                watch.looked(queue, memory.guest());
            }
            told |= queue.driver_wants_interrupt(memory.guest());
        }
        if told {
            self.raise(USED);
        }
    }

    pub(crate) fn raise(&mut self, cause: u8) {
        if self.gone {
            return;
        }
        self.interrupt |= cause;
        self.counters.interrupts += 1;
        self.event(Event::Interrupt {
            device: self.index,
            cause,
        });
    }

    pub(crate) fn needs_reset(&mut self) {
        self.status |= status::DEVICE_NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.raise(CHANGED);
        }
    }

    /// Returns the memory that the device may touch, besides that of its model.
    fn ranges(&self) -> Vec<Range> {
        let mut ranges = Vec::new();
        for (queue, watch) in self.queues.iter().zip(&self.watches) {
            if queue.enabled {
                ranges.extend(queue.rings());
                ranges.extend(watch.ranges());
            }
        }
        ranges
    }
}

impl Core {
    pub(crate) fn new(
        index: usize,
        device: Device,
        transport: Transport,
        memory: Arc<Memory>,
        violations: Violations,
        watching: bool,
    ) -> Self {
        let Device { model, options } = device;
        let queue_sizes: Vec<u16> = model
            .queues()
            .iter()
            .map(|size| options.queue_size.unwrap_or(*size))
            .collect();
        let count = queue_sizes.len();
        let mut core = Self {
            model,
            state: State {
                index,
                transport,
                options,
                memory,
                counters: DeviceCounters {
                    kicks: vec![0; count],
                    completions: vec![0; count],
                    ..DeviceCounters::default()
                },
                status: 0,
                driver_features: 0,
                queues: (0..count).map(|_| DeviceQueue::new()).collect(),
                interrupt: 0,
                generation: 0,
                page_size: 0,
                gone: false,
                may_master: transport != Transport::Pci,
                version_1_withheld: false,
                watches: (0..count).map(|_| QueueWatch::default()).collect(),
                watching,
                violations,
                held: VecDeque::new(),
                lifecycle: Lifecycle::default(),
                resetting: Resetting::No,
                retired: Vec::new(),
                queue_sizes,
                config_limit: None,
            },
        };
        core.prepare();
        core
    }

    /// Decides, before a driver starts, on the faults that stay for as long as it runs.
    fn prepare(&mut self) {
        let state = &mut self.state;
        state.version_1_withheld =
            state.transport != Transport::LegacyMmio && state.fault(Occasion::Features).is_some();
        state.config_limit = state.fault(Occasion::ConfigRead).map(|_| 4);
    }

    /// Decides whether the device vanishes or lies at this access. Returns what a register reads as instead of the truth.
    pub(crate) fn disturb(&mut self) -> Option<u32> {
        if self.vanishes() {
            return Some(u32::MAX);
        }
        match self.state.fault(Occasion::Register)? {
            Fault::Vanish => {
                self.state.gone = true;
                Some(u32::MAX)
            }
            _ => Some(self.state.options.hostile.number()),
        }
    }

    /// Decides whether the device vanishes at this access, or is gone already.
    pub(crate) fn vanishes(&mut self) -> bool {
        self.state.gone |= self.state.fault(Occasion::Access).is_some();
        self.state.gone
    }

    pub(crate) fn offered(&self) -> u64 {
        let state = &self.state;
        let mut offered = self.model.features() | state.options.offered;
        offered &= !state.options.withheld;
        if state.is_legacy() {
            offered &= 0xffff_ffff;
        }
        if state.version_1_withheld {
            offered &= !features::VERSION_1;
        }
        offered
    }

    pub(crate) fn features(&mut self, select: u32) -> u32 {
        match select {
            0 => (self.offered() & 0xffff_ffff) as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        }
    }

    pub(crate) fn write_features(&mut self, select: u32, value: u32) {
        let offered = self.offered();
        let state = &mut self.state;
        if state.status & status::FEATURES_OK != 0 {
            state.violation("GEN-20", "features written after FEATURES_OK");
            return;
        }
        if state.status & status::DRIVER == 0 {
            state.violation("GEN-18", "features written before DRIVER");
        }
        let shift = match select {
            0 => 0,
            1 => 32,
            _ => {
                if value != 0 {
                    state.violation("GEN-05", format!("feature word {select} written"));
                }
                return;
            }
        };
        let bits = u64::from(value) << shift;
        let mask = 0xffff_ffff_u64 << shift;
        if bits & !offered != 0 {
            state.violation(
                "GEN-05",
                format!("features {:#x} accepted but not offered", bits & !offered),
            );
        }
        state.driver_features = state.driver_features & !mask | bits;
        state.event(Event::FeaturesWrite {
            device: state.index,
            value: state.driver_features,
        });
    }

    pub(crate) fn read_status(&mut self) -> u32 {
        let state = &mut self.state;
        match state.resetting {
            Resetting::Reads(0) => self.finish_reset(),
            Resetting::Reads(left) => state.resetting = Resetting::Reads(left - 1),
            Resetting::No | Resetting::Run => {}
        }
        let state = &mut self.state;
        let value = state.status;
        state.lifecycle.features_ok_read = true;
        state.lifecycle.needs_reset_read = value & status::DEVICE_NEEDS_RESET != 0;
        if value == 0 {
            state.lifecycle.reset_unread = false;
            state.retired.clear();
        }
        state.event(Event::StatusRead {
            device: state.index,
            value,
        });
        value
    }

    pub(crate) fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.begin_reset();
            return;
        }
        let offered = self.offered();
        let state = &mut self.state;
        state.event(Event::StatusWrite {
            device: state.index,
            value,
        });
        let before = state.status;
        let added = value & !before;
        let legacy = state.is_legacy();
        if state.lifecycle.reset_unread && !legacy {
            state.lifecycle.reset_unread = false;
            state.violation(
                state.by_transport("GEN-10", "PCI-14"),
                "status written after a reset that was not read back as 0",
            );
        }
        if before & !value & !status::DEVICE_NEEDS_RESET != 0 {
            state.violation(
                "GEN-02",
                format!("status goes from {before:#x} to {value:#x}"),
            );
        }
        if before & status::FAILED != 0 && added != 0 {
            state.violation("GEN-03", "status bits set after FAILED without a reset");
        }
        let both = status::ACKNOWLEDGE | status::DRIVER;
        if added & both == both {
            state.violation("GEN-18", "ACKNOWLEDGE and DRIVER set in one write");
        } else if added & status::DRIVER != 0 && value & status::ACKNOWLEDGE == 0 {
            state.violation("GEN-18", "DRIVER set before ACKNOWLEDGE");
        }
        if added & status::FEATURES_OK != 0 && !legacy {
            if before & both != both || added & !(status::FEATURES_OK | status::FAILED) != 0 {
                state.violation(
                    "GEN-20",
                    format!("FEATURES_OK set in a write of {value:#x} at status {before:#x}"),
                );
            }
            state.lifecycle.features_ok_read = false;
        }
        if added & status::DRIVER_OK != 0 {
            if value & both != both {
                state.violation("GEN-23", "DRIVER_OK set without ACKNOWLEDGE and DRIVER");
            }
            if !legacy && before & status::FEATURES_OK == 0 {
                state.violation("GEN-21", "DRIVER_OK set without FEATURES_OK");
            } else if !legacy && !state.lifecycle.features_ok_read {
                state.violation("GEN-21", "FEATURES_OK was not read back before DRIVER_OK");
            }
            if state.lifecycle.generation_due && !legacy {
                state.violation(
                    "GEN-11",
                    "a wide configuration field was read without the generation after it",
                );
                state.lifecycle.generation_due = false;
            }
        }
        state.status = value | before & status::DEVICE_NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !legacy {
            self.agree(offered);
        } else if added & status::DRIVER_OK != 0 && legacy {
            self.model.negotiated(&mut self.state);
        }
        if added & status::DRIVER_OK != 0 {
            for queue in 0..self.state.queues.len() {
                self.state.scan(queue);
            }
        }
    }

    /// Decides whether the accepted features will do; if not, FEATURES_OK does not stay.
    fn agree(&mut self, offered: u64) {
        let state = &mut self.state;
        let accepted = state.driver_features;
        let mut refused = accepted & !offered != 0;
        if offered & features::VERSION_1 != 0 && accepted & features::VERSION_1 == 0 {
            state.violation("GEN-28", "VERSION_1 was offered and not accepted");
            refused = true;
        }
        if offered & features::ACCESS_PLATFORM != 0 && accepted & features::ACCESS_PLATFORM == 0 {
            state.violation("GEN-30", "ACCESS_PLATFORM was offered and not accepted");
            refused = true;
        }
        if offered & features::ORDER_PLATFORM != 0 && accepted & features::ORDER_PLATFORM == 0 {
            state.violation("GEN-33", "ORDER_PLATFORM was offered and not accepted");
        }
        refused |= state.fault(Occasion::Negotiation).is_some();
        if refused {
            state.status &= !status::FEATURES_OK;
        } else {
            self.model.negotiated(state);
        }
    }

    fn begin_reset(&mut self) {
        let mut ranges = self.state.ranges();
        ranges.extend(self.model.ranges());
        let state = &mut self.state;
        state.event(Event::Reset {
            device: state.index,
        });
        state.lifecycle.reset_unread = true;
        state.retired.extend(ranges);
        match state.fault(Occasion::Reset) {
            Some(Fault::ResetIgnored) => return,
            Some(Fault::ResetSlow) => {
                state.resetting = Resetting::Reads(3);
                return;
            }
            Some(Fault::CompleteAfterReset) => {
                state.resetting = Resetting::Run;
                return;
            }
            _ => {}
        }
        self.finish_reset();
    }

    fn finish_reset(&mut self) {
        let state = &mut self.state;
        state.status = 0;
        state.resetting = Resetting::No;
        state.driver_features = 0;
        state.interrupt = 0;
        state.page_size = 0;
        state.held.clear();
        for queue in &mut state.queues {
            *queue = DeviceQueue::new();
        }
        for watch in &mut state.watches {
            *watch = QueueWatch::default();
        }
        let reset_unread = state.lifecycle.reset_unread;
        state.lifecycle = Lifecycle {
            reset_unread,
            ..Lifecycle::default()
        };
        self.model.reset();
        self.prepare();
    }

    /// Returns the largest size that is offered for `queue`; 0 where there is none.
    pub(crate) fn queue_max(&mut self, queue: u32) -> u32 {
        let Some(size) = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.state.queue_sizes.get(queue))
        else {
            return 0;
        };
        let size = u32::from(*size);
        match self.state.fault(Occasion::QueueSize) {
            Some(Fault::QueueSize(size)) => size,
            _ => size,
        }
    }

    /// Takes `queue` into use.
    pub(crate) fn enable_queue(&mut self, queue: usize) {
        let event_idx = self.state.has(features::RING_EVENT_IDX);
        let state = &mut self.state;
        if !state.is_legacy() && state.status & status::FEATURES_OK == 0 {
            state.violation(
                "GEN-22",
                format!("queue {queue} enabled before FEATURES_OK"),
            );
        }
        if state.status & status::DRIVER_OK != 0 {
            state.violation("GEN-22", format!("queue {queue} enabled after DRIVER_OK"));
        }
        let Some(device_queue) = state.queues.get_mut(queue) else {
            return;
        };
        let result = device_queue.enable(event_idx);
        let size = device_queue.size;
        let (rings, flags) = (
            device_queue.rings(),
            device_queue.used_flags(state.memory.guest()),
        );
        if let Err(what) = result {
            let id = if what.starts_with("size") {
                "VQ-02"
            } else {
                "VQ-01"
            };
            state.violation(id, format!("queue {queue}: {what}"));
        }
        for (address, len) in rings {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if state.memory.host_address(address, len).is_none() {
                state.violation(
                    "GEN-31",
                    format!("queue {queue}: a ring at {address:#x} is not in memory"),
                );
            }
        }
        if flags.is_some_and(|flags| flags != 0) {
            state.violation("VQ-19", format!("queue {queue}: used.flags is not 0"));
        }
        state.watches[queue] = QueueWatch::default();
        if state.options.quiet {
            let memory = state.memory.clone();
            state.queues[queue].ask_for_kicks(memory.guest(), false);
        }
        state.event(Event::QueueEnabled {
            device: state.index,
            queue: u16::try_from(queue).unwrap_or(u16::MAX),
            size: u16::try_from(size).unwrap_or(LARGEST),
        });
    }

    pub(crate) fn disable_queue(&mut self, queue: usize) {
        let state = &mut self.state;
        if let Some(device_queue) = state.queues.get_mut(queue) {
            *device_queue = DeviceQueue::new();
            state.watches[queue] = QueueWatch::default();
            state.event(Event::QueueDisabled {
                device: state.index,
                queue: u16::try_from(queue).unwrap_or(u16::MAX),
            });
        }
    }

    /// The driver rang for `queue`.
    pub(crate) fn notify(&mut self, queue: u32) {
        let state = &mut self.state;
        let Some(index) = usize::try_from(queue)
            .ok()
            .filter(|queue| *queue < state.queues.len())
        else {
            state.violation(
                state.by_transport("MMIO-01", "PCI-21"),
                format!("rang for queue {queue}, which does not exist"),
            );
            return;
        };
        state.counters.kicks[index] += 1;
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        state.event(Event::Kick {
            device: state.index,
            queue: number,
        });
        if state.status & status::DRIVER_OK == 0 {
            state.violation("GEN-25", format!("rang for queue {queue} before DRIVER_OK"));
            return;
        }
        if state.lifecycle.needs_reset_read {
            state.violation(
                "GEN-04",
                format!("rang for queue {queue} of a device that needs a reset"),
            );
        }
        if !state.is_live() {
            return;
        }
        state.scan(index);
        if state.watching {
            let rules = state.rules();
            let (device, violations) = (state.index, state.violations.clone());
            state.watches[index].rung(
                &state.queues[index],
                state.memory.guest(),
                rules,
                &mut |id, what| {
                    violations.push(Violation {
                        id,
                        device,
                        what: format!("queue {queue}: {what}"),
                    });
                },
            );
        }
        if state.options.later {
            state.queues[index].kicked = true;
        } else {
            self.model.serve(number, state);
            state.settle();
        }
    }

    /// Does what is due without a kick. Returns whether anything was done.
    pub(crate) fn poll(&mut self) -> bool {
        self.note_change();
        if !self.state.is_live() || self.state.options.later {
            return false;
        }
        let done = self.model.poll(&mut self.state);
        if done {
            self.state.settle();
        }
        done
    }

    /// Does everything that is due: what was put off, what was held back, and what came in without a kick.
    pub(crate) fn run(&mut self) {
        self.note_change();
        self.state.release_held();
        if self.state.is_live() {
            for queue in 0..self.state.queues.len() {
                let number = u16::try_from(queue).unwrap_or(u16::MAX);
                if self.state.options.quiet || self.state.queues[queue].kicked {
                    self.state.queues[queue].kicked = false;
                    self.model.serve(number, &mut self.state);
                }
            }
            self.model.poll(&mut self.state);
        }
        self.state.settle();
        if self.state.resetting == Resetting::Run {
            self.finish_reset();
        }
    }

    /// Raises the interrupt for a configuration change, if there was one.
    pub(crate) fn note_change(&mut self) {
        if self.model.changed() {
            self.state.generation = self.state.generation.wrapping_add(1);
            if self.state.status & status::DRIVER_OK != 0 {
                self.state.raise(CHANGED);
            }
        }
    }

    pub(crate) fn read_generation(&mut self) -> u32 {
        let state = &mut self.state;
        state.lifecycle.generation_read = true;
        state.lifecycle.generation_due = false;
        if state.fault(Occasion::Generation).is_some() {
            state.generation = state.generation.wrapping_add(1);
        }
        state.generation
    }

    /// Returns how many bytes of configuration space are shown.
    pub(crate) fn config_len(&mut self) -> u64 {
        let len = self.model.config(&mut self.state).len() as u64;
        self.state.config_limit.map_or(len, |limit| len.min(limit))
    }

    fn check_config(&mut self, offset: u64, width: u8, write: bool) {
        let field = self
            .model
            .fields()
            .iter()
            .find(|field| offset >= field.offset && offset < field.end());
        let offered = self.offered();
        let state = &mut self.state;
        let known = if state.status & (status::FEATURES_OK | status::DRIVER_OK) != 0 {
            state.driver_features
        } else {
            offered
        };
        let verb = if write { "written" } else { "read" };
        let Some(field) = field else {
            state.violation(
                state.by_transport("MMIO-01", "PCI-09"),
                format!("configuration {verb} at {offset:#x}, where there is no field"),
            );
            return;
        };
        if !field.fits(offset, width) {
            state.violation(
                state.by_transport("MMIO-03", "PCI-04"),
                format!(
                    "configuration {verb} at {offset:#x} with {width} bytes, but the field has {}",
                    field.width
                ),
            );
        }
        if field.features != 0 && known & field.features == 0 {
            state.violation(
                "GEN-12",
                format!("configuration {verb} at {offset:#x} without its feature"),
            );
        }
        if write {
            if !field.writable {
                let id = match self.model.kind() {
                    1 => "NET-02",
                    16 => "GPU-01",
                    _ => state.by_transport("MMIO-01", "PCI-09"),
                };
                state.violation(
                    id,
                    format!("read-only configuration written at {offset:#x}"),
                );
            }
            if state.status & status::FEATURES_OK == 0 && !state.is_legacy() {
                state.violation(
                    "GEN-19",
                    format!("configuration written at {offset:#x} before FEATURES_OK"),
                );
            }
        } else if self.model.kind() == 2
            && offset == 32
            && state.status & status::FEATURES_OK == 0
            && !state.is_legacy()
        {
            state.violation("BLK-04", "writeback read before FEATURES_OK");
        } else if field.is_wide() && !state.is_legacy() {
            if !state.lifecycle.generation_read {
                state.violation(
                    "GEN-11",
                    format!("a wide configuration field was read at {offset:#x} without the generation before it"),
                );
                state.lifecycle.generation_read = true;
            }
            state.lifecycle.generation_due = true;
        }
    }

    pub(crate) fn read_config(&mut self, offset: u64, width: u8) -> u64 {
        let width = width.min(8);
        self.note_change();
        self.check_config(offset, width, false);
        self.state.event(Event::ConfigRead {
            device: self.state.index,
            offset,
            width,
        });
        let limit = self.config_len();
        let config = self.model.config(&mut self.state);
        let mut bytes = [0xff; 8];
        for (index, byte) in bytes.iter_mut().take(width.into()).enumerate() {
            let at = offset + index as u64;
            if at < limit
                && let Some(value) = usize::try_from(at).ok().and_then(|at| config.get(at))
            {
                *byte = *value;
            }
        }
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn write_config(&mut self, offset: u64, width: u8, value: u64) {
        self.check_config(offset, width, true);
        self.state.event(Event::ConfigWrite {
            device: self.state.index,
            offset,
            width,
            value,
        });
        let bytes = value.to_le_bytes();
        self.model
            .write_config(offset, &bytes[..usize::from(width).min(8)]);
    }

    /// Acknowledges interrupts.
    pub(crate) fn acknowledge(&mut self, cause: u32) {
        let state = &mut self.state;
        state.interrupt &= !((cause & 0xff) as u8);
        state.event(Event::InterruptAcknowledged {
            device: state.index,
            cause,
        });
    }

    /// The driver takes `range` of memory back: can the device still reach it?
    pub(crate) fn leaving(&mut self, range: Range) {
        if !self.state.watching || self.state.gone {
            return;
        }
        for queue in 0..self.state.queues.len() {
            if self.state.is_live() {
                self.state.scan(queue);
            }
        }
        let state = &self.state;
        let (address, len) = range;
        if state.ranges().iter().any(|used| overlap(*used, range)) {
            state.violation(
                "GEN-27",
                format!(
                    "{len} bytes at {address:#x} were taken back while the device may use them"
                ),
            );
        } else if self.model.ranges().iter().any(|used| overlap(*used, range)) {
            state.violation(
                "GPU-03",
                format!("{len} bytes at {address:#x} were taken back while they back a resource"),
            );
        } else if state.retired.iter().any(|used| overlap(*used, range)) {
            state.violation(
                state.by_transport("GEN-10", "PCI-14"),
                format!(
                    "{len} bytes at {address:#x} were taken back before the reset was read back"
                ),
            );
        }
    }

    /// Returns how many chains are available that the driver should have rung for and has not.
    pub(crate) fn unkicked(&self) -> Vec<u16> {
        let guest: &GuestMemoryMmap = self.state.memory.guest();
        self.state
            .queues
            .iter()
            .zip(&self.state.watches)
            .map(|(queue, watch)| {
                if self.state.options.quiet {
                    0
                } else {
                    watch.untold(queue, guest)
                }
            })
            .collect()
    }
}
