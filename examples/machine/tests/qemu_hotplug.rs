//! Devices behind QEMU's root ports: that they work there, and that they can be unplugged, in good order and by surprise.
//!
//! Without QEMU the tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes them fail instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::sync::Arc;

use axdriver_base::{BaseDriverOps, DevError, DevResult};
use axdriver_block::{BlockDriverOps, conformance as block_rules};
use axdriver_display::{DisplayDriverOps, conformance as display_rules};
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    PciBridge, PciRangeAllocator, PciTransport, VirtIoBlkDev, VirtIoGpuDev, VirtIoNetDev,
    WaitPolicy, pci::DeviceFunction, probe_pci_buses, route_pci_interrupt,
};
use machine::qemu::{Bus, Disk, Display, ImageFormat, Nic, QemuBoard, QemuMachine, QemuOptions};
use machine::{MachineHal, RegisterBus};
use serde_json::json;
use support::{BUSES, Drivers, LONG, Scratch, patiently, pattern, skip};

const VIRT: QemuMachine = QemuMachine::Aarch64Virt;
const Q35: QemuMachine = QemuMachine::X86Q35;

/// The machines, with a line for each that is missing.
fn machines() -> impl Iterator<Item = QemuMachine> {
    [VIRT, Q35].into_iter().filter(|machine| {
        let missing = QemuBoard::missing(*machine);
        if let Some(why) = &missing {
            skip(why);
        }
        missing.is_none()
    })
}

/// The slot of a root port (PCI Express Base Specification 5.0, 7.5.3).
struct Port {
    bus: Arc<dyn RegisterBus>,
    /// Where its PCI Express capability is.
    capability: u64,
}

/// Slot Control: the power is off, and so is the power indicator.
const POWER_OFF: u64 = 1 << 10;
const INDICATOR: u64 = 3 << 8;
const INDICATOR_ON: u64 = 1 << 8;
/// Slot Status: the attention button was pressed, and there is a device.
const ATTENTION: u64 = 1;
const PRESENT: u64 = 1 << 6;

impl Port {
    fn of(board: &QemuBoard, number: usize) -> Self {
        let address = board.root_ports()[number];
        let capability = board
            .pci()
            .capabilities(address)
            .find(|capability| capability.id == 0x10)
            .unwrap();
        Self {
            bus: board.machine().bus().clone(),
            capability: board.ecam()
                + (u64::from(address.device) << 15)
                + u64::from(capability.offset),
        }
    }

    fn status(&self) -> u64 {
        self.bus.read(self.capability + 0x1a, 2)
    }

    fn control(&self, clear: u64, set: u64) {
        let control = self.bus.read(self.capability + 0x18, 2);
        self.bus
            .write(self.capability + 0x18, 2, control & !clear | set);
    }

    /// Takes note of the attention button. Whether it was pressed.
    fn attention(&self) -> bool {
        let pressed = self.status() & ATTENTION != 0;
        self.bus.write(self.capability + 0x1a, 2, ATTENTION);
        pressed
    }

    fn is_occupied(&self) -> bool {
        self.status() & PRESENT != 0
    }

    fn power_off(&self) {
        self.control(0, INDICATOR | POWER_OFF);
    }

    fn power_on(&self) {
        self.control(INDICATOR | POWER_OFF, INDICATOR_ON);
    }
}

type Found = Vec<(DeviceFunction, PciTransport)>;

fn find(board: &QemuBoard) -> Found {
    let window = board.pci_window();
    let mut window = PciRangeAllocator::new(window.start, window.end - window.start);
    let mut root = board.pci();
    probe_pci_buses::<MachineHal, _>(&mut root, BUSES, Some(&mut window))
        .map(|(function, _, transport)| (function, transport))
        .collect()
}

/// What is behind a port into which it was plugged.
fn find_plugged(board: &QemuBoard, number: usize) -> Found {
    let configuration = support::configuration(board);
    let PciBridge {
        buses, mut window, ..
    } = PciBridge::read(&configuration, board.root_ports()[number]).unwrap();
    let mut root = board.pci();
    probe_pci_buses::<MachineHal, _>(&mut root, buses, Some(&mut window))
        .map(|(function, _, transport)| (function, transport))
        .collect()
}

/// Waits until QEMU has done away with a device.
fn wait_until_deleted(board: &mut QemuBoard, id: &str) {
    // It tells of the device's parts, which have no id, as well.
    while board.qmp().wait_for_event("DEVICE_DELETED").unwrap()["data"]["device"] != id {}
}

/// A disk, a NIC on a cable and a display, each behind a port of its own.
fn three(machine: QemuMachine, image: &Scratch) -> QemuOptions {
    QemuOptions::new(machine)
        .disk(Disk::new(&image.0, ImageFormat::Raw).on(Bus::RootPort))
        .nic(Nic::on_cable().on(Bus::RootPort))
        .display(Display::new(200, 120).on(Bus::RootPort))
}

#[track_caller]
fn assert_nothing_left(board: &QemuBoard) {
    let counters = board.memory().counters();
    assert_eq!((counters.pages_live, counters.shares_live), (0, 0));
    assert_eq!(board.memory().overwritten_free_pages(), [0; 0]);
}

#[test]
fn devices_behind_root_ports_keep_the_contracts() {
    for machine in machines() {
        let image = Scratch::image(&format!("behind-{machine:?}"), 1 << 20);
        let mut board = QemuBoard::start(&three(machine, &image)).unwrap();
        let mut drivers = Drivers::probe::<64>(&board);
        block_rules::check(drivers.disks[0].as_mut()).unwrap();
        display_rules::check(drivers.displays[0].as_mut()).unwrap();
        let nic = drivers.nics[0].as_mut();
        let mut cable = board.take_cable(0).unwrap();
        let frame = pattern(0, 600);
        for _ in 0..100 {
            nic.recycle_tx_buffers().unwrap();
            let mut buffer = nic.alloc_tx_buffer(frame.len()).unwrap();
            buffer.packet_mut().copy_from_slice(&frame);
            nic.transmit(buffer).unwrap();
            assert_eq!(cable.receive(LONG).unwrap(), frame);
        }
        drop(drivers);
        assert_nothing_left(&board);
        board.check().unwrap();
        board.shut_down().unwrap();
    }
}

#[test]
fn devices_behind_a_switch_and_a_bridge_of_another_kind_are_found_and_work() {
    for machine in machines() {
        let image = Scratch::image(&format!("switch-{machine:?}"), 1 << 20);
        let mut options = three(machine, &image);
        // A switch with two ports, and a bridge to a bus that is not PCI Express.
        for device in [
            "pcie-root-port,id=root,bus=pcie.0,addr=0x10,chassis=40",
            "x3130-upstream,id=switch,bus=root",
            "xio3130-downstream,id=left,bus=switch,addr=0,chassis=41",
            "xio3130-downstream,id=right,bus=switch,addr=1,chassis=42",
            "virtio-gpu-pci,id=display1,bus=left",
            "virtio-gpu-pci,id=display2,bus=right",
            "pci-bridge,id=old,bus=pcie.0,addr=0x11,chassis_nr=43",
            "virtio-gpu-pci,id=display3,bus=old,addr=5",
        ] {
            options = options.argument("-device").argument(device);
        }
        let mut board = QemuBoard::start(&options).unwrap();
        let places: Vec<_> = find(&board)
            .iter()
            .map(|(function, _)| (function.bus, function.device))
            .collect();
        assert_eq!(places, [(1, 0), (2, 0), (3, 0), (6, 0), (7, 0), (8, 5)]);
        let configuration = support::configuration(&board);
        let function = |bus, device| DeviceFunction {
            bus,
            device,
            function: 0,
        };
        for (inner, outer, pin) in [
            (function(6, 0), function(0, 0x10), 1),
            (function(7, 0), function(0, 0x10), 2),
            (function(8, 5), function(0, 0x11), 2),
        ] {
            let route = route_pci_interrupt(&configuration, 0, inner);
            assert_eq!(route, Some((outer, pin)), "{inner}");
        }

        let mut drivers = Drivers::probe::<16>(&board);
        assert_eq!(drivers.displays.len(), 4);
        for (number, display) in drivers.displays.iter_mut().enumerate() {
            display.fb().as_bytes_mut().fill(number as u8 + 1);
            display.flush().unwrap();
        }
        for number in 0..4 {
            let shade = number as u8 + 1;
            let pixel = board.image(number, 0).unwrap().pixel(9, 9);
            assert_eq!(pixel, Some([shade, shade, shade, 255]));
        }
        drop(drivers);
        assert_nothing_left(&board);
        board.check().unwrap();
    }
}

#[test]
fn an_interrupt_of_a_device_behind_a_root_port_comes_where_it_is_said_to() {
    for machine in machines() {
        let image = Scratch::image(&format!("routed-{machine:?}"), 1 << 20);
        let mut board = QemuBoard::start(&three(machine, &image)).unwrap();
        board.intercept_interrupts().unwrap();
        let (function, transport) = find(&board).remove(0);
        let configuration = support::configuration(&board);
        let (port, pin) = route_pci_interrupt(&configuration, 0, function).unwrap();
        assert_eq!(port, board.root_ports()[0]);
        // As the boards wire the pins of bus 0; see `QemuBoard::pci_functions`.
        let first = if machine == VIRT { 3 } else { 20 };
        let line = first + (u32::from(port.device) + u32::from(pin) - 1) % 4;
        let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).unwrap();
        disk.enable_interrupts().unwrap();
        assert!(!board.interrupt_line(line).unwrap().asserted);
        disk.read_block(0, &mut [0; 512]).unwrap();
        assert!(board.wait_for_interrupt(line, LONG).unwrap());
        let _ = disk.acknowledge_interrupt().unwrap();
        assert!(!board.interrupt_line(line).unwrap().asserted);
    }
}

#[test]
fn a_device_that_is_asked_for_is_let_go_and_another_takes_its_place() {
    for machine in machines() {
        let image = Scratch::image(&format!("orderly-{machine:?}"), 1 << 20);
        let mut board = QemuBoard::start(&three(machine, &image)).unwrap();
        let port = Port::of(&board, 0);
        let mut found = find(&board);
        assert_eq!(found.len(), 3);
        // The others stay where they are.
        let (_, transport) = found.remove(2);
        let mut display =
            VirtIoGpuDev::<MachineHal, _>::try_new_with(transport, patiently()).unwrap();
        let (_, transport) = found.remove(0);
        let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).unwrap();
        disk.write_block(7, &[0xa5; 512]).unwrap();
        disk.flush().unwrap();
        let before = board.memory().counters();

        assert!(!port.attention() && port.is_occupied());
        board.qmp().device_del("disk0").unwrap();
        assert!(port.attention(), "the button was pressed");
        assert!(port.is_occupied(), "it is asked for, and no more");
        disk.read_block(7, &mut [0; 512]).unwrap();
        drop(disk);
        port.power_off();
        wait_until_deleted(&mut board, "disk0");
        assert!(!port.is_occupied());
        assert!(board.memory().counters().pages_live < before.pages_live);
        display.flush().unwrap();
        assert!(find_plugged(&board, 0).is_empty());

        let again =
            json!({ "driver": "virtio-blk-pci", "id": "again", "drive": "disk0", "bus": "port1" });
        board.qmp().execute("device_add", again).unwrap();
        assert!(port.attention() && port.is_occupied());
        port.power_on();
        let (_, transport) = find_plugged(&board, 0).remove(0);
        let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).unwrap();
        let mut block = [0; 512];
        disk.read_block(7, &mut block).unwrap();
        assert_eq!(block, [0xa5; 512]);
        disk.read_block(9, &mut block).unwrap();
        assert_eq!(block[..], pattern(9 * 512, 512));
        display.flush().unwrap();
        drop((disk, display, found));
        assert_nothing_left(&board);
        board.check().unwrap();
    }
}

/// How often a driver looks at a device that has gone, at most.
const POLLS: u64 = 2000;

fn impatiently() -> WaitPolicy {
    WaitPolicy::new().with_max_polls(POLLS)
}

/// Expects that a call on a device that has gone fails, and looks at it no more often than it may.
#[track_caller]
fn fails(board: &QemuBoard, what: &str, call: impl FnOnce() -> DevResult) {
    let reads = board.machine().accesses().reads;
    let error = call().unwrap_err();
    let reads = board.machine().accesses().reads - reads;
    // Registers that have gone are read as 0 on q35, as if they had been reset, and offer no features then.
    assert!(
        matches!(
            error,
            DevError::Io | DevError::BadState | DevError::Unsupported
        ),
        "{what}: {error:?}"
    );
    assert!(reads < 3 * POLLS, "{what}: {reads} registers were read");
}

#[test]
fn a_device_that_is_pulled_out_under_its_driver_is_an_error_of_each_call_and_no_more() {
    for machine in machines() {
        let image = Scratch::image(&format!("surprise-{machine:?}"), 1 << 20);
        let options = three(machine, &image).disk(Disk::null(1 << 20));
        let mut board = QemuBoard::start(&options).unwrap();
        let mut cable = board.take_cable(0).unwrap();
        let ports = [0, 1, 2].map(|number| Port::of(&board, number));
        let (mut other, mut without) = (None, None);
        let (mut disk, mut nic, mut display) = (None, None, None);
        for (function, transport) in find(&board) {
            // Bus 0 comes first.
            match function.bus {
                0 => {
                    other =
                        VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).ok();
                    without = Some(board.memory().counters());
                }
                1 => {
                    disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).ok()
                }
                2 => {
                    nic =
                        VirtIoNetDev::<MachineHal, _, 16>::try_new_with(transport, patiently()).ok()
                }
                _ => {
                    display =
                        VirtIoGpuDev::<MachineHal, _>::try_new_with(transport, patiently()).ok()
                }
            }
        }
        let mut other = other.unwrap();
        let without = without.unwrap();
        let (mut disk, mut nic, mut display) = (disk.unwrap(), nic.unwrap(), display.unwrap());
        disk.read_block(0, &mut [0; 512]).unwrap();
        display.flush().unwrap();
        let frame = pattern(0, 600);
        cable.send(&frame, LONG).unwrap();
        // Frames are with the device, and a buffer of it with the caller.
        let received = loop {
            if let Ok(buffer) = nic.receive() {
                break buffer;
            }
        };
        let mut sending = nic.alloc_tx_buffer(frame.len()).unwrap();
        sending.packet_mut().copy_from_slice(&frame);
        let kept = nic.alloc_tx_buffer(60).unwrap();
        nic.transmit(sending).unwrap();
        assert_eq!(cable.receive(LONG).unwrap(), frame);
        let with = board.memory().counters();

        disk.set_wait_policy(impatiently());
        nic.set_wait_policy(impatiently());
        display.set_wait_policy(impatiently());
        for (port, id) in ports.iter().zip(["disk0", "nic0"]) {
            board.qmp().device_del(id).unwrap();
            assert!(port.attention());
            port.power_off();
            wait_until_deleted(&mut board, id);
        }
        // QEMU takes no order to unplug a display, and tells nothing of its end, but lets it go all the same.
        ports[2].power_off();

        let mut block = [0; 512];
        for _ in 0..3 {
            fails(&board, "read", || disk.read_block(0, &mut block));
            fails(&board, "write", || disk.write_block(0, &block));
            fails(&board, "flush", || disk.flush());
            fails(&board, "reset of the disk", || disk.reset());
            fails(&board, "draw", || display.flush());
            fails(&board, "reset of the display", || display.reset());
            fails(&board, "reset of the NIC", || nic.reset());
            fails(&board, "receive", || nic.receive().map(drop));
            let _ = disk.acknowledge_interrupt();
            let _ = nic.acknowledge_interrupt();
            let _ = display.acknowledge_interrupt();
            let _ = nic.recycle_tx_buffers();
            other.write_block(1, &block).unwrap();
            other.flush().unwrap();
        }
        let _ = nic.transmit(kept);
        let _ = nic.recycle_rx_buffer(received);
        drop((disk, nic, display));
        let counters = board.memory().counters();
        if machine == Q35 {
            assert_eq!(counters.pages_live, without.pages_live);
            assert_eq!(counters.shares_live, without.shares_live);
        } else {
            // What does not reset keeps the memory that it was told of, of the disk the block that was to be read.
            assert_eq!(counters.pages_live, with.pages_live);
            assert_eq!(counters.shares_live, with.shares_live + 1);
        }
        assert_eq!(board.memory().overwritten_free_pages(), [0; 0]);

        // The slots are free, and one of another kind fits as well.
        for (number, port) in ports.iter().enumerate() {
            assert!(!port.is_occupied());
            port.power_on();
            assert!(find_plugged(&board, number).is_empty());
            port.power_off();
        }
        let again =
            json!({ "driver": "virtio-net-pci", "id": "again", "netdev": "net0", "bus": "port3" });
        board.qmp().execute("device_add", again).unwrap();
        ports[2].power_on();
        let (_, transport) = find_plugged(&board, 2).remove(0);
        let mut nic =
            VirtIoNetDev::<MachineHal, _, 16>::try_new_with(transport, patiently()).unwrap();
        let mut buffer = nic.alloc_tx_buffer(80).unwrap();
        buffer.packet_mut().copy_from_slice(&frame[..80]);
        nic.transmit(buffer).unwrap();
        assert_eq!(cable.receive(LONG).unwrap(), frame[..80]);
        other.read_block(1, &mut block).unwrap();
        drop((other, nic));
        board.check().unwrap();
    }
}
