//! Real work for a disk, a NIC and a display of any kind: what the traits are for, in three functions.

use std::io::Read;

use anyhow::{Context, bail, ensure};
use axdriver_block::BlockDriverOps;
use axdriver_display::{Canvas, DisplayDriverOps};
use axdriver_net::{NetDriverOps, smoltcp::SmoltcpDevice};
use embedded_graphics::{Drawable, pixelcolor::Rgb888};
use smoltcp::wire::Ipv4Address;

use crate::{
    fat::{self, BlockStream},
    http, report,
    stack::Stack,
    time::Time,
};

/// The files that [`keep_files`] writes: path and size, in bytes.
const FILES: [(&str, u64); 5] = [
    ("empty", 0),
    ("hello.txt", 17),
    ("one block", 512),
    ("a directory/with a long name/inside.bin", 70_001),
    ("a directory/large.bin", 1_000_000),
];

/// Makes a file system, writes files, starts the driver afresh, and compares. Returns what was done, in words.
///
/// What the disk held is lost.
///
/// # Errors
///
/// * `start`, which gives the driver of the disk, fails.
/// * The disk is too small, is read-only, or fails.
/// * A file is not what was written.
pub fn keep_files<D: BlockDriverOps>(
    start: &mut dyn FnMut() -> anyhow::Result<D>,
) -> anyhow::Result<String> {
    {
        let mut stream = BlockStream::new(start()?)?;
        fat::format(&mut stream, "axdriver")?;
        fat::mounted(&mut stream, |fs| {
            fs.root_dir()
                .create_dir("a directory")?
                .create_dir("with a long name")?;
            for (path, size) in FILES {
                let written =
                    fat::write_file(fs, path, &mut contents(path).take(size), &mut |_| {})?;
                ensure!(
                    written == size,
                    "{written} of {size} bytes of {path} were written"
                );
            }
            Ok(())
        })?;
        // The driver ends here, and its device is reset.
    }
    let mut stream = BlockStream::new(start().context("cannot start the driver afresh")?)?;
    fat::mounted(&mut stream, |fs| {
        let entries = fat::list(fs)?;
        let mut total = 0;
        for (path, size) in FILES {
            let listed = entries.iter().find(|entry| entry.path == path);
            ensure!(
                listed.is_some_and(|entry| entry.size == Some(size)),
                "{path} is not listed with {size} bytes"
            );
            let (mut read, mut expected) = (Vec::new(), Vec::new());
            fat::read_file(fs, path, &mut read, &mut |_| {})?;
            contents(path).take(size).read_to_end(&mut expected)?;
            ensure!(read == expected, "{path} is not what was written");
            total += size;
        }
        let files = FILES.len();
        Ok(format!(
            "{:?}, {files} files, {} written, read back and compared",
            fs.fat_type(),
            report::size(total)
        ))
    })
}

/// Returns an endless text that differs from file to file.
fn contents(path: &str) -> impl Read {
    struct Contents(u64);

    impl Read for Contents {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            for byte in &mut *buf {
                *byte = http::pattern(self.0);
                self.0 += 1;
            }
            Ok(buf.len())
        }
    }

    Contents(path.bytes().map(u64::from).sum())
}

/// A half of the check of a whole disk.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub enum Step {
    /// Writes each block, and flushes.
    Fill,
    /// Reads each block, and compares.
    Check,
}

impl Step {
    /// Returns what is done.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fill => "filling",
            Self::Check => "checking",
        }
    }
}

/// Does one half of the check of a whole disk: each block has its own contents, so a block in the wrong place is found.
///
/// `progress` is called with the number of bytes after each part.
///
/// # Errors
///
/// The disk fails, or a block does not hold what was written.
pub fn verify<D: BlockDriverOps>(
    disk: &mut D,
    step: Step,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    /// In bytes; a request to the device.
    const PART: usize = 128 << 10;
    /// Parts between two flushes, so that no cache has to hold the whole disk.
    const FLUSH_AFTER: u64 = 256;

    let (blocks, block_size) = (disk.num_blocks(), disk.block_size());
    let part_blocks = (PART / block_size).max(1) as u64;
    let mut expected = Vec::new();
    let mut read = Vec::new();
    let mut first = 0;
    for part in 1.. {
        let count = part_blocks.min(blocks - first);
        if count == 0 {
            break;
        }
        expected.clear();
        for block in first..first + count {
            block_contents(block, block_size, &mut expected);
        }
        let range = || format!("{count} blocks from block {first} on");
        match step {
            Step::Fill => {
                disk.write_block(first, &expected)
                    .with_context(|| format!("cannot write {}", range()))?;
                if part % FLUSH_AFTER == 0 {
                    disk.flush().context("cannot flush")?;
                }
            }
            Step::Check => {
                read.clear();
                read.resize(expected.len(), 0);
                disk.read_block(first, &mut read)
                    .with_context(|| format!("cannot read {}", range()))?;
                let wrong = read
                    .chunks(block_size)
                    .zip(expected.chunks(block_size))
                    .position(|(is, was)| is != was);
                if let Some(wrong) = wrong {
                    bail!(
                        "block {} does not hold what was written",
                        first + wrong as u64
                    );
                }
            }
        }
        first += count;
        progress(first * block_size as u64);
    }
    if step == Step::Fill {
        disk.flush().context("cannot flush")?;
    }
    Ok(())
}

/// Adds the contents of a block: numbers that follow from its own, as SplitMix64 makes them.
fn block_contents(block: u64, block_size: usize, contents: &mut Vec<u8>) {
    let end = contents.len() + block_size;
    let mut state = block.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while contents.len() < end {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        contents.extend_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    contents.truncate(end);
}

/// Gets an address by DHCP and fetches a page from `port` of the way out. Returns what was done, in words.
///
/// # Errors
///
/// * Nobody gives an address, or a way out with it.
/// * The page cannot be fetched, or is not `expected`.
pub fn fetch_page<D: NetDriverOps, T: Time>(
    nic: D,
    time: T,
    port: u16,
    path: &str,
    expected: &[u8],
) -> anyhow::Result<String> {
    let mac = nic.mac_address();
    let mut stack = Stack::new(SmoltcpDevice::new(nic), mac.0, time);
    let lease = stack.dhcp()?;
    let router: Ipv4Address = lease
        .router
        .context("DHCP gave no way out of the network")?;
    let page = stack.get(router, port, path)?;
    ensure!(
        page.status == 200,
        "http://{router}:{port}{path} is answered with status {}",
        page.status
    );
    ensure!(
        page.body == expected,
        "http://{router}:{port}{path} has {} bytes, which are not the {} that were expected",
        page.body.len(),
        expected.len()
    );
    Ok(format!(
        "{} by DHCP, {} from http://{router}:{port}{path}",
        lease.address,
        report::size(page.body.len() as u64)
    ))
}

/// Draws `picture` and flushes it to the screen.
///
/// # Errors
///
/// The framebuffer is not as the display says, or the display fails.
pub fn draw<D: DisplayDriverOps + ?Sized>(
    display: &mut D,
    picture: &impl Drawable<Color = Rgb888>,
) -> anyhow::Result<()> {
    let mut canvas = Canvas::of(display).context("the framebuffer is not as the display says")?;
    picture.draw(&mut canvas).context("cannot draw")?;
    if display.need_flush() {
        display
            .flush()
            .context("cannot flush the picture to the screen")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use axdriver_block::ramdisk::RamDisk;
    use axdriver_display::{DisplayInfo, memory::MemoryDisplay};
    use embedded_graphics::prelude::{Point, Size};

    use super::*;
    use crate::{image::Image, picture::TestCard};

    #[test]
    fn what_is_drawn_is_in_the_framebuffer_pixel_by_pixel() {
        let mut display = MemoryDisplay::new(120, 90).unwrap();
        let card = TestCard {
            title: "a",
            detail: "b",
        };
        draw(&mut display, &card).unwrap();
        let mut expected = Image::new(120, 90).unwrap();
        card.draw(&mut expected).unwrap();
        let DisplayInfo { width, height, .. } = display.info();
        assert_eq!(Size::new(width, height), Size::new(120, 90));
        let canvas = Canvas::of(&mut display).unwrap();
        for y in 0..90 {
            for x in 0..120 {
                let shown = canvas
                    .pixel(x, y)
                    .map(|color| Rgb888::new(color.r, color.g, color.b));
                assert_eq!(
                    shown,
                    expected.pixel(x, y),
                    "{:?}",
                    Point::new(x.cast_signed(), y.cast_signed())
                );
            }
        }
    }

    #[test]
    fn a_disk_of_any_odd_size_is_filled_and_checked_to_its_last_block() {
        for blocks in [0, 1, 255, 256, 257, 1000] {
            let mut disk = RamDisk::new(blocks * 512);
            let mut seen = 0;
            verify(&mut disk, Step::Fill, &mut |bytes| seen = bytes).unwrap();
            assert_eq!(seen, blocks as u64 * 512);
            verify(&mut disk, Step::Check, &mut |_| {}).unwrap();
            if let Some(last) = disk.last_mut() {
                *last ^= 1;
                assert!(verify(&mut disk, Step::Check, &mut |_| {}).is_err());
            }
        }
    }

    #[test]
    fn files_that_were_not_kept_are_missed() {
        // Each start gives another disk: nothing of the first one is on the second.
        let mut start = || Ok(RamDisk::new(4 << 20));
        assert!(keep_files(&mut start).is_err());
        let mut small = || Ok(RamDisk::new(64 * 1024));
        assert!(keep_files(&mut small).is_err());
    }
}
