//! The split virtqueue's three areas as they lie in shared memory, and the barriers between them.
//!
//! VirtIO 1.3, 2.7: descriptor table, available ring and used ring, all little-endian. The used
//! ring starts on a page of its own, which the legacy layout (2.7.2) asks for and the modern one
//! permits, so there is one layout.

use core::sync::atomic::{AtomicU16, Ordering, fence};

use axdriver_base::DevResult;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::dma::Dma;

/// The size of a descriptor, in bytes.
const DESCRIPTOR: usize = 16;
/// The buffer continues in the descriptor that `next` names.
pub(super) const NEXT: u16 = 1;
/// The device may write to the buffer.
pub(super) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;
/// `flags` of the available ring: the driver wants no used-buffer notifications.
const NO_INTERRUPT: u16 = 1;
/// `flags` of the used ring: the device wants no available-buffer notifications.
const NO_NOTIFY: u16 = 1;

/// A descriptor, as the driver writes it.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) paddr: PhysAddr,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// Writes a descriptor into the table that starts at `table` in `memory`.
pub(super) fn write_descriptor<H: Hal>(
    memory: &Dma<H>,
    table: usize,
    index: u16,
    descriptor: Descriptor,
) {
    let at = table + usize::from(index) * DESCRIPTOR;
    memory.store_le64(at, descriptor.paddr);
    memory.store_le32(at + 8, descriptor.len);
    memory.store_le16(at + 12, descriptor.flags);
    memory.store_le16(at + 14, descriptor.next);
}

/// Returns the size in bytes of a table of `descriptors`.
pub(super) const fn table_len(descriptors: usize) -> usize {
    descriptors * DESCRIPTOR
}

/// Returns where the used ring starts in rings of `size` entries: on the first page boundary
/// behind the available ring, which has flags, idx, ring\[size\] and used_event.
const fn used_offset(size: u16) -> usize {
    let size = size as usize;
    (size * DESCRIPTOR + 2 * (size + 3)).next_multiple_of(PAGE_SIZE)
}

/// The rings of one queue, in memory of their own.
pub(super) struct Rings<H: Hal> {
    memory: Dma<H>,
    /// The size for which there is room: a power of two, at most 32768.
    most: u16,
    /// The number of entries of each area: a power of two, at most `most`.
    size: u16,
    /// Whether VIRTIO_F_ORDER_PLATFORM was accepted: barriers must reach hardware devices.
    order_platform: bool,
}

impl<H: Hal> Rings<H> {
    /// Allocates room for rings of `most` entries.
    pub(super) fn new(most: u16) -> DevResult<Self> {
        // 2.7: flags, idx, ring[size] of 8 bytes, avail_event.
        let end = used_offset(most) + 6 + 8 * usize::from(most);
        Ok(Self {
            memory: Dma::new(end, BufferDirection::Both)?,
            most,
            size: most,
            order_platform: false,
        })
    }

    /// Makes the rings as new, with `size` entries, a power of two that is at most
    /// [`most`](Self::most), for a device that has been reset.
    pub(super) fn clear(&mut self, size: u16, order_platform: bool) {
        self.memory.zero(0, self.memory.len());
        self.size = size;
        self.order_platform = order_platform;
    }

    pub(super) fn most(&self) -> u16 {
        self.most
    }

    /// Never gives the memory back.
    pub(super) fn keep(&mut self) {
        self.memory.keep();
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses of the descriptor table, the available ring and the used ring.
    pub(super) fn paddrs(&self) -> [PhysAddr; 3] {
        [0, self.available(), self.used()].map(|offset| self.memory.paddr(offset))
    }

    pub(super) fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        write_descriptor(&self.memory, 0, index, descriptor);
    }

    fn available(&self) -> usize {
        usize::from(self.size) * DESCRIPTOR
    }

    fn used(&self) -> usize {
        used_offset(self.size)
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Enters a chain into the available ring, where the device looks once `index` is published.
    pub(super) fn write_available(&self, index: u16, head: u16) {
        self.memory
            .store_le16(self.available() + 4 + 2 * self.slot(index), head);
    }

    /// Publishes all entries before `index`.
    pub(super) fn publish(&self, index: u16) {
        // 2.7.13.3.1: a barrier before the index, so that the device sees the entries first.
        self.platform_fence();
        self.memory
            .u16(self.available() + 2)
            .store(index.to_le(), Ordering::Release);
    }

    /// Orders everything before against everything after, as 2.7.13.4.1 asks for between the
    /// index and the device's wishes about notifications.
    pub(super) fn full_fence(&self) {
        fence(Ordering::SeqCst);
        self.platform_fence();
    }

    /// 6.1: with VIRTIO_F_ORDER_PLATFORM, barriers must be those for hardware devices.
    fn platform_fence(&self) {
        if self.order_platform {
            super::barrier::platform();
        }
    }

    /// Returns the index that the device publishes: all entries before it are used.
    pub(super) fn used_index(&self) -> u16 {
        // 2.7.14: a read barrier between the index and the entries.
        let index = u16::from_le(self.memory.u16(self.used() + 2).load(Ordering::Acquire));
        self.platform_fence();
        index
    }

    /// Returns the `id` and the `len` of a used entry, as the device wrote them.
    pub(super) fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = self.used() + 4 + 8 * self.slot(index);
        (self.memory.load_le32(at), self.memory.load_le32(at + 4))
    }

    /// Returns whether the device asks not to be notified (without VIRTIO_F_EVENT_IDX).
    pub(super) fn no_notify(&self) -> bool {
        u16::from_le(self.memory.u16(self.used()).load(Ordering::Relaxed)) & NO_NOTIFY != 0
    }

    /// Returns the index after which the device wants to be notified (with VIRTIO_F_EVENT_IDX).
    pub(super) fn avail_event(&self) -> u16 {
        let at = self.used() + 4 + 8 * usize::from(self.size);
        u16::from_le(self.memory.u16(at).load(Ordering::Relaxed))
    }

    /// Asks for notifications or silences them (without VIRTIO_F_EVENT_IDX).
    pub(super) fn set_no_interrupt(&self, silent: bool) {
        let flags: u16 = if silent { NO_INTERRUPT } else { 0 };
        self.memory.store_le16(self.available(), flags);
    }

    /// Sets the index after which the driver wants to be notified (with VIRTIO_F_EVENT_IDX).
    pub(super) fn set_used_event(&self, index: u16) {
        let used_event: &AtomicU16 = self
            .memory
            .u16(self.available() + 4 + 2 * usize::from(self.size));
        used_event.store(index.to_le(), Ordering::Relaxed);
    }
}
