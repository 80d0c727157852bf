//! VirtIO 1.3, 4.1: virtio over PCI. Each test is a row of `CONFORMANCE.md`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{DevError, DeviceType, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_virtio::pci::{DeviceFunctionInfo, HeaderType};
use axdriver_virtio::{PciTransport, probe_pci_device};
use common::{
    Access, Bench, Capability, Disk, FakeFunction, FakeRoot, Kind, MAC, Over, first, is_release,
    is_reset, is_status_read, numbered_disk,
};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Event, MachineHal};
use virtio_drivers::transport::pci::VirtioPciError;

/// Where the emulated devices have their structures.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
/// Offsets in the common configuration (4.1.4.3).
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;

/// All accesses of start, work, interrupts, reset and end to the structures, with offsets for addresses.
fn whole_life(kind: Kind) -> Vec<Access> {
    let world = kind.plug(Over::Pci);
    let transport = world.bench.find_pci().unwrap();
    drop(transport);
    let tap = world.bench.tap(|_| None);
    let mut driver = world.start();
    driver.base().enable_interrupts().unwrap();
    world.work(&mut driver).unwrap();
    driver.acknowledge().unwrap();
    driver.configuration_changed().unwrap();
    driver.base().disable_interrupts().unwrap();
    driver.reset().unwrap();
    world.work(&mut driver).unwrap();
    drop(driver);
    world.bench.assert_clean();
    let bar = world.bench.registers();
    let relative = |access: Access| {
        let address = access.address.checked_sub(bar)?;
        (address < 0x4000).then_some(Access { address, ..access })
    };
    tap.take().into_iter().filter_map(relative).collect()
}

/// What an enumeration says of a function.
fn info(vendor_id: u16, device_id: u16, revision: u8) -> DeviceFunctionInfo {
    DeviceFunctionInfo {
        vendor_id,
        device_id,
        class: 0,
        subclass: 0,
        prog_if: 0,
        revision,
        header_type: HeaderType::Standard,
    }
}

/// A function of this board with these ids, behind which the emulated disk answers.
fn probe(bench: &Bench, vendor_id: u16, device_id: u16, revision: u8) -> Option<DeviceType> {
    drop(bench.find_pci());
    let mut function = FakeFunction::new(bench.registers(), &Capability::honest());
    function.put(0, u32::from(device_id) << 16 | u32::from(vendor_id));
    function.put(8, revision.into());
    let (mut root, fake) = FakeRoot::new(function);
    let info = info(vendor_id, device_id, revision);
    let found = probe_pci_device::<MachineHal, _>(&mut root, FakeRoot::FUNCTION, &info);
    if found.is_none() {
        assert_eq!(fake.writes(), [], "what is no device is not written to");
    }
    found.map(|(device_type, _)| device_type)
}

#[test]
fn pci_01_vendor_and_device_ids_are_matched() {
    let bench = Over::Pci.plug(numbered_disk());
    for (device_id, device_type) in [
        (0x1041, Some(DeviceType::Net)),
        (0x1042, Some(DeviceType::Block)),
        (0x1050, Some(DeviceType::Display)),
        (0x1040, None),
        (0x103f, None),
        (0x1043, None),
        (0x1080, None),
        (0x1081, None),
        (0x1082, None),
        (0xffff, None),
    ] {
        assert_eq!(
            probe(&bench, 0x1af4, device_id, 1),
            device_type,
            "{device_id:#x}"
        );
        assert_eq!(probe(&bench, 0x1af5, device_id, 1), None);
        assert_eq!(probe(&bench, 0xffff, device_id, 1), None);
    }
}

#[test]
fn pci_02_transitional_ids_are_matched() {
    let bench = Over::Pci.plug(numbered_disk());
    assert_eq!(probe(&bench, 0x1af4, 0x1000, 0), Some(DeviceType::Net));
    assert_eq!(probe(&bench, 0x1af4, 0x1001, 0), Some(DeviceType::Block));
    assert_eq!(probe(&bench, 0x1af4, 0x1005, 0), None);
    // And such a device works.
    for kind in [Kind::Disk, Kind::Nic] {
        let world = kind.plug_as(Over::Pci, Device::transitional);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn pci_03_every_revision_is_matched() {
    let bench = Over::Pci.plug(numbered_disk());
    for revision in [0, 1, 2, 0x7f, 0xff] {
        assert_eq!(
            probe(&bench, 0x1af4, 0x1042, revision),
            Some(DeviceType::Block)
        );
    }
}

#[test]
fn pci_04_fields_are_accessed_by_their_width_and_wide_ones_by_halves() {
    for kind in Kind::ALL {
        for access in whole_life(kind) {
            let width = match access.address {
                COMMON..0x10 | 0x20..0x38 => 4,
                0x14 | 0x15 | ISR => 1,
                0x10..0x20 | NOTIFY.. => 2,
                CONFIG..NOTIFY => match (kind, access.address - CONFIG) {
                    (Kind::Nic, 0..6) => 1,
                    (Kind::Nic, _) => 2,
                    _ => 4,
                },
                other => panic!("no register at {other:#x}"),
            };
            assert_eq!(access.width, width, "{kind:?} at {:#x}", access.address);
        }
    }
}

/// A transport of a function with these capabilities on a board with a disk.
fn with_capabilities(
    capabilities: &[Capability],
) -> (Bench, FakeRoot, Result<Disk, VirtioPciError>) {
    let bench = Over::Pci.plug(numbered_disk());
    drop(bench.find_pci());
    bench.board.memory().trace().clear();
    let function = FakeFunction::new(bench.registers(), capabilities);
    let (mut root, fake) = FakeRoot::new(function);
    let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
    let disk = transport.map(|transport| Disk::try_new(transport.into()).unwrap());
    (bench, fake, disk)
}

#[track_caller]
fn assert_works(capabilities: &[Capability]) {
    let (bench, _, disk) = with_capabilities(capabilities);
    let mut disk = disk.unwrap();
    let mut block = [0; 512];
    disk.read_block(9, &mut block).unwrap();
    assert_eq!(block, [9; 512]);
    drop(disk);
    bench.assert_clean();
}

#[test]
fn pci_05_a_capability_of_a_reserved_type_is_ignored() {
    for cfg_type in [0, 6, 7, 10, 0xff] {
        let mut capabilities = Capability::honest();
        let reserved = Capability::new(cfg_type, 0xffff_ffff, 0xffff_ffff);
        capabilities.insert(0, reserved);
        assert_works(&capabilities);
    }
}

#[test]
fn pci_06_the_first_instance_that_can_be_used_is_used() {
    for index in 0..4 {
        let mut capabilities = Capability::honest();
        let honest = capabilities[index];
        // One in a BAR that does not exist, one beyond the end; then the right one.
        capabilities.insert(index, Capability { bar: 2, ..honest });
        assert_works(&capabilities);
        capabilities[index] = Capability {
            offset: 0x4000,
            ..honest
        };
        assert_works(&capabilities);
        // A later one does not count.
        capabilities.remove(index);
        capabilities.push(Capability {
            offset: 0x3800,
            ..honest
        });
        assert_works(&capabilities);
    }
}

#[test]
fn pci_06_a_structure_behind_io_ports_is_passed_over() {
    let mut capabilities = Capability::honest();
    for capability in Capability::honest() {
        capabilities.insert(
            0,
            Capability {
                bar: 0,
                ..capability
            },
        );
    }
    let bench = Over::Pci.plug(numbered_disk());
    drop(bench.find_pci());
    let mut function = FakeFunction::new(bench.registers(), &capabilities);
    function.masks[0] = 0xffff_ffe0;
    function.put(0x10, 0xc001);
    let (mut root, _) = FakeRoot::new(function);
    let transport = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).unwrap();
    assert_eq!(Disk::try_new(transport.into()).unwrap().num_blocks(), 64);
}

#[test]
fn pci_07_longer_capabilities_are_accepted() {
    let mut capabilities = Capability::honest();
    for capability in &mut capabilities {
        capability.cap_len = 20;
    }
    assert_works(&capabilities);
}

#[test]
fn pci_08_a_capability_of_a_reserved_bar_is_ignored() {
    for bar in [6, 7, 0x80, 0xff] {
        let mut capabilities = Capability::honest();
        for capability in Capability::honest() {
            capabilities.insert(0, Capability { bar, ..capability });
        }
        assert_works(&capabilities);
        // Where there is no other, there is no device.
        for capability in &mut capabilities {
            capability.bar = bar;
        }
        let (_, fake, disk) = with_capabilities(&capabilities);
        assert!(disk.is_err());
        assert_only_bars_and_command_written(&fake);
    }
}

fn assert_only_bars_and_command_written(fake: &FakeRoot) {
    for (register, _) in fake.writes() {
        assert!(
            matches!(register, 0x04 | 0x10..0x28),
            "{register:#x} is written"
        );
    }
}

/// The ranges that the driver has asked for.
fn mapped(bench: &Bench) -> Vec<(u64, usize)> {
    let range = |event| match event {
        Event::Mapped { address, size } => Some((address, size)),
        _ => None,
    };
    bench.events().into_iter().filter_map(range).collect()
}

#[test]
fn pci_09_a_structure_of_unexpected_length_is_mapped_as_far_as_needed() {
    let mut capabilities = Capability::honest();
    capabilities[0].length = 0x1000;
    capabilities[2].length = 0x1000;
    let (bench, _, disk) = with_capabilities(&capabilities);
    assert_eq!(disk.unwrap().num_blocks(), 64);
    let bar = bench.registers();
    let mapped = mapped(&bench);
    assert!(mapped.contains(&(bar, 56)), "{mapped:x?}");
    assert!(mapped.contains(&(bar + 0x1000, 1)), "{mapped:x?}");
}

#[test]
fn pci_09_nothing_outside_of_a_bar_is_mapped() {
    for fault in [Fault::OffsetWraps, Fault::OffsetBeyondBar] {
        for kind in Kind::ALL {
            let hostile = Hostile::new().always(fault);
            let world = kind.plug_as(Over::Pci, |device| device.hostile(hostile));
            assert!(world.bench.find_pci().is_none());
            assert_eq!(mapped(&world.bench), []);
            world.bench.assert_clean();
        }
    }
}

#[test]
fn pci_10_capabilities_are_not_written() {
    let (_, fake, disk) = with_capabilities(&Capability::honest());
    drop(disk.unwrap());
    assert_only_bars_and_command_written(&fake);
    for fault in [
        Fault::BarReserved(6),
        Fault::BarReserved(255),
        Fault::CapabilityLoop,
    ] {
        let hostile = Hostile::new().always(fault);
        let world = Kind::Disk.plug_as(Over::Pci, |device| device.hostile(hostile));
        drop(world.bench.find_pci());
        world.bench.assert_clean();
    }
}

#[test]
fn pci_11_read_only_fields_are_not_written() {
    for kind in Kind::ALL {
        for access in whole_life(kind).iter().filter(|access| access.write) {
            // device_feature, num_queues, config_generation, queue_notify_off.
            assert!(
                !matches!(access.address, 0x04 | 0x12 | 0x15 | 0x1e),
                "{access:x?}"
            );
        }
    }
}

#[test]
fn pci_12_the_size_of_a_queue_is_a_power_of_two() {
    for kind in Kind::ALL {
        for offered in [4, 5, 6, 100, 1000, 32768, 65535] {
            let world = kind.plug_as(Over::Pci, |device| device.queue_size(offered));
            let tap = world.bench.tap(|_| None);
            let _driver = world.start();
            let size = world.bench.registers() + QUEUE_SIZE;
            let sizes = tap.take();
            let sizes = sizes.iter().filter(|access| access.writes(size));
            assert!(sizes.clone().count() > 0);
            for access in sizes {
                assert!(access.value.is_power_of_two() && access.value <= offered.into());
            }
            world.bench.assert_rules_kept();
        }
    }
}

#[test]
fn pci_13_a_queue_is_set_up_before_it_is_enabled() {
    for kind in Kind::ALL {
        let mut fields = [false; 64];
        for access in whole_life(kind).iter().filter(|access| access.write) {
            match access.address {
                QUEUE_SELECT => fields = [false; 64],
                offset @ (QUEUE_SIZE | 0x20..0x38) => {
                    assert!(!fields[0x1c], "{offset:#x} after the enable");
                    fields[usize::try_from(offset).unwrap()] = true;
                }
                QUEUE_ENABLE => {
                    for field in [0x18, 0x20, 0x24, 0x28, 0x2c, 0x30, 0x34] {
                        assert!(fields[field], "{field:#x} is not set");
                    }
                    fields[0x1c] = true;
                }
                _ => {}
            }
        }
    }
}

#[test]
fn pci_14_after_0_is_written_to_the_status_it_is_read_until_it_is_0() {
    for kind in Kind::ALL {
        let slow = Hostile::new().always(Fault::ResetSlow);
        let world = kind.plug_as(Over::Pci, |device| device.hostile(slow));
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        world.bench.board.memory().trace().clear();
        drop(driver);
        let events = world.bench.events();
        let reset = first(&events, "a reset", is_reset);
        let done = first(&events, "status 0", is_status_read(0));
        let release = first(&events, "a release", is_release);
        assert!(reset < done && done < release);
        assert!(done - reset > 3, "it is read more than once");
        world.bench.assert_clean();
    }
}

#[test]
fn pci_15_a_queue_is_never_disabled_by_writing_0() {
    for kind in Kind::ALL {
        let accesses = whole_life(kind);
        let mut enables = accesses.iter().filter(|access| access.writes(QUEUE_ENABLE));
        assert!(enables.all(|access| access.value == 1));
    }
    // Also not by the transport itself.
    use axdriver_virtio::Transport;
    let bench = Over::Pci.plug(numbered_disk());
    let mut transport = bench.transport();
    transport.queue_unset(0);
    bench.assert_rules_kept();
}

#[test]
fn pci_18_vendor_capabilities_are_not_used() {
    let mut capabilities = Capability::honest();
    capabilities.insert(0, Capability::new(9, 0, 0x1000));
    assert_works(&capabilities);
    // Nor is one of another owner of the vendor id taken for one of ours.
    capabilities[0] = Capability {
        id: 0x11,
        ..Capability::new(1, 0x3000, 56)
    };
    assert_works(&capabilities);
}

#[test]
fn pci_19_the_window_in_configuration_space_is_not_used() {
    let mut capabilities = Capability::honest();
    capabilities.insert(0, Capability::new(5, 3, 3));
    let (_, fake, disk) = with_capabilities(&capabilities);
    drop(disk.unwrap());
    assert_only_bars_and_command_written(&fake);
}

#[test]
fn pci_21_a_notification_is_16_bits_with_the_number_of_the_queue() {
    for kind in Kind::ALL {
        let mut count = 0;
        for access in whole_life(kind) {
            let Some(offset) = access.address.checked_sub(NOTIFY) else {
                continue;
            };
            assert!(access.write && access.width == 2);
            // The emulated devices have a doorbell of 4 bytes for each queue.
            assert_eq!(offset, access.value * 4);
            count += 1;
        }
        assert!(count > 0);
    }
}

#[test]
fn pci_22_one_interrupt_can_mean_both_used_buffers_and_a_change() {
    let nic = machine::Nic::new(MAC);
    let bench = Over::Pci.plug(&nic);
    let mut driver = common::Nic::<8>::try_new(bench.transport()).unwrap();
    use axdriver_base::BaseDriverOps;
    use axdriver_net::NetDriverOps;
    driver.enable_interrupts().unwrap();
    nic.inject(&[1; 60]);
    nic.set_link(false);
    bench.board.run();
    let both = InterruptCause::USED_BUFFERS | InterruptCause::CONFIGURATION;
    assert_eq!(driver.acknowledge_interrupt(), Ok(both));
    assert_eq!(
        driver.capabilities().link,
        Some(false),
        "the change is seen"
    );
    assert!(driver.can_receive(), "and so is the frame");
    assert_eq!(driver.acknowledge_interrupt(), Ok(InterruptCause::empty()));
}

#[test]
fn a_function_without_addresses_is_refused() {
    let bench = Over::Pci.plug(numbered_disk());
    let function = FakeFunction::new(0, &Capability::honest());
    let (mut root, fake) = FakeRoot::new(function);
    let before = fake.space();
    let refused = PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
    assert_eq!(refused.err(), Some(VirtioPciError::BarNotAllocated(4)));
    assert_eq!(fake.space(), before, "the BARs are as they were");
    bench.assert_clean();
}

#[test]
fn a_doorbell_that_does_not_exist_stops_the_start() {
    for kind in Kind::ALL {
        let hostile = Hostile::new().always(Fault::NotifyOffsetOutOfRange);
        let world = kind.plug_as(Over::Pci, |device| device.hostile(hostile));
        let started = world.try_start(common::impatient());
        assert_eq!(started.err(), Some(DevError::Unsupported), "{kind:?}");
        world.bench.assert_clean();
    }
}
