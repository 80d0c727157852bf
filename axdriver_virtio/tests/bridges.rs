//! Devices behind PCI-to-PCI bridges: finding them, where firmware has set up the bridges and where nobody has, and bridges that
//! say anything.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use axdriver_base::DeviceType;
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::pci::{ConfigurationAccess, DeviceFunction, MmioCam, PciRoot};
use axdriver_virtio::{
    PciBridge, PciRangeAllocator, PciTransport, Transport, VirtIoBlkDev, VirtIoGpuDev,
    VirtIoNetDev, probe_pci_buses, route_pci_interrupt,
};
use common::{MAC, logged};
use machine::emulated::{Builder, PciBus};
use machine::{Board, Machine, MachineHal, Memory, RegisterBus};
use proptest::prelude::*;

const COMMAND: u8 = 0x04;
const NUMBERS: u8 = 0x18;
const MEMORY: u8 = 0x20;
const BAR4: u8 = 0x20;

/// The configuration space of a board, any register of it.
#[derive(Clone)]
struct Config(Arc<dyn RegisterBus>, u64);

impl Config {
    fn of(board: &Board) -> Self {
        Self(board.machine().bus().clone(), board.ecam())
    }

    fn address(&self, function: DeviceFunction, register: u8) -> u64 {
        let DeviceFunction {
            bus,
            device,
            function,
        } = function;
        self.1
            + (u64::from(bus) << 20
                | u64::from(device) << 15
                | u64::from(function) << 12
                | u64::from(register))
    }
}

impl ConfigurationAccess for Config {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        let value = self.0.read(self.address(function, register), 4);
        u32::try_from(value & 0xffff_ffff).unwrap()
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        let address = self.address(function, register);
        self.0.write(address, 4, data.into());
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

fn at(bus: u8, device: u8) -> DeviceFunction {
    DeviceFunction {
        bus,
        device,
        function: 0,
    }
}

fn disk() -> machine::Disk {
    machine::Disk::memory(1 << 16)
}

fn nic() -> machine::Nic {
    machine::Nic::new(MAC)
}

/// A disk on bus 0; behind one bridge a NIC, and a display and a disk behind one more; behind another bridge nothing but two
/// bridges, one to a NIC and one to nothing; and a disk on bus 0 again.
fn forest() -> Builder {
    let inner = PciBus::new().pci(machine::Display::new(16, 8)).pci(disk());
    let switch = PciBus::new()
        .bridge(PciBus::new().pci(nic()))
        .bridge(PciBus::new());
    Board::emulated()
        .memory(32 << 20)
        .pci(disk())
        .pci_bridge(PciBus::new().pci(nic()).bridge(inner))
        .pci_bridge(switch)
        .pci(disk())
}

/// What is found in it.
const FOUND: [(u8, u8, DeviceType); 6] = [
    (0, 1, DeviceType::Block),
    (0, 4, DeviceType::Block),
    (1, 0, DeviceType::Net),
    (2, 0, DeviceType::Display),
    (2, 1, DeviceType::Block),
    (4, 0, DeviceType::Net),
];

/// The bridges of it, with their buses.
const BRIDGES: [(u8, u8, Range<u8>); 5] = [
    (0, 2, 1..2),
    (1, 1, 2..2),
    (0, 3, 3..5),
    (3, 0, 4..4),
    (3, 1, 5..5),
];

type Found = Vec<(DeviceFunction, DeviceType, PciTransport)>;

fn window(board: &Board) -> PciRangeAllocator {
    let range = board.pci_window();
    PciRangeAllocator::new(range.start, range.end - range.start)
}

fn find(board: &Board, window: Option<&mut PciRangeAllocator>) -> Found {
    let mut root = board.pci();
    probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, window).collect()
}

fn places(found: &Found) -> Vec<(u8, u8, DeviceType)> {
    let place = |(at, kind, _): &(DeviceFunction, _, _)| (at.bus, at.device, *kind);
    found.iter().map(place).collect()
}

/// Expects that what a bridge forwards lies within what the one above forwards, and apart from what its neighbours do, and
/// that every BAR is forwarded.
fn assert_windows_nest(board: &Board, found: &Found) {
    let config = Config::of(board);
    let mut windows: BTreeMap<u8, Vec<Range<u64>>> = BTreeMap::new();
    let forwarded = |bridge: DeviceFunction| {
        let memory = config.read_word(bridge, MEMORY);
        let (base, limit) = (memory << 16 & 0xfff0_0000, memory & 0xfff0_0000 | 0xf_ffff);
        u64::from(base)..u64::from(limit) + 1
    };
    let mut outer = BTreeMap::from([(0, board.pci_window())]);
    for (bus, device, buses) in BRIDGES {
        let bridge = at(bus, device);
        let inner = forwarded(bridge);
        windows.entry(bus).or_default().push(inner.clone());
        outer.insert(buses.start, inner);
        // No prefetchable memory is forwarded, and memory and DMA are.
        let prefetchable = config.read_word(bridge, 0x24) & 0xfff0_fff0;
        assert_eq!(prefetchable, 0xfff0, "{bridge}");
        assert_eq!(config.read_word(bridge, 0x28), 0, "{bridge}");
        assert_eq!(config.read_word(bridge, 0x2c), 0, "{bridge}");
        assert_eq!(config.read_word(bridge, COMMAND) & 7, 6, "{bridge}");
        let own = u64::from(config.read_word(bridge, 0x10));
        assert_ne!(own, 0, "{bridge} decodes addresses at 0");
        windows.entry(bus).or_default().push(own..own + 0x1000);
    }
    for (function, ..) in found {
        let start = u64::from(config.read_word(*function, BAR4) & !0xf);
        windows
            .entry(function.bus)
            .or_default()
            .push(start..start + 0x4000);
    }
    for (bus, mut ranges) in windows {
        ranges.sort_by_key(|range| range.start);
        let outer = &outer[&bus];
        for range in &ranges {
            assert!(
                range.start < range.end && outer.start <= range.start && range.end <= outer.end,
                "{range:x?} on bus {bus} is not within {outer:x?}"
            );
        }
        for pair in ranges.windows(2) {
            assert!(
                pair[0].end <= pair[1].start,
                "{pair:x?} overlap on bus {bus}"
            );
        }
    }
}

/// Starts a driver on each device that was found, and lets it work.
fn work(board: &Board, found: Found) {
    for (function, kind, transport) in found {
        match kind {
            DeviceType::Block => {
                let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new(transport).unwrap();
                let mut read = [0; 512];
                disk.write_block(3, &[function.device + 1; 512]).unwrap();
                disk.read_block(3, &mut read).unwrap();
                assert_eq!(read, [function.device + 1; 512], "{function}");
            }
            DeviceType::Net => {
                let mut nic = VirtIoNetDev::<MachineHal, _, 8>::try_new(transport).unwrap();
                assert_eq!(nic.mac_address().0, MAC, "{function}");
                let buf = nic.alloc_tx_buffer(60).unwrap();
                nic.transmit(buf).unwrap();
                nic.recycle_tx_buffers().unwrap();
            }
            _ => {
                let mut display = VirtIoGpuDev::<MachineHal, _>::try_new(transport).unwrap();
                assert_eq!(display.info().width, 16, "{function}");
                display.flush().unwrap();
            }
        }
    }
    assert_eq!(board.violations(), []);
    assert_eq!(board.memory().counters().pages_live, 0);
}

#[test]
fn devices_behind_bridges_that_nobody_numbered_are_found_and_work() {
    let board = forest().build().unwrap();
    let mut window = window(&board);
    let found = find(&board, Some(&mut window));
    assert_eq!(places(&found), FOUND);
    let config = Config::of(&board);
    for (bus, device, buses) in BRIDGES {
        let numbers = u32::from_le_bytes([bus, buses.start, buses.end, 0]);
        assert_eq!(config.read_word(at(bus, device), NUMBERS), numbers);
    }
    assert_windows_nest(&board, &found);
    // What comes next is behind all of it.
    let next = window.alloc(1).unwrap();
    for (function, ..) in &found {
        assert!(next > u64::from(config.read_word(*function, BAR4)));
    }
    work(&board, found);
}

#[test]
fn devices_behind_bridges_that_firmware_numbered_are_found_without_a_window() {
    let board = forest().build().unwrap();
    let mut first = window(&board);
    // What firmware would have done.
    drop(find(&board, Some(&mut first)));
    let bus = board.machine().bus().clone();
    let tap = Arc::new(Writes(bus, Mutex::default()));
    let machine = Machine::new(board.memory().clone(), tap.clone());
    let installed = machine.install();
    let found = find(&board, None);
    drop(installed);
    assert_eq!(places(&found), FOUND);
    // Nothing was written but what sizes BARs.
    let ecam = board.ecam();
    let bridges = BRIDGES.map(|(bus, device, _)| Config::of(&board).address(at(bus, device), 0));
    for address in tap.1.lock().unwrap().iter() {
        assert!(!bridges.contains(&(address & !0xfff)), "{address:#x}");
        assert!(matches!((address - ecam) & 0xfff, 0x04 | 0x10..0x28));
    }
    work(&board, found);
}

/// Notes the addresses that are written to.
struct Writes(Arc<dyn RegisterBus>, Mutex<Vec<u64>>);

impl RegisterBus for Writes {
    fn read(&self, address: u64, width: u8) -> u64 {
        self.0.read(address, width)
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        self.1.lock().unwrap().push(address);
        self.0.write(address, width, value);
    }
}

#[test]
fn a_second_search_finds_what_the_first_has_set_up() {
    let board = forest().build().unwrap();
    let mut window = window(&board);
    drop(find(&board, Some(&mut window)));
    let next = window.clone().alloc(1);
    let found = find(&board, Some(&mut window));
    assert_eq!(places(&found), FOUND);
    assert_eq!(window.alloc(1), next, "nothing was taken");
    work(&board, found);
}

#[test]
fn a_search_with_a_window_enables_what_firmware_has_only_set_up() {
    let board = forest().build().unwrap();
    drop(find(&board, Some(&mut window(&board))));
    let mut config = Config::of(&board);
    let bridges = BRIDGES.map(|(bus, device, _)| at(bus, device));
    let devices = FOUND.map(|(bus, device, _)| at(bus, device));
    for function in bridges.into_iter().chain(devices) {
        config.write_word(function, COMMAND, 2);
    }
    let found = find(&board, Some(&mut window(&board)));
    assert_eq!(places(&found), FOUND);
    work(&board, found);
}

#[test]
fn without_a_window_bridges_that_nobody_numbered_are_not_followed() {
    let board = forest().build().unwrap();
    logged();
    assert!(find(&board, None).is_empty());
    let said = logged();
    assert!(
        said.iter().any(|line| line.text.contains("00:02.0")),
        "{said:?}"
    );
    let config = Config::of(&board);
    assert_eq!(config.read_word(at(0, 2), NUMBERS), 0);
    assert_eq!(config.read_word(at(0, 2), COMMAND), 0);
}

#[test]
fn numbers_that_firmware_has_given_are_kept_and_left_out() {
    let board = forest().build().unwrap();
    let mut config = Config::of(&board);
    // The second bridge on bus 0 has 1 to 7, and what is behind it has no addresses.
    config.write_word(at(0, 3), NUMBERS, 0x0007_0100);
    config.write_word(at(1, 0), NUMBERS, 0x0006_0601);
    let found = find(&board, Some(&mut window(&board)));
    assert_eq!(config.read_word(at(0, 3), NUMBERS), 0x0007_0100);
    assert_eq!(config.read_word(at(0, 2), NUMBERS), 0x0009_0800);
    assert_eq!(
        places(&found),
        [
            (0, 1, DeviceType::Block),
            (0, 4, DeviceType::Block),
            (8, 0, DeviceType::Net),
            (9, 0, DeviceType::Display),
            (9, 1, DeviceType::Block),
        ]
    );
    // Firmware's other bridge has no number, and none that would be free for it.
    assert_eq!(config.read_word(at(1, 1), NUMBERS), 0);
    // The device there was left as it is.
    assert_eq!(config.read_word(at(6, 0), COMMAND) & 0xffff, 0);
    work(&board, found);
}

#[test]
fn no_bus_is_accessed_that_the_caller_has_not() {
    for last in [0, 1, 2, 4] {
        let board = forest().build().unwrap();
        if last == 4 {
            // Bridges that firmware led elsewhere are not followed either.
            Config::of(&board).write_word(at(0, 3), NUMBERS, 0x00ff_0500);
        }
        let bus = board.machine().bus().clone();
        let end = board.ecam() + ((u64::from(last) + 1) << 20);
        let machine = Machine::new(board.memory().clone(), Arc::new(Mapped(bus, end)));
        let _installed = machine.install();
        let mut root = board.pci();
        let mut window = window(&board);
        let found: Found =
            probe_pci_buses::<MachineHal, _>(&mut root, 0..=last, Some(&mut window)).collect();
        let expected: Vec<_> = match last {
            0 => FOUND[..2].to_vec(),
            1 => FOUND[..3].to_vec(),
            _ => FOUND[..5].to_vec(),
        };
        assert_eq!(places(&found), expected, "{last}");
        work(&board, found);
    }
}

/// The registers up to an address, beyond which nothing is mapped.
struct Mapped(Arc<dyn RegisterBus>, u64);

impl RegisterBus for Mapped {
    fn read(&self, address: u64, width: u8) -> u64 {
        assert!(address < self.1, "{address:#x} is not mapped");
        self.0.read(address, width)
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        assert!(address < self.1, "{address:#x} is not mapped");
        self.0.write(address, width, value);
    }
}

#[test]
fn one_bus_alone_is_walked_if_no_more_is_asked_for() {
    let board = forest().build().unwrap();
    let mut root = board.pci();
    let mut window = window(&board);
    let found: Found =
        probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window)).collect();
    assert_eq!(places(&found), FOUND[..2]);
    assert_eq!(Config::of(&board).read_word(at(0, 2), NUMBERS), 0);
    #[expect(clippy::reversed_empty_ranges, reason = "no bus at all")]
    let none = probe_pci_buses::<MachineHal, _>(&mut root, 1..=0, Some(&mut window)).next();
    assert!(none.is_none());
}

#[test]
fn a_bridge_for_which_there_is_no_room_is_left_out() {
    let board = forest().build().unwrap();
    let start = board.pci_window().start;
    // Room for the first bridge and the one behind it, no more than a granule each, and for some BARs.
    let mut window = PciRangeAllocator::new(start, 0x30_c000);
    logged();
    let found = find(&board, Some(&mut window));
    assert_eq!(
        places(&found),
        [FOUND[0], FOUND[1], FOUND[2], FOUND[3], FOUND[4]]
    );
    let config = Config::of(&board);
    assert_eq!(config.read_word(at(0, 3), NUMBERS), 0);
    assert_eq!(config.read_word(at(0, 3), COMMAND), 0);
    let said = logged();
    let warned =
        |line: &common::Logged| line.level == log::Level::Warn && line.text.contains("00:03.0");
    assert!(said.iter().any(warned), "{said:?}");
    work(&board, found);
}

#[test]
fn a_window_above_4_gib_serves_bus_0_alone() {
    let board = forest().pci_window(1 << 32..(1 << 32) + (1 << 28));
    let board = board.build().unwrap();
    let mut window = window(&board);
    let found = find(&board, Some(&mut window));
    assert_eq!(places(&found), FOUND[..2]);
    work(&board, found);
}

/// What is read from a register instead of what is there.
type Alter = fn(&Config, DeviceFunction, u8) -> Option<u32>;

/// Configuration space in which some registers are read as something else.
#[derive(Clone)]
struct Altered(Config, Alter);

impl ConfigurationAccess for Altered {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        let altered = self.1(&self.0, function, register);
        altered.unwrap_or_else(|| self.0.read_word(function, register))
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        self.0.write_word(function, register, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

impl Altered {
    fn find(self, window: &mut PciRangeAllocator) -> Vec<(u8, u8, DeviceType)> {
        let mut root = PciRoot::new(self);
        places(&probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, Some(window)).collect())
    }
}

#[test]
fn bridges_without_bars_are_given_room_for_what_is_behind_them_and_no_more() {
    let no_bars: Alter = |_, _, register| (register == 0x10).then_some(0);
    for (start, size, expected) in [
        (0x1000_0000, 0x1000_0000, &FOUND[..]),
        (0x1000_0000, 0x20_c000, &FOUND[..5]),
        (0x1000_0000, 0x4_0000, &FOUND[..2]),
        // One granule below 4 GiB.
        (0xfff0_0000, 0x1000_0000, &FOUND[..3]),
        (1 << 32, 1 << 28, &FOUND[..2]),
    ] {
        let board = forest().pci_window(0x1000_0000..1 << 33).build().unwrap();
        let mut window = PciRangeAllocator::new(start, size);
        let found = Altered(Config::of(&board), no_bars).find(&mut window);
        assert_eq!(found, expected, "{start:#x}");
    }
}

#[test]
fn a_bridge_that_does_not_take_what_it_is_given_is_left_out() {
    let stubborn: [Alter; 2] = [
        |_, function, register| (function == at(0, 2) && register == NUMBERS).then_some(0),
        |_, function, register| (function == at(0, 2) && register == MEMORY).then_some(0),
    ];
    for alter in stubborn {
        let board = forest().build().unwrap();
        let found = Altered(Config::of(&board), alter).find(&mut window(&board));
        assert_eq!(found[..2], FOUND[..2]);
        assert!(matches!(found[2..], [(_, 0, DeviceType::Net)]), "{found:?}");
        let config = Config::of(&board);
        assert_eq!(config.read_word(at(0, 2), NUMBERS), 0);
        assert_eq!(config.read_word(at(0, 2), COMMAND) & 3, 0);
    }
}

#[test]
fn a_device_that_shows_its_only_function_under_each_number_is_found_once() {
    let board = forest().build().unwrap();
    let mut window = window(&board);
    let mut root = PciRoot::new(Echoing(Config::of(&board)));
    let found: Found =
        probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, Some(&mut window)).collect();
    assert_eq!(places(&found), FOUND);
}

/// Configuration space in which all functions of a device are its first.
struct Echoing(Config);

impl Echoing {
    fn first(function: DeviceFunction) -> DeviceFunction {
        at(function.bus, function.device)
    }
}

impl ConfigurationAccess for Echoing {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        self.0.read_word(Self::first(function), register)
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        self.0.write_word(Self::first(function), register, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[test]
fn a_search_that_is_given_up_leaves_bridges_that_forward_what_they_should() {
    let board = forest().build().unwrap();
    let mut root = board.pci();
    let mut window = window(&board);
    let found = probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, Some(&mut window)).next();
    drop(found);
    let all = find(&board, Some(&mut window));
    assert_windows_nest(&board, &all);
    work(&board, all);
}

#[test]
fn interrupts_come_out_where_the_pins_lead() {
    let board = forest().build().unwrap();
    let found = find(&board, Some(&mut window(&board)));
    let config = Config::of(&board);
    // The board numbers its devices as they were plugged in, and finds them bus by bus.
    for (device, (function, _, mut transport)) in [0, 5, 1, 2, 3, 4].into_iter().zip(found) {
        let (outer, pin) = route_pci_interrupt(&config, 0, function).unwrap();
        assert_eq!(outer.bus, 0);
        // The board's wiring of bus 0: the pins rotate from device to device, and the lines follow those of the slots.
        let line = 32 + (u32::from(outer.device) + u32::from(pin) - 1) % 4;
        board.device(device).spurious_interrupt(1);
        assert_eq!(board.run(), [line], "{function}");
        transport.ack_interrupt();
        // Seen from the bus that the function is on, its pin is its own.
        assert_eq!(
            route_pci_interrupt(&config, function.bus, function),
            Some((function, 1))
        );
    }
    for nowhere in [
        at(9, 0),
        at(0, 0),
        at(0, 2),
        at(0, 31),
        at(1, 5),
        at(0, 255),
    ] {
        assert_eq!(
            route_pci_interrupt(&config, 0, nowhere),
            None,
            "{nowhere:?}"
        );
    }
}

#[test]
fn a_slot_that_was_empty_takes_a_device_into_what_its_bridge_forwards() {
    let behind = PciBus::new().pci(disk());
    let board = Board::emulated()
        .pci_bridge(behind)
        .pci_bridge(PciBus::new());
    let board = board.build().unwrap();
    // The device is not there at the first search.
    let port = at(0, 1);
    let mut root = PciRoot::new(Unplugged(Config::of(&board)));
    let mut first = window(&board);
    let found = probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, Some(&mut first)).next();
    assert!(found.is_none());

    let mut root = PciRoot::new(Config::of(&board));
    let PciBridge {
        buses, mut window, ..
    } = PciBridge::read(&Config::of(&board), port).unwrap();
    assert_eq!(buses, 1..=1);
    let found: Found =
        probe_pci_buses::<MachineHal, _>(&mut root, buses, Some(&mut window)).collect();
    assert_eq!(places(&found), [(1, 0, DeviceType::Block)]);
    work(&board, found);
}

/// Configuration space in which there is nothing behind bridges.
struct Unplugged(Config);

impl ConfigurationAccess for Unplugged {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        if function.bus == 0 {
            self.0.read_word(function, register)
        } else {
            u32::MAX
        }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        assert_eq!(function.bus, 0);
        self.0.write_word(function, register, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[test]
fn what_a_bridge_forwards_is_read_from_its_registers() {
    let board = forest().build().unwrap();
    let config = Config::of(&board);
    // No bridge at all, a host bridge, a device, and a bridge without numbers.
    for none in [at(0, 31), at(0, 0), at(0, 1), at(0, 2), at(0, 32)] {
        assert!(PciBridge::read(&config, none).is_none(), "{none:?}");
    }
    drop(find(&board, Some(&mut window(&board))));
    for (numbers, buses) in [
        (0x0005_0300, Some(3..=5)),
        (0x0003_0300, Some(3..=3)),
        (0x0002_0300, None),
        (0x0005_0000, None),
    ] {
        Config::of(&board).write_word(at(0, 3), NUMBERS, numbers);
        let bridge = PciBridge::read(&config, at(0, 3));
        assert_eq!(bridge.map(|bridge| bridge.buses), buses);
    }
    Config::of(&board).write_word(at(0, 3), NUMBERS, 0x0005_0300);
    for (memory, first, size) in [
        (0x1010_1000, Some(0x1000_0000), 0x20_0000),
        (0xfff0_fff0, Some(0xfff0_0000), 0x10_0000),
        (0x0000_fff0, None, 0),
        (0x1000_1020, None, 0),
        // Address 0 is that of BARs that have none.
        (0x0010_0000, None, 0),
    ] {
        Config::of(&board).write_word(at(0, 3), MEMORY, memory);
        let mut window = PciBridge::read(&config, at(0, 3)).unwrap().window;
        assert_eq!(window.alloc(1), first, "{memory:#x}");
        let mut window = PciBridge::read(&config, at(0, 3)).unwrap().window;
        assert_eq!(
            window.alloc(2 * u64::from(size > 0) * size),
            None,
            "{memory:#x}"
        );
        let mut all = window;
        let pieces = std::iter::from_fn(|| all.alloc(0x10_0000)).count();
        assert_eq!(pieces as u64 * 0x10_0000, size, "{memory:#x}");
    }
}

#[test]
fn bridges_behind_one_another_are_numbered_up_to_a_depth() {
    for (depth, expected) in [(16, 1), (17, 0)] {
        let mut behind = PciBus::new().pci(disk());
        for _ in 1..depth {
            behind = PciBus::new().bridge(behind);
        }
        let board = Board::emulated().pci_bridge(behind).build().unwrap();
        logged();
        let found = find(&board, Some(&mut window(&board)));
        assert_eq!(found.len(), expected, "{depth}");
        let warned = |line: &common::Logged| line.level == log::Level::Warn;
        assert_eq!(logged().iter().any(warned), expected == 0);
        work(&board, found);
    }
}

// Bridges that say anything.

/// What a register is: what was written counts for some, and others stay or change at each look.
#[derive(Clone, Copy, Debug)]
enum Conduct {
    /// As the specification has it: what can be written is kept.
    Honest,
    /// What was there at first is read for ever.
    Fixed,
    /// A word that is another one at each look.
    Random,
    /// All ones after so many accesses.
    Gone(u32),
}

/// A whole configuration space made of one seed: the functions of all buses are there and are bridges, devices or neither.
#[derive(Clone)]
struct Chaos(Arc<Mutex<ChaosState>>);

struct ChaosState {
    seed: u64,
    conduct: Conduct,
    /// How many of 256 functions are there, and how many of those are bridges.
    there: u16,
    bridges: u16,
    accesses: u64,
    written: BTreeMap<(DeviceFunction, u8), u32>,
    /// The buses that may be accessed.
    last: u8,
}

/// A number that follows from two others, and looks like any.
fn scramble(seed: u64, salt: u64) -> u64 {
    let mut x = seed ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..3 {
        x ^= x >> 31;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    x ^ x >> 29
}

impl ChaosState {
    fn initial(&self, function: DeviceFunction, register: u8) -> u32 {
        let place = u64::from(function.bus) << 16
            | u64::from(function.device) << 11
            | u64::from(function.function) << 8;
        let own = scramble(self.seed, place);
        let [there, bridge, multi, kind, low, high, ..] = own.to_le_bytes();
        if u16::from(there) >= self.there {
            return u32::MAX;
        }
        let is_bridge = u16::from(bridge) < self.bridges;
        let noise = scramble(own, register.into());
        let noise = u32::try_from(noise & 0xffff_ffff).unwrap();
        match register {
            0x00 if is_bridge => 0x0001_1b36,
            0x00 => 0x1040_1af4 + (u32::from([1_u8, 2, 16, 4][usize::from(kind % 4)]) << 16),
            0x04 => 0x0010_0000 | noise & 7,
            0x0c => (u32::from(is_bridge) | u32::from(multi & 0x80)) << 16,
            // Numbers that are there or not, of lower or higher buses or the same.
            NUMBERS if is_bridge => match kind % 4 {
                0 => 0,
                1 => u32::from_le_bytes([low, function.bus, high, 0]),
                2 => u32::from_le_bytes([function.bus, low, high, 0]),
                _ => u32::from_le_bytes([function.bus, function.bus.wrapping_add(1), 255, 0]),
            },
            // One BAR of 64 bits, with an address or without.
            BAR4 if kind < 100 => 0xc,
            BAR4 if kind < 200 => 0x2000_000c,
            0x10..0x28 if kind < 200 => 0,
            0x34 => 0x40,
            // The structures of a virtio device.
            0x40 => 0x0110_5009,
            0x50 => 0x0214_6409,
            0x64 => 0x0310_7409,
            0x44 | 0x54 | 0x68 => 4,
            0x48 | 0x7c => 0,
            0x58 | 0x5c | 0x4c => 0x1000,
            0x6c => 0x800,
            0x60 | 0x70 => 4,
            _ => noise,
        }
    }
}

impl ConfigurationAccess for Chaos {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        let mut state = self.0.lock().unwrap();
        assert!(function.valid() && register.is_multiple_of(4));
        assert!(function.bus <= state.last, "{function} is not mapped");
        state.accesses += 1;
        let initial = state.initial(function, register);
        if initial == u32::MAX {
            return initial;
        }
        let written = state.written.get(&(function, register)).copied();
        match state.conduct {
            Conduct::Honest => written.unwrap_or(initial),
            Conduct::Fixed => initial,
            Conduct::Random if state.accesses.is_multiple_of(3) => {
                u32::try_from(scramble(state.seed, state.accesses) >> 32).unwrap()
            }
            Conduct::Random => written.unwrap_or(initial),
            Conduct::Gone(after) if state.accesses > after.into() => u32::MAX,
            Conduct::Gone(_) => written.unwrap_or(initial),
        }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        let mut state = self.0.lock().unwrap();
        assert!(function.bus <= state.last, "{function} is not mapped");
        state.accesses += 1;
        let writable = match register {
            0x04 => {
                assert_eq!(data >> 16, 0, "bits of the status register are cleared");
                7
            }
            0x10..0x30 => u32::MAX,
            other => panic!("{other:#x} is written to"),
        };
        let mut value = state.initial(function, register) & !writable | data & writable;
        if register == BAR4 && state.initial(function, 0) >> 16 != 1 {
            // The bits that the address of a device's registers has.
            value = value & 0xffff_c000 | 0xc;
        }
        state.written.insert((function, register), value);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

/// The most accesses that a search may take: it looks at each function of each bus a few times, and at six BARs of each.
const MOST: u64 = 256 * 256 * 150;

fn search(seed: u64, conduct: Conduct, there: u16, bridges: u16, last: u8, give: bool) -> usize {
    let memory = Memory::anonymous(machine::memory::DEFAULT_BASE, 1 << 20).unwrap();
    let machine = Machine::new(memory, Arc::new(()));
    let _installed = machine.install();
    let chaos = Chaos(Arc::new(Mutex::new(ChaosState {
        seed,
        conduct,
        there,
        bridges,
        accesses: 0,
        written: BTreeMap::new(),
        last,
    })));
    let mut root = PciRoot::new(chaos.clone());
    let mut window = PciRangeAllocator::new(0x1000_0000, 0x3000_0000);
    let window = give.then_some(&mut window);
    let mut before = None;
    let mut found = 0;
    for (function, ..) in probe_pci_buses::<MachineHal, _>(&mut root, 0..=last, window) {
        assert!(before < Some(function), "{function} is found twice");
        before = Some(function);
        found += 1;
        let _ = route_pci_interrupt(&chaos, 0, function);
        let _ = PciBridge::read(&chaos, function);
    }
    let accesses = chaos.0.lock().unwrap().accesses;
    assert!(accesses < MOST, "{accesses} accesses");
    found
}

fn conducts() -> impl Strategy<Value = Conduct> {
    prop_oneof![
        Just(Conduct::Honest),
        Just(Conduct::Fixed),
        Just(Conduct::Random),
        (0_u32..20_000).prop_map(Conduct::Gone),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_search_ends_whatever_the_bridges_say(
        seed in any::<u64>(),
        conduct in conducts(),
        there in 0_u16..=40,
        bridges in 0_u16..=256,
        last in any::<u8>(),
        give in any::<bool>(),
    ) {
        search(seed, conduct, there, bridges, last, give);
    }
}

#[test]
fn devices_behind_strange_bridges_are_found_all_the_same() {
    // The test above would hold of a search that finds nothing.
    let found: Vec<_> = (0..20)
        .map(|seed| search(seed, Conduct::Honest, 40, 64, 255, true))
        .collect();
    assert!(found.iter().any(|found| *found > 50), "{found:?}");
}

#[test]
fn a_search_ends_where_every_function_of_every_bus_is_a_bridge() {
    for conduct in [Conduct::Honest, Conduct::Fixed, Conduct::Random] {
        assert_eq!(search(7, conduct, 256, 256, 255, true), 0);
    }
}

#[test]
fn the_access_of_virtio_drivers_finds_what_another_one_does() {
    fn is_access<C: ConfigurationAccess>(_: &PciRoot<C>) {}
    let board = forest().build().unwrap();
    let mut root: PciRoot<MmioCam> = board.pci();
    is_access(&root);
    let mut window = window(&board);
    let found: Found =
        probe_pci_buses::<MachineHal, _>(&mut root, 0..=255, Some(&mut window)).collect();
    let mut other = PciRoot::new(Config::of(&board));
    let again: Found = probe_pci_buses::<MachineHal, _>(&mut other, 0..=255, None).collect();
    assert_eq!(places(&found), places(&again));
}
