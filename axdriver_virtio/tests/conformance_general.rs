//! VirtIO 1.3, 2.1 to 2.5, 3.1, 3.3 and 6: status, features, configuration space, start and end. Each test is a row of
//! `CONFORMANCE.md`, which says what the specification asks for.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{DevError, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{Transport, WaitPolicy};
use common::{
    Capability, Disk, FakeFunction, FakeRoot, Kind, MAC, Nic, Over, STARTED, STARTED_LEGACY, first,
    impatient, is_features_write, is_kick, is_queue_enabled, is_release, is_reset, is_status_read,
    is_status_write, last, numbered_disk, running,
};
use machine::emulated::{block_features, features, net_features, status};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Event, MachineHal};

/// Features of the devices that the drivers accept, but for those that all devices share.
const BLOCK: u64 = block_features::SIZE_MAX
    | block_features::RO
    | block_features::BLK_SIZE
    | block_features::FLUSH;
const NET: u64 = net_features::MTU | net_features::MAC | net_features::STATUS;
/// Those that all devices share: ANY_LAYOUT is the one that only legacy devices offer.
const COMMON: u64 = 1 << 27
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX
    | features::VERSION_1
    | features::ACCESS_PLATFORM
    | features::ORDER_PLATFORM;

fn supported(kind: Kind) -> u64 {
    COMMON
        | match kind {
            Kind::Disk => BLOCK,
            Kind::Nic => NET,
            Kind::Display => 0,
        }
}

#[test]
fn gen_01_the_status_is_updated_as_each_step_completes() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _driver = world.start();
        let steps: &[u32] = match over {
            Over::Legacy => &STARTED_LEGACY,
            Over::Modern | Over::Pci => &STARTED,
        };
        let statuses = world.bench.statuses();
        assert_eq!(statuses[0], 0, "{kind:?} over {over:?} begins with a reset");
        assert_eq!(statuses[1..], *steps, "{kind:?} over {over:?}");
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_02_no_status_bit_is_cleared_but_by_a_reset() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.once(Fault::UsedIdOutOfRange);
        world.work(&mut driver).unwrap_err();
        driver.reset().unwrap();
        drop(driver);
        let mut before = 0;
        for status in world.bench.statuses() {
            assert!(
                status == 0 || before & !status == 0,
                "{before:#x} to {status:#x}"
            );
            before = status;
        }
        world.bench.assert_clean();
    }
}

#[test]
fn gen_03_after_failed_the_device_is_reset_before_it_is_started_again() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.once(Fault::UsedIdOutOfRange);
        world.work(&mut driver).unwrap_err();
        driver.reset().unwrap();
        let statuses = world.bench.statuses();
        let failed = statuses
            .iter()
            .position(|status| status & status::FAILED != 0);
        let failed = failed.expect("FAILED is set");
        assert_eq!(statuses[failed + 1], 0, "{kind:?} over {over:?}");
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_04_a_device_that_needs_a_reset_fails_calls_until_the_driver_is_reset() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.device().needs_reset();
        assert_eq!(
            driver.acknowledge(),
            Err(DevError::Io),
            "{kind:?} over {over:?}"
        );
        assert_eq!(world.bench.device().status(), 0, "it is reset at once");
        assert_eq!(driver.ask(), Err(DevError::BadState));
        assert_eq!(driver.configuration_changed(), Err(DevError::BadState));
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_04_a_wait_notices_that_the_device_needs_a_reset() {
    for (kind, over) in [(Kind::Disk, Over::Modern), (Kind::Display, Over::Pci)] {
        let world = kind.plug(over);
        // Far more looks than this test takes time for.
        let mut driver = world.try_start(WaitPolicy::new()).unwrap();
        world.bench.once(Fault::NeedsReset);
        assert_eq!(driver.ask(), Err(DevError::Io), "{kind:?} over {over:?}");
        assert_eq!(driver.ask(), Err(DevError::BadState));
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_04_a_nic_that_needs_a_reset_is_noticed_without_an_interrupt() {
    let world = Kind::Nic.plug(Over::Modern);
    let mut nic = world.bench.nic::<8>();
    world.bench.device().needs_reset();
    let error = (0..1000).find_map(|_| {
        nic.receive()
            .err()
            .filter(|error| *error != DevError::Again)
    });
    assert_eq!(error, Some(DevError::Io));
    assert!(!nic.can_receive() && !nic.can_transmit());
}

#[test]
fn gen_05_no_feature_is_accepted_that_is_not_offered() {
    for (kind, over) in Kind::everywhere() {
        for withheld in (0..64).map(|bit| 1_u64 << bit) {
            if withheld & supported(kind) == 0 {
                continue;
            }
            let world = kind.plug_as(over, |device| device.withhold(withheld));
            let mut driver = world.start();
            assert_eq!(world.bench.device().accepted_features() & withheld, 0);
            world.work(&mut driver).unwrap();
            drop(driver);
            world.bench.assert_clean();
        }
    }
}

#[test]
fn gen_06_no_feature_is_accepted_without_its_prerequisites() {
    // 5.1.3.1 is the only section that has any for these devices; see NET-01.
    for over in Over::ALL {
        let world = Kind::Nic.plug_as(over, |device| device.offer(u64::MAX));
        let _driver = world.start();
        let accepted = world.bench.device().accepted_features();
        assert_eq!(accepted & !(COMMON | NET), 0);
    }
}

#[test]
fn gen_07_unknown_reserved_and_foreign_features_are_ignored() {
    for (kind, over) in Kind::everywhere() {
        let unknown = !supported(kind);
        let world = kind.plug_as(over, |device| device.offer(unknown));
        let mut driver = world.start();
        assert_eq!(world.bench.device().accepted_features() & unknown, 0);
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_08_the_drivers_do_without_every_feature_that_is_missing() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug_as(over, |device| device.withhold(u64::MAX));
        let mut driver = world.start();
        assert_eq!(world.bench.device().accepted_features(), 0);
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_09_an_unknown_feature_does_not_stop_the_driver() {
    for (kind, over) in Kind::everywhere_since_1() {
        for bit in 24..64 {
            if supported(kind) & 1 << bit != 0 {
                continue;
            }
            let world = kind.plug_as(over, |device| device.offer(1 << bit));
            drop(world.start());
            world.bench.assert_clean();
        }
    }
}

#[test]
fn gen_10_a_reset_is_complete_when_the_status_reads_0_and_not_before() {
    for (kind, over) in Kind::everywhere() {
        let slow = Hostile::new().always(Fault::ResetSlow);
        let world = kind.plug_as(over, |device| device.hostile(slow));
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        drop(driver);
        // After each reset, nothing but reads of the status until it is 0.
        let mut resetting = false;
        for event in world.bench.events() {
            match event {
                Event::Reset { .. } => resetting = true,
                Event::StatusRead { value: 0, .. } => resetting = false,
                Event::StatusWrite { value, .. } => {
                    assert!(!resetting, "status {value:#x} written meanwhile");
                }
                Event::PagesFreed { .. } | Event::Unshared { .. } => {
                    assert!(!resetting, "memory was taken back meanwhile");
                }
                _ => {}
            }
        }
        assert!(!resetting);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_10_a_device_that_does_not_reset_is_not_started() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        // Somebody has used it before.
        world.bench.transport().set_status_to(0x3);
        world
            .bench
            .misbehave(Hostile::new().times(2, 0, Fault::ResetIgnored));
        let started = world.try_start(impatient());
        assert_eq!(started.err(), Some(DevError::Io), "{kind:?} over {over:?}");
        assert!(!world.bench.events().iter().any(is_queue_enabled));
        // It was told of nothing, so nothing is kept.
        world.bench.assert_clean();
    }
}

/// Writes a status and lets the device be as it is then.
trait SetStatusTo {
    fn set_status_to(self, status: u32);
}

impl<T: Transport> SetStatusTo for T {
    fn set_status_to(mut self, status: u32) {
        use virtio_drivers::transport::DeviceStatus;
        for bits in [1, status] {
            self.set_status(DeviceStatus::from_bits_retain(bits));
        }
        std::mem::forget(self);
    }
}

#[test]
fn gen_11_a_capacity_that_changes_between_its_halves_is_read_again() {
    for over in Over::SINCE_1 {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let config = bench.registers() + if over == Over::Pci { 0x2000 } else { 0x100 };
        let resized = disk.clone();
        // Between the reads of the two halves the disk grows.
        let mut once = true;
        let _tap = bench.tap(move |access| {
            if access.reads(config) && std::mem::take(&mut once) {
                resized.resize(4 << 20);
            }
            None
        });
        let driver = bench.disk();
        assert_eq!(driver.num_blocks(), (4 << 20) / 512);
        bench.assert_rules_kept();
    }
}

#[test]
fn gen_11_a_configuration_that_never_settles_is_an_error() {
    for (kind, over) in Kind::everywhere_since_1() {
        let restless = Hostile::new().always(Fault::ConfigRestless);
        let world = kind.plug_as(over, |device| device.hostile(restless));
        let started = world.try_start(impatient());
        assert_eq!(started.err(), Some(DevError::Io), "{kind:?} over {over:?}");
        world.bench.assert_clean();
    }
}

/// The offsets of the configuration space that the driver has read.
fn config_reads(events: &[Event]) -> Vec<u64> {
    let offset = |event: &Event| match event {
        Event::ConfigRead { offset, .. } => Some(*offset),
        _ => None,
    };
    events.iter().filter_map(offset).collect()
}

#[test]
fn gen_12_optional_fields_are_read_only_with_their_feature() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(Device::from(&disk).withhold(block_features::BLK_SIZE));
        let _driver = bench.disk();
        assert!(
            config_reads(&bench.events())
                .iter()
                .all(|offset| *offset < 8)
        );
        bench.assert_rules_kept();

        let nic = machine::Nic::new(MAC).without_mac().without_status();
        let bench = over.plug(&nic);
        let driver = bench.nic::<8>();
        assert_eq!(config_reads(&bench.events()), [0; 0]);
        assert_eq!(driver.capabilities().link, None);
        bench.assert_rules_kept();
    }
}

#[test]
fn gen_13_a_larger_configuration_space_is_accepted() {
    let disk = numbered_disk();
    let bench = Over::Pci.plug(&disk);
    drop(bench.find_pci().unwrap());
    // The same registers under a configuration space of 4 KiB, as far as the capability says.
    let mut capabilities = Capability::honest();
    capabilities[3].length = 0x1000;
    let address = bench.registers();
    let (mut root, _) = FakeRoot::new(FakeFunction::new(address, &capabilities));
    let transport =
        axdriver_virtio::PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).unwrap();
    let driver = Disk::try_new(transport.into()).unwrap();
    assert_eq!(driver.num_blocks(), 64);
    drop(driver);

    let slot = Over::Modern.plug(&disk);
    let registers = slot.board.mmio_slots()[0].pointer();
    // SAFETY: the slot of this board; what lies behind it is answered too.
    let found = unsafe { axdriver_virtio::probe_mmio_device(registers, 0x1_0000) };
    assert_eq!(
        Disk::try_new(found.unwrap().1.into()).unwrap().num_blocks(),
        64
    );
}

#[test]
fn gen_14_the_configuration_space_needs_to_hold_what_is_read_and_no_more() {
    // Eight bytes of capacity are enough without BLK_SIZE; four are not.
    let disk = numbered_disk();
    for (len, enough) in [(8, true), (12, true), (4, false), (0, false)] {
        let bench = Over::Modern.plug(Device::from(&disk).withhold(block_features::BLK_SIZE));
        let registers = bench.board.mmio_slots()[0].pointer();
        // SAFETY: the slot of this board.
        let found = unsafe { axdriver_virtio::probe_mmio_device(registers, 0x100 + len) };
        let driver = Disk::try_new(found.unwrap().1.into());
        let error = driver.err();
        assert_eq!(
            error,
            (!enough).then_some(DevError::BadState),
            "{len} bytes"
        );
        bench.assert_clean();
    }
    // A NIC without features needs none at all.
    let nic = machine::Nic::new(MAC).without_mac().without_status();
    let bench = Over::Modern.plug(&nic);
    let registers = bench.board.mmio_slots()[0].pointer();
    // SAFETY: the slot of this board.
    let found = unsafe { axdriver_virtio::probe_mmio_device(registers, 0x100) };
    Nic::<8>::try_new(found.unwrap().1.into()).unwrap();
}

#[test]
fn gen_17_the_first_step_is_a_reset() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _driver = world.start();
        let events = world.bench.events();
        let reset = first(&events, "a reset", is_reset);
        let status = first(&events, "a status", is_status_write(1));
        let read = first(&events, "the status read as 0", is_status_read(0));
        assert!(reset < read && read < status, "{kind:?} over {over:?}");
    }
}

#[test]
fn gen_18_acknowledge_and_driver_are_separate_steps() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _driver = world.start();
        assert_eq!(world.bench.statuses()[1..3], [0x1, 0x3]);
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_19_features_are_written_and_no_configuration_before_features_ok() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug(over);
        let _driver = world.start();
        let events = world.bench.events();
        let driver = first(&events, "DRIVER", is_status_write(0x3));
        let features_ok = first(&events, "FEATURES_OK", is_status_write(0xb));
        let written = first(&events, "features", is_features_write);
        assert!(driver < written && written < features_ok);
        let config_write = |event: &Event| matches!(event, Event::ConfigWrite { .. });
        assert!(!events.iter().any(config_write), "{kind:?} over {over:?}");
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_20_no_feature_is_accepted_after_features_ok() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug(over);
        let _driver = world.start();
        let events = world.bench.events();
        let written = last(&events, "features", is_features_write);
        assert!(written < first(&events, "FEATURES_OK", is_status_write(0xb)));
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_21_features_ok_is_read_back() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug(over);
        let _driver = world.start();
        let events = world.bench.events();
        let features_ok = first(&events, "FEATURES_OK", is_status_write(0xb));
        let read = first(&events, "FEATURES_OK read", is_status_read(0xb));
        let queue = first(&events, "a queue", is_queue_enabled);
        assert!(features_ok < read && read < queue, "{kind:?} over {over:?}");
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_21_a_device_that_refuses_the_features_is_not_driven() {
    for (kind, over) in Kind::everywhere_since_1() {
        let refusing = Hostile::new().always(Fault::FeaturesRefused);
        let world = kind.plug_as(over, |device| device.hostile(refusing));
        let started = world.try_start(impatient());
        assert_eq!(
            started.err(),
            Some(DevError::Unsupported),
            "{kind:?} over {over:?}"
        );
        assert!(!world.bench.events().iter().any(is_queue_enabled));
        world.bench.assert_clean();
    }
}

#[test]
fn gen_22_queues_are_set_up_before_driver_ok() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _driver = world.start();
        let events = world.bench.events();
        let driver_ok = if over == Over::Legacy { 0x7 } else { 0xf };
        let live = first(&events, "DRIVER_OK", is_status_write(driver_ok));
        assert!(last(&events, "a queue", is_queue_enabled) < live);
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_23_driver_ok_is_set() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _driver = world.start();
        assert_ne!(world.bench.device().status() & status::DRIVER_OK, 0);
    }
}

#[test]
fn gen_24_a_start_that_fails_sets_failed_and_goes_no_further() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug_as(over, |device| {
            device.hostile(Hostile::new().always(Fault::QueueSize(0)))
        });
        let started = world.try_start(impatient());
        assert_eq!(
            started.err(),
            Some(DevError::Unsupported),
            "{kind:?} over {over:?}"
        );
        let statuses = world.bench.statuses();
        let [.., failed, reset] = statuses[..] else {
            panic!("two statuses at least");
        };
        assert_eq!(failed & status::FAILED, status::FAILED);
        assert_eq!(failed & status::DRIVER_OK, 0);
        assert_eq!(reset, 0);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_25_no_queue_is_notified_before_driver_ok() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        let events = world.bench.events();
        let driver_ok = if over == Over::Legacy { 0x7 } else { 0xf };
        let live = first(&events, "DRIVER_OK", is_status_write(driver_ok));
        assert!(live < first(&events, "a doorbell", is_kick));
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_26_descriptors_that_the_device_has_are_left_alone() {
    for over in Over::ALL {
        // Frames are in flight while others are added and come back.
        let world = Kind::Nic.plug_as(over, Device::answer_later);
        let mut nic = world.bench.nic::<8>();
        for round in 0..50 {
            let mut sent = 0;
            while nic.can_transmit() && sent < 1 + round % 8 {
                let buf = nic.alloc_tx_buffer(60 + round).unwrap();
                nic.transmit(buf).unwrap();
                sent += 1;
                world.nic.inject(&[1; 100]);
            }
            world.bench.board.run();
            while let Ok(buf) = nic.receive() {
                nic.recycle_rx_buffer(buf).unwrap();
            }
        }
        assert!(world.nic.counters().received > 100);
        drop(nic);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_27_memory_is_taken_back_after_the_reset_and_not_before() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        world.bench.board.memory().trace().clear();
        drop(driver);
        let events = world.bench.events();
        let reset = first(&events, "a reset", is_reset);
        let read = first(&events, "the status read as 0", is_status_read(0));
        let release = first(&events, "a release", is_release);
        assert!(reset < read && read < release, "{kind:?} over {over:?}");
        world.bench.assert_clean();
    }
}

#[test]
fn gen_27_a_failed_start_resets_before_it_takes_memory_back() {
    // Both queues are there and buffers are posted when the second half of the start fails.
    for (kind, over) in Kind::everywhere() {
        let needs_reset = Hostile::new().always(Fault::NeedsReset);
        let world = kind.plug_as(over, |device| device.hostile(needs_reset).queue_size(4));
        let started = world.try_start(impatient());
        if kind == Kind::Display {
            assert_eq!(started.err(), Some(DevError::Io));
            let events = world.bench.events();
            let reset = last(&events, "a reset", is_reset);
            assert!(reset < first(&events, "a release", is_release));
        } else {
            drop(started);
        }
        world.bench.assert_clean();
    }
}

#[test]
fn gen_28_version_1_is_accepted() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug(over);
        let _driver = world.start();
        let accepted = world.bench.device().accepted_features();
        assert_ne!(accepted & features::VERSION_1, 0);
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_29_a_device_without_version_1_is_driven_and_warned_of() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| {
            device.hostile(Hostile::new().always(Fault::Version1Withheld))
        });
        common::logged();
        let mut driver = world.start();
        let said = common::logged();
        assert!(
            said.iter()
                .any(|message| message.text.contains("VERSION_1"))
        );
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_30_access_platform_is_accepted() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(features::ACCESS_PLATFORM));
        let mut driver = world.start();
        let accepted = world.bench.device().accepted_features();
        assert_ne!(accepted & features::ACCESS_PLATFORM, 0);
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_31_the_device_is_given_addresses_of_the_hal_and_no_others() {
    // The emulated memory is elsewhere for the device than for the program, and devices report what is outside of it.
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        drop(driver);
        assert!(world.bench.board.memory().counters().allocations > 0);
        world.bench.assert_clean();
    }
}

#[test]
fn gen_32_packed_rings_are_not_accepted_and_not_used() {
    const RING_PACKED: u64 = 1 << 34;
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(RING_PACKED));
        let mut driver = world.start();
        assert_eq!(world.bench.device().accepted_features() & RING_PACKED, 0);
        world.work(&mut driver).unwrap();
    }
}

#[test]
fn gen_33_order_platform_is_accepted() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(features::ORDER_PLATFORM));
        let mut driver = world.start();
        let accepted = world.bench.device().accepted_features();
        assert_ne!(accepted & features::ORDER_PLATFORM, 0);
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn gen_35_sr_iov_is_not_negotiated() {
    const SR_IOV: u64 = 1 << 37;
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(SR_IOV));
        let _driver = world.start();
        assert_eq!(world.bench.device().accepted_features() & SR_IOV, 0);
    }
}

#[test]
fn gen_36_notification_config_data_is_not_negotiated() {
    const NOTIF_CONFIG_DATA: u64 = 1 << 39;
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(NOTIF_CONFIG_DATA));
        let mut driver = world.start();
        assert_eq!(
            world.bench.device().accepted_features() & NOTIF_CONFIG_DATA,
            0
        );
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn a_reset_that_ends_after_late_completions_is_waited_for() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let _running = world.bench.run_while_waiting();
        let mut driver = world.try_start(running()).unwrap();
        world
            .bench
            .misbehave(Hostile::new().always(Fault::CompleteAfterReset));
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        assert_eq!(
            driver
                .acknowledge()
                .map(|cause| cause & InterruptCause::CONFIGURATION),
            Ok(InterruptCause::empty())
        );
        world.bench.behave();
        drop(driver);
        world.bench.assert_clean();
    }
}
