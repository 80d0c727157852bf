//! What callers and devices get wrong: an error, no panic, nothing leaked, and right data wherever a call said `Ok`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{BaseDriverOps, DevError, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{VirtIoNetDev, WaitPolicy};
use common::{
    AnyTransport, Disk, Driver, Kind, MAC, Nic, Over, World, impatient, is_release, numbered_disk,
    running,
};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Event, MachineHal};

// Callers.

#[test]
fn requests_that_cannot_be_are_refused_and_change_nothing() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let before = disk.contents().unwrap();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        for (block, len) in [
            (0, 0),
            (0, 1),
            (0, 511),
            (0, 513),
            (0, 65 * 512),
            (63, 1024),
            (64, 512),
            (1 << 32, 512),
            ((1 << 55) - 1, 1024),
            (1 << 55, 512),
            (u64::MAX - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX, 0),
        ] {
            let mut buffer = vec![0xab; len];
            let read = driver.read_block(block, &mut buffer);
            assert_eq!(read, Err(DevError::InvalidParam), "{len} bytes at {block}");
            assert!(buffer.iter().all(|byte| *byte == 0xab));
            let written = driver.write_block(block, &buffer);
            assert_eq!(
                written,
                Err(DevError::InvalidParam),
                "{len} bytes at {block}"
            );
        }
        assert_eq!(disk.contents().unwrap(), before);
        assert_eq!((disk.counters().reads, disk.counters().writes), (0, 0));
        drop(driver);
        bench.assert_clean();
    }
}

#[test]
fn a_wrong_write_to_a_read_only_disk_is_wrong_first_and_unsupported_second() {
    let bench = Over::Pci.plug(numbered_disk().read_only());
    let mut driver = bench.disk();
    let refused = driver.write_block(64, &[0; 512]);
    assert_eq!(refused, Err(DevError::InvalidParam));
    assert_eq!(
        driver.write_block(63, &[0; 512]),
        Err(DevError::Unsupported)
    );
    driver.flush().unwrap();
}

#[test]
fn frames_that_cannot_be_are_refused_and_cost_no_buffer() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<2>();
        for _ in 0..20 {
            for size in [0, 1515, 2048, 65536, usize::MAX] {
                let refused = driver.alloc_tx_buffer(size).map(drop);
                assert_eq!(refused, Err(DevError::InvalidParam));
            }
            // A buffer of a driver with the same queues, and one without an owner to be found.
            let pool = axdriver_net::NetBufPool::new(2, 2048).unwrap();
            let foreign = || pool.alloc_boxed().unwrap().into_buf_ptr();
            assert_eq!(driver.transmit(foreign()), Err(DevError::InvalidParam));
            let refused = driver.recycle_rx_buffer(foreign());
            assert_eq!(refused, Err(DevError::InvalidParam));
            assert_eq!(pool.available(), 2);
            let mut buf = driver.alloc_tx_buffer(1514).unwrap();
            buf.packet_mut().fill(3);
            driver.transmit(buf).unwrap();
        }
        assert_eq!(nic.take_sent(), vec![vec![3; 1514]; 20]);
        drop(driver);
        bench.assert_clean();
    }
}

#[test]
fn frames_outlive_their_driver() {
    let nic = machine::Nic::new(MAC);
    let bench = Over::Modern.plug(&nic);
    let mut driver = bench.nic::<2>();
    nic.inject(&[9; 99]);
    bench.board.run();
    let received = driver.receive().unwrap();
    let allocated = driver.alloc_tx_buffer(100).unwrap();
    drop(driver);
    bench.assert_clean();
    assert_eq!(received.packet(), [9; 99]);
    drop(allocated);
}

#[test]
fn a_nic_with_queues_of_no_frames_is_refused() {
    let bench = Over::Modern.plug(machine::Nic::new(MAC));
    let started = VirtIoNetDev::<MachineHal, AnyTransport, 0>::try_new(bench.transport());
    assert_eq!(started.err(), Some(DevError::InvalidParam));
    bench.assert_clean();
}

#[test]
fn displays_without_pixels_are_refused() {
    for over in Over::ALL {
        for (width, height) in [(0, 0), (0, 8), (16, 0)] {
            let bench = over.plug(machine::Display::new(width, height));
            let started = common::Display::try_new(bench.transport());
            assert_eq!(started.err(), Some(DevError::Unsupported));
            bench.assert_clean();
        }
    }
}

// Memory.

#[test]
fn out_of_memory_at_any_point_is_an_error_and_leaks_nothing() {
    for (kind, over) in Kind::everywhere() {
        let mut enough = None;
        for limit in 0..200 {
            let world = kind.plug_as(over, |device| device.queue_size(4));
            world.bench.board.memory().set_page_limit(Some(limit));
            match world.try_start(impatient()) {
                Ok(driver) => {
                    drop(driver);
                    enough = Some(limit);
                }
                Err(error) => assert_eq!(error, DevError::NoMemory, "{limit} pages"),
            }
            world.bench.assert_clean();
            if enough.is_some() {
                break;
            }
        }
        assert!(
            enough.is_some_and(|limit| limit > 1),
            "{kind:?} over {over:?}"
        );
    }
}

#[test]
fn a_display_that_has_no_memory_for_a_larger_picture_can_be_reset_later() {
    let display = machine::Display::new(16, 8);
    let bench = Over::Pci.plug(&display);
    let mut driver = bench.display();
    display.resize(1000, 1000);
    let live = bench.board.memory().counters().pages_live;
    bench.board.memory().set_page_limit(Some(live));
    assert_eq!(driver.reset(), Err(DevError::NoMemory));
    assert_eq!(driver.flush(), Err(DevError::BadState));
    // The framebuffer of before is still there.
    assert_eq!(driver.fb().as_bytes().len(), driver.info().fb_size);
    bench.board.memory().set_page_limit(None);
    driver.reset().unwrap();
    assert_eq!((driver.info().width, driver.info().height), (1000, 1000));
    driver.flush().unwrap();
    drop(driver);
    bench.assert_clean();
}

// Devices.

/// Faults after which a device behaves again that is told to, and memory is given back.
fn curable() -> impl Iterator<Item = Fault> {
    let faults = Fault::ALL.iter().copied();
    // One that is gone stays so, and one that does not reset keeps what it had.
    faults.filter(|fault| *fault != Fault::Vanish)
}

/// Faults in which a device speaks of one buffer and means another, which no driver can notice.
fn swaps_buffers(fault: Fault) -> bool {
    matches!(
        fault,
        Fault::UsedIdForeign | Fault::UsedIdRepeated | Fault::CompleteTwice
    )
}

/// Faults that a driver has no reason to mind.
fn is_harmless(kind: Kind, fault: Fault) -> bool {
    match fault {
        Fault::ResetSlow
        | Fault::Version1Withheld
        | Fault::CompleteLate
        | Fault::QueueSize(4 | 32768)
        | Fault::InterruptBits
        | Fault::CapabilityDecoys
        | Fault::CapabilityLoop
        | Fault::CapabilityOffEnd => true,
        Fault::QueueSize(1 | 3) => kind == Kind::Nic,
        _ => false,
    }
}

fn work(world: &World, driver: &mut Driver, fault: Fault) -> Result<(), DevError> {
    if swaps_buffers(fault) {
        world.work_with_swapped_frames(driver)
    } else {
        world.work(driver)
    }
}

/// Whether a device of this kind with this fault, from the start and always, was found to be driven nevertheless.
fn faulty_from_the_start(kind: Kind, over: Over, fault: Fault, hostile: Hostile) -> bool {
    let world = kind.plug_as(over, |device| device.hostile(hostile));
    let _running = world.bench.run_while_waiting();
    let Some(transport) = world.bench.find() else {
        world.bench.assert_clean();
        return false;
    };
    let Ok(mut driver) = world.try_start_on(transport, running()) else {
        world.bench.assert_nothing_left();
        return false;
    };
    let worked = work(&world, &mut driver, fault).is_ok();
    // More calls than one, whatever they say.
    for _ in 0..3 {
        let _ = work(&world, &mut driver, fault);
        let _ = driver.acknowledge();
        let _ = driver.base().enable_interrupts();
        let _ = driver.configuration_changed();
    }
    world.bench.behave();
    driver.reset().unwrap();
    world.work(&mut driver).unwrap();
    drop(driver);
    world.bench.assert_nothing_left();
    worked
}

/// All settings of a fault, once and always, on each kind of device.
fn every_fault_from_the_start(over: Over) {
    for kind in Kind::ALL {
        for fault in curable() {
            let always = Hostile::new().always(fault);
            let worked = faulty_from_the_start(kind, over, fault, always);
            if is_harmless(kind, fault) {
                assert!(worked, "{fault} of {kind:?} over {over:?} is harmless");
            }
            for skip in 0..3 {
                let once = Hostile::new().after(skip, fault);
                faulty_from_the_start(kind, over, fault, once);
            }
        }
    }
}

#[test]
fn every_fault_from_the_start_over_mmio_is_an_error_or_harmless() {
    every_fault_from_the_start(Over::Modern);
}

#[test]
fn every_fault_from_the_start_over_legacy_mmio_is_an_error_or_harmless() {
    every_fault_from_the_start(Over::Legacy);
}

#[test]
fn every_fault_from_the_start_over_pci_is_an_error_or_harmless() {
    every_fault_from_the_start(Over::Pci);
}

/// Lets a device go wrong that has worked, and expects that a reset mends it when it behaves again.
fn faulty_at_work(kind: Kind, over: Over, fault: Fault, hostile: Hostile, later: bool) {
    let world = kind.plug_as(
        over,
        |device| if later { device.answer_later() } else { device },
    );
    let _running = world.bench.run_while_waiting();
    let mut driver = world.try_start(running()).unwrap();
    world.work(&mut driver).unwrap();
    world.bench.misbehave(hostile);
    let mut results = Vec::new();
    for _ in 0..4 {
        results.push(work(&world, &mut driver, fault));
        let _ = driver.configuration_changed();
    }
    let _ = driver.reset();
    let _ = work(&world, &mut driver, fault);
    world.bench.behave();
    driver.reset().unwrap();
    world.work(&mut driver).unwrap_or_else(|error| {
        panic!("{error} after {fault} of {kind:?} over {over:?}, which was {results:?}")
    });
    drop(driver);
    world.bench.assert_nothing_left();
}

fn every_fault_at_work(over: Over) {
    for kind in Kind::ALL {
        for fault in curable() {
            for later in [false, true] {
                let always = Hostile::new().always(fault);
                faulty_at_work(kind, over, fault, always, later);
            }
            for skip in 0..3 {
                let once = Hostile::new().after(skip, fault);
                faulty_at_work(kind, over, fault, once, skip == 1);
            }
        }
    }
}

#[test]
fn every_fault_at_work_over_mmio_is_mended_by_a_reset() {
    every_fault_at_work(Over::Modern);
}

#[test]
fn every_fault_at_work_over_legacy_mmio_is_mended_by_a_reset() {
    every_fault_at_work(Over::Legacy);
}

#[test]
fn every_fault_at_work_over_pci_is_mended_by_a_reset() {
    every_fault_at_work(Over::Pci);
}

#[test]
fn faults_by_chance_are_mended_by_a_reset() {
    for (kind, over) in Kind::everywhere() {
        for seed in 0..20 {
            // What a device does that neither answers nor resets is tested below.
            let faults = curable().filter(|fault| *fault != Fault::ResetIgnored);
            let faults: Vec<Fault> = faults.filter(|fault| !swaps_buffers(*fault)).collect();
            let hostile = Hostile::seed(seed).one_in(3).only(&faults);
            faulty_at_work(kind, over, Fault::NeedsReset, hostile, seed % 2 == 0);
        }
    }
}

#[test]
fn errors_are_stable_until_a_reset() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.once(Fault::UsedIdOutOfRange);
        assert_eq!(world.work(&mut driver), Err(DevError::Io));
        for _ in 0..3 {
            assert_eq!(driver.ask(), Err(DevError::BadState));
            assert_eq!(driver.configuration_changed(), Err(DevError::BadState));
            assert_eq!(driver.base().enable_interrupts(), Err(DevError::BadState));
            assert_eq!(driver.base().disable_interrupts(), Err(DevError::BadState));
            // What was wrong before is still wrong.
            if let Driver::Disk(disk) = &mut driver {
                let refused = disk.read_block(u64::MAX, &mut [0; 512]);
                assert_eq!(refused, Err(DevError::InvalidParam));
            }
        }
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

#[test]
fn a_device_that_does_not_reset_keeps_its_memory_and_the_caller_gets_an_error() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.work(&mut driver).unwrap();
        world.bench.board.memory().trace().clear();
        world
            .bench
            .misbehave(Hostile::new().always(Fault::ResetIgnored));
        common::logged();
        assert_eq!(driver.reset(), Err(DevError::Io));
        assert_eq!(driver.ask(), Err(DevError::BadState));
        drop(driver);
        assert!(
            !world.bench.events().iter().any(is_release),
            "{kind:?} over {over:?}"
        );
        assert!(world.bench.board.memory().counters().pages_live > 0);
        let said = common::logged();
        assert!(
            said.iter()
                .any(|message| message.text.contains("does not reset"))
        );
        world.bench.assert_rules_kept();
    }
}

#[test]
fn a_request_to_a_device_that_neither_answers_nor_resets_is_never_taken_back() {
    for over in Over::ALL {
        let bench = over.plug(numbered_disk());
        let mut disk = Disk::try_new_with(bench.transport(), impatient()).unwrap();
        let never = Hostile::new();
        bench.misbehave(
            never
                .always(Fault::CompleteNever)
                .always(Fault::ResetIgnored),
        );
        let mut block = [0x77; 512];
        assert_eq!(disk.read_block(0, &mut block), Err(DevError::Io));
        assert_eq!(block, [0x77; 512]);
        // The copy that the device may still write to is not used for anything else.
        assert_eq!(bench.board.memory().counters().shares_live, 1);
        assert_eq!(disk.read_block(0, &mut block), Err(DevError::BadState));
        bench.assert_rules_kept();
        drop(disk);
        bench.assert_rules_kept();
    }
}

#[test]
fn a_device_that_vanishes_at_any_register_access_is_an_error() {
    for (kind, over) in Kind::everywhere() {
        for access in (0..120).step_by(7) {
            let vanishing = Hostile::new().after(access, Fault::Vanish);
            let world = kind.plug_as(over, |device| device.hostile(vanishing));
            // What works until it is gone, works.
            if let Some(transport) = world.bench.find()
                && let Ok(mut driver) = world.try_start_on(transport, impatient())
            {
                let _ = world.work(&mut driver);
            }
            assert_eq!(world.bench.board.memory().overwritten_free_pages(), [0; 0]);
        }
    }
}

#[test]
fn a_device_that_is_pulled_out_in_the_middle_of_a_request_is_an_error() {
    for over in Over::ALL {
        let bench = over.plug(Device::from(&numbered_disk()).answer_later());
        let mut disk = Disk::try_new_with(bench.transport(), impatient()).unwrap();
        // It is there at the doorbell, and gone before it has answered.
        let device = bench.device();
        let doorbell = match over {
            Over::Pci => bench.registers() + 0x3000,
            _ => bench.registers() + 0x50,
        };
        let mut rung = false;
        let tap = bench.tap(move |access| {
            if std::mem::replace(&mut rung, access.writes(doorbell)) {
                device.vanish();
            }
            None
        });
        let mut block = [0x55; 512];
        assert_eq!(disk.read_block(1, &mut block), Err(DevError::Io));
        assert_eq!(disk.read_block(1, &mut block), Err(DevError::BadState));
        assert_eq!(disk.reset(), Err(DevError::Io));
        drop(tap);
        assert_eq!(bench.board.memory().overwritten_free_pages(), [0; 0]);
    }
}

#[test]
fn a_device_that_needs_a_reset_before_its_first_request_is_not_started() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let device = world.bench.device();
        let status = match over {
            Over::Pci => world.bench.registers() + 0x14,
            _ => world.bench.registers() + 0x70,
        };
        let mut live = false;
        let tap = world.bench.tap(move |access| {
            // Right behind DRIVER_OK.
            if access.writes(status) {
                live = access.value & 4 != 0;
            }
            if live && access.reads(status) {
                device.needs_reset();
                return Some(access.value | 0x40);
            }
            None
        });
        let started = world.try_start(impatient());
        assert!(started.is_err(), "{kind:?} over {over:?}");
        drop(started);
        drop(tap);
        // The buffers of a NIC were posted already, and are taken back after the reset.
        world.bench.assert_clean();
    }
}

#[test]
fn a_caller_that_unwinds_out_of_a_wait_leaves_the_device_without_its_buffer() {
    for over in Over::ALL {
        let bench = over.plug(Device::from(&numbered_disk()).answer_later());
        let policy = WaitPolicy::new().with_relax(|_| panic!("the OS gives up"));
        let mut disk = Disk::try_new_with(bench.transport(), policy).unwrap();
        let mut block = [0x55; 512];
        let read = std::panic::AssertUnwindSafe(|| disk.read_block(1, &mut block));
        std::panic::catch_unwind(read).unwrap_err();
        assert_eq!(bench.device().status(), 0, "it is reset");
        bench.board.run();
        assert_eq!(block, [0x55; 512]);
        disk.set_wait_policy(running());
        let _running = bench.run_while_waiting();
        disk.reset().unwrap();
        disk.read_block(1, &mut block).unwrap();
        assert_eq!(block, [1; 512]);
    }
}

// Interrupts.

#[test]
fn an_interrupt_handle_acknowledges_without_the_driver() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut transport = world.bench.transport();
        let handle = transport.split_interrupt().expect("it is there once");
        assert!(transport.split_interrupt().is_none(), "and not twice");
        let mut driver = match kind {
            Kind::Disk => Driver::Disk(Disk::try_new(transport).unwrap()),
            Kind::Nic => Driver::Nic(Box::new(Nic::try_new(transport).unwrap())),
            Kind::Display => Driver::Display(common::Display::try_new(transport).unwrap()),
        };
        driver.base().enable_interrupts().unwrap();
        assert_eq!(handle.acknowledge(), InterruptCause::empty());
        world.work(&mut driver).unwrap();
        assert!(world.bench.device().interrupt_pending());
        // The handler runs elsewhere, while the driver is locked.
        let machine = world.bench.board.machine().clone();
        let cause = std::thread::scope(|scope| {
            let handler = scope.spawn(|| {
                let _installed = machine.install();
                handle.acknowledge()
            });
            handler.join().unwrap()
        });
        assert_eq!(
            cause,
            InterruptCause::USED_BUFFERS,
            "{kind:?} over {over:?}"
        );
        assert!(!world.bench.device().interrupt_pending());
        assert_eq!(driver.acknowledge(), Ok(InterruptCause::empty()));

        world.disk.resize(common::DISK_SIZE / 2);
        world.nic.set_link(false);
        world.display.resize(16, 8);
        world.bench.board.run();
        assert_eq!(handle.acknowledge(), InterruptCause::CONFIGURATION);
        driver.configuration_changed().unwrap();
        match &mut driver {
            Driver::Disk(disk) => assert_eq!(disk.num_blocks(), 32),
            Driver::Nic(nic) => assert_eq!(nic.capabilities().link, Some(false)),
            Driver::Display(display) => display.flush().unwrap(),
        }
        world.bench.assert_rules_kept();
    }
}

#[test]
fn a_handle_acknowledges_in_one_register_access_or_two() {
    for (over, reads) in [(Over::Modern, 1), (Over::Pci, 1)] {
        let world = Kind::Nic.plug(over);
        let mut transport = world.bench.transport();
        let handle = transport.split_interrupt().unwrap();
        let mut nic = Nic::<8>::try_new(transport).unwrap();
        nic.enable_interrupts().unwrap();
        let tap = world.bench.tap(|_| None);
        handle.acknowledge();
        assert_eq!(tap.take().len(), reads);
        world.nic.inject(&[1; 60]);
        world.bench.board.run();
        handle.acknowledge();
        let most = if over == Over::Pci { 1 } else { 2 };
        assert_eq!(tap.take().len(), most);
    }
}

#[test]
fn enabling_interrupts_says_whether_work_has_come_in_meanwhile() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(Device::from(&nic).answer_later());
        let mut driver = bench.nic::<8>();
        assert_eq!(driver.enable_interrupts(), Ok(false));
        driver.disable_interrupts().unwrap();
        nic.inject(&[1; 60]);
        assert_eq!(bench.board.run(), [0; 0], "nobody asked for an interrupt");
        assert_eq!(driver.enable_interrupts(), Ok(true), "so this says it");
        assert_eq!(driver.enable_interrupts(), Ok(true), "until somebody looks");
        let buf = driver.receive().unwrap();
        driver.recycle_rx_buffer(buf).unwrap();
        assert_eq!(driver.enable_interrupts(), Ok(false));
        // Frames that were sent count too.
        let buf = driver.alloc_tx_buffer(60).unwrap();
        driver.transmit(buf).unwrap();
        driver.disable_interrupts().unwrap();
        bench.board.run();
        assert_eq!(driver.enable_interrupts(), Ok(true));
        driver.recycle_tx_buffers().unwrap();
        assert_eq!(driver.enable_interrupts(), Ok(false));
        assert!(bench.board.run().is_empty());
        nic.inject(&[2; 60]);
        assert_eq!(bench.board.run().len(), 1, "now it interrupts");
        bench.assert_rules_kept();
    }
}

#[test]
fn interrupts_are_off_after_a_start_and_after_a_reset() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        assert_eq!(world.bench.device().counters().interrupts, 0);
        driver.base().enable_interrupts().unwrap();
        driver.reset().unwrap();
        world.work(&mut driver).unwrap();
        assert_eq!(
            world.bench.device().counters().interrupts,
            0,
            "{kind:?} over {over:?}"
        );
    }
}

#[test]
fn an_interrupt_of_a_device_that_is_gone_is_an_error_and_no_loop() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.device().vanish();
        assert_eq!(
            driver.acknowledge(),
            Err(DevError::Io),
            "{kind:?} over {over:?}"
        );
        assert_eq!(driver.ask(), Err(DevError::BadState));
        // All ones are all causes; the driver does not go and look again.
        assert!(driver.acknowledge().is_ok());
    }
}

#[test]
fn a_driver_can_be_sent_to_another_thread_and_used_there() {
    let bench = Over::Modern.plug(numbered_disk());
    let mut disk = bench.disk();
    let machine = bench.board.machine().clone();
    let block = std::thread::spawn(move || {
        let _installed = machine.install();
        let mut block = [0; 512];
        disk.read_block(8, &mut block).unwrap();
        drop(disk);
        block
    });
    assert_eq!(block.join().unwrap(), [8; 512]);
    bench.assert_clean();
}

#[test]
fn frames_that_are_sent_on_as_they_were_received_use_up_no_buffer() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<4>();
        for round in 0..50 {
            nic.inject(&[round; 80]);
            bench.board.run();
            let received = driver.receive().unwrap();
            driver.transmit(received).unwrap();
            assert_eq!(nic.take_sent(), [[round; 80]]);
        }
        // Nor do those that stand still in a full transmit queue.
        bench.device().answer_later(true);
        for _ in 0..20 {
            while driver.can_transmit() {
                let buf = driver.alloc_tx_buffer(60).unwrap();
                driver.transmit(buf).unwrap();
            }
            bench.board.run();
            nic.inject(&[1; 80]);
            bench.board.run();
            driver.receive().map(drop).unwrap();
        }
        drop(driver);
        let used = |event: &Event| matches!(event, Event::Used { .. });
        assert!(bench.events().iter().any(used));
        bench.assert_clean();
    }
}

#[test]
fn a_disk_that_can_no_longer_flush_is_not_taken_to_be_durable_after_a_reset() {
    const FLUSH: u64 = 1 << 9;
    let bench = Over::Modern.plug(numbered_disk());
    let mut driver = bench.disk();
    driver.write_block(2, &[0xbb; 512]).unwrap();
    let features = bench.registers() + 0x10;
    let mut halves = 0;
    let tap = bench.tap(move |access| {
        if !access.reads(features) {
            return None;
        }
        halves += 1;
        (halves % 2 == 1).then_some(access.value & !FLUSH)
    });
    for _ in 0..2 {
        assert_eq!(driver.reset(), Err(DevError::BadState));
        assert_eq!(driver.flush(), Err(DevError::BadState));
        assert!(driver.capabilities().volatile_write_cache);
    }
    drop(tap);
    driver.reset().unwrap();
    driver.flush().unwrap();
}
