//! VirtIO 1.3, 5.2: block devices. Each test is a row of `CONFORMANCE.md`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{BaseDriverOps, DevError, InterruptCause};
use axdriver_block::{BlockDriverOps, conformance};
use common::{Chain, DISK_SIZE, Over, numbered_disk};
use machine::emulated::block_features;
use machine::{Device, Disk, Event};

/// The kinds of requests (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

/// Kind, reserved word and sector of a request.
fn header(chain: &Chain) -> (u32, u32, u64) {
    let bytes = chain.readable();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let sector = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (word(0), word(4), sector)
}

/// The requests of some work.
fn requests(disk: &Disk, work: impl FnOnce(&mut common::Disk)) -> Vec<Chain> {
    let bench = Over::Modern.plug(disk);
    let rings = bench.watch_rings();
    let mut driver = bench.disk();
    work(&mut driver);
    bench.assert_rules_kept();
    rings.take()
}

#[test]
fn blk_01_flush_is_accepted_and_sent() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        let accepted = bench.device().accepted_features();
        assert_ne!(accepted & block_features::FLUSH, 0);
        driver.write_block(1, &[0xaa; 512]).unwrap();
        assert_eq!(disk.unflushed_sectors(), 1);
        driver.flush().unwrap();
        assert_eq!((disk.counters().flushes, disk.unflushed_sectors()), (1, 0));
        bench.assert_rules_kept();
    }
}

#[test]
fn blk_02_a_disk_with_flush_is_taken_to_have_a_write_back_cache() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        assert!(driver.capabilities().volatile_write_cache);
        // What was flushed outlives a loss of power; the rest need not.
        let survives = conformance::flushed_writes_survive(&mut driver, |driver| {
            disk.power_cut();
            driver.reset()
        });
        assert_eq!(survives, Ok(()));
        driver.write_block(2, &[0xbb; 512]).unwrap();
        disk.power_cut();
        let mut block = [0; 512];
        driver.read_block(2, &mut block).unwrap();
        assert_eq!(block, [2; 512]);
    }
}

#[test]
fn blk_03_a_disk_without_flush_writes_through() {
    for over in Over::ALL {
        let disk = numbered_disk().without_flush();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        assert!(!driver.capabilities().volatile_write_cache);
        driver.write_block(2, &[0xbb; 512]).unwrap();
        driver.flush().unwrap();
        assert_eq!(
            disk.counters().flushes,
            0,
            "no request that it does not know"
        );
        disk.power_cut();
        assert_eq!(disk.stable().unwrap()[2 * 512..3 * 512], [0xbb; 512]);
        bench.assert_rules_kept();
    }
}

#[test]
fn blk_04_the_cache_mode_is_neither_negotiated_nor_read() {
    for over in Over::ALL {
        let disk = numbered_disk().with_cache_control();
        let bench = over.plug(&disk);
        let _driver = bench.disk();
        let accepted = bench.device().accepted_features();
        assert_eq!(accepted & block_features::CONFIG_WCE, 0);
        let writeback = |event: &Event| match event {
            Event::ConfigRead { offset, .. } | Event::ConfigWrite { offset, .. } => *offset == 32,
            _ => false,
        };
        assert!(!bench.events().iter().any(writeback));
    }
}

#[test]
fn blk_05_zones_are_not_negotiated() {
    const ZONED: u64 = 1 << 21;
    for over in Over::ALL {
        let bench = over.plug(Device::from(&numbered_disk()).offer(ZONED));
        let _driver = bench.disk();
        assert_eq!(bench.device().accepted_features() & ZONED, 0);
    }
}

#[test]
fn blk_06_the_capacity_is_read_again_when_the_configuration_changes() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        disk.resize(2 * DISK_SIZE);
        assert_eq!(
            driver.acknowledge_interrupt(),
            Ok(InterruptCause::CONFIGURATION)
        );
        assert_eq!(driver.num_blocks(), 128);
        driver.write_block(127, &[1; 512]).unwrap();
        // Where the interrupt was acknowledged elsewhere, the OS says so.
        disk.resize(DISK_SIZE / 2);
        driver.configuration_changed().unwrap();
        assert_eq!(driver.num_blocks(), 32);
        let refused = driver.read_block(32, &mut [0; 512]);
        assert_eq!(refused, Err(DevError::InvalidParam));
        bench.assert_rules_kept();
    }
}

#[test]
fn blk_07_nothing_beyond_the_capacity_is_asked_for() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        for block in [
            64,
            65,
            1 << 31,
            1 << 32,
            (1 << 55) - 1,
            1 << 55,
            1 << 63,
            u64::MAX,
        ] {
            let read = driver.read_block(block, &mut [0; 512]);
            assert_eq!(read, Err(DevError::InvalidParam), "{block}");
            let written = driver.write_block(block, &[0; 512]);
            assert_eq!(written, Err(DevError::InvalidParam), "{block}");
        }
        let refused = driver.read_block(63, &mut [0; 1024]);
        assert_eq!(refused, Err(DevError::InvalidParam));
        driver.read_block(63, &mut [0; 512]).unwrap();
        assert_eq!((disk.counters().reads, disk.counters().writes), (1, 0));
        bench.assert_rules_kept();
    }
}

#[test]
fn blk_08_a_read_only_disk_is_accepted_and_not_written_to() {
    for over in Over::ALL {
        let disk = numbered_disk().read_only();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        let accepted = bench.device().accepted_features();
        assert_ne!(accepted & block_features::RO, 0);
        assert!(driver.capabilities().read_only);
        let refused = driver.write_block(0, &[0; 512]);
        assert_eq!(refused, Err(DevError::Unsupported));
        assert_eq!(disk.counters().writes, 0);
        bench.assert_rules_kept();
    }
}

#[test]
fn blk_09_the_sector_of_a_flush_is_0() {
    let disk = numbered_disk();
    let chains = requests(&disk, |driver| {
        driver.write_block(17, &[1; 512]).unwrap();
        driver.flush().unwrap();
    });
    assert_eq!(header(&chains[0]), (OUT, 0, 17));
    assert_eq!(header(&chains[1]), (FLUSH, 0, 0));
}

#[test]
fn blk_10_a_flush_has_no_data() {
    let chains = requests(&numbered_disk(), |driver| driver.flush().unwrap());
    let [flush] = &chains[..] else {
        panic!("one request");
    };
    assert_eq!((flush.readable_len(), flush.writable_len()), (16, 1));
}

#[test]
fn blk_11_transfers_are_of_whole_sectors() {
    let disk = Disk::memory(1 << 20).block_size(4096);
    let chains = requests(&disk, |driver| {
        assert_eq!(driver.block_size(), 4096);
        driver.read_block(3, &mut [0; 8192]).unwrap();
        driver.write_block(5, &[0; 4096]).unwrap();
        for len in [0, 1, 511, 512, 4095, 4097] {
            let refused = driver.read_block(0, &mut vec![0; len]);
            assert_eq!(refused, Err(DevError::InvalidParam), "{len}");
        }
    });
    assert_eq!(chains.len(), 2);
    // 5.2.6: sectors of 512 bytes, whatever the block size.
    assert_eq!(header(&chains[0]), (IN, 0, 24));
    assert_eq!(chains[0].writable_len(), 8192 + 1);
    assert_eq!(header(&chains[1]), (OUT, 0, 40));
    assert_eq!(chains[1].readable_len(), 4096 + 16);
}

#[test]
fn blk_21_a_segment_is_no_longer_than_the_limit_and_there_is_only_one() {
    for limit in [512, 1024, 1536, 5000] {
        let disk = numbered_disk().size_max(limit).seg_max(1);
        let chains = requests(&disk, |driver| {
            let mut all = vec![0; DISK_SIZE];
            driver.read_block(0, &mut all).unwrap();
            assert_eq!(all[63 * 512..], [63; 512]);
            driver.write_block(0, &all).unwrap();
        });
        for chain in &chains {
            assert_eq!(chain.parts.len(), 3);
            assert!(chain.parts.iter().all(|part| part.len <= limit));
        }
    }
    // A limit below a block cannot be kept.
    let bench = Over::Modern.plug(numbered_disk().size_max(511));
    let started = common::Disk::try_new(bench.transport());
    assert_eq!(started.err(), Some(DevError::Unsupported));
    bench.assert_clean();
}
