//! Each fault does what its name says, as the driver sees it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Driver, NEXT, WRITE};
use machine::emulated::{features, status};
use machine::hostile::{Fault, Hostile};
use machine::{Board, Device, Disk, Display, Event, MachineHal, Nic, Version};
use virtio_drivers::transport::Transport;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::Command;

const PLAIN: u64 = !features::RING_EVENT_IDX;

fn board(device: impl Into<Device>, hostile: Hostile) -> Board {
    Board::emulated()
        .mmio(Version::Modern, device.into().hostile(hostile))
        .build()
        .unwrap()
}

fn disk(hostile: Hostile) -> Board {
    board(Disk::memory(1 << 16), hostile)
}

/// Sends one read to a disk with a fault. Returns the used index, the used element, and what the status byte holds.
fn one_read(fault: Fault) -> (u16, (u32, u32), u8) {
    let board = disk(Hostile::new().once(fault));
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    let (buffer, descriptors) = driver.block_read(1);
    driver.send(0, &descriptors);
    let said = (
        driver.used_index(0),
        driver.used(0, 0),
        driver.get(buffer.address() + 1000),
    );
    assert_eq!(board.device(0).counters().faults, 1, "{fault}");
    assert!(
        board
            .events()
            .iter()
            .any(|record| record.event == Event::Fault { device: 0, fault })
    );
    driver.reset();
    said
}

#[test]
fn used_elements_lie_as_they_are_told() {
    assert_eq!(one_read(Fault::UsedIdHighBits), (1, (0x1_0000, 513), 0));
    assert_eq!(one_read(Fault::UsedIdWrong), (1, (1, 513), 0));
    assert_eq!(one_read(Fault::UsedLenZero), (1, (0, 0), 0));
    assert_eq!(one_read(Fault::UsedIndexBack).0, u16::MAX);
    assert_eq!(one_read(Fault::CompleteTwice).0, 2);
    assert_eq!(one_read(Fault::CompleteNever).0, 0);
    let (_, (id, _), _) = one_read(Fault::UsedIdOutOfRange);
    assert!(id >= 8);
    let (_, (id, len), _) = one_read(Fault::UsedLenLong);
    assert!(id == 0 && len > 513);
    let (_, (id, len), _) = one_read(Fault::UsedLenShort);
    assert!(id == 0 && len < 513);
    assert!(one_read(Fault::UsedIndexJump).0 > 8);
}

#[test]
fn block_statuses_lie_as_they_are_told() {
    assert_eq!(one_read(Fault::BlockStatus(3)), (1, (0, 513), 3));
    assert_eq!(one_read(Fault::BlockStatusUnwritten), (1, (0, 512), 0xff));
}

#[test]
fn completions_come_late_and_out_of_order() {
    let hostile = Hostile::new().once(Fault::CompleteLate);
    let late = disk(hostile.times(1, 0, Fault::CompleteOutOfOrder));
    let mut driver = Driver::new(&late, 0);
    driver.start(PLAIN, 1, 8);
    let (_buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    assert_eq!(
        driver.used_index(0),
        0,
        "the first one waits for the board to run"
    );
    let table = driver.queues[0].descriptors();
    for head in [3, 4] {
        driver.descriptor(table, head, (descriptors[0].0, 16, NEXT, 1));
        driver.post(0, head);
        driver.kick(0);
    }
    late.run();
    assert_eq!(driver.used_index(0), 3);
    let order: Vec<_> = (0..3).map(|slot| driver.used(0, slot).0).collect();
    assert!(order.ends_with(&[0]), "{order:?}");
    driver.reset();
}

#[test]
fn a_foreign_id_is_that_of_another_request() {
    let board = disk(Hostile::new().once(Fault::UsedIdForeign));
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    let (_buffer, descriptors) = driver.block_read(0);
    let table = driver.queues[0].descriptors();
    driver.descriptor(table, 5, (descriptors[0].0, 16, NEXT, 1));
    for (index, descriptor) in (0..).zip(&descriptors) {
        driver.descriptor(table, index, *descriptor);
    }
    driver.post(0, 0);
    driver.post(0, 5);
    driver.kick(0);
    assert_eq!(driver.used(0, 0).0, 5);
    driver.reset();
}

#[test]
fn a_reset_that_does_not_happen_leaves_the_device_at_work() {
    let board = disk(Hostile::new().once(Fault::ResetIgnored));
    let driver = Driver::new(&board, 0);
    driver.write(0x70, 1);
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 1);
    assert!(driver.reset(), "but once");
}

#[test]
fn a_slow_reset_is_done_after_some_reads() {
    let board = disk(Hostile::new().always(Fault::ResetSlow));
    let driver = Driver::new(&board, 0);
    driver.write(0x70, 1);
    driver.write(0x70, 0);
    let reads: Vec<_> = (0..5).map(|_| driver.status()).collect();
    assert_eq!(reads, [1, 1, 1, 0, 0]);
}

#[test]
fn a_request_may_be_completed_between_reset_and_its_end() {
    let board = disk(Hostile::new().times(1, 1, Fault::CompleteAfterReset));
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    board.device(0).answer_later(true);
    let (buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    driver.write(0x70, 0);
    assert_ne!(driver.status(), 0);
    board.run();
    assert_eq!(driver.used_index(0), 1);
    assert_eq!(driver.get::<u8>(buffer.address() + 1000), 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn features_are_refused_and_withheld() {
    let driver_board = disk(Hostile::new().always(Fault::FeaturesRefused));
    assert!(!Driver::new(&driver_board, 0).negotiate(u64::MAX));
    let driver_board = disk(Hostile::new().always(Fault::Version1Withheld));
    let driver = Driver::new(&driver_board, 0);
    assert_eq!(driver.offered() & features::VERSION_1, 0);
}

#[test]
fn a_device_needs_a_reset_instead_of_answering() {
    let board = disk(Hostile::new().once(Fault::NeedsReset));
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    let (_buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    assert_eq!(driver.used_index(0), 0);
    assert_eq!(
        driver.status() & status::DEVICE_NEEDS_RESET,
        status::DEVICE_NEEDS_RESET
    );
    assert!(board.interrupt_pending(0));
    driver.kick(0);
    assert_eq!(driver.violations(), ["GEN-04"]);
    assert!(driver.reset());
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_device_vanishes_after_so_many_accesses() {
    let board = disk(Hostile::new().after(3, Fault::Vanish));
    let driver = Driver::new(&board, 0);
    driver.read(0);
    driver.write(0x70, 1);
    assert_eq!(driver.status(), 1);
    assert_eq!(driver.status(), u32::MAX);
    assert_eq!(driver.read_width(0x100, 2), 0xffff);
}

#[test]
fn queue_sizes_are_what_they_are_told() {
    for size in [0, 1, 3, 4, 32768] {
        let board = disk(Hostile::new().always(Fault::QueueSize(size)));
        let driver = Driver::new(&board, 0);
        driver.write(0x30, 0);
        assert_eq!(driver.read(0x34), size);
    }
}

#[test]
fn configuration_is_short_and_restless() {
    let short = disk(Hostile::new().always(Fault::ConfigShort));
    let driver = Driver::new(&short, 0);
    assert_eq!((driver.read(0x100), driver.read(0x104)), (128, u32::MAX));
    let restless = disk(Hostile::new().always(Fault::ConfigRestless));
    let driver = Driver::new(&restless, 0);
    assert_ne!(driver.read(0xfc), driver.read(0xfc));
}

#[test]
fn frames_lie_as_they_are_told() {
    for (fault, expected) in [
        (Fault::FrameRunt, 0..10),
        (Fault::FrameOversized, 2049..2050),
        (Fault::NetBuffersWrong, 72..73),
    ] {
        let nic = Nic::new([2; 6]);
        let board = board(&nic, Hostile::new().once(fault));
        let mut driver = Driver::new(&board, 0);
        driver.start(PLAIN, 2, 8);
        let buffer = board.memory().buffer(2048).unwrap();
        nic.inject(&[7; 60]);
        driver.send(0, &[(buffer.address(), 2048, WRITE, 0)]);
        let (id, len) = driver.used(0, 0);
        assert!(id == 0 && expected.contains(&len), "{fault}: {len}");
        let buffers: u16 = driver.get(buffer.address() + 10);
        assert_eq!(buffers == 1, fault != Fault::NetBuffersWrong);
        driver.reset();
    }
}

#[test]
fn displays_lie_as_they_are_told() {
    for (fault, kind, len, width) in [
        (Fault::GpuResponseType, 0x1100, 408, 640),
        (Fault::GpuResponseShort, 0x1101, 8, 0),
        (Fault::DisplayEmpty, 0x1101, 408, 0),
        (Fault::DisplayHuge, 0x1101, 408, 65536),
    ] {
        let board = board(Display::new(640, 480), Hostile::new().once(fault));
        let mut driver = Driver::new(&board, 0);
        driver.start(PLAIN, 2, 8);
        let buffer = board.memory().buffer(4096).unwrap();
        let at = buffer.address();
        driver.put(at, 0x100_u32);
        driver.send(0, &[(at, 24, NEXT, 1), (at + 1024, 1024, WRITE, 0)]);
        assert_eq!(driver.used(0, 0), (0, len), "{fault}");
        assert_eq!(driver.get::<u32>(at + 1024), kind, "{fault}");
        assert_eq!(driver.get::<u32>(at + 1024 + 32), width, "{fault}");
        driver.reset();
    }
}

/// A PCI disk with a fault, switched on.
fn pci_disk(fault: Fault) -> Board {
    let disk = Device::from(Disk::memory(1 << 16));
    let board = Board::emulated()
        .pci(disk.hostile(Hostile::new().always(fault)))
        .build()
        .unwrap();
    let function = board.pci_functions()[0].address;
    let mut root = board.pci();
    root.set_bar_64(function, 4, board.pci_window().start);
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    board
}

#[test]
fn capability_lists_lie_as_they_are_told() {
    let list = |fault, most| {
        let board = pci_disk(fault);
        let function = board.pci_functions()[0].address;
        let root = board.pci();
        let found: Vec<_> = root
            .capabilities(function)
            .take(most)
            .map(|capability| capability.offset)
            .collect();
        found
    };
    assert_eq!(list(Fault::CapabilityLoop, 100).len(), 100);
    assert_eq!(list(Fault::CapabilityOffEnd, 100).last(), Some(&0xfc));
    assert_eq!(list(Fault::CapabilityDecoys, 100).len(), 8);
    assert_eq!(list(Fault::NotifyMultiplierOdd, 100).len(), 4);
}

#[test]
fn bars_lie_as_they_are_told() {
    let infos = |fault| {
        let board = pci_disk(fault);
        let function = board.pci_functions()[0].address;
        board.pci().bars(function)
    };
    infos(Fault::BarTypeReserved).unwrap_err();
    let huge = infos(Fault::BarHuge).unwrap();
    assert_eq!(
        huge[4].as_ref().unwrap().memory_address_size(),
        Some((0, 1 << 63))
    );
    let decoys = infos(Fault::CapabilityDecoys).unwrap();
    assert_eq!(decoys[0].as_ref().unwrap().memory_address_size(), None);
    let board = pci_disk(Fault::NotifyOffsetOutOfRange);
    assert_eq!(board.machine().bus().read(0x1000_001e, 2), 0x7fff);
}

#[test]
fn undefined_interrupt_bits_are_set() {
    let board = disk(Hostile::new().always(Fault::InterruptBits));
    let driver = Driver::new(&board, 0);
    board.device(0).spurious_interrupt(1);
    assert_eq!(driver.read(0x60), 0xf1);
    driver.write(0x64, 0xf1);
    assert_eq!(driver.violations(), ["MMIO-13"]);
}

#[test]
fn unusable_capabilities_are_refused_by_a_careful_driver() {
    for fault in [Fault::OffsetBeyondBar, Fault::NotifyMultiplierOdd] {
        let board = pci_disk(fault);
        let function = board.pci_functions()[0].address;
        PciTransport::new::<MachineHal, _>(&mut board.pci(), function).unwrap_err();
    }
}

#[test]
fn mapping_registers_outside_of_a_bar_is_seen() {
    let board = pci_disk(Fault::ConfigRestless);
    let function = board.pci_functions()[0].address;
    let transport = PciTransport::new::<MachineHal, _>(&mut board.pci(), function).unwrap();
    assert_ne!(
        transport.read_config_generation(),
        transport.read_config_generation()
    );
    drop(transport);
    assert!(board.violations().is_empty());
    board.machine().bus().mapped(0x1000_3000, 0x1001);
    assert_eq!(board.violations()[0].id, "PCI-09");
}

#[test]
fn registers_of_a_function_are_watched() {
    let board = pci_disk(Fault::ConfigRestless);
    let bus = board.machine().bus();
    let (bar, config) = (0x1000_0000_u64, 0x3000_8000_u64);
    let cases: [(u64, u8, u64, &str); 9] = [
        (bar + 0x20, 8, 0, "PCI-04"),
        (bar + 0x14, 4, 1, "PCI-04"),
        (bar + 0x12, 2, 1, "PCI-11"),
        (bar + 0x1e, 2, 1, "PCI-11"),
        (bar + 0x18, 2, 3, "PCI-12"),
        (bar + 0x1c, 2, 0, "PCI-15"),
        (bar + 0x3000, 4, 0, "PCI-21"),
        (bar + 0x1800, 4, 0, "PCI-09"),
        (config + 0x48, 4, 0, "PCI-10"),
    ];
    for (address, width, value, id) in cases {
        bus.write(address, width, value);
        let seen = board.take_violations();
        assert!(
            seen.iter().any(|violation| violation.id == id),
            "{id}: {seen:?}"
        );
    }
    bus.write(bar + 0x14, 1, 1);
    bus.write(bar + 0x14, 1, 0);
    bus.write(bar + 0x14, 1, 1);
    assert_eq!(board.take_violations()[0].id, "PCI-14");
    bus.write(config + 0x20, 4, 0);
    assert_eq!(board.take_violations()[0].id, "PCI-10");
}

#[test]
fn every_fault_by_seed_and_by_bytes_leaves_the_board_standing() {
    let mut committed = std::collections::HashSet::new();
    for seed in 0..400_u64 {
        let hostile = if seed % 2 == 0 {
            Hostile::seed(seed).one_in(4)
        } else {
            let bytes: Vec<u8> = (0..2000_u64)
                .map(|index| {
                    index
                        .wrapping_mul(seed)
                        .wrapping_mul(2_654_435_761)
                        .to_le_bytes()[1]
                })
                .collect();
            Hostile::bytes(&bytes)
        };
        let nic = Nic::new([2; 6]);
        let device = match seed % 3 {
            0 => Device::from(Disk::memory(1 << 16)),
            1 => Device::from(&nic),
            _ => Device::from(Display::new(64, 64)),
        };
        let board = board(device, Hostile::new());
        let mut driver = Driver::new(&board, 0);
        driver.start(PLAIN, 1 + usize::from(seed % 3 != 0), 8);
        board.device(0).misbehave(hostile);
        for round in 0..50 {
            let (buffer, mut descriptors) = driver.block_read(round);
            if seed % 3 == 1 {
                nic.inject(&[1; 60]);
                descriptors = [(buffer.address(), 1024, WRITE, 0); 3];
            } else if seed % 3 == 2 {
                driver.put(buffer.address(), 0x100_u32);
                descriptors[0].1 = 24;
            }
            driver.send(0, &descriptors);
            driver.read(0x70);
            driver.read(0xfc);
            board.run();
        }
        driver.reset();
        driver.offered();
        board.run();
        for record in board.events() {
            if let Event::Fault { fault, .. } = record.event {
                committed.insert(fault);
            }
        }
    }
    assert!(committed.len() > 25, "{committed:?}");
}
