//! Probing and starting a device that says whatever it likes, and some requests to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    InterruptHandle, PciRangeAllocator, Transport, VirtIoBlkDev, VirtIoGpuDev, VirtIoNetDev,
    WaitPolicy, assign_bars,
    pci::{ConfigurationAccess, DeviceFunction, PciRoot},
    probe_mmio_device, probe_pci_buses,
};
use machine::{Machine, MachineHal, Memory, memory::DEFAULT_BASE, registers::register_pointer};

use crate::{
    choices::Choices,
    raw::{Layout, MMIO, Raw},
};

const MEMORY: usize = 1 << 20;
/// The bytes that decide what the driver is asked to do.
const DECISIONS: usize = 12;
/// Small, because what a device that does not reset keeps is gone for the whole run.
const QUEUE: usize = 4;
const KINDS: [u32; 3] = [2, 1, 16];

fn wait() -> WaitPolicy {
    WaitPolicy::new().with_max_polls(70)
}

fn drive<T: Transport + Send + Sync>(
    kind: DeviceType,
    transport: T,
    interrupt: Option<InterruptHandle<'_>>,
    choices: &mut Choices,
) {
    let started: DevResult = match kind {
        DeviceType::Block => VirtIoBlkDev::<MachineHal, T>::try_new_with(transport, wait())
            .map(|driver| steps(driver, interrupt, choices, block)),
        DeviceType::Net => VirtIoNetDev::<MachineHal, T, QUEUE>::try_new_with(transport, wait())
            .map(|driver| steps(driver, interrupt, choices, net)),
        DeviceType::Display => VirtIoGpuDev::<MachineHal, T>::try_new_with(transport, wait())
            .map(|driver| steps(driver, interrupt, choices, display)),
        _ => panic!("there is no driver for {kind:?}"),
    };
    // Whether it starts is up to the device.
    let _ = started;
}

/// Asks a driver for some things, one after another.
fn steps<D: BaseDriverOps>(
    mut driver: D,
    interrupt: Option<InterruptHandle<'_>>,
    choices: &mut Choices,
    step: fn(&mut D, u8) -> DevResult,
) {
    for _ in 0..8 {
        let choice = choices.byte();
        // Whether it works is up to the device.
        let _ = match choice & 0xf {
            0 => driver.acknowledge_interrupt().map(drop),
            1 => driver.enable_interrupts().map(drop),
            2 => driver.disable_interrupts(),
            3 => {
                if let Some(interrupt) = &interrupt {
                    interrupt.acknowledge();
                }
                Ok(())
            }
            _ => step(&mut driver, choice >> 4),
        };
    }
}

fn block<T: Transport + Send + Sync>(
    driver: &mut VirtIoBlkDev<MachineHal, T>,
    choice: u8,
) -> DevResult {
    let block_size = driver.block_size();
    assert!(block_size.is_power_of_two() && (512..=1 << 16).contains(&block_size));
    let last = driver.num_blocks().saturating_sub(1);
    match choice & 7 {
        0 => driver.flush(),
        1 => driver.read_block(last, &mut vec![0; block_size]),
        2 => driver.write_block(last, &vec![7; block_size]),
        3 => {
            let beyond = driver.read_block(last + 1, &mut vec![0; block_size]);
            assert_eq!(beyond, Err(DevError::InvalidParam));
            beyond
        }
        4 => driver.read_block(0, &mut vec![0; 3 * block_size]),
        5 => driver.write_block(0, &vec![7; 3 * block_size]),
        6 => driver.configuration_changed(),
        _ => driver.reset(),
    }
}

fn net<T: Transport + Send + Sync>(
    driver: &mut VirtIoNetDev<MachineHal, T, QUEUE>,
    choice: u8,
) -> DevResult {
    assert!(
        (1..=QUEUE).contains(&driver.rx_queue_size())
            && (1..=QUEUE).contains(&driver.tx_queue_size())
    );
    let most = driver.capabilities().max_frame_len;
    match choice & 7 {
        0 => driver.recycle_tx_buffers(),
        1 => driver.configuration_changed(),
        2 => driver.reset(),
        3 | 4 => {
            let len = if choice & 1 == 0 { most } else { 60 };
            let mut buf = driver.alloc_tx_buffer(len)?;
            buf.packet_mut().fill(choice);
            driver.transmit(buf)
        }
        choice => {
            let mut buf = driver.receive()?;
            // All of it can be written to.
            buf.packet_mut().fill(choice);
            if choice == 5 {
                driver.transmit(buf)
            } else {
                driver.recycle_rx_buffer(buf)
            }
        }
    }
}

fn display<T: Transport + Send + Sync>(
    driver: &mut VirtIoGpuDev<MachineHal, T>,
    choice: u8,
) -> DevResult {
    let info = driver.info();
    assert!((1..=16384).contains(&info.width) && (1..=16384).contains(&info.height));
    assert_eq!(info.fb_size, info.width as usize * info.height as usize * 4);
    driver.fb().as_bytes_mut().fill(choice);
    match choice & 3 {
        0 => driver.reset(),
        1 => driver.configuration_changed().map(drop),
        _ => driver.flush(),
    }
}

/// Starts a device behind MMIO registers.
pub fn mmio(bytes: &[u8]) {
    let (decisions, rest) = bytes.split_at(bytes.len().min(DECISIONS));
    let mut choices = Choices::bytes(decisions);
    let kind = KINDS[choices.below(3)];
    let size = [0x200, 0x200, 0x200, 0x140, 0x108, 0x100, 0xff, 0][choices.below(8)];
    let memory = Memory::anonymous(DEFAULT_BASE, MEMORY).unwrap();
    let raw = Raw::new(
        memory.clone(),
        kind,
        Layout::Mmio { size },
        Choices::bytes(rest),
    );
    let machine = Machine::new(memory, raw.clone());
    let _installed = machine.install();
    // SAFETY: registers are numbers, which `raw` answers to.
    if let Some((kind, mut transport)) = unsafe { probe_mmio_device(register_pointer(MMIO), size) }
    {
        let split = choices
            .one_in(2)
            .then(|| transport.split_interrupt())
            .flatten();
        raw.set_kind(kind);
        drive(kind, transport, split, &mut choices);
    }
    raw.finish();
}

/// A base address register: bits that are fixed, and bits that can be written.
#[derive(Clone, Copy, Debug, Default)]
struct BarRegister {
    fixed: u32,
    writable: u32,
    value: u32,
}

impl BarRegister {
    fn read(&self) -> u32 {
        self.fixed & !self.writable | self.value & self.writable
    }

    fn is_wide(&self) -> bool {
        self.read() & 7 == 4
    }
}

#[derive(Debug)]
struct Function {
    words: [u32; 64],
    bars: [BarRegister; 6],
    command: u16,
    /// What is answered instead, now and then; `None` if the function is true to its words.
    lies: Option<Choices>,
}

/// The only function that there is.
const FUNCTION: DeviceFunction = DeviceFunction {
    bus: 0,
    device: 3,
    function: 0,
};
const COMMAND: u8 = 4;
const BARS: std::ops::Range<u8> = 0x10..0x28;

/// Where BARs may be.
const WINDOW: (u64, u64) = (0x1000_0000, 0x1000_0000);

impl Function {
    fn new(kind: u32, choices: &mut Choices) -> Self {
        let mut words = [0; 64];
        words[0] = 0x1af4 | (0x1040 + kind) << 16;
        words[1] = 1 << 20;
        words[13] = 0x40;
        // Common, notify, ISR and device structures in BAR 4.
        let mut at = 16;
        for (kind, offset, len) in [
            (1, 0, 56),
            (2, 0x1000, 0x1000),
            (3, 0x800, 1),
            (4, 0xc00, 64),
        ] {
            let size = if kind == 2 { 20 } else { 16 };
            let next = if kind == 4 { 0 } else { 4 * at as u32 + size };
            words[at] = 9 | next << 8 | size << 16 | kind << 24;
            words[at + 1] = 4;
            words[at + 2] = offset;
            words[at + 3] = len;
            if kind == 2 {
                words[at + 4] = 4;
            }
            at += size as usize / 4;
        }
        let mut bars = [BarRegister::default(); 6];
        bars[4] = BarRegister {
            fixed: 0xc,
            writable: 0xffff_c000,
            value: 0,
        };
        bars[5].writable = u32::MAX;
        for _ in 0..choices.below(16) {
            let word = choices.below(64);
            words[word] = match choices.below(4) {
                0 => words[word] ^ 1 << choices.below(32),
                1 => choices.long(),
                2 => words[word] & 0xffff_ff00 | u32::from(choices.byte()),
                _ => words[word] & 0xffff_00ff | u32::from(choices.byte()) << 8,
            };
        }
        for _ in 0..choices.below(8) {
            let bar = &mut bars[choices.below(6)];
            match choices.below(4) {
                0 => bar.fixed = choices.byte().into(),
                1 => bar.fixed = choices.long(),
                2 => bar.writable = u32::MAX << choices.below(32),
                _ => bar.writable = choices.long(),
            }
            bar.value = choices.byte().into();
            bar.value <<= 24;
        }
        Self {
            words,
            bars,
            command: choices.word() & 7,
            lies: None,
        }
    }

    /// Returns the address ranges of all memory BARs that have an address.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let mut index = 0;
        while index < self.bars.len() {
            let low = self.bars[index];
            let wide = low.is_wide() && index + 1 < self.bars.len();
            let high = wide.then(|| self.bars[index + 1]);
            index += if wide { 2 } else { 1 };
            if low.read() & 1 != 0 || ![0, 4].contains(&(low.read() & 6)) {
                continue;
            }
            let address =
                u64::from(low.read() & !0xf) | u64::from(high.map_or(0, |high| high.read())) << 32;
            let mask = u64::from(low.writable & !0xf)
                | u64::from(high.map_or(u32::MAX, |high| high.writable)) << 32;
            if address != 0 && mask & 0xffff_ffff_ffff_fff0 != 0 {
                ranges.push((address, mask & mask.wrapping_neg()));
            }
        }
        ranges
    }

    fn registers(&self) -> [u32; 6] {
        self.bars.map(|bar| bar.read())
    }
}

/// The configuration space of the bus.
#[derive(Clone, Debug)]
struct Bus(Arc<Mutex<Function>>);

impl Bus {
    fn lock(&self) -> MutexGuard<'_, Function> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigurationAccess for Bus {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        assert_eq!(offset % 4, 0);
        if function != FUNCTION {
            return u32::MAX;
        }
        let mut state = self.lock();
        let honest = match offset {
            COMMAND => state.words[1] & 0xffff_0000 | u32::from(state.command),
            _ if BARS.contains(&offset) => {
                state.bars[usize::from((offset - BARS.start) / 4)].read()
            }
            _ => state.words[usize::from(offset / 4)],
        };
        let Some(choices) = &mut state.lies else {
            return honest;
        };
        match choices.byte() {
            0..200 => honest,
            200..210 => u32::MAX,
            210..230 => honest ^ 1 << choices.below(32),
            _ => choices.long(),
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, value: u32) {
        assert_eq!(function, FUNCTION, "another function is written to");
        let mut state = self.lock();
        if offset == COMMAND {
            assert_eq!(value >> 16, 0, "bits of the status register are cleared");
            state.command = value as u16;
        } else {
            assert!(
                offset.is_multiple_of(4) && BARS.contains(&offset),
                "configuration register {offset:#x} is written to"
            );
            assert!(
                state.lies.is_some() || state.command & 3 == 0,
                "a BAR is written to while the function decodes"
            );
            state.bars[usize::from((offset - BARS.start) / 4)].value = value;
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

/// Starts a device behind a PCI function.
pub fn pci(bytes: &[u8]) {
    let (decisions, rest) = bytes.split_at(bytes.len().min(DECISIONS));
    let mut choices = Choices::bytes(decisions);
    let mut rest = Choices::bytes(rest);
    let kind = KINDS[choices.below(3)];
    let mut function = Function::new(kind, &mut rest);
    let lies = choices.one_in(4);
    if lies {
        function.lies = Some(Choices::Seed(rest.long().into()));
    }
    let multiplier = 4;
    let memory = Memory::anonymous(DEFAULT_BASE, MEMORY).unwrap();
    let layout = Layout::Pci {
        mapped: Vec::new(),
        bars: None,
        multiplier,
    };
    let raw = Raw::new(memory.clone(), kind, layout, rest);
    let machine = Machine::new(memory, raw.clone());
    let _installed = machine.install();

    let bus = Bus(Arc::new(Mutex::new(function)));
    let mut root = PciRoot::new(bus.clone());
    let mut window = PciRangeAllocator::new(WINDOW.0, WINDOW.1);
    if !choices.one_in(4) && assign_bars(&mut root, FUNCTION, &mut window).is_ok() && !lies {
        let state = bus.lock();
        assert_eq!(state.command & 6, 6, "the function does not answer");
    }
    let before = {
        let state = bus.lock();
        raw.set_bars((!lies).then(|| state.ranges()), multiplier);
        (state.registers(), state.command)
    };
    let found = probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, None).next();
    if !lies {
        let state = bus.lock();
        assert_eq!(
            (state.registers(), state.command),
            before,
            "the probe left traces"
        );
    }
    if let Some((address, kind, mut transport)) = found {
        assert_eq!(address, FUNCTION);
        let split = choices
            .one_in(2)
            .then(|| transport.split_interrupt())
            .flatten();
        raw.set_kind(kind);
        drive(kind, transport, split, &mut choices);
    }
    raw.finish();
}
