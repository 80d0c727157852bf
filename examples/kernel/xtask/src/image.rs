//! The disk: a partition with a FAT file system, and on it a file for the kernel to read.

use std::io::{Cursor, Read, Write};
use std::path::Path;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};

use crate::Result;

const BLOCK: usize = 512;
/// The size of the disk, in blocks: 16 MiB.
const BLOCKS: u32 = 32 * 1024;
/// The size of the disk, in bytes.
pub(crate) const SIZE: u64 = BLOCK as u64 * BLOCKS as u64;
/// Where the partition begins, in blocks.
const FIRST: u32 = 2048;

/// The file for the kernel.
pub(crate) const THEIRS: (&str, &[u8]) = (
    "HELLO.TXT",
    b"This was on the disk before the kernel came.\n",
);

/// The file that the kernel writes, and what it writes; the kernel's `disk.rs` has the same.
pub(crate) const OURS: &str = "KERNEL.BIN";

/// Returns what the kernel writes.
pub(crate) fn expected() -> Vec<u8> {
    (0..100_001_usize)
        .map(|index| (index * index / 7).to_le_bytes()[0])
        .collect()
}

/// Makes the disk's image at `path`.
///
/// # Errors
///
/// It cannot be written.
pub(crate) fn create(path: &Path) -> Result {
    let mut disk = vec![0; BLOCK * BLOCKS as usize];
    // A partition table with one row (type 0x0e: FAT16, by block numbers), and its signature.
    let row = &mut disk[446..462];
    row[4] = 0x0e;
    row[8..12].copy_from_slice(&FIRST.to_le_bytes());
    row[12..16].copy_from_slice(&(BLOCKS - FIRST).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);

    let mut partition = Cursor::new(&mut disk[BLOCK * FIRST as usize..]);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .bytes_per_cluster(2048);
    fatfs::format_volume(&mut partition, options)?;
    let files = FileSystem::new(partition, FsOptions::new())?;
    files
        .root_dir()
        .create_file(THEIRS.0)?
        .write_all(THEIRS.1)?;
    files.unmount()?;
    Ok(std::fs::write(path, disk)?)
}

/// Checks what the kernel has left on the disk.
///
/// # Errors
///
/// The file system is damaged, or a file is not as it should be.
pub(crate) fn check(path: &Path) -> Result {
    let mut disk = std::fs::read(path)?;
    let partition = Cursor::new(&mut disk[BLOCK * FIRST as usize..BLOCK * BLOCKS as usize]);
    let files = FileSystem::new(partition, FsOptions::new())?;
    for (name, content) in [(THEIRS.0, THEIRS.1.to_vec()), (OURS, expected())] {
        let mut found = Vec::new();
        files.root_dir().open_file(name)?.read_to_end(&mut found)?;
        if found != content {
            return Err(format!("the disk's {name} is not as it should be").into());
        }
    }
    Ok(())
}
