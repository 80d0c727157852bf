//! What a device can see of a driver that breaks the rules.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::queue::DeviceQueue;

/// A rule of the specification that the driver broke, as far as the device could see.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    /// The rule, by its row in the conformance table: `GEN-18`, `MMIO-13`, `VQ-15`, ...
    pub id: &'static str,
    /// The device that saw it.
    pub device: usize,
    /// What the driver did.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at device {}: {}", self.id, self.device, self.what)
    }
}

/// Violations are kept up to this number.
const MOST: usize = 10_000;

/// The violations that all devices of a board have seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Violations(Arc<Mutex<Vec<Violation>>>);

impl Violations {
    pub(crate) fn push(&self, violation: Violation) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < MOST {
            all.push(violation);
        }
    }

    pub(crate) fn all(&self) -> Vec<Violation> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn take(&self) -> Vec<Violation> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor as it lies in memory: address, length, flags, next.
type Raw = [u8; 16];

/// A range of memory: address and length.
pub(crate) type Range = (u64, u64);

/// What a driver has made available under one head.
#[derive(Debug, Default)]
struct Posted {
    /// Where each descriptor lies, and what it held.
    descriptors: Vec<(u64, Raw)>,
    /// Everything that the device may touch: buffers and indirect tables.
    ranges: Vec<Range>,
    writable: u64,
}

/// What the device has seen of one queue.
#[derive(Debug, Default)]
pub(crate) struct QueueWatch {
    /// The available index up to which chains were looked at.
    seen: u16,
    /// The available index when the driver last rang.
    rung: u16,
    posted: HashMap<u16, Posted>,
}

/// Features that change what a chain may look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
}

impl QueueWatch {
    /// Looks at the chains that were made available since the last call.
    pub(crate) fn scan(
        &mut self,
        queue: &DeviceQueue,
        memory: &GuestMemoryMmap,
        rules: Rules,
        report: &mut dyn FnMut(&'static str, String),
    ) {
        let Some(index) = queue.avail_index(memory) else {
            return;
        };
        let size = queue.size;
        let fresh = index.wrapping_sub(self.seen);
        if u32::from(fresh) > size {
            report(
                "VQ-12",
                format!(
                    "available index went from {} to {index} in a queue of {size}",
                    self.seen
                ),
            );
            self.seen = index;
            return;
        }
        let flags = queue.avail_flags(memory).unwrap_or(0);
        if rules.event_idx && flags != 0 {
            report(
                "VQ-15",
                format!("avail.flags is {flags} although EVENT_IDX was negotiated"),
            );
        } else if flags > 1 {
            report("VQ-13", format!("avail.flags is {flags}"));
        }
        for offset in 0..fresh {
            let Some(head) = queue.avail_head(memory, self.seen.wrapping_add(offset)) else {
                continue;
            };
            let posted = walk(queue, memory, head, rules, report);
            if self.posted.insert(head, posted).is_some() {
                report(
                    "GEN-26",
                    format!("head {head} is made available while it is in flight"),
                );
            }
        }
        self.seen = index;
    }

    /// Checks that a chain that the device takes is still the one that was made available.
    pub(crate) fn taken(
        &self,
        head: u16,
        memory: &GuestMemoryMmap,
        report: &mut dyn FnMut(&'static str, String),
    ) {
        let Some(posted) = self.posted.get(&head) else {
            return;
        };
        for (address, descriptor) in &posted.descriptors {
            if read_raw(memory, *address).is_some_and(|now| now != *descriptor) {
                report(
                    "GEN-26",
                    format!("a descriptor of head {head} changed while it was in flight"),
                );
            }
        }
    }

    /// Forgets a chain that the device gave back.
    pub(crate) fn completed(&mut self, head: u16) {
        self.posted.remove(&head);
    }

    /// Returns the heads in flight.
    pub(crate) fn heads(&self) -> impl Iterator<Item = u16> {
        self.posted.keys().copied()
    }

    /// Returns how many bytes the device may write under `head`.
    pub(crate) fn writable(&self, head: u16) -> u64 {
        self.posted.get(&head).map_or(0, |posted| posted.writable)
    }

    /// Returns the memory that the device may touch for what is in flight.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range> {
        self.posted
            .values()
            .flat_map(|posted| posted.ranges.iter().copied())
    }

    /// The driver rang: was it asked to?
    pub(crate) fn rung(
        &mut self,
        queue: &DeviceQueue,
        memory: &GuestMemoryMmap,
        rules: Rules,
        report: &mut dyn FnMut(&'static str, String),
    ) {
        let Some(index) = queue.avail_index(memory) else {
            return;
        };
        if rules.event_idx {
            let event = queue.avail_event(memory).unwrap_or(index);
            if !self.is_due(index, event) {
                report(
                    "VQ-25",
                    format!(
                        "rang at available index {index} (before: {}), but the device asked for {event}",
                        self.rung
                    ),
                );
            }
        } else if queue.used_flags(memory).is_some_and(|flags| flags & 1 != 0) {
            report("VQ-21", "rang although used.flags asks not to".to_owned());
        }
        self.rung = index;
    }

    /// Whether the index that the device asked for is among those that were added since the driver last rang (2.7.10.1).
    fn is_due(&self, index: u16, event: u16) -> bool {
        index.wrapping_sub(event).wrapping_sub(1) < index.wrapping_sub(self.rung)
    }

    /// Returns how many chains are available that the device has not taken, and that it should have been told of.
    pub(crate) fn untold(
        &self,
        queue: &DeviceQueue,
        memory: &GuestMemoryMmap,
        rules: Rules,
    ) -> u16 {
        let (Some(index), Some(taken)) = (queue.avail_index(memory), queue.taken_index()) else {
            return 0;
        };
        let due = if rules.event_idx {
            queue
                .avail_event(memory)
                .is_some_and(|event| self.is_due(index, event))
        } else {
            queue.used_flags(memory).is_some_and(|flags| flags & 1 == 0)
        };
        if due {
            index.wrapping_sub(self.rung).min(index.wrapping_sub(taken))
        } else {
            0
        }
    }
}

fn read_raw(memory: &GuestMemoryMmap, address: u64) -> Option<Raw> {
    let mut raw = [0; 16];
    memory.read_slice(&mut raw, GuestAddress(address)).ok()?;
    Some(raw)
}

/// Follows a chain descriptor by descriptor (2.7.5), and reports what is wrong with it.
fn walk(
    queue: &DeviceQueue,
    memory: &GuestMemoryMmap,
    head: u16,
    rules: Rules,
    report: &mut dyn FnMut(&'static str, String),
) -> Posted {
    let mut posted = Posted::default();
    let mut table = queue.layout.descriptors;
    let mut table_size = queue.size;
    let mut in_table = false;
    let mut index = u32::from(head);
    let mut count = 0;
    let mut total: u64 = 0;
    let mut seen_writable = false;
    loop {
        if index >= table_size {
            report(
                "VQ-05",
                format!("head {head}: descriptor {index} of {table_size}"),
            );
            break;
        }
        let place = table.wrapping_add(16 * u64::from(index));
        let Some(raw) = read_raw(memory, place) else {
            report(
                "GEN-31",
                format!("head {head}: a descriptor table at {table:#x} is not memory"),
            );
            break;
        };
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let flags = u16::from_le_bytes([f0, f1]);
        let next = u16::from_le_bytes([n0, n1]);
        posted.descriptors.push((place, raw));
        if memory_lacks(memory, address, len) {
            report(
                "GEN-31",
                format!("head {head}: {len} bytes at {address:#x} are not memory"),
            );
        }
        posted.ranges.push((address, len.into()));
        if flags & INDIRECT != 0 {
            if !rules.indirect {
                report(
                    "VQ-07",
                    format!("head {head}: INDIRECT without RING_INDIRECT_DESC"),
                );
            }
            if in_table {
                report(
                    "VQ-08",
                    format!("head {head}: INDIRECT in an indirect table"),
                );
                break;
            }
            if flags & NEXT != 0 {
                report("VQ-10", format!("head {head}: INDIRECT and NEXT together"));
            }
            if len == 0 || !len.is_multiple_of(16) {
                report(
                    "VQ-09",
                    format!("head {head}: an indirect table of {len} bytes"),
                );
                break;
            }
            table = address;
            table_size = len / 16;
            in_table = true;
            index = 0;
            continue;
        }
        count += 1;
        total += u64::from(len);
        if flags & WRITE != 0 {
            seen_writable = true;
            posted.writable += u64::from(len);
        } else if seen_writable {
            report(
                "VQ-03",
                format!("head {head}: a readable descriptor after a writable one"),
            );
        }
        if flags & NEXT == 0 {
            break;
        }
        if count >= queue.size {
            report(
                "VQ-09",
                format!(
                    "head {head}: more descriptors than the queue's {}",
                    queue.size
                ),
            );
            break;
        }
        index = next.into();
    }
    if total > 1 << 32 {
        report("VQ-05", format!("head {head}: {total} bytes in a chain"));
    }
    posted
}

fn memory_lacks(memory: &GuestMemoryMmap, address: u64, len: u32) -> bool {
    use vm_memory::GuestMemoryBackend;
    usize::try_from(len).map_or(true, |len| !memory.check_range(GuestAddress(address), len))
}

/// Returns whether two ranges share a byte.
pub(crate) fn overlap(one: Range, other: Range) -> bool {
    one.1 > 0
        && other.1 > 0
        && one.0 < other.0.saturating_add(other.1)
        && other.0 < one.0.saturating_add(one.1)
}
