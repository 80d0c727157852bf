//! What a device has and knows besides its type, and how it takes and gives back requests, honestly or not.

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{CHANGED, DeviceCounters, Options, USED, features, status};
use super::queue::{Chain, DeviceQueue};
use super::watch::{QueueWatch, Range, Rules, Violation, Violations};
use crate::hostile::{Fault, Occasion};
use crate::memory::Memory;
use crate::trace::Event;

/// By which rules registers are named in violations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    LegacyMmio,
    Mmio,
    Pci,
}

/// A request that is done, and whose completion is held back.
#[derive(Debug)]
pub(super) struct Held {
    queue: u16,
    head: u16,
    len: u32,
    /// Whether it waits for the next `run`, not only for the next completion.
    late: bool,
}

#[derive(Debug, Default)]
pub(super) struct Lifecycle {
    /// FEATURES_OK was set, and the status read since.
    pub(super) features_ok_read: bool,
    /// The status was read with DEVICE_NEEDS_RESET.
    pub(super) needs_reset_read: bool,
    /// A reset was written, and the status has not been read as 0 since.
    pub(super) reset_unread: bool,
    /// The reads of the generation that frame reads of wide fields.
    pub(super) generation_read: bool,
    pub(super) generation_due: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Resetting {
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
    pub(super) watches: Vec<QueueWatch>,
    pub(super) watching: bool,
    pub(super) violations: Violations,
    pub(super) held: VecDeque<Held>,
    pub(super) lifecycle: Lifecycle,
    pub(super) resetting: Resetting,
    /// What the device could touch before a reset that was not awaited yet.
    pub(super) retired: Vec<Range>,
    pub(super) queue_sizes: Vec<u16>,
    /// Size of configuration space that is shown, when it is less than there is.
    pub(super) config_limit: Option<u64>,
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

    pub(super) fn is_legacy(&self) -> bool {
        self.transport == Transport::LegacyMmio
    }

    pub(super) fn rules(&self) -> Rules {
        Rules {
            event_idx: self.driver_features & features::RING_EVENT_IDX != 0,
            indirect: self.driver_features & features::RING_INDIRECT_DESC != 0,
        }
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    /// Looks at the chains that were made available in `queue`.
    pub(super) fn scan(&mut self, queue: usize) {
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
            Some(Fault::UsedGarbage) => (number, self.options.hostile.number()),
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
    pub(super) fn release_held(&mut self) {
        while let Some(held) = self.held.pop_front() {
            if self.is_live() {
                self.complete_with(held.queue, held.head, held.len, None);
            }
        }
    }

    /// Tells the driver of what was completed, if it wants to know, and asks for the next kick.
    pub(super) fn settle(&mut self) {
        if !self.is_live() {
            return;
        }
        let memory = self.memory.clone();
        let mut told = false;
        for queue in &mut self.queues {
            if queue.live.is_none() {
                continue;
            }
            if !queue.kicked {
                queue.ask_for_kicks(memory.guest(), !self.options.quiet);
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
    pub(super) fn ranges(&self) -> Vec<Range> {
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
