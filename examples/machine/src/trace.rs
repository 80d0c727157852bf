//! What happened on a machine, in order: one sequence of numbers for devices and memory alike.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Something that happened on a machine.
///
/// `device` is the number of the device on its board, as [`DeviceHandle::index`](crate::DeviceHandle::index) says.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The driver took pages for itself and the device.
    PagesAllocated {
        /// Guest-physical address of the first page.
        address: u64,
        /// Number of pages.
        pages: usize,
    },
    /// The driver gave pages back.
    PagesFreed {
        /// Guest-physical address of the first page.
        address: u64,
        /// Number of pages.
        pages: usize,
    },
    /// The driver lent a buffer to the device.
    Shared {
        /// Guest-physical address that the device sees.
        address: u64,
        /// Length in bytes.
        len: usize,
        /// Whether the buffer lies outside of the machine's memory, so that a copy is lent.
        bounced: bool,
    },
    /// The driver took a lent buffer back.
    Unshared {
        /// Guest-physical address that the device saw.
        address: u64,
        /// Length in bytes.
        len: usize,
        /// Whether a copy had been lent.
        bounced: bool,
    },
    /// The driver asked for registers at a physical address.
    Mapped {
        /// Physical address of the first byte.
        address: u64,
        /// Length in bytes.
        size: usize,
    },
    /// The driver read the device status.
    StatusRead {
        /// The device.
        device: usize,
        /// What the device answered.
        value: u32,
    },
    /// The driver wrote a device status other than 0.
    StatusWrite {
        /// The device.
        device: usize,
        /// What the driver wrote.
        value: u32,
    },
    /// The driver wrote device status 0.
    Reset {
        /// The device.
        device: usize,
    },
    /// The driver accepted these features, low or high half.
    FeaturesWrite {
        /// The device.
        device: usize,
        /// All features accepted so far.
        value: u64,
    },
    /// The driver read from the device's configuration space.
    ConfigRead {
        /// The device.
        device: usize,
        /// Offset in bytes.
        offset: u64,
        /// Width in bytes.
        width: u8,
    },
    /// The driver wrote to the device's configuration space.
    ConfigWrite {
        /// The device.
        device: usize,
        /// Offset in bytes.
        offset: u64,
        /// Width in bytes.
        width: u8,
        /// What was written.
        value: u64,
    },
    /// The driver enabled a queue.
    QueueEnabled {
        /// The device.
        device: usize,
        /// The queue.
        queue: u16,
        /// Number of descriptors.
        size: u16,
    },
    /// The driver disabled a queue.
    QueueDisabled {
        /// The device.
        device: usize,
        /// The queue.
        queue: u16,
    },
    /// The driver rang the doorbell of a queue.
    Kick {
        /// The device.
        device: usize,
        /// The queue.
        queue: u16,
    },
    /// The device gave a chain of buffers back.
    Used {
        /// The device.
        device: usize,
        /// The queue.
        queue: u16,
        /// The `id` that the device wrote.
        id: u32,
        /// The `len` that the device wrote.
        len: u32,
    },
    /// The device raised its interrupt line, or would have if it was not raised already.
    Interrupt {
        /// The device.
        device: usize,
        /// 1: used buffers, 2: configuration change.
        cause: u8,
    },
    /// The driver acknowledged an interrupt.
    InterruptAcknowledged {
        /// The device.
        device: usize,
        /// What was acknowledged.
        cause: u32,
    },
    /// The device misbehaved on purpose.
    Fault {
        /// The device.
        device: usize,
        /// What it did.
        fault: crate::hostile::Fault,
    },
}

/// An [`Event`] with its place in the order of all events of the machine.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// Counts up by one from record to record.
    pub sequence: u64,
    /// What happened.
    pub event: Event,
}

#[derive(Debug, Default)]
struct Records {
    next: u64,
    kept: VecDeque<Record>,
}

/// The newest events of a machine.
#[derive(Debug, Default)]
pub struct Trace {
    /// How many records are kept; 0 switches the trace off.
    limit: AtomicUsize,
    records: Mutex<Records>,
}

impl Trace {
    /// Returns a trace that keeps the newest `limit` events.
    pub fn new(limit: usize) -> Self {
        Self {
            limit: AtomicUsize::new(limit),
            records: Mutex::default(),
        }
    }

    /// Changes how many events are kept. 0 switches the trace off.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
        let mut records = self.lock();
        while records.kept.len() > limit {
            records.kept.pop_front();
        }
    }

    /// Appends an event; the oldest one falls out when there are too many.
    pub fn push(&self, event: Event) {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == 0 {
            return;
        }
        let mut records = self.lock();
        let sequence = records.next;
        records.next += 1;
        if records.kept.len() >= limit {
            records.kept.pop_front();
        }
        records.kept.push_back(Record { sequence, event });
    }

    /// Returns the events kept, oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.lock().kept.iter().cloned().collect()
    }

    /// Forgets the events kept. The sequence goes on.
    pub fn clear(&self) {
        self.lock().kept.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
