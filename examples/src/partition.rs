//! Which parts a disk has: the tables of MBR and of GPT (UEFI 2.10, chapter 5).

use std::{collections::HashSet, fmt};

use anyhow::{Context, bail, ensure};
use axdriver_block::BlockDriverOps;

/// The most partitions of either kind that are looked at.
const MAX_PARTITIONS: usize = 1024;

/// The type of the one partition of a protective MBR.
const PROTECTIVE: u8 = 0xee;

/// How a disk is divided.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub enum Scheme {
    /// No table was found: the disk may hold one file system as a whole.
    Whole,
    /// A table in the first block.
    Mbr,
    /// A table in the blocks from the second on.
    Gpt,
    /// The table at the end of the disk, because the one at its start is damaged.
    BackupGpt,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole => "no partition table",
            Self::Mbr => "MBR",
            Self::Gpt => "GPT",
            Self::BackupGpt => "GPT (the first copy is damaged, this is the backup)",
        })
    }
}

/// A part of a disk. Its blocks are all on the disk.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Partition {
    /// As Linux counts: from 1 on; logical partitions of an MBR from 5 on.
    pub number: usize,
    /// The first block.
    pub first_block: u64,
    /// The number of blocks, at least 1.
    pub blocks: u64,
    /// What it is for, as the table says.
    pub kind: String,
    /// Its name; only GPT has names.
    pub name: String,
}

/// Reads how a disk is divided. Nothing is written.
///
/// # Errors
///
/// * The device cannot be read.
/// * There is a table, but a partition of it leaves the disk, or the chain of logical partitions is damaged.
pub fn read_table(device: &mut dyn BlockDriverOps) -> anyhow::Result<(Scheme, Vec<Partition>)> {
    let mut reader = Reader::new(device)?;
    if reader.count == 0 {
        return Ok((Scheme::Whole, Vec::new()));
    }
    let block = reader.block(0)?;
    let Some(entries) = mbr_entries(&block) else {
        return Ok((Scheme::Whole, Vec::new()));
    };
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        let last = reader.count - 1;
        return match read_gpt(&mut reader, 1) {
            Ok(partitions) => Ok((Scheme::Gpt, partitions)),
            Err(first) => match read_gpt(&mut reader, last) {
                Ok(partitions) => Ok((Scheme::BackupGpt, partitions)),
                Err(_) => Err(first.context("both copies of the GPT are damaged")),
            },
        };
    }
    // A boot sector of FAT ends like an MBR, with text or code where the table would be.
    if entries
        .iter()
        .any(|entry| !matches!(entry.status, 0 | 0x80))
        || entries.iter().all(|entry| entry.blocks == 0)
    {
        return Ok((Scheme::Whole, Vec::new()));
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(&entries) {
        if entry.blocks > 0 && entry.kind != 0 {
            partitions.push(reader.partition(number, u64::from(entry.first), entry)?);
            if entry.is_extended() {
                read_logical(&mut reader, u64::from(entry.first), &mut partitions)?;
            }
        }
    }
    partitions.sort_by_key(|partition| partition.number);
    Ok((Scheme::Mbr, partitions))
}

/// A device, and a check of each block before it is read.
struct Reader<'a> {
    device: &'a mut dyn BlockDriverOps,
    /// The number of blocks.
    count: u64,
    /// At least 512.
    block_size: usize,
}

impl<'a> Reader<'a> {
    fn new(device: &'a mut dyn BlockDriverOps) -> anyhow::Result<Self> {
        let (count, block_size) = (device.num_blocks(), device.block_size());
        ensure!(
            block_size >= 512,
            "blocks of {block_size} bytes are too small for a partition table"
        );
        Ok(Self {
            device,
            count,
            block_size,
        })
    }

    fn block(&mut self, block: u64) -> anyhow::Result<Vec<u8>> {
        ensure!(
            block < self.count,
            "block {block} is past the end of the disk"
        );
        let mut bytes = vec![0; self.block_size];
        self.device
            .read_block(block, &mut bytes)
            .with_context(|| format!("cannot read block {block}"))?;
        Ok(bytes)
    }

    fn check(&self, number: usize, first: u64, blocks: u64) -> anyhow::Result<()> {
        let inside = first
            .checked_add(blocks)
            .is_some_and(|end| end <= self.count);
        ensure!(
            inside,
            "partition {number} ({blocks} blocks from block {first} on) leaves the disk of {} blocks",
            self.count
        );
        Ok(())
    }

    fn partition(&self, number: usize, first: u64, entry: &MbrEntry) -> anyhow::Result<Partition> {
        let blocks = u64::from(entry.blocks);
        self.check(number, first, blocks)?;
        Ok(Partition {
            number,
            first_block: first,
            blocks,
            kind: mbr_kind(entry.kind),
            name: String::new(),
        })
    }
}

/// One of the four entries of an MBR.
struct MbrEntry {
    /// 0x80: to be booted; 0: not; anything else is no entry.
    status: u8,
    kind: u8,
    first: u32,
    blocks: u32,
}

impl MbrEntry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// Returns the entries of a block that is signed as an MBR.
fn mbr_entries(block: &[u8]) -> Option<[MbrEntry; 4]> {
    if block.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let entry = |index: usize| {
        let bytes = &block[446 + 16 * index..462 + 16 * index];
        MbrEntry {
            status: bytes[0],
            kind: bytes[4],
            first: le32(bytes, 8),
            blocks: le32(bytes, 12),
        }
    };
    Some([entry(0), entry(1), entry(2), entry(3)])
}

/// Follows the chain of tables in an extended partition, each of which has one partition and the place of the next.
fn read_logical(
    reader: &mut Reader<'_>,
    start: u64,
    partitions: &mut Vec<Partition>,
) -> anyhow::Result<()> {
    let mut table = start;
    let mut seen = HashSet::new();
    let mut number = partitions
        .iter()
        .map(|partition| partition.number + 1)
        .max()
        .unwrap_or(5)
        .max(5);
    while seen.insert(table) {
        ensure!(
            seen.len() <= MAX_PARTITIONS,
            "there are more than {MAX_PARTITIONS} logical partitions"
        );
        let block = reader
            .block(table)
            .context("cannot follow the chain of logical partitions")?;
        let entries = mbr_entries(&block)
            .with_context(|| format!("block {table} is no table of logical partitions"))?;
        let [entry, next, ..] = &entries;
        if entry.blocks > 0 && entry.kind != 0 {
            partitions.push(reader.partition(number, table + u64::from(entry.first), entry)?);
            number += 1;
        }
        if next.blocks == 0 || !next.is_extended() {
            return Ok(());
        }
        table = start + u64::from(next.first);
    }
    bail!("the chain of logical partitions runs in a circle at block {table}")
}

/// Reads the GPT whose header is in `block`.
fn read_gpt(reader: &mut Reader<'_>, block: u64) -> anyhow::Result<Vec<Partition>> {
    let header = reader.block(block)?;
    ensure!(
        header.starts_with(b"EFI PART"),
        "block {block} is no header of a GPT"
    );
    let header_size = le32(&header, 12) as usize;
    ensure!(
        (92..=header.len()).contains(&header_size),
        "the header of the GPT says that it has {header_size} bytes"
    );
    let mut checked = header[..header_size].to_vec();
    checked[16..20].fill(0);
    ensure!(
        crc32fast::hash(&checked) == le32(&header, 16),
        "the checksum of the GPT's header is wrong"
    );
    let (table, count, entry_size) = (
        le64(&header, 72),
        le32(&header, 80) as usize,
        le32(&header, 84) as usize,
    );
    ensure!(
        count <= MAX_PARTITIONS,
        "the GPT has room for {count} partitions, more than {MAX_PARTITIONS}"
    );
    ensure!(
        (128..=4096).contains(&entry_size),
        "an entry of the GPT has {entry_size} bytes"
    );

    let mut bytes = Vec::with_capacity(count * entry_size);
    let blocks = (count * entry_size).div_ceil(reader.block_size) as u64;
    for index in 0..blocks {
        bytes.extend(reader.block(table.saturating_add(index))?);
    }
    bytes.truncate(count * entry_size);
    ensure!(
        crc32fast::hash(&bytes) == le32(&header, 88),
        "the checksum of the GPT's entries is wrong"
    );

    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(bytes.chunks_exact(entry_size)) {
        if entry[..16] == [0; 16] {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let blocks = last
            .checked_sub(first)
            .and_then(|length| length.checked_add(1));
        let blocks = blocks.with_context(|| format!("partition {number} ends before it starts"))?;
        reader.check(number, first, blocks)?;
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
            .take_while(|unit| *unit != 0)
            .collect();
        partitions.push(Partition {
            number,
            first_block: first,
            blocks,
            kind: gpt_kind(entry),
            name: String::from_utf16_lossy(&name),
        });
    }
    Ok(partitions)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

fn mbr_kind(kind: u8) -> String {
    let name = match kind {
        0x01 => "FAT12",
        0x04 | 0x06 | 0x0e => "FAT16",
        0x05 | 0x0f | 0x85 => "extended",
        0x07 => "NTFS or exFAT",
        0x0b | 0x0c => "FAT32",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xa5 => "FreeBSD",
        0xef => "EFI system",
        _ => return format!("type {kind:#04x}"),
    };
    name.to_owned()
}

fn gpt_kind(entry: &[u8]) -> String {
    // The first three fields of a GUID are little-endian.
    let guid = format!(
        "{:08X}-{:04X}-{:04X}-{:02X}{:02X}-{}",
        le32(entry, 0),
        u16::from_le_bytes([entry[4], entry[5]]),
        u16::from_le_bytes([entry[6], entry[7]]),
        entry[8],
        entry[9],
        entry[10..16]
            .iter()
            .map(|byte| format!("{byte:02X}"))
            .collect::<String>()
    );
    let name = match guid.as_str() {
        "C12A7328-F81F-11D2-BA4B-00A0C93EC93B" => "EFI system",
        "21686148-6449-6E6F-744E-656564454649" => "BIOS boot",
        "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7" => "basic data",
        "E3C9E316-0B5C-4DB8-817D-F92DF00215AE" => "Microsoft reserved",
        "0FC63DAF-8483-4772-8E79-3D69D8477DE4" => "Linux",
        "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F" => "Linux swap",
        "E6D6D379-F507-44C2-A23C-238F2A3DF928" => "Linux LVM",
        _ => return guid,
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use axdriver_block::ramdisk::RamDisk;

    use super::*;

    fn set_mbr_entry(
        disk: &mut [u8],
        block: usize,
        index: usize,
        kind: u8,
        first: u32,
        blocks: u32,
    ) {
        let at = block * 512 + 446 + 16 * index;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&blocks.to_le_bytes());
        disk[block * 512 + 510..block * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    fn set_gpt(disk: &mut [u8], header: usize, table: usize) {
        let mut entries = vec![0; 128 * 128];
        entries[..16].copy_from_slice(&[
            0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e,
            0xc9, 0x3b,
        ]);
        entries[32..40].copy_from_slice(&40_u64.to_le_bytes());
        entries[40..48].copy_from_slice(&59_u64.to_le_bytes());
        for (place, unit) in entries[56..].chunks_exact_mut(2).zip("böot".encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
        disk[table * 512..table * 512 + entries.len()].copy_from_slice(&entries);
        let bytes = &mut disk[header * 512..header * 512 + 92];
        bytes.fill(0);
        bytes[..8].copy_from_slice(b"EFI PART");
        bytes[12..16].copy_from_slice(&92_u32.to_le_bytes());
        bytes[72..80].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[80..84].copy_from_slice(&128_u32.to_le_bytes());
        bytes[84..88].copy_from_slice(&128_u32.to_le_bytes());
        bytes[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let checksum = crc32fast::hash(bytes);
        bytes[16..20].copy_from_slice(&checksum.to_le_bytes());
    }

    fn gpt_disk() -> RamDisk {
        let mut disk = RamDisk::new(200 * 512);
        set_mbr_entry(&mut disk, 0, 0, PROTECTIVE, 1, 199);
        set_gpt(&mut disk, 1, 2);
        set_gpt(&mut disk, 199, 167);
        disk
    }

    #[test]
    fn an_empty_disk_has_no_table() {
        assert_eq!(
            read_table(&mut RamDisk::new(4096)).unwrap(),
            (Scheme::Whole, Vec::new())
        );
        assert_eq!(
            read_table(&mut RamDisk::default()).unwrap(),
            (Scheme::Whole, Vec::new())
        );
    }

    #[test]
    fn primary_and_logical_partitions_of_an_mbr_are_found() {
        let mut disk = RamDisk::new(100 * 512);
        set_mbr_entry(&mut disk, 0, 0, 0x0c, 1, 9);
        set_mbr_entry(&mut disk, 0, 1, 0x05, 10, 50);
        set_mbr_entry(&mut disk, 0, 3, 0x83, 60, 40);
        set_mbr_entry(&mut disk, 10, 0, 0x06, 1, 9);
        set_mbr_entry(&mut disk, 10, 1, 0x05, 20, 10);
        set_mbr_entry(&mut disk, 30, 0, 0x82, 2, 8);
        let (scheme, partitions) = read_table(&mut disk).unwrap();
        assert_eq!(scheme, Scheme::Mbr);
        let found: Vec<_> = partitions
            .iter()
            .map(|partition| {
                (
                    partition.number,
                    partition.first_block,
                    partition.blocks,
                    partition.kind.as_str(),
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                (1, 1, 9, "FAT32"),
                (2, 10, 50, "extended"),
                (4, 60, 40, "Linux"),
                (5, 11, 9, "FAT16"),
                (6, 32, 8, "Linux swap")
            ]
        );
    }

    #[test]
    fn a_chain_of_logical_partitions_that_runs_in_a_circle_is_refused() {
        let mut disk = RamDisk::new(100 * 512);
        set_mbr_entry(&mut disk, 0, 0, 0x05, 10, 50);
        set_mbr_entry(&mut disk, 10, 1, 0x05, 20, 10);
        set_mbr_entry(&mut disk, 30, 1, 0x05, 0, 10);
        let error = read_table(&mut disk).unwrap_err();
        assert!(error.to_string().contains("circle"), "{error}");
    }

    #[test]
    fn a_partition_that_leaves_the_disk_is_refused() {
        let mut disk = RamDisk::new(100 * 512);
        set_mbr_entry(&mut disk, 0, 0, 0x83, 99, 2);
        assert!(read_table(&mut disk).is_err());
        set_mbr_entry(&mut disk, 0, 0, 0x83, u32::MAX, u32::MAX);
        assert!(read_table(&mut disk).is_err());
    }

    #[test]
    fn a_gpt_is_read_with_names_and_types() {
        let (scheme, partitions) = read_table(&mut gpt_disk()).unwrap();
        assert_eq!(scheme, Scheme::Gpt);
        let name = "böot".to_owned();
        let expected = Partition {
            number: 1,
            first_block: 40,
            blocks: 20,
            kind: "EFI system".to_owned(),
            name,
        };
        assert_eq!(partitions, [expected]);
    }

    #[test]
    fn a_damaged_gpt_is_read_from_its_backup_or_refused() {
        let mut disk = gpt_disk();
        // A letter of a name: nothing but the checksum tells.
        disk[2 * 512 + 56] ^= 1;
        assert_eq!(read_table(&mut disk).unwrap().0, Scheme::BackupGpt);
        disk[199 * 512 + 9] ^= 1;
        assert!(read_table(&mut disk).is_err());
    }

    #[test]
    fn no_single_wrong_byte_of_a_table_does_harm() {
        for at in (440..512).chain(512..512 + 92).chain(1024..1024 + 128) {
            for value in [0, 0x05, 0x7f, 0xff] {
                let mut disk = gpt_disk();
                disk[at] = value;
                let _ = read_table(&mut disk);
            }
        }
    }
}
