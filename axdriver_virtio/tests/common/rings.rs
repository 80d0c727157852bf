//! What is in the rings when the driver rings the doorbell, read by somebody who is not the device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use machine::{Board, Memory};
use vm_memory::{Bytes, GuestAddress};

use super::tap::{Access, Tap};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor, as the driver wrote it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    /// What it holds, if it is for the device to read: at most the first 4096 bytes.
    pub(crate) bytes: Vec<u8>,
}

impl Part {
    pub(crate) fn is_writable(&self) -> bool {
        self.flags & WRITE != 0
    }
}

/// A chain that was made available.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Chain {
    pub(crate) queue: u32,
    pub(crate) head: u16,
    /// The flags of the descriptor of the ring that names the table, if there is a table.
    pub(crate) indirect: Option<u16>,
    /// The descriptors, in the ring or in the table.
    pub(crate) parts: Vec<Part>,
}

impl Chain {
    /// What the device can read, in one piece.
    pub(crate) fn readable(&self) -> Vec<u8> {
        self.parts
            .iter()
            .flat_map(|part| part.bytes.clone())
            .collect()
    }

    pub(crate) fn readable_len(&self) -> u64 {
        let readable = self.parts.iter().filter(|part| !part.is_writable());
        readable.map(|part| u64::from(part.len)).sum()
    }

    pub(crate) fn writable_len(&self) -> u64 {
        let writable = self.parts.iter().filter(|part| part.is_writable());
        writable.map(|part| u64::from(part.len)).sum()
    }
}

/// A queue as the driver has described it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tapped {
    pub(crate) size: u32,
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    /// The available index up to which it was read.
    seen: u16,
}

#[derive(Default)]
struct Seen {
    selected: u32,
    queues: BTreeMap<u32, Tapped>,
    chains: Vec<Chain>,
    /// The flags of the available ring at each doorbell.
    flags: Vec<u16>,
}

/// Looks into the rings at each doorbell, until it is dropped.
pub(crate) struct Rings {
    memory: Arc<Memory>,
    seen: Arc<Mutex<Seen>>,
    pub(crate) tap: Tap,
}

impl Rings {
    pub(crate) fn install(board: &Board) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let memory = board.memory().clone();
        let base = board.mmio_slots()[0].base as u64;
        let tap = {
            let (seen, memory) = (seen.clone(), memory.clone());
            Tap::install(board, move |access: &Access| {
                if access.write {
                    let offset = access.address.wrapping_sub(base);
                    seen.lock().unwrap().write(&memory, offset, access.value);
                }
                None
            })
        };
        Self { memory, seen, tap }
    }

    /// Returns the chains that were made available up to the last doorbell, since the last call.
    pub(crate) fn take(&self) -> Vec<Chain> {
        std::mem::take(&mut self.seen.lock().unwrap().chains)
    }

    /// Returns the flags of the available ring at each doorbell since the last call.
    pub(crate) fn take_flags(&self) -> Vec<u16> {
        std::mem::take(&mut self.seen.lock().unwrap().flags)
    }

    pub(crate) fn queue(&self, queue: u32) -> Tapped {
        self.seen.lock().unwrap().queues[&queue]
    }

    pub(crate) fn available_flags(&self, queue: u32) -> u16 {
        load(&self.memory, self.queue(queue).driver)
    }

    pub(crate) fn available_index(&self, queue: u32) -> u16 {
        load(&self.memory, self.queue(queue).driver + 2)
    }

    pub(crate) fn used_event(&self, queue: u32) -> u16 {
        let Tapped { driver, size, .. } = self.queue(queue);
        load(&self.memory, driver + 4 + 2 * u64::from(size))
    }

    pub(crate) fn set_used_flags(&self, queue: u32, flags: u16) {
        store(&self.memory, self.queue(queue).device, flags);
    }

    pub(crate) fn set_avail_event(&self, queue: u32, index: u16) {
        let Tapped { device, size, .. } = self.queue(queue);
        store(&self.memory, device + 4 + 8 * u64::from(size), index);
    }
}

fn load(memory: &Memory, address: u64) -> u16 {
    let value: u16 = memory.guest().read_obj(GuestAddress(address)).unwrap();
    u16::from_le(value)
}

fn store(memory: &Memory, address: u64, value: u16) {
    let guest = memory.guest();
    guest
        .write_obj(value.to_le(), GuestAddress(address))
        .unwrap();
}

impl Seen {
    /// Follows the writes to the registers of virtio-mmio (4.2.2).
    fn write(&mut self, memory: &Memory, offset: u64, value: u64) {
        let queue = self.queues.entry(self.selected).or_default();
        let half = |old: u64| match offset & 4 {
            0 => old & !0xffff_ffff | value,
            _ => old & 0xffff_ffff | value << 32,
        };
        let small = u32::try_from(value & 0xffff_ffff).unwrap();
        match offset {
            0x30 => self.selected = small,
            0x38 => queue.size = small,
            0x44 => queue.seen = 0,
            0x80 | 0x84 => queue.descriptors = half(queue.descriptors),
            0x90 | 0x94 => queue.driver = half(queue.driver),
            0xa0 | 0xa4 => queue.device = half(queue.device),
            0x50 => self.read(memory, small),
            _ => {}
        }
    }

    fn read(&mut self, memory: &Memory, number: u32) {
        let Some(queue) = self.queues.get_mut(&number) else {
            return;
        };
        self.flags.push(load(memory, queue.driver));
        let index = load(memory, queue.driver + 2);
        while queue.seen != index {
            let slot = u64::from(u32::from(queue.seen) % queue.size);
            let head = load(memory, queue.driver + 4 + 2 * slot);
            queue.seen = queue.seen.wrapping_add(1);
            self.chains.push(read_chain(memory, *queue, number, head));
        }
    }
}

fn read_chain(memory: &Memory, queue: Tapped, number: u32, head: u16) -> Chain {
    let (mut part, mut next) = read_part(memory, queue.descriptors, head);
    let mut table = queue.descriptors;
    let indirect = (part.flags & INDIRECT != 0).then_some(part.flags);
    if indirect.is_some() {
        table = part.address;
        (part, next) = read_part(memory, table, 0);
    }
    let mut parts = Vec::new();
    loop {
        let more = part.flags & NEXT != 0;
        parts.push(part);
        if !more || parts.len() > 64 {
            break;
        }
        (part, next) = read_part(memory, table, next);
    }
    Chain {
        queue: number,
        head,
        indirect,
        parts,
    }
}

fn read_part(memory: &Memory, table: u64, index: u16) -> (Part, u16) {
    let at = table + 16 * u64::from(index);
    let raw: [u8; 16] = memory.guest().read_obj(GuestAddress(at)).unwrap();
    let address = u64::from_le_bytes(raw[..8].try_into().unwrap());
    let len = u32::from_le_bytes(raw[8..12].try_into().unwrap());
    let flags = u16::from_le_bytes(raw[12..14].try_into().unwrap());
    let next = u16::from_le_bytes(raw[14..].try_into().unwrap());
    let mut bytes = Vec::new();
    if flags & (WRITE | INDIRECT) == 0 {
        bytes.resize(usize::try_from(len).unwrap().min(4096), 0);
        let guest = memory.guest();
        guest.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    }
    (
        Part {
            address,
            len,
            flags,
            bytes,
        },
        next,
    )
}
