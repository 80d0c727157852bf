//! The contract of [`BlockDriverOps`] as code: every rule is a function, and [`check`] checks them all.
//!
//! Rules that write keep the old contents of the blocks that they use and put them back, also when the rule is broken.
//! A driver that breaks one, or a loss of power meanwhile, can still damage what is on the disk. Rules about writing
//! are met by every read-only device, and rules about contents by every device without blocks.
//!
//! ```
//! use axdriver_block::{conformance, ramdisk::RamDisk};
//!
//! let mut disk = RamDisk::copy_from_slice(&[7; 64 * 512]);
//! conformance::check(&mut disk)?;
//! assert!(disk.iter().all(|byte| *byte == 7));
//! # Ok::<(), conformance::Violation>(())
//! ```

use alloc::vec::Vec;

pub use axdriver_base::conformance::{Verdict, Violation};
use axdriver_base::{
    DevError, DeviceType,
    conformance::{self as base, ensure, ensure_ok, ensure_refused},
};

use crate::BlockDriverOps;

/// The length of the longest request that the rules make, in bytes, if the device is as large.
const LARGE: usize = 128 * 1024;

/// What is in a buffer that no read may touch.
const UNTOUCHED: u8 = 0xa5;

/// Checks all rules but [`flushed_writes_survive`], which needs help from outside.
///
/// It uses the first and the last blocks of the device, up to 128 KiB from its middle on, and as much memory three times.
///
/// # Errors
///
/// * [`Violation`]: the first rule that the driver breaks.
pub fn check<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    base::check(dev, DeviceType::Block)?;
    geometry_makes_sense(dev)?;
    empty_and_ragged_buffers_are_refused(dev)?;
    ranges_past_the_end_are_refused(dev)?;
    read_only_devices_refuse_writes(dev)?;
    what_was_written_is_read(dev)?;
    writes_touch_no_other_block(dev)?;
    many_blocks_are_as_many_single_ones(dev)?;
    flushing_succeeds_and_changes_nothing(dev)
}

/// A block has at least one byte, and the size of the device in bytes fits into 64 bits.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn geometry_makes_sense<D: BlockDriverOps + ?Sized>(dev: &D) -> Verdict {
    let block_size = dev.block_size();
    ensure(block_size > 0, "a block has at least one byte")?;
    ensure(
        dev.num_blocks().checked_mul(block_size as u64).is_some(),
        "the size of the device in bytes fits into 64 bits",
    )
}

/// An empty or ragged buffer is an invalid parameter, and nothing is read or written.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn empty_and_ragged_buffers_are_refused<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let block_size = dev.block_size();
    is_refused(dev, 0, 0)?;
    // With blocks of one byte, no buffer is ragged.
    if block_size > 1 {
        for len in [1, block_size - 1, block_size.saturating_add(1)] {
            is_refused(dev, 0, len)?;
        }
    }
    Ok(())
}

/// A range that leaves the device is an invalid parameter, and nothing is read or written.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn ranges_past_the_end_are_refused<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let (num_blocks, block_size) = (dev.num_blocks(), dev.block_size());
    let double = block_size.saturating_mul(2);
    // The product of this number and the block size wraps around 64 bits to 0, or nearly so.
    let wraps = (u64::MAX / (block_size.max(1) as u64)).saturating_add(1);
    let numbers = [num_blocks, wraps, 1 << 32, (1 << 32) + 1, 1 << 63, u64::MAX];
    for block_id in numbers {
        if block_id >= num_blocks {
            is_refused(dev, block_id, block_size)?;
            is_refused(dev, block_id, double)?;
        }
    }
    match num_blocks.checked_sub(1) {
        Some(last) => is_refused(dev, last, double),
        None => Ok(()),
    }
}

/// A read-only device refuses right writes as unsupported and wrong ones as invalid, and its contents do not change.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn read_only_devices_refuse_writes<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const RULE: &str = "a read-only device refuses writes as unsupported";
    let Some(last) = last_block(dev) else {
        return Ok(());
    };
    if !dev.capabilities().read_only {
        return Ok(());
    }
    for block_id in [0, last] {
        let before = read(dev, block_id, 1)?;
        let inverted = before.iter().map(|byte| !byte);
        let mut other = buffer(dev, 1)?;
        other
            .iter_mut()
            .zip(inverted)
            .for_each(|(to, from)| *to = from);
        ensure_refused(
            dev.write_block(block_id, &other),
            DevError::Unsupported,
            RULE,
        )?;
        let after = read(dev, block_id, 1)?;
        ensure(before == after, "a read-only device does not change")?;
    }
    Ok(())
}

/// What was written is read, until it is written again: in the first, the middle and the last block.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn what_was_written_is_read<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let Some(last) = writable(dev) else {
        return Ok(());
    };
    for block_id in [0, last / 2, last] {
        preserving(dev, block_id, 1, |dev| {
            for salt in [1, 2] {
                let written = pattern(dev, block_id, 1, salt)?;
                write(dev, block_id, &written)?;
                let found = read(dev, block_id, 1)?;
                ensure(found == written, "what was written is read")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A request for many blocks does what as many requests for single blocks do.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn many_blocks_are_as_many_single_ones<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const READ: &str = "reading many blocks at once is as reading them one by one";
    const WRITTEN: &str = "writing many blocks at once is as writing them one by one";
    let Some(last) = last_block(dev) else {
        return Ok(());
    };
    let block_size = dev.block_size();
    let first = last / 2;
    let most = (LARGE / block_size).max(1) as u64;
    let large = most.min(last - first + 1);
    for count in [1, 2, 3, large] {
        let count = count.min(large);
        let together = read(dev, first, count)?;
        for (block_id, block) in (first..).zip(together.chunks(block_size)) {
            ensure(read(dev, block_id, 1)? == block, READ)?;
        }
        if writable(dev).is_none() {
            continue;
        }
        preserving(dev, first, count, |dev| {
            let written = pattern(dev, first, count, 3)?;
            write(dev, first, &written)?;
            for (block_id, block) in (first..).zip(written.chunks(block_size)) {
                ensure(read(dev, block_id, 1)? == block, WRITTEN)?;
            }
            let written = pattern(dev, first, count, 4)?;
            for (block_id, block) in (first..).zip(written.chunks(block_size)) {
                write(dev, block_id, block)?;
            }
            ensure(read(dev, first, count)? == written, READ)
        })?;
    }
    Ok(())
}

/// A write touches no block but its own: not those beside it, and not those whose numbers share its low 32 bits.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn writes_touch_no_other_block<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let Some(last) = writable(dev) else {
        return Ok(());
    };
    for block_id in [0, last / 2, last] {
        let others = [
            block_id.checked_sub(1),
            block_id.checked_add(1),
            Some(block_id & 0xffff_ffff),
            block_id.checked_add(1 << 32),
        ]
        .map(|other| other.filter(|other| *other != block_id && *other <= last));
        for other in others.into_iter().flatten() {
            preserving(dev, other, 1, |dev| {
                let kept = pattern(dev, other, 1, 5)?;
                write(dev, other, &kept)?;
                preserving(dev, block_id, 1, |dev| {
                    let written = pattern(dev, block_id, 1, 6)?;
                    write(dev, block_id, &written)
                })?;
                ensure(
                    read(dev, other, 1)? == kept,
                    "a write touches no other block",
                )
            })?;
        }
    }
    Ok(())
}

/// A flush succeeds and changes no contents. Only a device with a volatile cache may have no flush.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn flushing_succeeds_and_changes_nothing<D: BlockDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const RULE: &str = "a flush succeeds, unless there is none for a volatile cache";
    let flush = |dev: &mut D| match dev.flush() {
        Err(DevError::Unsupported) if dev.capabilities().volatile_write_cache => Ok(()),
        result => ensure_ok(result, RULE),
    };
    flush(dev)?;
    let Some(last) = writable(dev) else {
        return Ok(());
    };
    preserving(dev, last, 1, |dev| {
        let written = pattern(dev, last, 1, 7)?;
        write(dev, last, &written)?;
        flush(dev)?;
        let found = read(dev, last, 1)?;
        ensure(found == written, "a flush changes no contents")
    })?;
    // What has been put back is to last as well.
    flush(dev)
}

/// What was written before a successful flush outlives a loss of power.
///
/// `restart` cuts the power of the device and starts its driver again. Without it, nothing can be said about flushes.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken, or `restart` failed.
pub fn flushed_writes_survive<D: BlockDriverOps + ?Sized>(
    dev: &mut D,
    restart: impl FnOnce(&mut D) -> axdriver_base::DevResult,
) -> Verdict {
    const RULE: &str = "what was written before a successful flush outlives a loss of power";
    let Some(last) = writable(dev) else {
        return Ok(());
    };
    preserving(dev, last, 1, |dev| {
        let written = pattern(dev, last, 1, 8)?;
        write(dev, last, &written)?;
        ensure_ok(dev.flush(), "a flush succeeds")?;
        ensure_ok(restart(dev), "the device comes back after a restart")?;
        ensure(read(dev, last, 1)? == written, RULE)
    })?;
    ensure_ok(dev.flush(), "a flush succeeds")
}

/// Returns the number of the last block, or `None` when there is none.
fn last_block<D: BlockDriverOps + ?Sized>(dev: &D) -> Option<u64> {
    dev.num_blocks().checked_sub(1)
}

/// Returns the number of the last block, or `None` when none can be written.
fn writable<D: BlockDriverOps + ?Sized>(dev: &D) -> Option<u64> {
    last_block(dev).filter(|_| !dev.capabilities().read_only)
}

/// Returns a buffer of `len` bytes, none of which is meant to be touched.
fn bytes(len: usize) -> Verdict<Vec<u8>> {
    const RULE: &str = "there is memory for the checks themselves";
    let mut bytes = Vec::new();
    ensure_ok(
        bytes.try_reserve_exact(len).map_err(|_| DevError::NoMemory),
        RULE,
    )?;
    bytes.resize(len, UNTOUCHED);
    Ok(bytes)
}

/// Returns a buffer for `count` blocks.
fn buffer<D: BlockDriverOps + ?Sized>(dev: &D, count: u64) -> Verdict<Vec<u8>> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    bytes(dev.block_size().saturating_mul(count))
}

/// Returns what to write into `count` blocks: other bytes for each block and each salt.
fn pattern<D: BlockDriverOps + ?Sized>(
    dev: &D,
    block_id: u64,
    count: u64,
    salt: u64,
) -> Verdict<Vec<u8>> {
    let mut bytes = buffer(dev, count)?;
    for (block_id, block) in (block_id..).zip(bytes.chunks_mut(dev.block_size().max(1))) {
        // A step of Marsaglia's xorshift for each byte; an odd seed is never its fixed point 0.
        let mut state = (block_id.rotate_left(17) ^ salt.rotate_left(40)) | 1;
        for byte in block {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            [*byte, ..] = state.to_be_bytes();
        }
    }
    Ok(bytes)
}

/// Reads blocks that can be read.
fn read<D: BlockDriverOps + ?Sized>(dev: &mut D, block_id: u64, count: u64) -> Verdict<Vec<u8>> {
    let mut bytes = buffer(dev, count)?;
    ensure_ok(
        dev.read_block(block_id, &mut bytes),
        "blocks inside the device can be read",
    )?;
    Ok(bytes)
}

/// Writes blocks that can be written.
fn write<D: BlockDriverOps + ?Sized>(dev: &mut D, block_id: u64, buf: &[u8]) -> Verdict {
    ensure_ok(
        dev.write_block(block_id, buf),
        "blocks inside the device can be written",
    )
}

/// Does something to blocks and then puts their contents back.
fn preserving<D: BlockDriverOps + ?Sized>(
    dev: &mut D,
    block_id: u64,
    count: u64,
    change: impl FnOnce(&mut D) -> Verdict,
) -> Verdict {
    let before = read(dev, block_id, count)?;
    let verdict = change(dev);
    let restored = write(dev, block_id, &before);
    verdict.and(restored)
}

/// Makes a read and a write that are both to be refused, and looks whether they did something all the same.
fn is_refused<D: BlockDriverOps + ?Sized>(dev: &mut D, block_id: u64, len: usize) -> Verdict {
    const READ: &str = "a read with a buffer or a range that is not right is an invalid parameter";
    const WRITE: &str =
        "a write with a buffer or a range that is not right is an invalid parameter";
    let last = last_block(dev);
    // Where numbers that wrap or are cut off would end up.
    let victims = [Some(0), Some(block_id & 0xffff_ffff), last]
        .map(|victim| victim.filter(|victim| last.is_some_and(|last| *victim <= last)));
    let contents = |dev: &mut D| -> Verdict<[Option<Vec<u8>>; 3]> {
        let [first, cut_off, last] =
            victims.map(|victim| victim.map(|victim| read(dev, victim, 1)));
        Ok([first.transpose()?, cut_off.transpose()?, last.transpose()?])
    };
    let before = contents(dev)?;
    let mut buf = bytes(len)?;
    ensure_refused(
        dev.read_block(block_id, &mut buf),
        DevError::InvalidParam,
        READ,
    )?;
    ensure(
        buf.iter().all(|byte| *byte == UNTOUCHED),
        "a refused read leaves the buffer untouched",
    )?;
    let refused = ensure_refused(
        dev.write_block(block_id, &buf),
        DevError::InvalidParam,
        WRITE,
    );
    let after = contents(dev)?;
    if after != before && writable(dev).is_some() {
        for (victim, contents) in victims.into_iter().zip(&before) {
            if let (Some(victim), Some(contents)) = (victim, contents) {
                write(dev, victim, contents)?;
            }
        }
    }
    refused?;
    ensure(after == before, "a refused write writes nothing")
}

#[cfg(all(test, feature = "ramdisk"))]
mod tests {
    use std::string::ToString;

    use axdriver_base::{BaseDriverOps, DevResult};

    use super::*;
    use crate::{BlockCapabilities, check_request, check_write, ramdisk::RamDisk};

    /// A way to break the contract.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        SaysOkToEmptyBuffers,
        RoundsRaggedBuffersDown,
        TouchesTheBufferOfARefusedRead,
        CutsNumbersTo32Bits,
        RefusesTheEndWithIo,
        AcceptsWritesThoughReadOnly,
        SaysInvalidToReadOnlyWrites,
        LosesWrites,
        WritesOnlyTheFirstBlock,
        ReadsOnlyTheFirstBlock,
        WritesTheNextBlockToo,
        FailsToFlush,
        FlushesByForgetting,
        HasNoFlushForNoCache,
        HasNoBlockSize,
        IsLargerThanItCanBe,
        WritesWhatItRefuses,
    }

    /// A disk in memory with a fault.
    struct Faulty {
        disk: RamDisk,
        fault: Fault,
    }

    impl Faulty {
        fn new(fault: Fault) -> Self {
            let disk = RamDisk::copy_from_slice(&[7; 600 * 512]);
            let read_only = matches!(
                fault,
                Fault::AcceptsWritesThoughReadOnly | Fault::SaysInvalidToReadOnlyWrites
            );
            Self {
                disk: if read_only {
                    disk.into_read_only()
                } else {
                    disk
                },
                fault,
            }
        }

        fn check(&self, block_id: u64, len: usize) -> DevResult<u64> {
            check_request(self.disk.num_blocks(), 512, block_id, len)
        }
    }

    impl BaseDriverOps for Faulty {
        fn device_name(&self) -> &str {
            "faulty"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Block
        }
    }

    impl BlockDriverOps for Faulty {
        fn num_blocks(&self) -> u64 {
            match self.fault {
                Fault::IsLargerThanItCanBe => u64::MAX,
                _ => self.disk.num_blocks(),
            }
        }

        fn block_size(&self) -> usize {
            match self.fault {
                Fault::HasNoBlockSize => 0,
                _ => 512,
            }
        }

        fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
            let checked = self.check(block_id, buf.len());
            match self.fault {
                Fault::SaysOkToEmptyBuffers if buf.is_empty() => Ok(()),
                Fault::RoundsRaggedBuffersDown if buf.len() > 512 => {
                    let len = buf.len() / 512 * 512;
                    self.disk.read_block(block_id, &mut buf[..len])
                }
                Fault::TouchesTheBufferOfARefusedRead if checked.is_err() => {
                    buf.fill(0);
                    checked.map(drop)
                }
                Fault::CutsNumbersTo32Bits => self.disk.read_block(block_id & 0xffff_ffff, buf),
                Fault::RefusesTheEndWithIo if checked.is_err() && buf.len().is_multiple_of(512) => {
                    Err(DevError::Io)
                }
                Fault::ReadsOnlyTheFirstBlock if checked.is_ok() => {
                    self.disk.read_block(block_id, &mut buf[..512])
                }
                _ => self.disk.read_block(block_id, buf),
            }
        }

        fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
            let checked = check_write(
                self.disk.num_blocks(),
                512,
                block_id,
                buf.len(),
                self.disk.capabilities().read_only,
            );
            match self.fault {
                Fault::AcceptsWritesThoughReadOnly if checked == Err(DevError::Unsupported) => {
                    Ok(())
                }
                Fault::SaysInvalidToReadOnlyWrites => {
                    checked.map(drop).map_err(|_| DevError::InvalidParam)
                }
                Fault::LosesWrites => checked.map(drop),
                Fault::WritesOnlyTheFirstBlock if checked.is_ok() => {
                    self.disk.write_block(block_id, &buf[..512])
                }
                Fault::WritesTheNextBlockToo if checked.is_ok() => {
                    self.disk.write_block(block_id, buf)?;
                    let _ = self.disk.write_block(block_id + 1, &buf[..512]);
                    Ok(())
                }
                Fault::WritesWhatItRefuses if checked.is_err() => {
                    self.disk[0] = self.disk[0].wrapping_add(1);
                    checked.map(drop)
                }
                _ => self.disk.write_block(block_id, buf),
            }
        }

        fn flush(&mut self) -> DevResult {
            match self.fault {
                Fault::FailsToFlush => Err(DevError::Io),
                Fault::HasNoFlushForNoCache => Err(DevError::Unsupported),
                Fault::FlushesByForgetting => {
                    self.disk.fill(0);
                    Ok(())
                }
                _ => Ok(()),
            }
        }

        fn capabilities(&self) -> BlockCapabilities {
            self.disk.capabilities()
        }
    }

    fn rule_broken_by(fault: Fault) -> Option<std::string::String> {
        let verdict = check(&mut Faulty::new(fault));
        verdict.err().map(|violation| violation.to_string())
    }

    #[test]
    fn a_ram_disk_conforms_whatever_its_size_and_keeps_its_contents() {
        for blocks in [0, 1, 2, 3, 4, 7, 600] {
            let mut disk = RamDisk::copy_from_slice(&std::vec![7; blocks * 512]);
            assert_eq!(check(&mut disk), Ok(()), "{blocks} blocks");
            assert!(disk.iter().all(|byte| *byte == 7), "{blocks} blocks");
            assert_eq!(check(&mut disk.into_read_only()), Ok(()), "{blocks} blocks");
        }
        assert_eq!(rule_broken_by(Fault::None), None);
    }

    #[test]
    fn a_driver_behind_a_pointer_conforms() {
        let mut disk = RamDisk::new(4096);
        assert_eq!(check::<dyn BlockDriverOps>(&mut disk), Ok(()));
        assert_eq!(check(&mut std::boxed::Box::new(disk)), Ok(()));
    }

    #[test]
    fn every_fault_is_found_and_named() {
        let faults = [
            (
                Fault::SaysOkToEmptyBuffers,
                "a read with a buffer or a range that is not right",
            ),
            (
                Fault::RoundsRaggedBuffersDown,
                "a read with a buffer or a range that is not right",
            ),
            (
                Fault::TouchesTheBufferOfARefusedRead,
                "a refused read leaves the buffer untouched",
            ),
            (
                Fault::CutsNumbersTo32Bits,
                "a read with a buffer or a range that is not right",
            ),
            (
                Fault::RefusesTheEndWithIo,
                "a read with a buffer or a range that is not right",
            ),
            (
                Fault::AcceptsWritesThoughReadOnly,
                "a read-only device refuses writes",
            ),
            (
                Fault::SaysInvalidToReadOnlyWrites,
                "a read-only device refuses writes",
            ),
            (Fault::LosesWrites, "what was written is read"),
            (
                Fault::WritesOnlyTheFirstBlock,
                "writing many blocks at once is as",
            ),
            (
                Fault::ReadsOnlyTheFirstBlock,
                "reading many blocks at once is as",
            ),
            (
                Fault::WritesTheNextBlockToo,
                "a write touches no other block",
            ),
            (Fault::FailsToFlush, "a flush succeeds"),
            (Fault::FlushesByForgetting, "a flush changes no contents"),
            (Fault::HasNoFlushForNoCache, "a flush succeeds"),
            (Fault::HasNoBlockSize, "a block has at least one byte"),
            (
                Fault::IsLargerThanItCanBe,
                "the size of the device in bytes fits into 64 bits",
            ),
            (Fault::WritesWhatItRefuses, "a refused write writes nothing"),
        ];
        for (fault, rule) in faults {
            let found = rule_broken_by(fault).unwrap_or_default();
            assert!(found.starts_with(rule), "{fault:?} broke: {found}");
        }
    }

    #[test]
    fn a_flush_that_is_none_is_found_by_a_restart() {
        let mut disk = Faulty::new(Fault::None);
        assert_eq!(flushed_writes_survive(&mut disk, |_| Ok(())), Ok(()));
        let forget = |disk: &mut Faulty| {
            disk.disk.fill(7);
            Ok(())
        };
        assert!(flushed_writes_survive(&mut disk, forget).is_err());
        assert!(disk.disk.iter().all(|byte| *byte == 7));
    }
}
