//! A device that is nothing but its registers and what it writes to queues, all chosen by bytes.
//!
//! Where the bytes say nothing else it is honest, so that a driver gets far: each register access
//! takes a byte, and only some say that the answer is another one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axdriver_base::DeviceType;
use machine::{Memory, RegisterBus, memory::MemoryWatch};
use vm_memory::{Bytes, GuestAddress};

use crate::choices::Choices;

/// Where the registers of the MMIO transport are.
pub const MMIO: u64 = 0x0a00_0000;

const FEATURES_OK: u32 = 8;
/// The number of an access to several structures at once.
const AMBIGUOUS: usize = 4;

/// How registers are laid out.
#[derive(Clone, Debug)]
pub enum Layout {
    /// This many bytes at [`MMIO`].
    Mmio {
        /// In bytes.
        size: usize,
    },
    /// Wherever the driver mapped them: common, notify, ISR and device structures, in this order.
    Pci {
        /// What was mapped: address and size.
        mapped: Vec<(u64, u64)>,
        /// Where the driver may map anything, if that is known: address and size of each BAR.
        bars: Option<Vec<(u64, u64)>>,
        /// The distance between doorbells.
        multiplier: u64,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct RawQueue {
    size: u32,
    enabled: bool,
    /// Descriptors, available ring, used ring.
    areas: [u64; 3],
    /// The next entry of the available ring to look at, and of the used ring to write.
    available: u16,
    used: u16,
}

impl RawQueue {
    fn ranges(&self) -> [(u64, u64); 3] {
        let size = u64::from(self.size);
        let [descriptors, available, used] = self.areas;
        [
            (descriptors, 16 * size),
            (available, 6 + 2 * size),
            (used, 6 + 8 * size),
        ]
    }
}

#[derive(Debug)]
struct State {
    layout: Layout,
    choices: Choices,
    /// The virtio device ID: 1 network, 2 block, 16 GPU.
    kind: u32,
    legacy: bool,
    status: u32,
    /// A reset was written, and 0 has not been read since.
    reset_pending: bool,
    /// A reset was given up.
    abandoned: bool,
    feature_select: u32,
    offered: u64,
    queue_select: u32,
    queues: [RawQueue; 4],
    interrupt: u32,
    config: [u8; 64],
    generation: u32,
}

/// The device.
#[derive(Debug)]
pub struct Raw {
    memory: Arc<Memory>,
    state: Mutex<State>,
}

/// Returns an honest configuration space.
fn config(kind: u32) -> [u8; 64] {
    let mut config = [0; 64];
    match kind {
        // An address, the link up, one pair of queues, an MTU of 1500.
        1 => config[..12].copy_from_slice(&[2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5]),
        2 => {
            // 64 sectors, segments of 4096, blocks of 512.
            config[0] = 64;
            config[9] = 0x10;
            config[21] = 2;
        }
        // A display.
        _ => config[8] = 1,
    }
    config
}

impl Raw {
    /// Returns a device that does what `choices` say.
    pub fn new(memory: Arc<Memory>, kind: u32, layout: Layout, mut choices: Choices) -> Arc<Self> {
        let mut offered = 0x1_3001_0260 | u64::from(choices.long()) << 4;
        if choices.one_in(4) {
            offered |= 0x12_0000_0000;
        }
        let raw = Arc::new(Self {
            memory: memory.clone(),
            state: Mutex::new(State {
                layout,
                choices,
                kind,
                legacy: false,
                status: 0,
                reset_pending: false,
                abandoned: false,
                feature_select: 0,
                offered,
                queue_select: 0,
                queues: Default::default(),
                interrupt: 0,
                config: config(kind),
                generation: 0,
            }),
        });
        let watch: Arc<dyn MemoryWatch> = raw.clone();
        memory.set_watch(Arc::downgrade(&watch));
        raw
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what is known of the BARs, and the distance of the doorbells in them, before a probe.
    pub fn set_bars(&self, known: Option<Vec<(u64, u64)>>, distance: u64) {
        if let Layout::Pci {
            mapped,
            bars,
            multiplier,
        } = &mut self.lock().layout
        {
            mapped.clear();
            *bars = known;
            *multiplier = distance;
        }
    }

    /// Lets it be the device that a driver was found for, whatever it said before.
    pub fn set_kind(&self, kind: DeviceType) {
        self.lock().kind = match kind {
            DeviceType::Net => 1,
            DeviceType::Block => 2,
            _ => 16,
        };
    }

    /// Settles the account of memory when the driver is gone.
    pub fn finish(&self) {
        let mut state = self.lock();
        let counters = self.memory.counters();
        assert!(
            state.abandoned
                || state.reset_pending
                || (
                    counters.pages_live,
                    counters.shares_live,
                    counters.bounces_live
                ) == (0, 0, 0),
            "memory was not given back: {counters:?}"
        );
        state.queues = Default::default();
        drop(state);
        crate::bench::release(&self.memory);
    }
}

impl MemoryWatch for Raw {
    fn leaving(&self, address: u64, len: usize) {
        // Within a register access of the same thread nothing leaves.
        let state = self.lock();
        for queue in state.queues.iter().filter(|queue| queue.enabled) {
            for (start, size) in queue.ranges() {
                let apart = address + len as u64 <= start || start + size <= address;
                assert!(
                    apart,
                    "the memory of a queue is freed while the device has it"
                );
            }
        }
    }
}

impl State {
    /// Returns what is answered instead of `honest`, if the bytes say so.
    fn answer(&mut self, honest: u64) -> u64 {
        match self.choices.byte() {
            0..=199 => honest,
            200..=209 => u64::MAX,
            210..=219 => 0,
            220..=229 => self.choices.byte().into(),
            230..=239 => honest ^ 1 << self.choices.below(32),
            240..=247 => honest.wrapping_add(1),
            _ => self.choices.long().into(),
        }
    }

    fn read_status(&mut self) -> u64 {
        if self.reset_pending && self.choices.byte() < 240 {
            self.status = 0;
        }
        let answer = self.answer(self.status.into());
        let width = if matches!(self.layout, Layout::Pci { .. }) {
            8
        } else {
            32
        };
        if answer & ((1 << width) - 1) == 0 && self.reset_pending {
            self.reset_pending = false;
            self.queues = Default::default();
        }
        answer
    }

    fn write_status(&mut self, status: u32) {
        self.abandoned |= self.reset_pending;
        if status == 0 {
            self.reset_pending = true;
        } else {
            self.reset_pending = false;
            self.status = status;
            if status & FEATURES_OK != 0 && self.choices.byte() > 250 {
                self.status &= !FEATURES_OK;
            }
        }
    }

    fn features(&mut self) -> u64 {
        let half = self.offered >> (32 * u64::from(self.feature_select & 1));
        self.answer(half & 0xffff_ffff)
    }

    fn queue(&mut self) -> &mut RawQueue {
        let index = self.queue_select as usize % self.queues.len();
        &mut self.queues[index]
    }

    fn queue_max(&mut self) -> u64 {
        let size = [8, 16, 4, 256, 3, 2, 1, 0][self.choices.below(8)];
        self.answer(size)
    }

    fn config(&mut self, offset: u64, width: u8) -> u64 {
        let mut bytes = [0; 8];
        for (byte, at) in bytes.iter_mut().zip(offset..).take(width.into()) {
            *byte = self.config.get(at as usize).copied().unwrap_or(0xff);
        }
        self.answer(u64::from_le_bytes(bytes))
    }

    fn write_config(&mut self, offset: u64, width: u8) {
        // The only field that a driver here writes to: `events_clear` of a display.
        assert_eq!(
            (self.kind, offset, width),
            (16, 4, 4),
            "a read-only field is written to"
        );
    }
}

/// A used element, a lie or not.
struct Answer {
    id: u32,
    len: u32,
    step: u16,
}

impl Raw {
    /// Answers what is available in a queue.
    fn serve(&self, state: &mut State, index: usize) {
        let guest = self.memory.guest();
        let load = |at: u64| guest.read_obj::<u16>(GuestAddress(at)).unwrap();
        for _ in 0..64 {
            let queue = state.queues[index];
            if !queue.enabled || !queue.size.is_power_of_two() {
                return;
            }
            let [descriptors, available, used] = queue.areas;
            if load(available + 2) == queue.available {
                break;
            }
            let mask = (queue.size - 1) as u16;
            let head = load(available + 4 + 2 * u64::from(queue.available & mask));
            state.queues[index].available = queue.available.wrapping_add(1);
            let (readable, writable) = self.chain(descriptors, queue.size, head);
            let Some(Answer { id, len, step }) = self.act(state, index, head, &readable, &writable)
            else {
                continue;
            };
            let at = used + 4 + 8 * u64::from(queue.used & mask);
            let element = u64::from(id) | u64::from(len) << 32;
            guest.write_obj(element, GuestAddress(at)).unwrap();
            let next = queue.used.wrapping_add(step);
            state.queues[index].used = next;
            guest.write_obj(next, GuestAddress(used + 2)).unwrap();
            state.interrupt |= 1;
        }
        // What it wants to be notified of.
        let queue = state.queues[index];
        let [_, _, used] = queue.areas;
        let event = state.answer(queue.available.into()) as u16;
        let flags = state.answer(0) as u16;
        let at = used + 4 + 8 * u64::from(queue.size);
        guest.write_obj(event, GuestAddress(at)).unwrap();
        guest.write_obj(flags, GuestAddress(used)).unwrap();
    }

    /// Follows a chain. Returns what the device may read and what it may write.
    fn chain(&self, table: u64, size: u32, head: u16) -> (Vec<(u64, u32)>, Vec<(u64, u32)>) {
        let guest = self.memory.guest();
        let (mut table, mut size, mut index) = (table, size, head);
        let mut pieces = (Vec::new(), Vec::new());
        for _ in 0..100 {
            assert!(u32::from(index) < size, "a descriptor beyond the table");
            let raw: [u8; 16] = guest
                .read_obj(GuestAddress(table + 16 * u64::from(index)))
                .expect("a descriptor table outside of memory");
            let raw = u128::from_le_bytes(raw);
            let (address, len) = (raw as u64, (raw >> 64) as u32);
            let (flags, next) = ((raw >> 96) as u16, (raw >> 112) as u16);
            assert!(
                len > 0 && self.memory.host_address(address, len as usize).is_some(),
                "{len} bytes at {address:#x} are not memory"
            );
            if flags & 4 != 0 {
                (table, size, index) = (address, len / 16, 0);
                continue;
            }
            if flags & 2 != 0 {
                pieces.1.push((address, len));
            } else {
                assert!(pieces.1.is_empty(), "readable after writable");
                pieces.0.push((address, len));
            }
            if flags & 1 == 0 {
                return pieces;
            }
            index = next;
        }
        panic!("a chain without an end");
    }

    /// Does what a request asks for, or something else.
    fn act(
        &self,
        state: &mut State,
        queue: usize,
        head: u16,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> Option<Answer> {
        let guest = self.memory.guest();
        let control = state.choices.byte();
        let most: u32 = writable.iter().map(|(_, len)| len).sum();
        let mut len = most;
        match state.kind {
            1 => {
                if queue == 0 {
                    // Without bytes there are no frames.
                    if control == 0 {
                        return None;
                    }
                    len = most.min(state.choices.word().into());
                }
            }
            2 => {
                if let Some(&(address, len)) = writable.last() {
                    let status = GuestAddress(address + u64::from(len) - 1);
                    guest.write_obj(0_u8, status).unwrap();
                }
            }
            _ => {
                let kind: u32 = guest.read_obj(GuestAddress(readable[0].0)).unwrap();
                let response: u32 = if kind == 0x100 { 0x1101 } else { 0x1100 };
                let (address, room) = writable[0];
                guest.write_obj(response, GuestAddress(address)).unwrap();
                if kind == 0x100 && room >= 48 {
                    // Position, size, enabled.
                    let display = [0_u32, 0, 16, 16, 1];
                    for (word, at) in display.into_iter().zip((address + 24..).step_by(4)) {
                        guest.write_obj(word, GuestAddress(at)).unwrap();
                    }
                }
            }
        }
        if control & 0x20 != 0 {
            // Something else at the beginning or at the end of what may be written.
            for _ in 0..=state.choices.below(8) {
                let piece = writable.get(state.choices.below(writable.len().max(1)));
                let Some(&(address, len)) = piece else { break };
                let at = state.choices.below(256) as u64 % u64::from(len);
                let byte = state.choices.byte();
                guest.write_obj(byte, GuestAddress(address + at)).unwrap();
            }
        }
        let mut answer = Answer {
            id: head.into(),
            len,
            step: 1,
        };
        match control & 0x1f {
            1 => return None,
            2 => answer.id = state.choices.byte().into(),
            3 => answer.id = state.choices.long(),
            4 => answer.len = state.choices.long(),
            5 => answer.len = state.choices.byte().into(),
            6 => answer.step = state.choices.byte().into(),
            7 => answer.step = state.choices.word(),
            8 => state.status |= 64,
            _ => {}
        }
        Some(answer)
    }
}

impl RegisterBus for Raw {
    fn read(&self, address: u64, width: u8) -> u64 {
        let mut state = self.lock();
        match state.layout {
            Layout::Mmio { size } => {
                let offset = check_mmio(address, width, size);
                read_mmio(&mut state, offset, width)
            }
            Layout::Pci { .. } => match structure(&state.layout, address, width) {
                (0, offset) => read_common(&mut state, offset),
                (1, _) => panic!("a doorbell is read"),
                (2, _) => {
                    let honest = u64::from(std::mem::take(&mut state.interrupt));
                    state.answer(honest)
                }
                (AMBIGUOUS, _) => {
                    // Nobody knows whether it is in a reset.
                    state.abandoned = true;
                    state.answer(0)
                }
                (_, offset) => state.config(offset, width),
            },
        }
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        let mut state = self.lock();
        let state = &mut *state;
        let notified = match state.layout {
            Layout::Mmio { size } => {
                let offset = check_mmio(address, width, size);
                write_mmio(state, offset, width, value as u32)
            }
            Layout::Pci { .. } => match structure(&state.layout, address, width) {
                (0, offset) => {
                    write_common(state, offset, value as u32);
                    None
                }
                (1, _) => {
                    assert_eq!(width, 2, "the width of a doorbell");
                    Some(value as u32)
                }
                (2, _) => panic!("the ISR status is written to"),
                (AMBIGUOUS, _) => {
                    state.abandoned = true;
                    None
                }
                (_, offset) => {
                    state.write_config(offset, width);
                    None
                }
            },
        };
        if let Some(queue) = notified {
            assert!(queue < 2, "queue {queue} is notified");
            assert!(state.status & 4 != 0, "a notification before DRIVER_OK");
            self.serve(state, queue as usize);
        }
    }

    fn mapped(&self, address: u64, size: usize) {
        let Layout::Pci { mapped, bars, .. } = &mut self.lock().layout else {
            panic!("a mapping of {address:#x}");
        };
        let size = size as u64;
        if let Some(bars) = bars {
            let inside = bars.iter().any(|&(start, len)| {
                address >= start
                    && u128::from(address) + u128::from(size) <= u128::from(start) + u128::from(len)
            });
            assert!(
                inside,
                "{size} bytes at {address:#x} are mapped, outside of {bars:x?}"
            );
        }
        mapped.push((address, size));
    }
}

fn check_mmio(address: u64, width: u8, size: usize) -> u64 {
    let offset = address
        .checked_sub(MMIO)
        .expect("an access below the registers");
    assert!(
        offset + u64::from(width) <= size as u64,
        "an access beyond the registers"
    );
    assert!(offset.is_multiple_of(width.into()) && width <= 4);
    assert!(
        offset >= 0x100 || width == 4,
        "4.2.2.2: registers have 32 bits"
    );
    offset
}

fn read_mmio(state: &mut State, offset: u64, width: u8) -> u64 {
    match offset {
        0x00 => state.answer(0x7472_6976),
        0x04 => {
            let version = if state.choices.one_in(3) { 1 } else { 2 };
            let version = state.answer(version);
            state.legacy = version & 0xffff_ffff == 1;
            version
        }
        0x08 => {
            let kind = state.kind;
            state.answer(kind.into())
        }
        0x0c => state.answer(0),
        0x10 => state.features(),
        0x34 => state.queue_max(),
        0x40 => {
            let honest = state.queue().areas[0] / 4096;
            state.answer(honest)
        }
        0x44 => {
            let honest = state.queue().enabled;
            state.answer(honest.into())
        }
        0x60 => {
            let honest = state.interrupt;
            state.answer(honest.into())
        }
        0x70 => state.read_status(),
        0xfc => {
            let honest = state.generation;
            state.answer(honest.into())
        }
        0x100.. => state.config(offset - 0x100, width),
        _ => panic!("register {offset:#x} is read"),
    }
}

/// Returns the queue that is notified, if any.
fn write_mmio(state: &mut State, offset: u64, width: u8, value: u32) -> Option<u32> {
    let legacy = state.legacy;
    let half = |address: u64, high: bool| {
        if high {
            address & 0xffff_ffff | u64::from(value) << 32
        } else {
            address & !0xffff_ffff | u64::from(value)
        }
    };
    match offset {
        0x14 => state.feature_select = value,
        0x20 => {}
        0x24 => assert!(value < 2),
        0x28 => assert!(legacy && value == 4096),
        0x30 => state.queue_select = value,
        0x38 => state.queue().size = value,
        0x3c => assert!(legacy && value == 4096),
        0x40 => {
            assert!(legacy);
            let queue = state.queue();
            let size = u64::from(queue.size);
            let page = u64::from(value) * 4096;
            let used = (page + 16 * size + 6 + 2 * size).next_multiple_of(4096);
            queue.areas = [page, page + 16 * size, used];
            queue.enabled = value != 0;
        }
        0x44 => state.queue().enabled = value == 1,
        0x50 => return Some(value),
        0x64 => {
            assert_eq!(value & !3, 0, "4.2.2.2: undefined bits are acknowledged");
            state.interrupt &= !value;
        }
        0x70 => state.write_status(value),
        0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => {
            assert!(!legacy);
            let area = (offset as usize - 0x80) / 0x10;
            let high = offset & 4 != 0;
            let queue = state.queue();
            queue.areas[area] = half(queue.areas[area], high);
        }
        0x100.. => state.write_config(offset - 0x100, width),
        _ => panic!("register {offset:#x} is written to"),
    }
    None
}

/// Returns which structure an access goes to, and the offset in it.
fn structure(layout: &Layout, address: u64, width: u8) -> (usize, u64) {
    let Layout::Pci { mapped, .. } = layout else {
        unreachable!();
    };
    let inside = |&(start, size): &(u64, u64)| {
        address >= start && address + u64::from(width) <= start + size
    };
    let found = mapped.iter().position(inside);
    let found = found.expect("an access outside of what was mapped");
    // Structures may lie on top of each other; then it is not known which one is meant.
    let others = mapped.iter().filter(|part| inside(part)).count();
    let offset = address - mapped[found].0;
    if others == 1 && found == 0 {
        let expected = match offset {
            0x00..0x10 | 0x20..0x38 => 4,
            0x14 | 0x15 => 1,
            _ => 2,
        };
        assert_eq!(
            width, expected,
            "4.1.3.1: the width of common field {offset:#x}"
        );
    }
    (if others > 1 { AMBIGUOUS } else { found }, offset)
}

fn read_common(state: &mut State, offset: u64) -> u64 {
    match offset {
        0x04 => state.features(),
        0x12 => state.answer(2),
        0x14 => state.read_status(),
        0x15 => {
            let honest = state.generation;
            state.answer(honest.into())
        }
        0x18 => state.queue_max(),
        0x1c => {
            let honest = state.queue().enabled;
            state.answer(honest.into())
        }
        0x1e => {
            let honest = state.queue_select;
            state.answer(honest.into())
        }
        _ => panic!("common field {offset:#x} is read"),
    }
}

fn write_common(state: &mut State, offset: u64, value: u32) {
    match offset {
        0x00 => state.feature_select = value,
        0x08 => assert!(value < 2),
        0x0c => {}
        0x14 => state.write_status(value),
        0x16 => state.queue_select = value,
        0x18 => state.queue().size = value,
        0x1c => {
            assert_eq!(value, 1, "4.1.4.3.2: a queue is not disabled");
            state.queue().enabled = true;
        }
        0x20..0x38 => {
            let area = (offset as usize - 0x20) / 8;
            let high = offset & 4 != 0;
            let queue = state.queue();
            let other = queue.areas[area];
            queue.areas[area] = if high {
                other & 0xffff_ffff | u64::from(value) << 32
            } else {
                other & !0xffff_ffff | u64::from(value)
            };
        }
        _ => panic!("common field {offset:#x} is written to"),
    }
}
