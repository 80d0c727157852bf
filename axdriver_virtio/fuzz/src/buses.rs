//! Searching PCI buses whose bridges lead wherever they like.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axdriver_virtio::{
    PciBridge, PciRangeAllocator,
    pci::{ConfigurationAccess, DeviceFunction, PciRoot},
    probe_pci_buses, route_pci_interrupt,
};
use machine::{Machine, MachineHal, Memory, memory::DEFAULT_BASE};

use crate::choices::Choices;

const COMMAND: u8 = 0x04;
/// The BARs of a device, or the BARs, bus numbers and ranges of a bridge.
const WRITABLE: std::ops::Range<u8> = 0x10..0x30;
/// The buses that functions are on.
const BUSES: usize = 8;
/// The most accesses that a search of a few functions may take.
const MOST: u64 = 256 * 256 * 4;

/// A function, by its configuration space.
#[derive(Clone, Copy, Debug)]
struct Function {
    words: [u32; 64],
    /// The bits that can be written.
    masks: [u32; 64],
}

impl Function {
    fn bridge() -> Self {
        let mut function = Self {
            words: [0; 64],
            masks: [0; 64],
        };
        function.words[0] = 0x0001_1b36;
        function.words[3] = 1 << 16;
        function.masks[1] = 7;
        function.masks[4] = 0xffff_f000;
        function.masks[6] = 0x00ff_ffff;
        function.masks[8] = 0xfff0_fff0;
        function.masks[9..12].copy_from_slice(&[0xfff0_fff0, u32::MAX, u32::MAX]);
        function
    }

    /// A virtio device with its structures in BAR 4.
    fn device(kind: u32) -> Self {
        let mut function = Self {
            words: [0; 64],
            masks: [0; 64],
        };
        let words = &mut function.words;
        words[0] = 0x1af4 | (0x1040 + kind) << 16;
        words[1] = 1 << 20;
        words[8] = 0xc;
        words[13] = 0x40;
        words[15] = 1 << 8;
        words[16..20].copy_from_slice(&[0x0110_5009, 4, 0, 56]);
        words[20..25].copy_from_slice(&[0x0214_6409, 4, 0x1000, 0x1000, 4]);
        words[25..29].copy_from_slice(&[0x0310_0009, 4, 0x800, 1]);
        function.masks[1] = 7;
        function.masks[8..10].copy_from_slice(&[0xffff_c000, u32::MAX]);
        function
    }

    fn scribble(&mut self, choices: &mut Choices) {
        for _ in 0..choices.below(6) {
            // Header and capabilities.
            let word = choices.below(32);
            match choices.below(4) {
                0 => self.words[word] ^= 1 << choices.below(32),
                1 => self.words[word] = choices.long(),
                2 => self.masks[word] = choices.long(),
                // Bus numbers.
                _ => self.words[6] = u32::from_le_bytes([0, choices.byte(), choices.byte(), 0]),
            }
        }
    }
}

#[derive(Debug)]
struct State {
    functions: BTreeMap<DeviceFunction, Function>,
    /// What is answered instead, now and then; `None` if the functions are true to their words.
    lies: Option<Choices>,
    last: u8,
    may_write: bool,
    accesses: u64,
}

/// The configuration space of all buses.
#[derive(Clone, Debug)]
struct Tree(Arc<Mutex<State>>);

impl Tree {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigurationAccess for Tree {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        let mut state = self.lock();
        assert!(function.valid() && offset.is_multiple_of(4));
        assert!(function.bus <= state.last, "{function} is not mapped");
        state.accesses += 1;
        let Some(found) = state.functions.get(&function) else {
            return u32::MAX;
        };
        let honest = found.words[usize::from(offset / 4)];
        let Some(choices) = &mut state.lies else {
            return honest;
        };
        match choices.byte() {
            0..220 => honest,
            220..230 => u32::MAX,
            230..245 => honest ^ 1 << choices.below(32),
            _ => choices.long(),
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, value: u32) {
        let mut state = self.lock();
        assert!(function.bus <= state.last, "{function} is not mapped");
        state.accesses += 1;
        let (lies, may_write) = (state.lies.is_some(), state.may_write);
        let Some(found) = state.functions.get_mut(&function) else {
            panic!("{function}, which is not there, is written to");
        };
        if offset == COMMAND {
            assert_eq!(value >> 16, 0, "bits of the status register are cleared");
        } else {
            assert!(
                offset.is_multiple_of(4) && WRITABLE.contains(&offset),
                "configuration register {offset:#x} is written to"
            );
            let is_bridge = found.words[3] >> 16 & 0x7f == 1;
            assert!(
                lies || may_write || !is_bridge,
                "a bridge is set up that is not ours to set up"
            );
        }
        let index = usize::from(offset / 4);
        let mask = found.masks[index];
        found.words[index] = found.words[index] & !mask | value & mask;
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

/// Searches buses.
pub fn search(bytes: &[u8]) {
    let mut choices = Choices::bytes(bytes);
    let last = [255, 255, 7, 3, 1, 0, 20, 8][choices.below(8)];
    let give = !choices.one_in(3);
    let lies = choices.one_in(4);
    let seed = choices.long();
    let mut functions = BTreeMap::new();
    for _ in 0..choices.below(40) {
        let place = DeviceFunction {
            bus: choices.below(BUSES) as u8,
            device: choices.byte() & 31,
            function: [0, 0, 0, 1, 7][choices.below(5)],
        };
        let mut function = match choices.below(6) {
            0..3 => Function::bridge(),
            3 => Function::device(2),
            4 => Function::device(1),
            _ => Function::device(16),
        };
        function.scribble(&mut choices);
        functions.insert(place, function);
    }
    let tree = Tree(Arc::new(Mutex::new(State {
        functions,
        lies: lies.then(|| Choices::Seed(seed.into())),
        last,
        may_write: give,
        accesses: 0,
    })));
    let memory = Memory::anonymous(DEFAULT_BASE, 1 << 20).unwrap();
    let machine = Machine::new(memory, Arc::new(()));
    let _installed = machine.install();

    let mut root = PciRoot::new(tree.clone());
    let mut window = PciRangeAllocator::new(0x1000_0000, 0x1000_0000);
    let window = give.then_some(&mut window);
    let mut before = None;
    for (place, ..) in probe_pci_buses::<MachineHal, _>(&mut root, 0..=last, window) {
        assert!(before < Some(place), "{place} is found out of order");
        before = Some(place);
        let routed = route_pci_interrupt(&tree, 0, place);
        assert!(routed.is_none_or(|(outer, pin)| outer.bus == 0 && (1..=4).contains(&pin)));
    }
    assert!(tree.lock().accesses < MOST, "a search without an end");
    let bridges: Vec<_> = tree.lock().functions.keys().copied().collect();
    let bridges = bridges.into_iter().filter(|place| place.bus <= last);
    for bridge in bridges {
        if let Some(bridge_of) = PciBridge::read(&tree, bridge) {
            assert!(*bridge_of.buses.start() > bridge.bus);
        }
    }
}
