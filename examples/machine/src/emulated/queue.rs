//! The device side of a virtqueue, on rust-vmm's `virtio-queue`.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The largest size that a split virtqueue may have (2.7).
pub(crate) const LARGEST: u16 = 32768;

/// A piece of memory that a descriptor names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) len: u32,
}

/// A chain of buffers that the driver has made available.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Vec<Piece>,
    pub(crate) writable: Vec<Piece>,
}

impl Chain {
    pub(crate) fn readable_len(&self) -> u64 {
        self.readable.iter().map(|piece| u64::from(piece.len)).sum()
    }

    pub(crate) fn writable_len(&self) -> u64 {
        self.writable.iter().map(|piece| u64::from(piece.len)).sum()
    }

    /// Reads what the driver wrote from `offset` on, and returns how many bytes there were.
    pub(crate) fn read(&self, memory: &GuestMemoryMmap, offset: u64, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for (address, len) in span(&self.readable, offset, bytes.len()) {
            let part = &mut bytes[done..done + len];
            if memory.read_slice(part, GuestAddress(address)).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Writes `bytes` for the driver from `offset` on, and returns how many found room.
    pub(crate) fn write(&self, memory: &GuestMemoryMmap, offset: u64, bytes: &[u8]) -> usize {
        let mut done = 0;
        for (address, len) in span(&self.writable, offset, bytes.len()) {
            let part = &bytes[done..done + len];
            if memory.write_slice(part, GuestAddress(address)).is_err() {
                break;
            }
            done += len;
        }
        done
    }
}

/// Returns where the `len` bytes from `offset` on are, as far as the pieces go.
fn span(pieces: &[Piece], mut offset: u64, mut len: usize) -> impl Iterator<Item = (u64, usize)> {
    pieces.iter().filter_map(move |piece| {
        let size = u64::from(piece.len);
        if offset >= size {
            offset -= size;
            return None;
        }
        let here = usize::try_from(size - offset).map_or(len, |rest| rest.min(len));
        let address = piece.address.wrapping_add(offset);
        offset = 0;
        len -= here;
        (here > 0).then_some((address, here))
    })
}

/// Where the three parts of a virtqueue are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Layout {
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
}

/// A virtqueue of a device.
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    /// What the driver has chosen; not checked before the queue is enabled.
    pub(crate) size: u32,
    pub(crate) layout: Layout,
    /// Alignment of the used ring, on legacy devices.
    pub(crate) align: u32,
    /// Page number, on legacy devices.
    pub(crate) page: u32,
    /// `Some` exactly while the queue is enabled and its size and addresses are fit for use.
    pub(crate) live: Option<Queue>,
    /// Whether the driver has enabled it.
    pub(crate) enabled: bool,
    /// The driver has rung, and the device has not looked yet.
    pub(crate) kicked: bool,
    /// Completions since the driver was last told.
    pub(crate) untold: u32,
    /// Id of the last completion.
    pub(crate) last_id: u32,
}

impl DeviceQueue {
    pub(crate) fn new() -> Self {
        Self {
            size: 0,
            layout: Layout::default(),
            align: 0,
            page: 0,
            live: None,
            enabled: false,
            kicked: false,
            untold: 0,
            last_id: 0,
        }
    }

    /// Takes the queue into use as the driver has described it. Returns what is wrong with it, if anything.
    pub(crate) fn enable(&mut self, event_idx: bool) -> Result<(), &'static str> {
        self.enabled = true;
        let size = u16::try_from(self.size).map_err(|_| "size is more than 16 bits")?;
        if size == 0 || size > LARGEST || !size.is_power_of_two() {
            return Err("size is not a power of two up to 32768");
        }
        let mut queue = Queue::new(LARGEST).map_err(|_| "size is refused")?;
        queue.set_size(size);
        queue
            .try_set_desc_table_address(GuestAddress(self.layout.descriptors))
            .map_err(|_| "descriptor table is not aligned to 16 bytes")?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.layout.driver))
            .map_err(|_| "available ring is not aligned to 2 bytes")?;
        queue
            .try_set_used_ring_address(GuestAddress(self.layout.device))
            .map_err(|_| "used ring is not aligned to 4 bytes")?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        self.live = Some(queue);
        Ok(())
    }

    /// Works out the legacy layout (2.7.2): descriptors, then the available ring, then the used ring at the next multiple of
    /// `align`.
    pub(crate) fn place_legacy(&mut self, page_size: u32) {
        let size = u64::from(self.size);
        let align = u64::from(self.align.max(1));
        let descriptors = u64::from(self.page) * u64::from(page_size);
        let driver = descriptors.wrapping_add(16 * size);
        let end = driver.wrapping_add(6 + 2 * size);
        self.layout = Layout {
            descriptors,
            driver,
            device: end.div_ceil(align).wrapping_mul(align),
        };
    }

    /// Returns the ranges of memory that the rings take.
    pub(crate) fn rings(&self) -> [(u64, u64); 3] {
        let size = u64::from(self.size);
        [
            (self.layout.descriptors, 16 * size),
            (self.layout.driver, 6 + 2 * size),
            (self.layout.device, 6 + 8 * size),
        ]
    }

    /// Takes the next chain that the driver has made available.
    pub(crate) fn pop(&mut self, memory: &GuestMemoryMmap) -> Option<Chain> {
        let chain = self.live.as_mut()?.pop_descriptor_chain(memory)?;
        let mut taken = Chain {
            head: chain.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        for descriptor in chain {
            let piece = Piece {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                taken.writable.push(piece);
            } else {
                taken.readable.push(piece);
            }
        }
        Some(taken)
    }

    /// Gives a chain back, of which `len` bytes were written.
    pub(crate) fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) {
        if let Some(queue) = self.live.as_mut() {
            // A ring outside of memory is the driver's fault, and has been noted when the queue was enabled.
            let _ = queue.add_used(memory, head, len);
            self.untold += 1;
            self.last_id = head.into();
        }
    }

    /// Writes a used element as it is told, and lets the used index go on by `step`.
    pub(crate) fn complete_raw(&mut self, memory: &GuestMemoryMmap, id: u32, len: u32, step: u16) {
        let Some(queue) = self.live.as_mut() else {
            return;
        };
        let used = queue.next_used();
        let slot = self
            .layout
            .device
            .wrapping_add(4 + 8 * u64::from(used % queue.size()));
        let element = u64::from(id) | u64::from(len) << 32;
        // As in `complete`.
        let _ = memory.write_obj(element.to_le(), GuestAddress(slot));
        let next = used.wrapping_add(step);
        queue.set_next_used(next);
        let _ = memory.store(
            next.to_le(),
            GuestAddress(self.layout.device.wrapping_add(2)),
            Ordering::Release,
        );
        self.untold += 1;
        self.last_id = id;
    }

    /// Returns the driver's available index.
    pub(crate) fn avail_index(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        let queue = self.live.as_ref()?;
        Some(queue.avail_idx(memory, Ordering::Acquire).ok()?.0)
    }

    /// Returns the available index up to which the device has taken chains.
    pub(crate) fn taken_index(&self) -> Option<u16> {
        self.live.as_ref().map(Queue::next_avail)
    }

    /// Returns the head in slot `index` of the available ring.
    pub(crate) fn avail_head(&self, memory: &GuestMemoryMmap, index: u16) -> Option<u16> {
        let size = self.live.as_ref()?.size();
        load(
            memory,
            self.layout
                .driver
                .wrapping_add(4 + 2 * u64::from(index % size)),
        )
    }

    /// Returns the flags of the available ring.
    pub(crate) fn avail_flags(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        load(memory, self.layout.driver)
    }

    /// Returns the flags of the used ring, which the device wrote.
    pub(crate) fn used_flags(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        load(memory, self.layout.device)
    }

    /// Returns `avail_event`, which the device wrote.
    pub(crate) fn avail_event(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        load(
            memory,
            self.layout
                .device
                .wrapping_add(4 + 8 * u64::from(self.live.as_ref()?.size())),
        )
    }

    /// Asks the driver to ring for every further chain, or not to.
    pub(crate) fn ask_for_kicks(&mut self, memory: &GuestMemoryMmap, wanted: bool) {
        if let Some(queue) = self.live.as_mut() {
            let _ = if wanted {
                queue.enable_notification(memory).map(drop)
            } else {
                queue.disable_notification(memory)
            };
        }
    }

    /// Returns whether the driver wants to hear of what was completed since it was last told.
    pub(crate) fn driver_wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> bool {
        if self.untold == 0 {
            return false;
        }
        self.untold = 0;
        let flags = self.avail_flags(memory).unwrap_or(0);
        let Some(queue) = self.live.as_mut() else {
            return false;
        };
        let wanted = queue.needs_notification(memory).unwrap_or(true);
        if queue.event_idx_enabled() {
            wanted
        } else {
            flags & 1 == 0
        }
    }
}

fn load(memory: &GuestMemoryMmap, address: u64) -> Option<u16> {
    memory
        .load::<u16>(GuestAddress(address), Ordering::Acquire)
        .ok()
        .map(u16::from_le)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cross_pieces_and_end_with_them() {
        let pieces = [
            Piece {
                address: 100,
                len: 4,
            },
            Piece {
                address: 200,
                len: 2,
            },
            Piece {
                address: 300,
                len: 8,
            },
        ];
        let found: Vec<_> = span(&pieces, 3, 6).collect();
        assert_eq!(found, [(103, 1), (200, 2), (300, 3)]);
        assert_eq!(span(&pieces, 12, 100).collect::<Vec<_>>(), [(306, 2)]);
        assert_eq!(span(&pieces, 14, 1).count(), 0);
    }

    #[test]
    fn legacy_rings_follow_one_another_with_the_used_ring_aligned() {
        let mut queue = DeviceQueue::new();
        queue.size = 16;
        queue.align = 4096;
        queue.page = 0x40001;
        queue.place_legacy(4096);
        assert_eq!(queue.layout.descriptors, 0x4000_1000);
        assert_eq!(queue.layout.driver, 0x4000_1100);
        assert_eq!(queue.layout.device, 0x4000_2000);
    }
}
