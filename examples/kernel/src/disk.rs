//! What is done with a disk: its FAT file system is read and written.

use alloc::{format, string::String, vec, vec::Vec};
use core::cell::RefCell;

use axdriver_base::{DevError, DevResult};
use axdriver_block::BlockDriverOps;
use embedded_sdmmc::{
    Block, BlockCount, BlockDevice, BlockIdx, Mode, TimeSource, Timestamp, VolumeIdx, VolumeManager,
};

use crate::checksum::checksum;
use crate::error::{Error, Result};

/// The file that is on the disk, and the one that will be.
const THEIRS: &str = "HELLO.TXT";
const OURS: &str = "KERNEL.BIN";
/// The length of `OURS`, in bytes: many clusters, and not a whole number of blocks.
const LENGTH: usize = 100_001;
/// How many blocks are read at once, and one by one, for comparison.
const MANY: usize = 64;

/// Any disk, as the file system sees it.
struct Disk<'a>(RefCell<&'a mut dyn BlockDriverOps>);

impl BlockDevice for Disk<'_> {
    type Error = DevError;

    fn read(&self, blocks: &mut [Block], start: BlockIdx) -> DevResult {
        let mut disk = self.0.borrow_mut();
        for (block, index) in blocks.iter_mut().zip(u64::from(start.0)..) {
            disk.read_block(index, &mut block.contents)?;
        }
        Ok(())
    }

    fn write(&self, blocks: &[Block], start: BlockIdx) -> DevResult {
        let mut disk = self.0.borrow_mut();
        for (block, index) in blocks.iter().zip(u64::from(start.0)..) {
            disk.write_block(index, &block.contents)?;
        }
        Ok(())
    }

    fn num_blocks(&self) -> DevResult<BlockCount> {
        let count = self.0.borrow().num_blocks();
        u32::try_from(count)
            .map(BlockCount)
            .map_err(|_| DevError::Unsupported)
    }
}

/// A kernel without a calendar: it is always 1 January 2000.
struct NoCalendar;

impl TimeSource for NoCalendar {
    fn get_timestamp(&self) -> Timestamp {
        Timestamp {
            year_since_1970: 30,
            zero_indexed_month: 0,
            zero_indexed_day: 0,
            hours: 0,
            minutes: 0,
            seconds: 0,
        }
    }
}

/// Reads the file that is there, writes one, and reads that back. Says what came of it.
///
/// # Errors
///
/// * [`Error::Device`]: the disk failed.
/// * [`Error::Wrong`]: the file system is none, or what was read is not what was written.
pub(crate) fn work(disk: &mut dyn BlockDriverOps) -> Result<String> {
    compare_reads(disk)?;
    let theirs = read_file(disk, THEIRS)?;
    let content = content();
    write_file(disk, OURS, &content)?;
    disk.flush()
        .map_err(|error| Error::Device("the disk", error))?;
    check(disk)?;
    Ok(format!(
        "{THEIRS} {} bytes, sum {:08x}; {OURS} {LENGTH} bytes, sum {:08x}",
        theirs.len(),
        checksum(&theirs),
        checksum(&content),
    ))
}

/// Reads the file that [`work`] has written, with everything anew, so that nothing comes from memory.
///
/// # Errors
///
/// As [`work`].
pub(crate) fn check(disk: &mut dyn BlockDriverOps) -> Result {
    if read_file(disk, OURS)? != content() {
        return Err(Error::Wrong("the file is not as it was written"));
    }
    Ok(())
}

/// Returns what [`work`] writes.
fn content() -> Vec<u8> {
    (0..LENGTH)
        .map(|index| (index * index / 7).to_le_bytes()[0])
        .collect()
}

/// Reads the same blocks at once and one by one. The buffer's pages are scattered, so a device gets
/// the many only if the kernel sees to it.
fn compare_reads(disk: &mut dyn BlockDriverOps) -> Result {
    let size = disk.block_size();
    if size != Block::LEN {
        return Err(Error::Wrong("the disk's blocks are not of 512 bytes"));
    }
    let failed = |error| Error::Device("the disk", error);
    let mut many = vec![0; MANY * size];
    disk.read_block(0, &mut many).map_err(failed)?;
    let mut one = vec![0; size];
    for (block, index) in many.chunks_exact(size).zip(0..) {
        disk.read_block(index, &mut one).map_err(failed)?;
        if one != block {
            return Err(Error::Wrong("many blocks are not what each of them is"));
        }
    }
    Ok(())
}

fn read_file(disk: &mut dyn BlockDriverOps, name: &str) -> Result<Vec<u8>> {
    let manager = VolumeManager::new(Disk(RefCell::new(disk)), NoCalendar);
    let volume = manager
        .open_volume(VolumeIdx(0))
        .map_err(from_file_system)?;
    let root = volume.open_root_dir().map_err(from_file_system)?;
    let file = root
        .open_file_in_dir(name, Mode::ReadOnly)
        .map_err(from_file_system)?;
    let mut content = vec![0; file.length() as usize];
    let mut done = 0;
    while done < content.len() {
        match file.read(&mut content[done..]).map_err(from_file_system)? {
            0 => return Err(Error::Wrong("a file ends early")),
            count => done += count,
        }
    }
    Ok(content)
}

fn write_file(disk: &mut dyn BlockDriverOps, name: &str, content: &[u8]) -> Result {
    let manager = VolumeManager::new(Disk(RefCell::new(disk)), NoCalendar);
    let volume = manager
        .open_volume(VolumeIdx(0))
        .map_err(from_file_system)?;
    let root = volume.open_root_dir().map_err(from_file_system)?;
    let file = root
        .open_file_in_dir(name, Mode::ReadWriteCreateOrTruncate)
        .map_err(from_file_system)?;
    file.write(content).map_err(from_file_system)?;
    file.close().map_err(from_file_system)
}

fn from_file_system(error: embedded_sdmmc::Error<DevError>) -> Error {
    match error {
        embedded_sdmmc::Error::DeviceError(error) => Error::Device("the disk", error),
        embedded_sdmmc::Error::NotFound => Error::Wrong("the disk has no such file"),
        embedded_sdmmc::Error::FormatError(what) => Error::Wrong(what),
        _ => Error::Wrong("the file system"),
    }
}
