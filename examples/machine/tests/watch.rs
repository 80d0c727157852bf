//! The board sees what a driver does wrong, and nothing where it does it right.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Driver, INDIRECT, NEXT, WRITE};
use machine::emulated::{features, net_features, status};
use machine::{Board, Device, Disk, Display, Nic, Version};

fn disk_board() -> Board {
    Board::emulated()
        .mmio(Version::Modern, Disk::memory(1 << 16))
        .build()
        .unwrap()
}

/// A board whose device is started by the book, and what the driver does then.
fn after_start(wanted: u64, does: impl FnOnce(&mut Driver<'_>)) -> Vec<&'static str> {
    let board = disk_board();
    let mut driver = Driver::new(&board, 0);
    driver.start(wanted, 1, 8);
    assert_eq!(driver.violations(), [""; 0], "the start is by the book");
    does(&mut driver);
    driver.violations()
}

/// All features of a disk without EVENT_IDX.
const PLAIN: u64 = !(features::RING_EVENT_IDX);

#[test]
fn a_driver_by_the_book_is_left_in_peace() {
    let seen = after_start(u64::MAX, |driver| {
        let (buffer, descriptors) = driver.block_read(3);
        driver.send(0, &descriptors);
        assert_eq!(driver.used(0, 0), (0, 513));
        assert!(driver.reset());
        driver.queues.clear();
        drop(buffer);
    });
    assert_eq!(seen, [""; 0]);
}

#[test]
fn status_bits_out_of_order_are_seen() {
    let all = status::ACKNOWLEDGE | status::DRIVER;
    for (writes, id) in [
        (&[all][..], "GEN-18"),
        (&[status::DRIVER], "GEN-18"),
        (&[status::ACKNOWLEDGE, status::DRIVER], "GEN-02"),
        (
            &[status::ACKNOWLEDGE, all, all | status::DRIVER_OK],
            "GEN-21",
        ),
        (
            &[
                status::ACKNOWLEDGE,
                status::ACKNOWLEDGE | status::FEATURES_OK,
            ],
            "GEN-20",
        ),
        (
            &[status::FAILED, status::FAILED | status::ACKNOWLEDGE],
            "GEN-03",
        ),
    ] {
        let board = disk_board();
        let driver = Driver::new(&board, 0);
        for value in writes {
            driver.write(0x70, *value);
        }
        assert!(driver.violations().contains(&id), "{writes:x?}");
    }
}

#[test]
fn features_ok_that_is_not_read_back_is_seen() {
    let board = disk_board();
    let driver = Driver::new(&board, 0);
    driver.reset();
    for value in [1, 3] {
        driver.write(0x70, value);
    }
    driver.accept(driver.offered());
    driver.write(0x70, 0xb);
    driver.write(0x70, 0xf);
    assert_eq!(driver.violations(), ["GEN-21"]);
}

#[test]
fn wrong_features_are_seen() {
    let board = disk_board();
    let driver = Driver::new(&board, 0);
    driver.reset();
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.accept(1 << 40 | driver.offered());
    assert_eq!(driver.violations(), ["GEN-05"]);
    driver.accept(driver.offered() & !features::VERSION_1);
    driver.write(0x70, 0xb);
    assert_eq!(driver.status(), 3, "the device refuses");
    assert_eq!(driver.violations(), ["GEN-28"]);
    driver.accept(driver.offered());
    driver.write(0x70, 0xb);
    assert_eq!(driver.status(), 0xb);
    driver.accept(0);
    assert_eq!(driver.violations(), ["GEN-20"]);
}

#[test]
fn a_platform_that_translates_has_to_be_accepted() {
    let disk = Device::from(Disk::memory(1 << 16)).offer(features::ACCESS_PLATFORM);
    let board = Board::emulated()
        .mmio(Version::Modern, disk)
        .build()
        .unwrap();
    let driver = Driver::new(&board, 0);
    assert!(!driver.negotiate(!features::ACCESS_PLATFORM));
    assert_eq!(driver.violations(), ["GEN-30"]);
    assert!(driver.negotiate(u64::MAX));
    assert_eq!(driver.violations(), [""; 0]);
}

#[test]
fn a_reset_that_is_not_awaited_is_seen() {
    let board = disk_board();
    let mut driver = Driver::new(&board, 0);
    driver.start(u64::MAX, 1, 8);
    driver.write(0x70, 0);
    driver.queues.clear();
    assert_eq!(
        driver.violations(),
        ["GEN-10"],
        "memory went before the status was read"
    );
    driver.write(0x70, 0);
    driver.write(0x70, 1);
    assert_eq!(
        driver.violations(),
        ["GEN-10"],
        "the next driver started before"
    );
}

#[test]
fn memory_taken_from_a_live_device_is_seen() {
    assert_eq!(
        after_start(u64::MAX, |driver| driver.queues.clear()),
        ["GEN-27"]
    );
    let board = disk_board();
    let mut driver = Driver::new(&board, 0);
    driver.start(u64::MAX, 1, 8);
    board.device(0).answer_later(true);
    let (buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    drop(buffer);
    assert_eq!(driver.violations(), ["GEN-27"]);
    board.run();
    assert_eq!(
        board.memory().overwritten_free_pages().len(),
        1,
        "and it is late DMA"
    );
}

#[test]
fn the_memory_of_a_picture_taken_while_it_backs_a_resource_is_seen() {
    let display = Display::new(64, 64);
    let board = Board::emulated()
        .mmio(Version::Modern, &display)
        .build()
        .unwrap();
    let mut driver = Driver::new(&board, 0);
    driver.start(u64::MAX, 2, 8);
    let picture = board.memory().buffer(64 * 64 * 4).unwrap();
    let request = board.memory().buffer(4096).unwrap();
    let at = request.address();
    let mut command = |words: &[u32]| {
        for (index, word) in words.iter().enumerate() {
            driver.put(at + 4 * index as u64, *word);
        }
        driver.send(0, &[(at, 100, NEXT, 1), (at + 2048, 24, WRITE, 0)]);
        driver.get::<u32>(at + 2048)
    };
    assert_eq!(command(&[0x101, 0, 0, 0, 0, 0, 1, 99, 64, 64]), 0x1205);
    assert_eq!(command(&[0x101, 0, 0, 0, 0, 0, 1, 1, 64, 64]), 0x1100);
    assert_eq!(
        command(&[0x105, 0, 0, 0, 0, 0, 0, 0, 64, 64, 0, 0, 1]),
        0x1200
    );
    assert_eq!(command(&[0x103, 0, 0, 0, 0, 0, 0, 0, 65, 64, 0, 1]), 0x1205);
    let address = u32::try_from(picture.address()).unwrap();
    assert_eq!(
        command(&[0x106, 0, 0, 0, 0, 0, 1, 1, address, 0, 16384]),
        0x1100
    );
    assert_eq!(command(&[0x300, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1]), 0x1100);
    assert_eq!(
        driver.violations(),
        ["GPU-03", "GPU-04", "GPU-07", "GPU-08"]
    );
    drop(picture);
    assert_eq!(driver.violations(), ["GPU-03"]);
}

#[test]
fn register_accesses_of_the_wrong_kind_are_seen() {
    for (does, id) in [
        (
            (|driver| driver.write_width(0x30, 2, 0)) as fn(&Driver<'_>),
            "MMIO-02",
        ),
        (|driver| _ = driver.read_width(0x0, 1), "MMIO-02"),
        (|driver| _ = driver.read(0x50), "MMIO-01"),
        (|driver| driver.write(0x60, 0), "MMIO-01"),
        (|driver| _ = driver.read(0x18), "MMIO-01"),
        (|driver| driver.write(0x64, 4), "MMIO-13"),
        (|driver| driver.write(0xac, 4), "MMIO-16"),
        (|driver| _ = driver.read_width(0x100, 1), "MMIO-03"),
        (|driver| _ = driver.read(0x118), "MMIO-03"),
        (|driver| driver.write(0x114, 0), "MMIO-01"),
        (|driver| _ = driver.read_width(0x120, 1), "GEN-12"),
        (|driver| driver.write(0x50, 9), "MMIO-01"),
        (|driver| driver.write(0x38, 4), "MMIO-10"),
        (|driver| driver.write(0x80, 4), "MMIO-10"),
    ] {
        let seen = after_start(u64::MAX, |driver| does(driver));
        assert!(seen.contains(&id), "{seen:?} should contain {id}");
    }
}

#[test]
fn selectors_and_the_order_of_the_first_registers_are_seen() {
    for (does, id) in [
        (
            (|driver| _ = driver.read(0x8)) as fn(&Driver<'_>),
            "MMIO-15",
        ),
        (|driver| _ = driver.read(0x10), "MMIO-07"),
        (|driver| driver.write(0x20, 0), "MMIO-08"),
        (|driver| driver.write(0x38, 0x1000), "MMIO-09"),
        (|driver| driver.write(0x44, 1), "MMIO-17"),
        (
            |driver| {
                driver.write(0x44, 0);
                driver.write(0x38, 8);
            },
            "MMIO-11",
        ),
        (|driver| driver.write(0x50, 0), "GEN-25"),
        (|driver| driver.write(0x120, 0), "GEN-19"),
        (
            |driver| {
                driver.read(0x100);
            },
            "GEN-11",
        ),
    ] {
        let board = disk_board();
        let driver = Driver::new(&board, 0);
        does(&driver);
        let seen = driver.violations();
        assert!(seen.contains(&id), "{seen:?} should contain {id}");
    }
    let board = disk_board();
    let empty = Driver::new(&board, 1);
    assert_eq!(
        (empty.read(0), empty.read(4), empty.read(8)),
        (0x7472_6976, 2, 0)
    );
    assert_eq!(empty.violations(), [""; 0]);
    empty.write(0x70, 0);
    assert_eq!(empty.violations(), ["MMIO-15"]);
}

#[test]
fn queues_of_bad_size_or_place_are_seen() {
    for (size, shift, id) in [(3, 0, "VQ-02"), (8, 8, "VQ-01"), (8, 1 << 40, "GEN-31")] {
        let board = disk_board();
        let driver = Driver::new(&board, 0);
        assert!(driver.negotiate(u64::MAX));
        let memory = board.memory().buffer(4096).unwrap();
        driver.write(0x30, 0);
        driver.read(0x44);
        driver.read(0x34);
        driver.write(0x38, size);
        for offset in [0x80, 0x90, 0xa0] {
            let address = memory.address() + shift;
            driver.write(offset, u32::try_from(address & 0xffff_ffff).unwrap());
            driver.write(offset + 4, u32::try_from(address >> 32).unwrap());
        }
        driver.write(0x44, 1);
        assert_eq!(driver.violations(), [id]);
        driver.reset();
    }
}

#[test]
fn chains_against_the_rules_are_seen() {
    // What is at `at` is a buffer of 4096 bytes.
    type Make = fn(u64) -> Vec<common::Descriptor>;
    let cases: [(Make, u64, &str); 9] = [
        (
            |at| vec![(at, 16, WRITE | NEXT, 1), (at, 16, 0, 0)],
            PLAIN,
            "VQ-03",
        ),
        (|at| vec![(at, 16, NEXT, 99)], PLAIN, "VQ-05"),
        (
            |at| vec![(at, 16, NEXT, 1), (at, 16, NEXT, 0)],
            PLAIN,
            "VQ-09",
        ),
        (
            |at| vec![(at, 16, INDIRECT, 0)],
            PLAIN & !features::RING_INDIRECT_DESC,
            "VQ-07",
        ),
        (|at| vec![(at, 16, INDIRECT | NEXT, 1)], PLAIN, "VQ-10"),
        (|at| vec![(at, 17, INDIRECT, 0)], PLAIN, "VQ-09"),
        (|at| vec![(at + 2048, 16, INDIRECT, 0)], PLAIN, "VQ-08"),
        (|_| vec![(1 << 40, 16, 0, 0)], PLAIN, "GEN-31"),
        (
            |at| {
                vec![
                    (at, 1 << 31, NEXT, 1),
                    (at, 1 << 31, NEXT, 2),
                    (at, 1, 0, 0),
                ]
            },
            PLAIN,
            "VQ-05",
        ),
    ];
    for (make, wanted, id) in cases {
        let seen = after_start(wanted, |driver| {
            let buffer = driver.board.memory().buffer(4096).unwrap();
            // An indirect table within an indirect table.
            driver.descriptor(
                buffer.address() + 2048,
                0,
                (buffer.address(), 16, INDIRECT, 0),
            );
            driver.send(0, &make(buffer.address()));
            driver.reset();
        });
        assert!(seen.contains(&id), "{seen:?} should contain {id}");
    }
}

#[test]
fn rings_against_the_rules_are_seen() {
    let seen = after_start(PLAIN, |driver| {
        let index = driver.queues[0].driver() + 2;
        driver.put(index, 100_u16);
        driver.kick(0);
    });
    assert_eq!(seen, ["VQ-12"]);
    for (wanted, flags, id) in [(PLAIN, 2_u16, "VQ-13"), (u64::MAX, 1, "VQ-15")] {
        let seen = after_start(wanted, |driver| {
            driver.put(driver.queues[0].driver(), flags);
            driver.kick(0);
        });
        assert!(seen.contains(&id), "{seen:?} should contain {id}");
    }
}

#[test]
fn a_head_used_twice_and_a_chain_changed_in_flight_are_seen() {
    let board = disk_board();
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    board.device(0).answer_later(true);
    let (_buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    driver.post(0, 0);
    driver.kick(0);
    assert_eq!(driver.violations(), ["GEN-26"]);
    let table = driver.queues[0].descriptors();
    driver.descriptor(table, 2, (descriptors[2].0 + 1, 1, WRITE, 0));
    board.run();
    assert_eq!(driver.violations(), ["GEN-26"]);
    driver.reset();
}

#[test]
fn kicks_that_were_not_asked_for_are_seen() {
    for (wanted, id) in [(PLAIN, "VQ-21"), (u64::MAX, "VQ-25")] {
        let disk = Disk::memory(1 << 16);
        let board = Board::emulated()
            .mmio(Version::Modern, Device::from(&disk).quiet())
            .build()
            .unwrap();
        let mut driver = Driver::new(&board, 0);
        driver.start(wanted, 1, 8);
        let (_buffer, descriptors) = driver.block_read(0);
        driver.send(0, &descriptors);
        driver.post(0, 0);
        driver.kick(0);
        driver.reset();
        assert!(driver.violations().contains(&id), "{id}");
    }
}

#[test]
fn a_kick_that_is_late_but_was_asked_for_is_left_in_peace() {
    let nic = Nic::new([2; 6]);
    let board = Board::emulated()
        .mmio(Version::Modern, &nic)
        .build()
        .unwrap();
    let mut driver = Driver::new(&board, 0);
    driver.start(u64::MAX, 2, 8);
    let buffer = board.memory().buffer(4096).unwrap();
    driver.descriptor(
        driver.queues[0].descriptors(),
        0,
        (buffer.address(), 2048, WRITE, 0),
    );
    driver.post(0, 0);
    // The other queue is rung in between, so the device looks at this one too.
    driver.put(buffer.address() + 2048, [0_u8; 12]);
    driver.send(1, &[(buffer.address() + 2048, 80, 0, 0)]);
    driver.kick(0);
    driver.reset();
    assert_eq!(driver.violations(), [""; 0]);
}

#[test]
fn a_kick_that_is_due_and_missing_can_be_asked_for() {
    let board = disk_board();
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN, 1, 8);
    let (_buffer, descriptors) = driver.block_read(0);
    driver.send(0, &descriptors);
    assert_eq!(board.device(0).unkicked(), [0]);
    driver.post(0, 0);
    assert_eq!(board.device(0).unkicked(), [1]);
    driver.kick(0);
    assert_eq!(board.device(0).unkicked(), [0]);
    assert_eq!(board.device(0).counters().kicks, [2]);
    driver.reset();
}

#[test]
fn block_requests_against_the_rules_are_seen() {
    let cases = [
        ((4_u32, 5_u64, 512_u32), "BLK-09"),
        ((4, 0, 512), "BLK-10"),
        ((0, 128, 512), "BLK-07"),
        ((0, u64::MAX, 512), "BLK-07"),
        ((0, 0, 100), "BLK-11"),
        ((8, 0, 512), "BLK-13"),
    ];
    for ((kind, sector, len), id) in cases {
        let seen = after_start(PLAIN, |driver| {
            let (buffer, mut descriptors) = driver.block_read(sector);
            driver.put(buffer.address(), kind);
            descriptors[1].1 = len;
            driver.send(0, &descriptors);
            driver.reset();
        });
        assert!(seen.contains(&id), "{seen:?} should contain {id}");
    }
}

#[test]
fn frames_against_the_rules_are_seen() {
    let nic = Nic::new([2; 6]);
    let board = Board::emulated()
        .mmio(Version::Modern, &nic)
        .build()
        .unwrap();
    let mut driver = Driver::new(&board, 0);
    driver.start(PLAIN & !net_features::MAC, 2, 8);
    assert_eq!(driver.violations(), ["NET-03"]);
    let buffer = board.memory().buffer(4096).unwrap();
    let at = buffer.address();
    for (offset, value, id) in [
        (0, 1_u8, "NET-12"),
        (0, 2, "NET-18"),
        (1, 1, "NET-14"),
        (10, 1, "NET-11"),
    ] {
        driver.put(at, [0_u8; 12]);
        driver.put(at + offset, value);
        driver.send(1, &[(at, 80, 0, 0)]);
        assert_eq!(driver.violations(), [id]);
    }
    nic.inject(&[0; 60]);
    driver.send(0, &[(at, 100, WRITE, 0)]);
    assert_eq!(driver.violations(), ["NET-19"]);
    assert_eq!(driver.used(0, 0), (0, 72));
    driver.reset();
}

#[test]
fn a_driver_that_writes_at_random_cannot_bring_the_board_down() {
    let mut state = 1_u64;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state >> 33
    };
    for round in 0..300 {
        let board = Board::emulated()
            .memory(1 << 20)
            .mmio(Version::Modern, Disk::memory(1 << 16))
            .mmio(Version::Modern, Nic::new([2; 6]))
            .mmio_legacy(Display::new(64, 64))
            .pci(Nic::new([2; 6]))
            .build()
            .unwrap();
        let bus = board.machine().bus();
        let slot = round % 3;
        let mut driver = Driver::new(&board, slot);
        if slot < 2 {
            driver.start(next() | features::VERSION_1, 1, 8);
            for offset in (0..0x3000).step_by(2) {
                let value = match next() % 4 {
                    0 => 0x4000,
                    1 => 0xffff,
                    _ => next() % 16,
                };
                let at = driver.queues[0].memory.address() + offset;
                driver.put(at, u16::try_from(value).unwrap());
            }
        }
        let regions = [
            0x0a00_0000_u64,
            0x0a00_0200,
            0x0a00_0400,
            0x3000_8000,
            0x1000_0000,
        ];
        bus.write(0x3000_8020, 4, 0x1000_0000);
        bus.write(0x3000_8004, 2, 6);
        for _ in 0..300 {
            let region = regions[usize::try_from(next() % 5).unwrap()];
            let width = [1, 2, 4, 4, 4, 8][usize::try_from(next() % 6).unwrap()];
            let offset = next() % 0x200 / u64::from(width) * u64::from(width);
            let value = match next() % 4 {
                0 => next() % 16,
                1 => u64::MAX,
                2 => 0x4000_0000 + next() % 0x10_0000,
                _ => next(),
            };
            if next() % 2 == 0 {
                bus.read(region + offset, width);
            } else {
                bus.write(region + offset, width, value);
            }
        }
        board.run();
    }
}
