//! VirtIO 1.3, 2.7: the split virtqueue. Each test is a row of `CONFORMANCE.md`; what needs the queue alone is tested in
//! `src/queue/tests.rs`.

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
use common::{
    Chain, Driver, Kind, Nic, Over, World, first, impatient, is_queue_enabled, numbered_disk,
};
use machine::emulated::features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Event};

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// A world behind modern MMIO in which the rings can be looked into, with or without EVENT_IDX.
fn world(kind: Kind, event_idx: bool) -> World {
    kind.plug_as(Over::Modern, |device| {
        device.withhold(if event_idx { 0 } else { RING_EVENT_IDX })
    })
}

/// All chains of a start and some work, for small and large queues, with and without indirect tables.
fn all_chains() -> Vec<(u32, bool, Chain)> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        for (size, indirect) in [(4, true), (4, false), (64, true), (64, false)] {
            let withheld = if indirect { 0 } else { RING_INDIRECT_DESC };
            let world = kind.plug_as(Over::Modern, |device| {
                device.withhold(withheld).queue_size(size)
            });
            let rings = world.bench.watch_rings();
            let mut driver = world.start();
            world.work(&mut driver).unwrap();
            let chains = rings.take();
            assert!(!chains.is_empty());
            all.extend(chains.into_iter().map(|chain| {
                let size = rings.queue(chain.queue).size;
                (size, indirect, chain)
            }));
            world.bench.assert_rules_kept();
        }
    }
    all
}

#[test]
fn vq_01_the_areas_of_a_queue_are_aligned() {
    for kind in Kind::ALL {
        for size in [4, 8, 64, 1024] {
            let world = kind.plug_as(Over::Modern, |device| device.queue_size(size));
            let rings = world.bench.watch_rings();
            let _driver = world.start();
            let queue = rings.queue(0);
            assert_eq!(queue.descriptors % 16, 0);
            assert_eq!(queue.driver % 2, 0);
            assert_eq!(queue.device % 4, 0);
            world.bench.assert_rules_kept();
        }
    }
    // The layout of legacy devices (2.7.2) is checked by the device.
    for kind in Kind::ALL {
        let world = kind.plug(Over::Legacy);
        let _driver = world.start();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_02_the_size_of_a_queue_is_a_power_of_two_up_to_32768() {
    for (kind, over) in Kind::everywhere() {
        for offered in [4, 5, 7, 8, 100, 1000, 1024, 32767, 32768, 65535] {
            let world = kind.plug_as(over, |device| device.queue_size(offered));
            let _driver = world.start();
            let size = world.bench.device().queue_size(0);
            assert!(
                size.is_power_of_two() && size <= offered.into(),
                "{size} of {offered}"
            );
            world.bench.assert_rules_kept();
        }
    }
}

#[test]
fn vq_03_what_the_device_reads_comes_before_what_it_writes() {
    for (_, _, chain) in all_chains() {
        let writable: Vec<bool> = chain.parts.iter().map(common::Part::is_writable).collect();
        assert!(writable.is_sorted(), "{chain:?}");
    }
}

#[test]
fn vq_04_no_request_takes_more_descriptors_than_header_data_and_status() {
    for (_, _, chain) in all_chains() {
        assert!(chain.parts.len() <= 3, "{chain:?}");
    }
    // However much is read at once.
    let disk = machine::Disk::memory(1 << 20);
    let bench = Over::Modern.plug(&disk);
    let rings = bench.watch_rings();
    bench.disk().read_block(0, &mut vec![0; 1 << 20]).unwrap();
    assert!(rings.take().iter().all(|chain| chain.parts.len() == 3));
}

#[test]
fn vq_05_a_chain_does_not_loop_and_large_transfers_are_several_requests() {
    const SIZE: usize = 9 << 20;
    let disk = machine::Disk::memory(SIZE);
    let bench = Over::Modern.plug(&disk);
    let rings = bench.watch_rings();
    bench.disk().read_block(0, &mut vec![1; SIZE]).unwrap();
    let chains = rings.take();
    assert!(chains.len() >= 3);
    for chain in &chains {
        assert!(chain.readable_len() + chain.writable_len() <= 1 << 32);
    }
    let data: u64 = chains.iter().map(|chain| chain.writable_len() - 1).sum();
    assert_eq!(data, SIZE as u64);
    bench.assert_rules_kept();
}

#[test]
fn vq_07_no_indirect_table_is_used_that_was_not_negotiated() {
    let mut used = 0;
    for (_, negotiated, chain) in all_chains() {
        assert!(negotiated || chain.indirect.is_none(), "{chain:?}");
        used += u32::from(chain.indirect.is_some());
    }
    assert!(used > 0, "a small queue uses them where it may");
}

#[test]
fn vq_07_indirect_tables_are_given_up_with_their_feature() {
    let world = Kind::Disk.plug_as(Over::Modern, |device| device.queue_size(4));
    let mut driver = world.start();
    world.work(&mut driver).unwrap();
    // From now on the device does not offer them any more.
    let features = world.bench.registers() + 0x10;
    let mut halves = 0;
    let _tap = world.bench.tap(move |access| {
        if !access.reads(features) {
            return None;
        }
        halves += 1;
        (halves % 2 == 1).then_some(access.value & !RING_INDIRECT_DESC)
    });
    driver.reset().unwrap();
    assert_eq!(
        world.bench.device().accepted_features() & RING_INDIRECT_DESC,
        0
    );
    world.work(&mut driver).unwrap();
    world.bench.assert_rules_kept();
}

#[test]
fn vq_08_an_indirect_table_names_no_other_table() {
    for (_, _, chain) in all_chains() {
        assert!(chain.parts.iter().all(|part| part.flags & INDIRECT == 0));
    }
}

#[test]
fn vq_09_no_chain_is_longer_than_the_queue() {
    for (size, _, chain) in all_chains() {
        assert!(chain.parts.len() <= size as usize, "{chain:?} in {size}");
    }
}

#[test]
fn vq_09_a_queue_too_small_for_a_request_is_refused_at_the_start() {
    for (kind, over) in [(Kind::Disk, Over::Pci), (Kind::Display, Over::Modern)] {
        for size in [1, 2, 3] {
            let world = kind.plug_as(over, |device| device.queue_size(size));
            let started = world.try_start(impatient());
            assert_eq!(started.err(), Some(DevError::Unsupported));
            world.bench.assert_clean();
        }
    }
}

#[test]
fn vq_10_indirect_and_next_are_never_set_together() {
    for (_, _, chain) in all_chains() {
        if let Some(flags) = chain.indirect {
            assert_eq!(flags & NEXT, 0);
        }
    }
}

#[test]
fn vq_12_the_available_index_only_goes_up_and_around() {
    let world = Kind::Nic.plug_as(Over::Modern, Device::answer_later);
    let rings = world.bench.watch_rings();
    let mut nic = world.bench.nic::<64>();
    let mut before = rings.available_index(1);
    for _ in 0..=(1 << 16) / 64 {
        for _ in 0..64 {
            transmit(&mut nic, 1);
            let now = rings.available_index(1);
            assert_eq!(now, before.wrapping_add(1));
            before = now;
        }
        world.bench.board.run();
        world.nic.take_sent();
    }
    assert!(before < 0x100, "it has gone around");
    world.bench.assert_rules_kept();
}

#[test]
fn vq_13_without_event_idx_the_flags_of_the_available_ring_are_0_or_1() {
    for kind in Kind::ALL {
        let world = world(kind, false);
        let rings = world.bench.watch_rings();
        let mut driver = world.start();
        for enable in [false, true, false] {
            if enable {
                driver.base().enable_interrupts().unwrap();
            } else {
                driver.base().disable_interrupts().unwrap();
            }
            world.work(&mut driver).unwrap();
            assert_eq!(rings.available_flags(0), u16::from(!enable));
        }
        assert!(rings.take_flags().iter().all(|flags| *flags <= 1));
        world.bench.assert_rules_kept();
    }
}

/// The number of used-buffer interrupts of some work, asked for or not.
fn interrupts(kind: Kind, over: Over, event_idx: bool, enable: bool) -> usize {
    let world = kind.plug_as(over, |device| {
        device.withhold(if event_idx { 0 } else { RING_EVENT_IDX })
    });
    let mut driver = world.start();
    if enable {
        driver.base().enable_interrupts().unwrap();
    } else {
        driver.base().disable_interrupts().unwrap();
    }
    for _ in 0..20 {
        world.work(&mut driver).unwrap();
    }
    world.bench.assert_rules_kept();
    let used = |event: &Event| matches!(event, Event::Interrupt { cause: 1, .. });
    world
        .bench
        .events()
        .iter()
        .filter(|event| used(event))
        .count()
}

#[test]
fn vq_14_without_event_idx_a_flag_silences_the_device() {
    for (kind, over) in Kind::everywhere() {
        assert_eq!(interrupts(kind, over, false, false), 0, "{kind:?} {over:?}");
        assert!(
            interrupts(kind, over, false, true) >= 20,
            "{kind:?} {over:?}"
        );
    }
}

#[test]
fn vq_15_with_event_idx_the_flags_of_the_available_ring_are_0() {
    for kind in Kind::ALL {
        let world = world(kind, true);
        let rings = world.bench.watch_rings();
        let mut driver = world.start();
        for enable in [true, false] {
            if enable {
                driver.base().enable_interrupts().unwrap();
            } else {
                driver.base().disable_interrupts().unwrap();
            }
            world.work(&mut driver).unwrap();
            assert_eq!(rings.available_flags(0), 0);
        }
        assert!(rings.take_flags().iter().all(|flags| *flags == 0));
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_16_with_event_idx_an_index_silences_the_device() {
    for (kind, over) in Kind::everywhere() {
        assert_eq!(interrupts(kind, over, true, false), 0, "{kind:?} {over:?}");
        assert!(
            interrupts(kind, over, true, true) >= 20,
            "{kind:?} {over:?}"
        );
    }
}

#[test]
fn vq_17_a_spurious_interrupt_is_acknowledged_and_harmless() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        driver.base().enable_interrupts().unwrap();
        for (cause, meaning) in [
            (1, InterruptCause::USED_BUFFERS),
            (2, InterruptCause::CONFIGURATION),
        ] {
            world.bench.device().spurious_interrupt(cause);
            assert_eq!(driver.acknowledge(), Ok(meaning));
            assert_eq!(driver.acknowledge(), Ok(InterruptCause::empty()));
        }
        if let Driver::Nic(nic) = &mut driver {
            assert!(!nic.can_receive());
            assert_eq!(nic.receive().err(), Some(DevError::Again));
        }
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_18_what_the_device_does_not_say_it_wrote_is_not_believed() {
    for over in Over::SINCE_1 {
        for fault in [Fault::UsedLenShort, Fault::UsedLenZero] {
            // The data and the good status are there, but the length says that they are not.
            let bench = over.plug(numbered_disk());
            let mut disk = bench.disk();
            bench.once(fault);
            assert_eq!(
                disk.read_block(3, &mut [0; 512]),
                Err(DevError::Io),
                "{fault}"
            );

            let world = Kind::Display.plug(over);
            let mut display = world.start();
            world.bench.once(fault);
            assert_eq!(display.ask(), Err(DevError::Io), "{fault}");
        }
        let world = Kind::Nic.plug(over);
        let mut nic = world.bench.nic::<8>();
        world.bench.once(Fault::UsedLenZero);
        world.nic.inject(&[7; 100]);
        world.bench.board.run();
        assert_eq!(nic.receive().err(), Some(DevError::Io));
    }
}

#[test]
fn vq_19_the_flags_of_the_used_ring_start_as_0() {
    for (kind, over) in Kind::everywhere() {
        // The device leaves its flag set; the next start has to clear it.
        let world = kind.plug_as(over, |device| device.quiet().withhold(RING_EVENT_IDX));
        let _running = world.bench.run_while_waiting();
        let mut driver = world.try_start(common::running()).unwrap();
        driver.reset().unwrap();
        let enabled = world.bench.events();
        assert!(first(&enabled, "a queue", is_queue_enabled) < enabled.len());
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_20_without_event_idx_the_event_index_of_the_device_is_ignored() {
    let world = world(Kind::Disk, false);
    let rings = world.bench.watch_rings();
    let mut driver = world.start();
    for event in [0, 1, 5, 0x8000, 0xffff] {
        rings.set_avail_event(0, event);
        world.work(&mut driver).unwrap();
    }
    assert_eq!(world.bench.device().unkicked(), [0]);
    world.bench.assert_rules_kept();
}

#[test]
fn vq_21_without_event_idx_a_device_that_does_not_want_to_be_notified_is_not() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug_as(over, |device| device.quiet().withhold(RING_EVENT_IDX));
        let _running = world.bench.run_while_waiting();
        let mut driver = world.try_start(common::running()).unwrap();
        world.work(&mut driver).unwrap();
        let kicks = world.bench.device().counters().kicks;
        assert!(
            kicks.iter().all(|kicks| *kicks == 0),
            "{kind:?} over {over:?}: {kicks:?}"
        );
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_22_without_event_idx_a_device_that_wants_to_be_notified_is() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug_as(over, |device| device.withhold(RING_EVENT_IDX));
        let mut driver = world.start();
        for _ in 0..20 {
            world.work(&mut driver).unwrap();
        }
        assert!(
            world
                .bench
                .device()
                .unkicked()
                .iter()
                .all(|chains| *chains == 0)
        );
        world.bench.assert_rules_kept();
    }
}

#[test]
fn vq_23_with_event_idx_the_flag_of_the_device_is_ignored() {
    let world = world(Kind::Disk, true);
    let rings = world.bench.watch_rings();
    let mut driver = world.start();
    rings.set_used_flags(0, 1);
    world.work(&mut driver).unwrap();
    assert_eq!(world.bench.device().unkicked(), [0]);
}

#[test]
fn vq_24_with_event_idx_the_device_is_notified_when_its_index_is_passed() {
    for (kind, over) in Kind::everywhere() {
        // It answers inside the doorbell, and asks for the next one each time.
        let world = kind.plug(over);
        let mut driver = world.start();
        for _ in 0..20 {
            world.work(&mut driver).unwrap();
        }
        // What a NIC adds to the receive queue it has room for in any case.
        let unkicked = world.bench.device().unkicked();
        let requests = if kind == Kind::Nic { 1 } else { 0 };
        assert_eq!(unkicked[requests], 0, "{kind:?} over {over:?}");
        world.bench.assert_rules_kept();
    }
}

/// Transmits `count` frames, one after the other.
fn transmit<const QS: usize>(nic: &mut Nic<QS>, count: usize) {
    for _ in 0..count {
        let buf = nic.alloc_tx_buffer(60).unwrap();
        nic.transmit(buf).unwrap();
    }
}

#[test]
fn vq_25_with_event_idx_the_device_is_not_notified_before_its_index_is_passed() {
    for over in Over::ALL {
        // It has seen the first doorbell and asks for no other until the board runs.
        let world = Kind::Nic.plug_as(over, Device::answer_later);
        let mut nic = world.bench.nic::<64>();
        transmit(&mut nic, 50);
        assert_eq!(world.bench.device().counters().kicks[1], 1);
        world.bench.board.run();
        transmit(&mut nic, 10);
        assert_eq!(world.bench.device().counters().kicks[1], 2);
        world.bench.assert_rules_kept();
    }
    // And where it names an index further on.
    let world = world(Kind::Nic, true);
    let rings = world.bench.watch_rings();
    let mut nic = world.bench.nic::<64>();
    rings.set_avail_event(1, 9);
    transmit(&mut nic, 9);
    assert_eq!(world.bench.device().counters().kicks[1], 0);
    transmit(&mut nic, 1);
    assert_eq!(world.bench.device().counters().kicks[1], 1);
}

#[test]
fn vq_29_ids_lengths_and_indices_of_the_device_are_checked() {
    const LIES: [Fault; 6] = [
        Fault::UsedIdWrong,
        Fault::UsedIdOutOfRange,
        Fault::UsedIdHighBits,
        Fault::UsedLenLong,
        Fault::UsedIndexJump,
        Fault::UsedIndexBack,
    ];
    for (kind, over) in Kind::everywhere() {
        for lie in LIES {
            if lie == Fault::UsedLenLong && over == Over::Legacy {
                // 2.7.8.2: a legacy device's length is not to be relied on, so it is not.
                continue;
            }
            let world = kind.plug(over);
            let mut driver = world.try_start(impatient()).unwrap();
            world.bench.misbehave(Hostile::new().once(lie));
            let result = world.work(&mut driver);
            assert_eq!(result, Err(DevError::Io), "{lie} of {kind:?} over {over:?}");
            assert_eq!(driver.ask(), Err(DevError::BadState), "{lie} of {kind:?}");
            assert_eq!(world.bench.device().status(), 0, "it is reset");
            driver.reset().unwrap();
            world.work(&mut driver).unwrap();
            drop(driver);
            world.bench.assert_clean();
        }
    }
}

#[test]
fn the_features_of_the_ring_are_accepted() {
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug(over);
        let _driver = world.start();
        let ring = RING_EVENT_IDX | RING_INDIRECT_DESC | VERSION_1;
        assert_eq!(world.bench.device().accepted_features() & ring, ring);
    }
}
