//! FAT file systems on a block device: a stream of bytes over whole blocks, for `fatfs`.

use std::{
    fmt,
    io::{self, Read, Seek, SeekFrom, Write},
};

use anyhow::{Context, bail, ensure};
use axdriver_block::{BlockDriverOps, DevError};
use fatfs::{Dir, FileSystem, FormatVolumeOptions, FsOptions, ReadWriteSeek};

/// How many lines the cache of a [`BlockStream`] holds.
const LINES: usize = 32;

/// The size of a line, in bytes, where a block is not larger.
const LINE_SIZE: usize = 4096;

/// Directories nested deeper than this are not listed: FAT paths have at most 260 characters.
const MAX_DEPTH: usize = 130;

/// The most entries that [`list`] gives: a damaged file system can hold directories that contain each other.
const MAX_ENTRIES: usize = 100_000;

/// A range of blocks of a device as a stream of bytes.
///
/// Bytes go through a small write-back cache, so a part of a block can be written. What was written reaches the
/// device's medium with [`flush`](Write::flush); without it, the latest writes are lost when the stream is dropped.
///
/// ```
/// use std::io::{Read, Seek, SeekFrom, Write};
///
/// use axdriver_block::ramdisk::RamDisk;
/// use examples::fat::BlockStream;
///
/// let mut disk = RamDisk::new(2048);
/// let mut stream = BlockStream::new(&mut disk)?;
/// stream.seek(SeekFrom::Start(510))?;
/// stream.write_all(b"across")?;
/// stream.flush()?;
/// assert_eq!(&disk[510..516], b"across");
///
/// let mut stream = BlockStream::new(&mut disk)?;
/// stream.seek(SeekFrom::End(-2))?;
/// assert!(stream.write_all(b"too long").is_err());
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct BlockStream<D> {
    device: D,
    /// The first block of the range on the device.
    first_block: u64,
    /// The size of the range, in bytes; a whole number of blocks.
    size: u64,
    /// In bytes from the start of the range; may be past its end.
    position: u64,
    /// A whole number of blocks, in bytes.
    line_size: usize,
    /// Something was written since the device was flushed.
    changed: bool,
    /// The line that was used last is at the end. No two have the same index.
    lines: Vec<Line>,
}

/// A cached part of the range.
struct Line {
    /// The line starts at `index * line_size`.
    index: u64,
    /// `line_size` bytes, or fewer at the end of the range.
    bytes: Vec<u8>,
    /// Whether `bytes` is newer than the device.
    dirty: bool,
}

/// A request that the device did not fulfil.
#[derive(Debug)]
struct Failure {
    operation: &'static str,
    first_block: u64,
    blocks: u64,
    error: DevError,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            first_block,
            blocks,
            ..
        } = self;
        write!(
            f,
            "the disk refused to {operation} {blocks} blocks from block {first_block} on"
        )
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<D: BlockDriverOps> BlockStream<D> {
    /// Makes a stream over the whole device.
    ///
    /// # Errors
    ///
    /// As [`BlockStream::range`].
    pub fn new(device: D) -> io::Result<Self> {
        let blocks = device.num_blocks();
        Self::range(device, 0, blocks)
    }

    /// Makes a stream over `blocks` blocks from `first_block` on.
    ///
    /// # Errors
    ///
    /// * [`io::ErrorKind::InvalidInput`]: the range is not within the device, or is of 2^64 bytes or more.
    pub fn range(device: D, first_block: u64, blocks: u64) -> io::Result<Self> {
        let block_size = device.block_size();
        let end = first_block.checked_add(blocks);
        let size = blocks.checked_mul(block_size as u64);
        match (end, size) {
            (Some(end), Some(size)) if end <= device.num_blocks() && block_size > 0 => Ok(Self {
                first_block,
                size,
                changed: false,
                position: 0,
                line_size: LINE_SIZE.next_multiple_of(block_size),
                lines: Vec::with_capacity(LINES),
                device,
            }),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{blocks} blocks of {block_size} bytes from block {first_block} on are not within the disk of {} blocks",
                    device.num_blocks()
                ),
            )),
        }
    }

    /// Returns the size of the range, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives the device back. What was not flushed is lost.
    pub fn into_device(self) -> D {
        self.device
    }

    fn blocks(&self, index: u64, bytes: usize) -> (u64, u64) {
        let block_size = self.device.block_size();
        let first = self.first_block + index * (self.line_size / block_size) as u64;
        (first, (bytes / block_size) as u64)
    }

    fn failure(
        &self,
        operation: &'static str,
        index: u64,
        bytes: usize,
        error: DevError,
    ) -> io::Error {
        let (first_block, blocks) = self.blocks(index, bytes);
        io::Error::other(Failure {
            operation,
            first_block,
            blocks,
            error,
        })
    }

    /// Brings the device up to date with `lines[place]`.
    fn write_back(&mut self, place: usize) -> io::Result<()> {
        let Line {
            index,
            ref bytes,
            dirty,
        } = self.lines[place];
        if dirty {
            let (first_block, _) = self.blocks(index, bytes.len());
            let length = bytes.len();
            if let Err(error) = self.device.write_block(first_block, bytes) {
                return Err(self.failure("write", index, length, error));
            }
            self.lines[place].dirty = false;
        }
        Ok(())
    }

    /// Makes the line at the current position the last one in `lines`, and returns the offset in it.
    ///
    /// `overwrite` says that the next so many bytes will be replaced, so that they need not be read.
    fn seek_line(&mut self, overwrite: usize) -> io::Result<usize> {
        let index = self.position / self.line_size as u64;
        let start = index * self.line_size as u64;
        let offset = usize::try_from(self.position - start).map_err(io::Error::other)?;
        if let Some(place) = self.lines.iter().position(|line| line.index == index) {
            let line = self.lines.remove(place);
            self.lines.push(line);
            return Ok(offset);
        }
        if self.lines.len() >= LINES {
            self.write_back(0)?;
            self.lines.remove(0);
        }
        let length = usize::try_from(self.size - start)
            .map_or(self.line_size, |left| left.min(self.line_size));
        let mut bytes = vec![0; length];
        if offset > 0 || overwrite < length {
            let (first_block, _) = self.blocks(index, length);
            self.device
                .read_block(first_block, &mut bytes)
                .map_err(|error| self.failure("read", index, length, error))?;
        }
        self.lines.push(Line {
            index,
            bytes,
            dirty: false,
        });
        Ok(offset)
    }
}

impl<D: BlockDriverOps> Read for BlockStream<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() || self.position >= self.size {
            return Ok(0);
        }
        let offset = self.seek_line(0)?;
        let Some(line) = self.lines.last() else {
            return Ok(0);
        };
        let count = buf.len().min(line.bytes.len() - offset);
        buf[..count].copy_from_slice(&line.bytes[offset..offset + count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl<D: BlockDriverOps> Write for BlockStream<D> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.device.capabilities().read_only {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the disk is read-only",
            ));
        }
        if self.position >= self.size {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the end of the disk is reached",
            ));
        }
        let offset = self.seek_line(buf.len())?;
        let Some(line) = self.lines.last_mut() else {
            return Ok(0);
        };
        let count = buf.len().min(line.bytes.len() - offset);
        line.bytes[offset..offset + count].copy_from_slice(&buf[..count]);
        line.dirty = true;
        self.changed = true;
        self.position += count as u64;
        Ok(count)
    }

    /// Writes what the cache holds to the device, in the order of the blocks, and flushes the device.
    ///
    /// Does nothing where nothing was written through this stream since the last time: `fatfs` flushes after reading too.
    fn flush(&mut self) -> io::Result<()> {
        if !self.changed {
            return Ok(());
        }
        let mut order: Vec<usize> = (0..self.lines.len()).collect();
        order.sort_by_key(|place| self.lines[*place].index);
        for place in order {
            self.write_back(place)?;
        }
        self.device
            .flush()
            .map_err(|error| self.failure("flush", 0, 0, error))?;
        self.changed = false;
        Ok(())
    }
}

impl<D: BlockDriverOps> Seek for BlockStream<D> {
    fn seek(&mut self, place: SeekFrom) -> io::Result<u64> {
        let position = match place {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(distance) => self.size.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = position.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a seek to before the start of the disk",
            )
        })?;
        Ok(self.position)
    }
}

/// Something in a directory.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Entry {
    /// From the root, without a `/` in front; directories have none behind either.
    pub path: String,
    /// In bytes; `None` for a directory.
    pub size: Option<u64>,
}

/// Makes an empty FAT file system on the whole of `stream`, and flushes it.
///
/// # Errors
///
/// The device is too small for a file system, is read-only, or fails.
pub fn format<D: BlockDriverOps>(stream: &mut BlockStream<D>, label: &str) -> anyhow::Result<()> {
    let block_size = stream.device.block_size();
    let sector_size = u16::try_from(block_size.max(512))
        .ok()
        .filter(|size| (512..=4096).contains(size) && size.is_power_of_two())
        .with_context(|| format!("FAT has no sectors of {block_size} bytes"))?;
    let mut volume_label = [b' '; 11];
    for (place, letter) in volume_label.iter_mut().zip(label.bytes()) {
        *place = letter.to_ascii_uppercase();
    }
    let options = FormatVolumeOptions::new()
        .bytes_per_sector(sector_size)
        .volume_label(volume_label);
    stream.rewind()?;
    fatfs::format_volume(&mut *stream, options).context("cannot make a FAT file system")?;
    stream.flush().context("cannot flush the new file system")
}

/// Opens the FAT file system on `stream` for `work`, and closes it: what `work` wrote is flushed to the device.
///
/// Where nothing is written by `work`, nothing is written at all.
///
/// # Errors
///
/// * There is no FAT file system, or it is damaged.
/// * `work` fails. What it wrote before is flushed, if that can be done.
/// * The device fails.
pub fn mounted<D: BlockDriverOps, R>(
    stream: &mut BlockStream<D>,
    work: impl FnOnce(&FileSystem<&mut BlockStream<D>>) -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    ensure!(
        stream.size >= 512,
        "a FAT file system has at least 512 bytes, this is {}",
        stream.size
    );
    stream.rewind()?;
    let fs =
        FileSystem::new(&mut *stream, FsOptions::new()).context("cannot find a FAT file system")?;
    let result = work(&fs);
    let unmounted = fs.unmount().context("cannot close the file system");
    // Unmounting clears a mark on the disk that says that the file system is in use, and does not flush that.
    let flushed = stream.flush().context("cannot flush the file system");
    let result = result?;
    unmounted.and(flushed).map(|()| result)
}

/// Lists all files and directories, each directory before what it holds.
///
/// # Errors
///
/// A directory is damaged, or the device fails.
pub fn list<T: ReadWriteSeek>(fs: &FileSystem<T>) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    list_into(&fs.root_dir(), "", 0, &mut entries)?;
    Ok(entries)
}

fn list_into<T: ReadWriteSeek>(
    dir: &Dir<'_, T>,
    prefix: &str,
    depth: usize,
    entries: &mut Vec<Entry>,
) -> anyhow::Result<()> {
    ensure!(
        depth <= MAX_DEPTH,
        "directories are nested more than {MAX_DEPTH} deep: {prefix}"
    );
    for entry in dir.iter() {
        let entry = entry.with_context(|| format!("cannot read the directory /{prefix}"))?;
        let name = entry.file_name();
        if name == "." || name == ".." {
            continue;
        }
        ensure!(
            entries.len() < MAX_ENTRIES,
            "there are more than {MAX_ENTRIES} files and directories"
        );
        let path = format!("{prefix}{name}");
        if entry.is_dir() {
            entries.push(Entry {
                path: path.clone(),
                size: None,
            });
            list_into(&entry.to_dir(), &format!("{path}/"), depth + 1, entries)?;
        } else {
            entries.push(Entry {
                path,
                size: Some(entry.len()),
            });
        }
    }
    Ok(())
}

/// Writes a file, in place of one that has the same path.
///
/// `progress` is called with the number of bytes after each part.
///
/// # Errors
///
/// * `path` names a directory, or a file in a directory that does not exist.
/// * `source` cannot be read.
/// * The file system is full, or the device fails.
pub fn write_file<T: ReadWriteSeek>(
    fs: &FileSystem<T>,
    path: &str,
    source: &mut dyn Read,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<u64> {
    let path = path.trim_matches('/');
    ensure!(!path.is_empty(), "a file on the disk needs a name");
    let mut file = fs
        .root_dir()
        .create_file(path)
        .with_context(|| format!("cannot create {path} on the disk"))?;
    file.truncate()
        .with_context(|| format!("cannot empty {path}"))?;
    let written =
        copy(source, &mut file, progress).with_context(|| format!("cannot write {path}"))?;
    file.flush()
        .with_context(|| format!("cannot flush {path}"))?;
    Ok(written)
}

/// Reads a file into `target`, and returns its size, in bytes.
///
/// # Errors
///
/// There is no such file, `target` cannot be written, or the device fails.
pub fn read_file<T: ReadWriteSeek>(
    fs: &FileSystem<T>,
    path: &str,
    target: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<u64> {
    let path = path.trim_matches('/');
    let mut file = fs
        .root_dir()
        .open_file(path)
        .with_context(|| format!("cannot open {path} on the disk"))?;
    copy(&mut file, target, progress).with_context(|| format!("cannot read {path}"))
}

fn copy(
    source: &mut dyn Read,
    target: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<u64> {
    let mut part = vec![0; 64 * 1024];
    let mut copied = 0;
    loop {
        let count = match source.read(&mut part) {
            Ok(0) => return Ok(copied),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => bail!(error),
        };
        target.write_all(&part[..count])?;
        copied += count as u64;
        progress(copied);
    }
}

#[cfg(test)]
mod tests {
    use axdriver_block::{
        BaseDriverOps, BlockCapabilities, DevResult, DeviceType, ramdisk::RamDisk,
    };

    use super::*;

    /// A disk that counts, and fails on request.
    #[derive(Default)]
    struct Observed {
        disk: RamDisk,
        read_only: bool,
        broken: bool,
        written: Vec<u64>,
        flushes: u32,
    }

    impl BaseDriverOps for Observed {
        fn device_name(&self) -> &str {
            "observed"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Block
        }
    }

    impl BlockDriverOps for Observed {
        fn num_blocks(&self) -> u64 {
            self.disk.num_blocks()
        }

        fn block_size(&self) -> usize {
            self.disk.block_size()
        }

        fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
            if self.broken {
                Err(DevError::Io)
            } else {
                self.disk.read_block(block_id, buf)
            }
        }

        fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
            if self.broken {
                return Err(DevError::Io);
            }
            self.written.push(block_id);
            self.disk.write_block(block_id, buf)
        }

        fn flush(&mut self) -> DevResult {
            self.flushes += 1;
            self.disk.flush()
        }

        fn capabilities(&self) -> BlockCapabilities {
            BlockCapabilities::new().with_read_only(self.read_only)
        }
    }

    fn observed(size: usize) -> Observed {
        Observed {
            disk: RamDisk::new(size),
            ..Observed::default()
        }
    }

    #[test]
    fn written_bytes_reach_the_device_in_order_at_a_flush() {
        let mut device = observed(64 * 1024);
        let mut stream = BlockStream::new(&mut device).unwrap();
        for place in [40_000, 100, 9_000] {
            stream.seek(SeekFrom::Start(place)).unwrap();
            stream.write_all(b"bytes").unwrap();
        }
        assert!(stream.device.written.is_empty());
        stream.flush().unwrap();
        assert_eq!(device.written, [0, 16, 72]);
        assert_eq!(device.flushes, 1);
        assert_eq!(&device.disk[40_000..40_005], b"bytes");
    }

    #[test]
    fn a_write_that_begins_and_ends_within_blocks_keeps_what_is_around_it() {
        let mut device = observed(20 * 1024);
        device.disk.fill(7);
        let mut stream = BlockStream::new(&mut device).unwrap();
        stream.seek(SeekFrom::Start(4000)).unwrap();
        stream.write_all(&[9; 9000]).unwrap();
        stream.flush().unwrap();
        assert!(device.disk[..4000].iter().all(|byte| *byte == 7));
        assert!(device.disk[4000..13_000].iter().all(|byte| *byte == 9));
        assert!(device.disk[13_000..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_stream_gives_the_bytes_that_were_written_whatever_the_order() {
        let mut device = observed(1 << 20);
        let mut model = vec![0_u8; 1 << 20];
        let mut stream = BlockStream::new(&mut device).unwrap();
        let mut seed = 12345_u64;
        let mut random = |limit: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(seed >> 33).unwrap() % limit
        };
        for turn in 0..2000 {
            let start = random(model.len());
            let length = random(20_000).min(model.len() - start);
            stream.seek(SeekFrom::Start(start as u64)).unwrap();
            if turn % 2 == 0 {
                let byte = u8::try_from(turn % 256).unwrap();
                model[start..start + length].fill(byte);
                stream.write_all(&vec![byte; length]).unwrap();
            } else {
                let mut bytes = vec![0; length];
                stream.read_exact(&mut bytes).unwrap();
                assert!(bytes == model[start..start + length]);
            }
        }
        stream.flush().unwrap();
        assert!(device.disk[..] == model[..]);
    }

    #[test]
    fn nothing_is_read_or_written_outside_of_the_range() {
        let mut device = observed(64 * 512);
        let mut stream = BlockStream::range(&mut device, 3, 11).unwrap();
        assert_eq!(stream.seek(SeekFrom::End(0)).unwrap(), 11 * 512);
        let error = stream.write(&[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
        assert!(stream.seek(SeekFrom::Current(-5633)).is_err());
        stream.rewind().unwrap();
        stream.write_all(&[1; 11 * 512]).unwrap();
        stream.flush().unwrap();
        let ones = device.disk.iter().filter(|byte| **byte == 1).count();
        assert_eq!(
            (ones, device.disk[3 * 512], device.disk[14 * 512]),
            (11 * 512, 1, 0)
        );
    }

    #[test]
    fn ranges_that_leave_the_device_are_refused() {
        for (first, blocks) in [
            (0, 9),
            (8, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
            (0, u64::MAX / 512 + 2),
        ] {
            assert!(
                BlockStream::range(RamDisk::new(8 * 512), first, blocks).is_err(),
                "{first} {blocks}"
            );
        }
    }

    #[test]
    fn a_failed_write_back_loses_nothing() {
        let mut device = observed(64 * 1024);
        let mut stream = BlockStream::new(&mut device).unwrap();
        stream.write_all(b"kept").unwrap();
        stream.device.broken = true;
        let error = anyhow::Error::from(stream.flush().unwrap_err());
        assert!(
            format!("{error:#}").contains("write 8 blocks from block 0"),
            "{error:#}"
        );
        stream.device.broken = false;
        stream.flush().unwrap();
        assert_eq!(&device.disk[..4], b"kept");
    }

    #[test]
    fn a_full_cache_with_a_broken_device_keeps_its_lines() {
        let mut device = observed(1 << 20);
        let mut stream = BlockStream::new(&mut device).unwrap();
        stream.write_all(&[5; LINES * LINE_SIZE]).unwrap();
        stream.device.broken = true;
        assert!(stream.write_all(&[6; LINE_SIZE]).is_err());
        stream.device.broken = false;
        stream.flush().unwrap();
        assert!(
            device.disk[..LINES * LINE_SIZE]
                .iter()
                .all(|byte| *byte == 5)
        );
        assert_eq!(device.disk[LINES * LINE_SIZE], 0);
    }

    /// Makes a file system on a disk, with a file in a directory.
    fn with_files(size: usize) -> Observed {
        let mut device = observed(size);
        let mut stream = BlockStream::new(&mut device).unwrap();
        format(&mut stream, "label").unwrap();
        mounted(&mut stream, |fs| {
            fs.root_dir().create_dir("a")?.create_dir("b")?;
            write_file(fs, "a/b/c.txt", &mut &b"text"[..], &mut |_| {})
        })
        .unwrap();
        device
    }

    #[test]
    fn a_closed_file_system_is_flushed_and_marked_as_such() {
        let device = with_files(1 << 20);
        let mut copy = RamDisk::copy_from_slice(&device.disk);
        let mut stream = BlockStream::new(&mut copy).unwrap();
        mounted(&mut stream, |fs| {
            assert!(!fs.read_status_flags()?.dirty());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_read_only_disk_is_listed_and_never_written() {
        let mut device = with_files(1 << 20);
        device.read_only = true;
        device.written.clear();
        device.flushes = 0;
        let mut stream = BlockStream::new(&mut device).unwrap();
        mounted(&mut stream, |fs| {
            let paths: Vec<_> = list(fs)?
                .into_iter()
                .map(|entry| (entry.path, entry.size))
                .collect();
            let expected = [("a", None), ("a/b", None), ("a/b/c.txt", Some(4))];
            assert_eq!(paths, expected.map(|(path, size)| (path.to_owned(), size)));
            let mut text = Vec::new();
            assert_eq!(read_file(fs, "/a/b/c.txt", &mut text, &mut |_| {})?, 4);
            assert_eq!(text, b"text");
            Ok(())
        })
        .unwrap();
        let error = mounted(&mut stream, |fs| {
            write_file(fs, "new", &mut &b"text"[..], &mut |_| {})
        })
        .unwrap_err();
        assert!(format!("{error:#}").contains("read-only"), "{error:#}");
        assert!(device.written.is_empty());
        assert_eq!(device.flushes, 0);
    }

    #[test]
    fn files_go_into_directories_that_exist() {
        let mut device = with_files(1 << 20);
        let mut stream = BlockStream::new(&mut device).unwrap();
        mounted(&mut stream, |fs| {
            write_file(fs, "/a/new", &mut &b"text"[..], &mut |_| {})?;
            assert!(write_file(fs, "none/new", &mut &b"text"[..], &mut |_| {}).is_err());
            assert!(write_file(fs, "a", &mut &b"text"[..], &mut |_| {}).is_err());
            assert!(write_file(fs, "/", &mut &b"text"[..], &mut |_| {}).is_err());
            assert!(read_file(fs, "a", &mut Vec::new(), &mut |_| {}).is_err());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn what_is_no_file_system_and_too_small_a_disk_are_refused() {
        assert!(
            mounted(
                &mut BlockStream::new(RamDisk::new(1 << 20)).unwrap(),
                |_| Ok(())
            )
            .is_err()
        );
        assert!(
            mounted(&mut BlockStream::new(RamDisk::default()).unwrap(), |_| Ok(
                ()
            ))
            .is_err()
        );
        assert!(format(&mut BlockStream::new(RamDisk::default()).unwrap(), "").is_err());
        assert!(format(&mut BlockStream::new(RamDisk::new(512)).unwrap(), "").is_err());
    }

    #[test]
    fn a_full_file_system_says_so_and_keeps_its_other_files() {
        let mut device = observed(256 * 1024);
        let mut stream = BlockStream::new(&mut device).unwrap();
        format(&mut stream, "small").unwrap();
        mounted(&mut stream, |fs| {
            write_file(fs, "first", &mut &[1; 1000][..], &mut |_| {})?;
            assert!(
                write_file(fs, "second", &mut io::repeat(2).take(1 << 20), &mut |_| {}).is_err()
            );
            let mut bytes = Vec::new();
            read_file(fs, "first", &mut bytes, &mut |_| {})?;
            assert_eq!(bytes, [1; 1000]);
            Ok(())
        })
        .unwrap();
    }
}
