//! Looking for devices where there are none, or strange ones, and giving out addresses: no feature of the crate is needed for it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{DevError, DeviceType};
use axdriver_virtio::pci::{DeviceFunction, DeviceFunctionInfo, HeaderType};
use axdriver_virtio::{
    PciRangeAllocator, PciTransport, Transport, as_dev_err, as_dev_type, assign_bars,
    probe_mmio_device, probe_pci_buses, probe_pci_device,
};
use common::{Capability, FakeFunction, FakeRoot, Over, logged};
use machine::hostile::{Fault, Hostile};
use machine::registers::register_pointer;
use machine::{Board, Device, Entropy, MachineHal, Version};

/// The fake function's BAR.
const BAR: u64 = 0x1000_0000;

fn disk() -> machine::Disk {
    machine::Disk::memory(1 << 16)
}

#[test]
fn addresses_that_cannot_be_registers_are_no_devices_and_are_not_followed() {
    let bench = Over::Modern.plug(disk());
    let tap = bench.tap(|_| None);
    let base = bench.registers();
    for (address, size) in [
        (0, 0x200),
        (0, 0),
        (base, 0),
        (base, 0x10),
        (base, 0xff),
        (base + 1, 0x200),
        (base + 2, 0x200),
        (base + 3, 0x200),
        (u64::MAX, 0x200),
    ] {
        // SAFETY: what is null, not aligned or too small is not followed; nothing here is dereferenced in any case.
        let found = unsafe { probe_mmio_device(register_pointer(address), size) };
        assert!(found.is_none(), "{size:#x} bytes at {address:#x}");
    }
    assert_eq!(tap.take(), []);
}

#[test]
fn the_smallest_region_is_all_registers_and_no_configuration() {
    let bench = Over::Modern.plug(disk());
    let pointer = bench.board.mmio_slots()[0].pointer();
    // SAFETY: the slot of this board.
    let (device_type, transport) = unsafe { probe_mmio_device(pointer, 0x100) }.unwrap();
    assert_eq!(device_type, DeviceType::Block);
    let field: Result<u32, _> = transport.read_config_space(0);
    assert_eq!(field, Err(virtio_drivers::Error::ConfigSpaceTooSmall));
}

#[test]
fn fields_outside_of_the_configuration_space_are_refused() {
    for over in Over::ALL {
        let bench = over.plug(disk());
        let mut transport = bench.transport();
        let beyond = if over == Over::Pci { 60 } else { 0x100 };
        let tap = bench.tap(|_| None);
        for offset in [beyond, beyond + 4, usize::MAX - 3, usize::MAX & !7] {
            let read: Result<u32, _> = transport.read_config_space(offset);
            assert_eq!(
                read,
                Err(virtio_drivers::Error::ConfigSpaceTooSmall),
                "{offset:#x}"
            );
            assert!(transport.write_config_space(offset, 0_u32).is_err());
        }
        // Not aligned, and wider than the transports guarantee.
        let read: Result<u32, _> = transport.read_config_space(2);
        assert_eq!(read, Err(virtio_drivers::Error::InvalidParam));
        let read: Result<u64, _> = transport.read_config_space(0);
        assert_eq!(read, Err(virtio_drivers::Error::InvalidParam));
        assert_eq!(tap.take(), []);
    }
}

#[test]
fn slots_are_told_apart_by_their_devices() {
    let board = Board::emulated()
        .mmio(Version::Modern, disk())
        .mmio_legacy(machine::Nic::new(common::MAC))
        .mmio_empty()
        .mmio(Version::Modern, Entropy::default())
        .mmio(Version::Modern, machine::Display::new(16, 8))
        .build()
        .unwrap();
    let found: Vec<_> = board.mmio_slots()[..6]
        .iter()
        .map(|slot| {
            // SAFETY: a slot of this board, used by nobody else.
            let found = unsafe { probe_mmio_device(slot.pointer(), slot.size) };
            found.map(|(device_type, _)| device_type)
        })
        .collect();
    assert_eq!(
        found,
        [
            Some(DeviceType::Block),
            Some(DeviceType::Net),
            None,
            None,
            Some(DeviceType::Display),
            None
        ]
    );
    assert_eq!(board.violations(), []);
}

#[test]
fn every_device_type_is_mapped_or_refused() {
    use virtio_drivers::transport::DeviceType as V;
    for id in 0..=u8::MAX {
        let Ok(device_type) = V::try_from(u32::from(id)) else {
            continue;
        };
        let expected = match id {
            1 => Some(DeviceType::Net),
            2 => Some(DeviceType::Block),
            16 => Some(DeviceType::Display),
            _ => None,
        };
        assert_eq!(as_dev_type(device_type), expected, "{device_type:?}");
    }
}

#[test]
fn errors_that_stay_are_not_reported_as_errors_that_pass() {
    use virtio_drivers::Error;
    for error in [
        Error::QueueFull,
        Error::AlreadyUsed,
        Error::WrongToken,
        Error::InvalidParam,
        Error::DmaError,
        Error::IoError,
        Error::Unsupported,
        Error::ConfigSpaceTooSmall,
        Error::ConfigSpaceMissing,
    ] {
        assert_ne!(as_dev_err(error), DevError::Again, "{error:?}");
    }
    assert_eq!(as_dev_err(Error::NotReady), DevError::Again);
}

#[test]
fn probing_writes_nothing() {
    for (kind, over) in [
        (0, Over::Modern),
        (1, Over::Legacy),
        (2, Over::Modern),
        (3, Over::Legacy),
    ] {
        let device = match kind {
            0 => Device::from(disk()),
            1 => Device::from(machine::Nic::new(common::MAC)),
            2 => Device::from(machine::Display::new(16, 8)),
            _ => Device::from(Entropy::default()),
        };
        let bench = over.plug(device);
        let tap = bench.tap(|_| None);
        drop(bench.find());
        assert!(tap.take().iter().all(|access| !access.write));
        assert_eq!(bench.events(), [], "no reset, no status, no feature");
        bench.assert_clean();
    }
}

#[test]
fn probing_a_function_leaves_its_configuration_space_as_it_was() {
    let bench = Over::Pci.plug(disk());
    drop(bench.find_pci());
    let function = FakeFunction::new(bench.registers(), &Capability::honest());
    let (mut root, fake) = FakeRoot::new(function);
    let before = fake.space();
    let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).unwrap();
    assert_eq!(fake.space(), before);
    drop(transport);
    assert_eq!(fake.space(), before);
    // While its BAR is sized, it does not answer to addresses.
    let mut decodes = true;
    for (register, value) in fake.writes() {
        match register {
            0x04 => decodes = value & 3 != 0,
            0x10..0x28 => assert!(!decodes, "{value:#x} is written to {register:#x}"),
            other => panic!("{other:#x} is written"),
        }
    }
    assert_eq!(bench.device().counters().writes, 0);
}

#[test]
fn functions_that_are_not_there_are_no_devices() {
    let (mut root, fake) = FakeRoot::new(FakeFunction::new(BAR, &Capability::honest()));
    for address in [
        DeviceFunction {
            bus: 0,
            device: 2,
            function: 0,
        },
        DeviceFunction {
            bus: 7,
            device: 1,
            function: 0,
        },
        DeviceFunction {
            bus: 0,
            device: 1,
            function: 7,
        },
        DeviceFunction {
            bus: 0,
            device: 32,
            function: 0,
        },
        DeviceFunction {
            bus: 0,
            device: 1,
            function: 8,
        },
        DeviceFunction {
            bus: 0xff,
            device: 0xff,
            function: 0xff,
        },
    ] {
        let transport = PciTransport::new::<MachineHal, _>(&mut root, address);
        assert!(transport.is_err(), "{address:?}");
        let mut window = PciRangeAllocator::new(BAR, 1 << 20);
        let assigned = assign_bars(&mut root, address, &mut window);
        assert_eq!(assigned, Err(DevError::InvalidParam), "{address:?}");
    }
    assert_eq!(fake.writes(), []);
}

#[test]
fn a_bridge_is_no_device_whatever_its_ids() {
    let mut function = FakeFunction::new(BAR, &Capability::honest());
    function.put(0x0c, 0x0001_0000);
    let (mut root, fake) = FakeRoot::new(function);
    let info = DeviceFunctionInfo {
        vendor_id: 0x1af4,
        device_id: 0x1042,
        class: 6,
        subclass: 4,
        prog_if: 0,
        revision: 1,
        header_type: HeaderType::PciPciBridge,
    };
    assert!(probe_pci_device::<MachineHal, _>(&mut root, FakeRoot::FUNCTION, &info).is_none());
    assert!(PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).is_err());
    let mut window = PciRangeAllocator::new(BAR, 1 << 20);
    let assigned = assign_bars(&mut root, FakeRoot::FUNCTION, &mut window);
    assert_eq!(assigned, Err(DevError::InvalidParam));
    assert_eq!(fake.writes(), []);
}

/// Functions whose capabilities are wrong in some way.
fn strange_functions() -> Vec<(&'static str, FakeFunction)> {
    let honest = Capability::honest();
    let with = |change: &dyn Fn(&mut FakeFunction)| {
        let mut function = FakeFunction::new(BAR, &honest);
        change(&mut function);
        function
    };
    let without = |index: usize| {
        let mut capabilities = honest.clone();
        capabilities.remove(index);
        FakeFunction::new(BAR, &capabilities)
    };
    let changed = |index: usize, change: &dyn Fn(&mut Capability)| {
        let mut capabilities = honest.clone();
        change(&mut capabilities[index]);
        FakeFunction::new(BAR, &capabilities)
    };
    vec![
        ("none at all", FakeFunction::new(BAR, &[])),
        (
            "the status bit is not set",
            with(&|function| function.put(0x04, 6)),
        ),
        (
            "the list starts in the header",
            with(&|function| function.put(0x34, 0x10)),
        ),
        (
            "the list starts at its end",
            with(&|function| function.put(0x34, 0xfc)),
        ),
        (
            "the first leads to itself",
            with(&|function| function.space[0x41] = 0x40),
        ),
        ("no common configuration", without(0)),
        ("no notifications", without(1)),
        ("no interrupt status", without(2)),
        (
            "the common configuration is short",
            changed(0, &|one| one.length = 55),
        ),
        (
            "the common configuration is empty",
            changed(0, &|one| one.length = 0),
        ),
        (
            "the common configuration is not aligned",
            changed(0, &|one| one.offset = 2),
        ),
        (
            "the notifications are short",
            changed(1, &|one| one.length = 1),
        ),
        (
            "the notifications are not aligned",
            changed(1, &|one| one.offset = 0x3001),
        ),
        (
            "the multiplier is odd",
            changed(1, &|one| one.multiplier = 3),
        ),
        (
            "the interrupt status is empty",
            changed(2, &|one| one.length = 0),
        ),
        (
            "a capability is too short",
            changed(0, &|one| one.cap_len = 15),
        ),
        (
            "the notify capability has no multiplier",
            changed(1, &|one| one.cap_len = 16),
        ),
        (
            "a capability is of another id",
            changed(0, &|one| one.id = 5),
        ),
        (
            "offset and length wrap",
            changed(0, &|one| one.offset = u32::MAX - 3),
        ),
        (
            "the length is all ones",
            changed(0, &|one| one.length = u32::MAX),
        ),
        (
            "it ends behind the BAR",
            changed(1, &|one| one.offset = 0x3004),
        ),
        (
            "the upper half of a BAR is no BAR",
            changed(0, &|one| one.bar = 5),
        ),
        (
            "the BAR has no size",
            with(&|function| {
                function.masks = [0; 6];
                function.put(0x20, 0x4);
            }),
        ),
        (
            "the BAR has holes",
            with(&|function| function.masks[4] = 0xffff_4000),
        ),
        (
            "the BAR is of a reserved type",
            with(&|function| {
                function.put(0x20, 0x1000_0006);
            }),
        ),
        (
            "the BAR wraps around 64 bits",
            with(&|function| {
                function.masks[4] = 0;
                function.masks[5] = 0xc000_0000;
                function.put(0x20, 0x4);
                function.put(0x24, 0);
            }),
        ),
    ]
}

#[test]
fn functions_with_strange_capabilities_are_no_devices_and_no_harm() {
    for (what, function) in strange_functions() {
        let bench = Over::Pci.plug(disk());
        let (mut root, fake) = FakeRoot::new(function);
        let before = fake.space();
        let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
        assert!(transport.is_err(), "{what}: {transport:?}");
        assert_eq!(fake.space(), before, "{what}");
        for (register, _) in fake.writes() {
            assert!(
                matches!(register, 0x04 | 0x10..0x28),
                "{what}: {register:#x}"
            );
        }
        bench.assert_clean();
        assert_eq!(bench.events(), [], "{what}: nothing is mapped");
    }
}

#[test]
fn a_bar_with_an_address_that_it_cannot_have_is_not_used() {
    // It claims 4 GiB, from an address that is no multiple of that: what would be mapped is not its own.
    let bench = Over::Pci.plug(disk());
    let mut function = FakeFunction::new(BAR, &Capability::honest());
    function.masks[4] = 0;
    let (mut root, _) = FakeRoot::new(function);
    let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
    assert!(transport.is_err());
    assert_eq!(bench.events(), [], "nothing is mapped");
}

#[test]
fn a_function_without_a_device_configuration_is_found() {
    let bench = Over::Pci.plug(disk());
    drop(bench.find_pci());
    let capabilities = &Capability::honest()[..3];
    let function = FakeFunction::new(bench.registers(), capabilities);
    let (mut root, _) = FakeRoot::new(function);
    let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).unwrap();
    let field: Result<u32, _> = transport.read_config_space(0);
    assert_eq!(field, Err(virtio_drivers::Error::ConfigSpaceMissing));
}

#[test]
fn capability_faults_of_the_emulated_devices_are_no_harm() {
    for &fault in Fault::ALL {
        let always = Hostile::new().always(fault);
        let bench = Over::Pci.plug(Device::from(&disk()).hostile(always));
        let found = bench.find_pci();
        let fit = !matches!(
            fault,
            Fault::BarReserved(_)
                | Fault::BarTypeReserved
                | Fault::BarHuge
                | Fault::OffsetWraps
                | Fault::OffsetBeyondBar
                | Fault::NotifyMultiplierOdd
        );
        assert_eq!(found.is_some(), fit, "{fault}");
        drop(found);
        bench.assert_clean();
    }
}

#[test]
fn what_is_wrong_is_in_the_log() {
    let hostile = Hostile::new().always(Fault::OffsetBeyondBar);
    let bench = Over::Pci.plug(Device::from(&disk()).hostile(hostile));
    logged();
    assert!(bench.find_pci().is_none());
    let said = logged();
    assert!(
        said.iter().any(|message| message.level == log::Level::Warn),
        "{said:?}"
    );
}

// Addresses for BARs.

#[test]
fn bars_get_addresses_and_the_function_is_enabled() {
    let (mut root, fake) = FakeRoot::new(FakeFunction::new(0, &Capability::honest()));
    let mut window = PciRangeAllocator::new(0xe000_1000, 0x10_0000);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    let space = fake.space();
    assert_eq!(space[0x20..0x28], [0x04, 0x40, 0x00, 0xe0, 0, 0, 0, 0]);
    assert_eq!(space[4] & 6, 6, "memory space and bus mastering");
    // The next address is behind it.
    assert_eq!(window.alloc(0x1000), Some(0xe000_8000));
}

#[test]
fn bars_that_have_addresses_keep_them() {
    let (mut root, fake) = FakeRoot::new(FakeFunction::new(BAR, &Capability::honest()));
    let before = fake.space();
    let mut window = PciRangeAllocator::new(0xe000_0000, 0x10_0000);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    assert_eq!(fake.space()[0x10..0x28], before[0x10..0x28]);
    assert_eq!(window.alloc(0x1000), Some(0xe000_0000), "nothing was taken");
}

#[test]
fn a_bar_above_4_gib_gets_both_halves() {
    let (mut root, fake) = FakeRoot::new(FakeFunction::new(0, &Capability::honest()));
    let mut window = PciRangeAllocator::new(0x12_3400_0000, 0x10_0000);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    assert_eq!(fake.space()[0x20..0x28], [0x04, 0, 0, 0x34, 0x12, 0, 0, 0]);
}

/// A function with a BAR of 32 bits and this mask at BAR 1 alone.
fn narrow(mask: u32) -> FakeFunction {
    let mut function = FakeFunction::new(0, &Capability::honest());
    function.masks = [0, mask, 0, 0, 0, 0];
    function.put(0x20, 0);
    function
}

#[test]
fn a_bar_of_32_bits_gets_an_address_below_4_gib_or_none() {
    let (mut root, fake) = FakeRoot::new(narrow(0xffff_f000));
    let mut window = PciRangeAllocator::new(0xffff_f000, 0x10_0000);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    assert_eq!(fake.space()[0x14..0x18], [0, 0xf0, 0xff, 0xff]);

    let (mut root, fake) = FakeRoot::new(narrow(0xffff_f000));
    let mut window = PciRangeAllocator::new(0x1_0000_0000, 0x10_0000);
    let assigned = assign_bars(&mut root, FakeRoot::FUNCTION, &mut window);
    assert_eq!(assigned, Err(DevError::NoMemory));
    assert_eq!(
        window.alloc(0x1000),
        Some(0x1_0000_0000),
        "nothing was taken"
    );
    assert_eq!(fake.space()[0x14..0x18], [0; 4]);
}

#[test]
fn a_function_for_which_there_is_no_room_is_not_enabled() {
    let mut function = FakeFunction::new(0, &Capability::honest());
    function.put(0x04, 0x0010_0000);
    let (mut root, fake) = FakeRoot::new(function);
    let mut window = PciRangeAllocator::new(0x1000, 0x3fff);
    let assigned = assign_bars(&mut root, FakeRoot::FUNCTION, &mut window);
    assert_eq!(assigned, Err(DevError::NoMemory));
    assert_eq!(fake.space()[4] & 7, 0);
}

#[test]
fn bars_that_are_none_of_memory_are_left_alone() {
    let mut function = FakeFunction::new(0, &Capability::honest());
    // I/O ports in BAR 0, and a BAR that does not exist.
    function.masks[0] = 0xffff_ffe0;
    function.put(0x10, 1);
    let (mut root, fake) = FakeRoot::new(function);
    let mut window = PciRangeAllocator::new(BAR, 1 << 20);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    assert_eq!(
        fake.space()[0x10..0x20],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_ne!(fake.space()[0x20..0x24], [4, 0, 0, 0]);
}

#[test]
fn a_bar_that_does_not_take_its_address_is_an_error() {
    let mut function = FakeFunction::new(0, &Capability::honest());
    function.put(0x04, 0x0010_0000);
    function.stubborn = true;
    let (mut root, fake) = FakeRoot::new(function);
    let mut window = PciRangeAllocator::new(BAR, 1 << 20);
    let assigned = assign_bars(&mut root, FakeRoot::FUNCTION, &mut window);
    assert_eq!(assigned, Err(DevError::Io));
    assert_eq!(fake.space()[4] & 7, 0, "it is not enabled");
    assert_eq!(window.alloc(0x1000), Some(BAR), "nothing was taken");
}

#[test]
fn a_bar_without_a_valid_size_gets_no_address() {
    let mut function = FakeFunction::new(0, &Capability::honest());
    // The lowest bit of the upper half cannot be set, though lower ones can.
    function.masks[5] = 0xffff_fffe;
    let (mut root, fake) = FakeRoot::new(function);
    let mut window = PciRangeAllocator::new(0x1_0000_0000, 1 << 20);
    assign_bars(&mut root, FakeRoot::FUNCTION, &mut window).unwrap();
    assert_eq!(fake.space()[0x20..0x28], [4, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn ranges_are_aligned_to_their_size_and_do_not_overlap() {
    let mut window = PciRangeAllocator::new(0x1234, 0x10_0000);
    let mut end = 0x1234;
    for size in [0x10, 0x1000, 0x20, 0x4000, 1, 0x100] {
        let start = window.alloc(size).unwrap();
        assert!(
            start >= end && start.is_multiple_of(size),
            "{size:#x} at {start:#x}"
        );
        end = start + size;
    }
}

#[test]
fn ranges_of_no_power_of_two_and_beyond_the_end_are_refused() {
    let mut window = PciRangeAllocator::new(0x1000, 0x1000);
    for size in [0, 3, 0x1001, 0x2000, 1 << 63, u64::MAX] {
        assert_eq!(window.alloc(size), None, "{size:#x}");
    }
    assert_eq!(window.alloc(0x1000), Some(0x1000), "nothing was taken");
    assert_eq!(window.alloc(1), None);
}

#[test]
fn ranges_near_the_last_address_do_not_wrap() {
    for base in [u64::MAX, u64::MAX - 1, u64::MAX - 0xfff, 1 << 63] {
        let mut window = PciRangeAllocator::new(base, u64::MAX);
        let mut before = None;
        for size in [1, 2, 0x10, 0x1000, 1 << 32, 1 << 62, 1 << 63] {
            if let Some(start) = window.alloc(size) {
                assert!(start >= base && start.checked_add(size).is_some());
                assert!(before.is_none_or(|before| before < start));
                before = Some(start);
            }
        }
    }
    assert_eq!(PciRangeAllocator::new(0, 0).alloc(1), None);
}

#[test]
fn a_bus_with_nothing_but_a_bridge_yields_nothing() {
    let board = Board::emulated().build().unwrap();
    let mut root = board.pci();
    assert!(
        probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, None)
            .next()
            .is_none()
    );
    assert!(
        probe_pci_buses::<MachineHal, _>(&mut root, 255..=255, None)
            .next()
            .is_none()
    );
    assert_eq!(board.violations(), []);
}

#[test]
fn a_bus_without_room_for_all_yields_those_that_have_it() {
    let board = Board::emulated()
        .pci(disk())
        .pci(machine::Nic::new(common::MAC))
        .build()
        .unwrap();
    let mut window = PciRangeAllocator::new(board.pci_window().start, 0x4000);
    let mut root = board.pci();
    let found: Vec<_> = probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window))
        .map(|(function, device_type, _)| (function.device, device_type))
        .collect();
    assert_eq!(found, [(1, DeviceType::Block)]);
    assert_eq!(board.violations(), []);
}
