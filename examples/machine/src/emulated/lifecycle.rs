//! A virtio device without its transport: what its registers do, whatever their addresses are.

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{CHANGED, Device, DeviceCounters, Model, features, status};
use super::queue::{DeviceQueue, LARGEST};
use super::state::{Lifecycle, Resetting, State, Transport};
use super::watch::{QueueWatch, Range, Violation, Violations, overlap};
use crate::hostile::{Fault, Occasion};
use crate::memory::Memory;
use crate::trace::Event;

/// A device and its state.
pub(crate) struct Core {
    pub(crate) model: Box<dyn Model>,
    pub(crate) state: State,
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

    /// Returns the cause of the interrupt, as the driver reads it.
    pub(crate) fn read_interrupt(&mut self) -> u8 {
        self.note_change();
        let state = &mut self.state;
        if state.fault(Occasion::Interrupt).is_some() {
            state.interrupt | 0xf0
        } else {
            state.interrupt
        }
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
        let guest = self.state.memory.guest();
        let rules = self.state.rules();
        self.state
            .queues
            .iter()
            .zip(&self.state.watches)
            .map(|(queue, watch)| watch.untold(queue, guest, rules))
            .collect()
    }
}
