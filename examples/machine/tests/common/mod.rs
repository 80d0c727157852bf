//! A driver in small, which does as the test says: right or wrong.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use machine::emulated::status;
use machine::{Board, Buffer};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags, next.
pub(crate) type Descriptor = (u64, u32, u16, u16);

/// Registers of the virtio-mmio slot at the board's beginning, version 2.
pub(crate) struct Driver<'a> {
    pub(crate) board: &'a Board,
    base: u64,
    pub(crate) queues: Vec<Queue>,
}

/// A queue, with its three parts in one page-aligned buffer.
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) memory: Buffer,
    pub(crate) avail: u16,
    pub(crate) used: u16,
}

impl Queue {
    pub(crate) fn descriptors(&self) -> u64 {
        self.memory.address()
    }
    pub(crate) fn driver(&self) -> u64 {
        self.memory.address() + 0x1000
    }
    pub(crate) fn device(&self) -> u64 {
        self.memory.address() + 0x2000
    }
}

impl<'a> Driver<'a> {
    pub(crate) fn new(board: &'a Board, slot: usize) -> Self {
        Self {
            board,
            base: board.mmio_slots()[slot].base as u64,
            queues: Vec::new(),
        }
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        self.read_width(offset, 4)
    }

    pub(crate) fn read_width(&self, offset: u64, width: u8) -> u32 {
        let value = self.board.machine().bus().read(self.base + offset, width);
        u32::try_from(value & ((1_u64 << (8 * width)) - 1)).unwrap()
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.write_width(offset, 4, value);
    }

    pub(crate) fn write_width(&self, offset: u64, width: u8, value: u32) {
        self.board
            .machine()
            .bus()
            .write(self.base + offset, width, value.into());
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// Resets the device and waits for it, a hundred times at most. Returns whether it is reset.
    pub(crate) fn reset(&self) -> bool {
        self.write(0x70, 0);
        (0..100).any(|_| self.status() == 0)
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
        self.write(0x24, 0);
        self.write(0x20, u32::from_le_bytes([a, b, c, d]));
        self.write(0x24, 1);
        self.write(0x20, u32::from_le_bytes([e, f, g, h]));
    }

    /// Goes by the book up to FEATURES_OK, and accepts those of `wanted` that are offered. Returns whether it stayed.
    pub(crate) fn negotiate(&self, wanted: u64) -> bool {
        assert_eq!(self.read(0), 0x7472_6976);
        assert_eq!(self.read(4), 2);
        assert_ne!(self.read(8), 0);
        if !self.reset() {
            return false;
        }
        self.write(0x70, status::ACKNOWLEDGE);
        self.write(0x70, status::ACKNOWLEDGE | status::DRIVER);
        let features = self.offered() & wanted;
        self.accept(features);
        let value = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(0x70, value);
        self.status() == value
    }

    /// Takes a queue into use. Returns whether the device has one of at least `size`.
    pub(crate) fn add_queue(&mut self, size: u16) -> bool {
        let index = u32::try_from(self.queues.len()).unwrap();
        self.write(0x30, index);
        assert_eq!(self.read(0x44), 0);
        if self.read(0x34) < size.into() {
            return false;
        }
        let memory = self.board.memory().buffer(0x3000).unwrap();
        let queue = Queue {
            size,
            memory,
            avail: 0,
            used: 0,
        };
        self.write(0x38, size.into());
        for (offset, address) in [
            (0x80, queue.descriptors()),
            (0x90, queue.driver()),
            (0xa0, queue.device()),
        ] {
            self.write(offset, u32::try_from(address).unwrap());
            self.write(offset + 4, 0);
        }
        self.write(0x44, 1);
        self.queues.push(queue);
        true
    }

    pub(crate) fn go(&self) {
        self.write(
            0x70,
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
        );
    }

    /// Goes by the book all the way, with `queues` queues of `size`.
    pub(crate) fn start(&mut self, wanted: u64, queues: usize, size: u16) {
        assert!(self.negotiate(wanted));
        for _ in 0..queues {
            assert!(self.add_queue(size));
        }
        self.go();
    }

    pub(crate) fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.board
            .memory()
            .guest()
            .write_obj(value, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn get<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.board
            .memory()
            .guest()
            .read_obj(GuestAddress(address))
            .unwrap()
    }

    pub(crate) fn descriptor(
        &self,
        table: u64,
        index: u16,
        (address, len, flags, next): Descriptor,
    ) {
        let place = table + 16 * u64::from(index);
        self.put(place, address);
        self.put(place + 8, len);
        self.put(place + 12, flags);
        self.put(place + 14, next);
    }

    /// Makes `head` available without a kick.
    pub(crate) fn post(&mut self, queue: usize, head: u16) {
        let entry = &self.queues[queue];
        let place = entry.driver() + 4 + 2 * u64::from(entry.avail % entry.size);
        let next = entry.avail.wrapping_add(1);
        let index = entry.driver() + 2;
        self.put(place, head);
        self.put(index, next);
        self.queues[queue].avail = next;
    }

    /// Writes descriptors from index 0 of a queue on, makes the first one available, and rings.
    pub(crate) fn send(&mut self, queue: usize, descriptors: &[Descriptor]) {
        let table = self.queues[queue].descriptors();
        for (index, descriptor) in (0..).zip(descriptors) {
            self.descriptor(table, index, *descriptor);
        }
        self.post(queue, 0);
        self.kick(queue);
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.write(0x50, u32::try_from(queue).unwrap());
    }

    /// Returns the used index.
    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.get(self.queues[queue].device() + 2)
    }

    /// Returns id and length in a slot of the used ring.
    pub(crate) fn used(&self, queue: usize, slot: u16) -> (u32, u32) {
        let place = self.queues[queue].device() + 4 + 8 * u64::from(slot);
        (self.get(place), self.get(place + 4))
    }

    /// Returns the ids of all violations so far, each once, and forgets them.
    pub(crate) fn violations(&self) -> Vec<&'static str> {
        let mut ids: Vec<_> = self
            .board
            .take_violations()
            .iter()
            .map(|violation| violation.id)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Returns a block request's buffer: header, 512 bytes, status; and its descriptors for a read.
    pub(crate) fn block_read(&self, sector: u64) -> (Arc<Buffer>, [Descriptor; 3]) {
        let buffer = self.board.memory().buffer(1024).unwrap();
        let at = buffer.address();
        self.put(at, 0_u64);
        self.put(at + 8, sector);
        self.put(at + 1000, 0xff_u8);
        let descriptors = [
            (at, 16, NEXT, 1),
            (at + 16, 512, NEXT | WRITE, 2),
            (at + 1000, 1, WRITE, 0),
        ];
        (Arc::new(buffer), descriptors)
    }
}
