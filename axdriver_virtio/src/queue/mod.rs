//! The split virtqueue (VirtIO 1.3, 2.7).
//!
//! Adding, publishing and kicking are three steps, so that a batch costs one notification. What
//! the queue knows of its descriptors it keeps to itself, in `slots`: the device's word is checked
//! against that, and nothing is ever read back from memory that the device can write but the used
//! ring. After construction there is no allocation.
//!
//! Unsafe code here is one function, `add`, whose caller answers for the memory in the chain.

mod barrier;
#[cfg(test)]
mod depth;
mod ring;
#[cfg(test)]
mod tests;

use axdriver_base::{DevError, DevResult};
use log::error;
use virtio_drivers::{BufferDirection, Hal, PhysAddr, transport::Transport};

use self::ring::{Descriptor, INDIRECT, NEXT, Rings, WRITE, table_len, write_descriptor};
use crate::{dma::Dma, lifecycle::Features};

/// The most descriptors in an indirect table: a header, data and a status need three.
const INDIRECT_LEN: u16 = 4;

/// A piece of memory that the device can reach.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) paddr: PhysAddr,
    /// In bytes; not 0.
    pub(crate) len: u32,
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Used {
    /// What [`VirtQueue::add`] returned for the chain. Less than the queue's size.
    pub(crate) token: u16,
    /// How many bytes the device wrote: at most as many as the chain let it write.
    pub(crate) len: u32,
}

/// The device said what cannot be true. The queue is of no use until the device is reset.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Lie;

/// Why a chain was not added. Nothing has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum AddError {
    /// Too few free descriptors now; there will be more when chains come back.
    Full,
    /// Empty, longer than the queue, or over 4 GiB in all: such a chain never fits.
    Invalid,
}

impl From<AddError> for DevError {
    fn from(error: AddError) -> Self {
        match error {
            AddError::Full => DevError::Again,
            AddError::Invalid => DevError::InvalidParam,
        }
    }
}

/// What the driver knows of a descriptor.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The descriptor after this one, in its chain or in the free list.
    next: u16,
    /// The number of descriptors in the chain that starts here and is with the device, else 0.
    chain: u16,
    /// How many bytes of that chain the device may write.
    writable: u32,
}

/// A queue of at most `N` descriptors.
pub(crate) struct VirtQueue<H: Hal, const N: usize> {
    rings: Rings<H>,
    /// One table of `INDIRECT_LEN` descriptors for each slot.
    tables: Option<Dma<H>>,
    /// The queue's number on its device.
    index: u16,
    features: Features,
    legacy: bool,
    slots: [Slot; N],
    /// The first of `free` free descriptors, which are linked by `next`.
    free_head: u16,
    free: u16,
    /// The index of the next entry of the available ring.
    next_available: u16,
    /// The index that the device knows.
    published: u16,
    /// The index up to which the device has been notified, or did not want to be.
    kicked: u16,
    /// The index of the next entry of the used ring.
    next_used: u16,
    /// The number of chains that the device knows and has not given back.
    in_flight: u16,
    /// Whether the driver wants used-buffer notifications.
    notifications: bool,
}

impl<H: Hal, const N: usize> VirtQueue<H, N> {
    /// Allocates memory for the queue number `index` of its device.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `N` is 0.
    /// * [`DevError::NoMemory`]: the HAL has no memory for the rings.
    pub(crate) fn new(index: u16) -> DevResult<Self> {
        let most = Self::choose_size(u32::MAX).ok_or(DevError::InvalidParam)?;
        Ok(Self {
            rings: Rings::new(most)?,
            tables: None,
            index,
            features: Features::empty(),
            legacy: false,
            slots: [Slot::default(); N],
            free_head: 0,
            free: 0,
            next_available: 0,
            published: 0,
            kicked: 0,
            next_used: 0,
            in_flight: 0,
            notifications: false,
        })
    }

    /// Returns the largest power of two that is at most `max_size`, at most `N` and at most 32768.
    fn choose_size(max_size: u32) -> Option<u16> {
        let limit = u32::try_from(N).unwrap_or(u32::MAX).min(1 << 15);
        let largest = max_size.min(limit).checked_ilog2()?;
        Some(1 << largest)
    }

    /// Makes the queue as new, with at least `min_size` descriptors, and tells the device where it
    /// is: one that has been reset and accepted `features`, and is not live yet.
    ///
    /// # Errors
    ///
    /// * [`DevError::Unsupported`]: the device offers too few descriptors, or a legacy device
    ///   cannot reach the rings.
    /// * [`DevError::BadState`]: the queue is in use already.
    /// * [`DevError::NoMemory`]: the HAL has no memory for indirect tables.
    pub(crate) fn start<T: Transport>(
        &mut self,
        transport: &mut T,
        features: Features,
        min_size: u16,
    ) -> DevResult {
        let offered = transport.max_queue_size(self.index);
        let size = Self::choose_size(offered).unwrap_or(0);
        if size < min_size {
            error!(
                "queue {}: {offered} entries offered, {min_size} needed",
                self.index
            );
            return Err(DevError::Unsupported);
        }
        if features.contains(Features::RING_INDIRECT_DESC) && self.tables.is_none() {
            let len = table_len(usize::from(self.rings.most()) * usize::from(INDIRECT_LEN));
            self.tables = Some(Dma::new(len, BufferDirection::DriverToDevice)?);
        }
        self.clear(size, features, transport.requires_legacy_layout());
        self.activate(transport)
    }

    fn clear(&mut self, size: u16, features: Features, legacy: bool) {
        self.rings
            .clear(size, features.contains(Features::ORDER_PLATFORM));
        self.features = features;
        self.legacy = legacy;
        self.slots = [Slot::default(); N];
        for (slot, next) in self.slots.iter_mut().zip(1..=u16::MAX) {
            slot.next = next;
        }
        self.free_head = 0;
        self.free = size;
        self.next_available = 0;
        self.published = 0;
        self.kicked = 0;
        self.next_used = 0;
        self.in_flight = 0;
        self.silence();
    }

    fn activate<T: Transport>(&self, transport: &mut T) -> DevResult {
        if transport.queue_used(self.index) {
            error!("queue {}: in use already", self.index);
            return Err(DevError::BadState);
        }
        let [descriptors, available, used] = self.rings.paddrs();
        // 4.2.4: a legacy device is told the number of the first page, in 32 bits.
        if self.legacy && used >> (32 + 12) != 0 {
            error!(
                "queue {}: {used:#x} is out of a legacy device's reach",
                self.index
            );
            return Err(DevError::Unsupported);
        }
        let size = u32::from(self.rings.size());
        transport.queue_set(self.index, size, descriptors, available, used);
        Ok(())
    }

    /// Never gives the queue's memory back: the device may still use it.
    pub(crate) fn keep(&mut self) {
        self.rings.keep();
        if let Some(tables) = &mut self.tables {
            tables.keep();
        }
    }

    /// Returns the number of descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.rings.size()
    }

    /// Returns where the device finds the queue.
    #[cfg(feature = "net")]
    pub(crate) fn paddr(&self) -> PhysAddr {
        self.rings.paddrs()[0]
    }

    /// Returns how many descriptors are free.
    #[cfg(any(feature = "net", test))]
    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    /// Enters a chain: what the device reads, then what it writes. The device does not know of it
    /// until [`publish`](Self::publish).
    ///
    /// # Safety
    ///
    /// The segments must be valid for the device, and the program must not write to `readable`
    /// nor access `writable` but atomically, until the chain is returned by [`pop`](Self::pop) or
    /// the device has been reset.
    pub(crate) unsafe fn add(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<u16, AddError> {
        let count = readable.len() + writable.len();
        let total = |segments: &[Segment]| {
            segments
                .iter()
                .try_fold(0_u32, |sum, segment| sum.checked_add(segment.len))
        };
        let writable_len = total(writable).ok_or(AddError::Invalid)?;
        // 2.7.5.2: at most 4 GiB in a chain. 2.7.5.3.1: no longer than the queue, also if indirect.
        total(readable)
            .and_then(|len| len.checked_add(writable_len))
            .ok_or(AddError::Invalid)?;
        let count = u16::try_from(count).map_err(|_| AddError::Invalid)?;
        if count == 0 || count > self.size() {
            return Err(AddError::Invalid);
        }

        let segments = readable
            .iter()
            .map(|&segment| (segment, 0))
            .chain(writable.iter().map(|&segment| (segment, WRITE)));
        let head = self.free_head;
        let chain = match &self.tables {
            Some(tables) if self.indirect_pays(count) => {
                if self.free == 0 {
                    return Err(AddError::Full);
                }
                let table = table_len(usize::from(head) * usize::from(INDIRECT_LEN));
                for ((Segment { paddr, len }, flags), index) in segments.zip(0..) {
                    let flags = flags | if index + 1 < count { NEXT } else { 0 };
                    let next = if index + 1 < count { index + 1 } else { 0 };
                    let descriptor = Descriptor {
                        paddr,
                        len,
                        flags,
                        next,
                    };
                    write_descriptor(tables, table, index, descriptor);
                }
                let descriptor = Descriptor {
                    paddr: tables.paddr(table),
                    len: u32::from(count) * 16,
                    flags: INDIRECT,
                    next: 0,
                };
                self.rings.write_descriptor(head, descriptor);
                self.free_head = self.slot(head).next;
                1
            }
            _ => {
                if self.free < count {
                    return Err(AddError::Full);
                }
                let mut index = head;
                for ((Segment { paddr, len }, flags), position) in segments.zip(1..) {
                    let following = self.slot(index).next;
                    let last = position == count;
                    let descriptor = Descriptor {
                        paddr,
                        len,
                        flags: flags | if last { 0 } else { NEXT },
                        next: if last { 0 } else { following },
                    };
                    self.rings.write_descriptor(index, descriptor);
                    index = following;
                }
                self.free_head = index;
                count
            }
        };
        self.free -= chain;
        let slot = self.slot_mut(head);
        slot.chain = chain;
        slot.writable = writable_len;
        self.rings.write_available(self.next_available, head);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// Returns whether a table is better than `count` descriptors of the ring: the device has to
    /// fetch it, so only where the ring would have no room for another chain like it.
    fn indirect_pays(&self, count: u16) -> bool {
        self.features.contains(Features::RING_INDIRECT_DESC)
            && (2..=INDIRECT_LEN).contains(&count)
            && self.free / 2 < count
    }

    fn slot(&self, index: u16) -> Slot {
        self.slots
            .get(usize::from(index))
            .copied()
            .unwrap_or_default()
    }

    fn slot_mut(&mut self, index: u16) -> &mut Slot {
        // Indices come from the free list or were checked by `pop`; both are less than the size,
        // which is at most `N`.
        &mut self.slots[usize::from(index)]
    }

    /// Shows the device all chains that were added.
    pub(crate) fn publish(&mut self) {
        let added = self.next_available.wrapping_sub(self.published);
        if added != 0 {
            self.rings.publish(self.next_available);
            self.published = self.next_available;
            self.in_flight += added;
        }
    }

    /// Returns whether the device wants to hear of what was published since the last call.
    ///
    /// 2.7.10.1 and 2.7.10: with VIRTIO_F_EVENT_IDX, whether the published indices passed
    /// `avail_event`, in arithmetic modulo 2^16; else the flag.
    pub(crate) fn should_kick(&mut self) -> bool {
        let (new, old) = (self.published, self.kicked);
        if new == old {
            return false;
        }
        // 2.7.13.4.1: a full barrier before reading the device's wish, or a kick can be lost.
        self.rings.full_fence();
        self.kicked = new;
        if self.features.contains(Features::RING_EVENT_IDX) {
            let event = self.rings.avail_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            !self.rings.no_notify()
        }
    }

    /// Publishes what was added, and notifies the device if it wants to be.
    pub(crate) fn submit<T: Transport>(&mut self, transport: &mut T) {
        self.publish();
        if self.should_kick() {
            transport.notify(self.index);
        }
    }

    /// Returns whether the device has used chains that are still to be popped.
    pub(crate) fn has_used(&self) -> bool {
        self.rings.used_index() != self.next_used
    }

    /// Takes back the next chain that the device has used.
    ///
    /// # Errors
    ///
    /// [`Lie`]: the index, the id or the length cannot be true. Nothing has changed, and the
    /// device must be reset.
    pub(crate) fn pop(&mut self) -> Result<Option<Used>, Lie> {
        let pending = self.rings.used_index().wrapping_sub(self.next_used);
        if pending == 0 {
            return Ok(None);
        }
        if pending > self.in_flight {
            error!(
                "queue {}: {pending} chains used, {} are with the device",
                self.index, self.in_flight
            );
            return Err(Lie);
        }
        let (id, len) = self.rings.used_entry(self.next_used);
        let token = u16::try_from(id)
            .ok()
            .filter(|&id| id < self.size() && self.slot(id).chain != 0);
        let Some(token) = token else {
            error!(
                "queue {}: chain {id} used, which is not in flight",
                self.index
            );
            return Err(Lie);
        };
        let Slot {
            chain, writable, ..
        } = self.slot(token);
        // 2.7.8.2: what a legacy device says of the length is not to be relied on.
        let len = if self.legacy { len.min(writable) } else { len };
        if len > writable {
            error!(
                "queue {}: {len} bytes written to chain {token} of {writable}",
                self.index
            );
            return Err(Lie);
        }

        let mut last = token;
        for _ in 1..chain {
            last = self.slot(last).next;
        }
        let free_head = self.free_head;
        self.slot_mut(last).next = free_head;
        self.slot_mut(token).chain = 0;
        self.free_head = token;
        self.free += chain;
        self.in_flight -= 1;
        self.next_used = self.next_used.wrapping_add(1);
        if self.notifications && self.features.contains(Features::RING_EVENT_IDX) {
            self.rings.set_used_event(self.next_used);
        }
        Ok(Some(Used { token, len }))
    }

    /// Asks for a notification for each chain that is used from now on, and returns whether some
    /// came back before the device could know: they will not be notified.
    pub(crate) fn listen(&mut self) -> bool {
        self.notifications = true;
        if self.features.contains(Features::RING_EVENT_IDX) {
            self.rings.set_used_event(self.next_used);
        } else {
            self.rings.set_no_interrupt(false);
        }
        // 2.7.7: what is used between the last look and the wish is not notified; so look again.
        self.rings.full_fence();
        self.has_used()
    }

    /// Returns whether the driver asked for notifications.
    #[cfg(any(feature = "block", feature = "gpu"))]
    pub(crate) fn is_listening(&self) -> bool {
        self.notifications
    }

    /// Asks for no notifications. One may still come.
    pub(crate) fn silence(&mut self) {
        self.notifications = false;
        if self.features.contains(Features::RING_EVENT_IDX) {
            // An index that was passed just now comes round again after 2^16 chains.
            self.rings.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.rings.set_no_interrupt(true);
        }
    }
}
