//! A disk in memory: the reference implementation, and a fake for tests.

use alloc::{boxed::Box, vec, vec::Vec};
use core::{
    fmt,
    ops::{Deref, DerefMut},
};

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};

use crate::{BlockCapabilities, BlockDriverOps, check_request, check_write};

/// The size of a block, in bytes.
const BLOCK_SIZE: usize = 512;

/// A disk in memory, with blocks of 512 bytes.
///
/// It dereferences to its contents, which are a whole number of blocks.
///
/// ```
/// use axdriver_block::{BlockDriverOps, DevError, ramdisk::RamDisk};
///
/// let mut disk = RamDisk::new(1000);
/// assert_eq!(disk.num_blocks(), 2);
/// disk.write_block(1, &[7; 512])?;
/// assert_eq!(disk[512..], [7; 512]);
/// assert_eq!(disk.write_block(2, &[7; 512]), Err(DevError::InvalidParam));
/// # Ok::<(), DevError>(())
/// ```
#[derive(Default)]
pub struct RamDisk {
    contents: Contents,
    read_only: bool,
}

/// Where the contents are. Their length is a multiple of [`BLOCK_SIZE`].
enum Contents {
    Heap(Box<[u8]>),
    Static(&'static mut [u8]),
}

impl Default for Contents {
    fn default() -> Self {
        Self::Heap(Box::default())
    }
}

impl RamDisk {
    /// Makes a disk of zeros, of at least `size_hint` bytes: the size is rounded up to whole blocks.
    ///
    /// When there is not enough memory, this ends as every allocation in Rust does, in the handler for allocation
    /// errors; [`try_new`](Self::try_new) returns an error instead.
    ///
    /// # Panics
    ///
    /// If the size is above [`isize::MAX`], as for every allocation.
    #[must_use]
    pub fn new(size_hint: usize) -> Self {
        // What cannot be rounded up is too large as it is.
        let size = round_up(size_hint).unwrap_or(size_hint);
        Self::from_heap(vec![0; size].into_boxed_slice())
    }

    /// Makes a disk as [`new`](Self::new) does, if there is memory for it.
    ///
    /// # Errors
    ///
    /// * [`DevError::NoMemory`]: there is not.
    pub fn try_new(size_hint: usize) -> DevResult<Self> {
        let size = round_up(size_hint).ok_or(DevError::NoMemory)?;
        let mut contents = Vec::new();
        contents
            .try_reserve_exact(size)
            .map_err(|_| DevError::NoMemory)?;
        contents.resize(size, 0);
        Ok(Self::from_heap(contents.into_boxed_slice()))
    }

    /// Makes a disk of the memory at `buf`, without allocating.
    ///
    /// A rest of `buf` that is shorter than a block is not part of the disk.
    #[must_use]
    pub fn from_static(buf: &'static mut [u8]) -> Self {
        let (blocks, _) = buf.as_chunks_mut::<BLOCK_SIZE>();
        Self {
            contents: Contents::Static(blocks.as_flattened_mut()),
            read_only: false,
        }
    }

    /// Makes a disk with a copy of `data`, filled up with zeros to whole blocks.
    ///
    /// For want of memory it ends as [`new`](Self::new) does.
    #[must_use]
    pub fn copy_from_slice(data: &[u8]) -> Self {
        let mut this = Self::new(data.len());
        // The disk is at least as long as the data.
        this.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        this
    }

    /// Makes the disk read-only: its driver refuses writes from now on. The owner can still change the contents directly.
    #[must_use]
    pub fn into_read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    /// Makes a disk of `contents`, which are a whole number of blocks.
    const fn from_heap(contents: Box<[u8]>) -> Self {
        Self {
            contents: Contents::Heap(contents),
            read_only: false,
        }
    }

    /// Returns the bytes of the blocks from `block_id` on that `len` bytes are for. The range has been checked.
    fn range_mut(&mut self, block_id: u64, len: usize) -> DevResult<&mut [u8]> {
        usize::try_from(block_id)
            .ok()
            .and_then(|block_id| block_id.checked_mul(BLOCK_SIZE))
            .and_then(|start| self.get_mut(start..)?.get_mut(..len))
            .ok_or(DevError::InvalidParam)
    }
}

/// Returns `size` rounded up to whole blocks, or `None` beyond the address space.
const fn round_up(size: usize) -> Option<usize> {
    size.checked_next_multiple_of(BLOCK_SIZE)
}

impl Deref for RamDisk {
    type Target = [u8];

    fn deref(&self) -> &Self::Target {
        match &self.contents {
            Contents::Heap(contents) => contents,
            Contents::Static(contents) => contents,
        }
    }
}

impl DerefMut for RamDisk {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.contents {
            Contents::Heap(contents) => contents,
            Contents::Static(contents) => contents,
        }
    }
}

impl From<&'static mut [u8]> for RamDisk {
    /// Makes a disk as [`from_static`](RamDisk::from_static) does.
    fn from(buf: &'static mut [u8]) -> Self {
        Self::from_static(buf)
    }
}

impl fmt::Debug for RamDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamDisk")
            .field("num_blocks", &self.num_blocks())
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl BaseDriverOps for RamDisk {
    fn device_name(&self) -> &str {
        "ramdisk"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
}

impl BlockDriverOps for RamDisk {
    fn num_blocks(&self) -> u64 {
        (self.len() / BLOCK_SIZE) as u64
    }

    fn block_size(&self) -> usize {
        BLOCK_SIZE
    }

    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
        check_request(self.num_blocks(), BLOCK_SIZE, block_id, buf.len())?;
        buf.copy_from_slice(self.range_mut(block_id, buf.len())?);
        Ok(())
    }

    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
        check_write(
            self.num_blocks(),
            BLOCK_SIZE,
            block_id,
            buf.len(),
            self.read_only,
        )?;
        self.range_mut(block_id, buf.len())?.copy_from_slice(buf);
        Ok(())
    }

    fn flush(&mut self) -> DevResult {
        Ok(())
    }

    fn capabilities(&self) -> BlockCapabilities {
        BlockCapabilities::new()
            .with_read_only(self.read_only)
            // Memory does not outlive a loss of power, and no flush changes that.
            .with_volatile_write_cache(false)
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicPtr, Ordering};
    use std::boxed::Box;

    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_whole_blocks() {
        for (hint, blocks) in [(0, 0), (1, 1), (512, 1), (513, 2), (1024, 2)] {
            assert_eq!(RamDisk::new(hint).num_blocks(), blocks);
            assert_eq!(RamDisk::try_new(hint).unwrap().num_blocks(), blocks);
        }
        assert_eq!(RamDisk::default().num_blocks(), 0);
    }

    #[test]
    fn sizes_beyond_the_address_space_are_refused() {
        for size in [usize::MAX, usize::MAX - 510, isize::MAX.unsigned_abs()] {
            assert_eq!(RamDisk::try_new(size).err(), Some(DevError::NoMemory));
        }
    }

    #[test]
    #[should_panic(expected = "capacity overflow")]
    fn a_new_disk_beyond_the_address_space_does_not_come_out_small() {
        let _ = RamDisk::new(usize::MAX);
    }

    #[test]
    fn a_disk_of_static_memory_writes_through_and_takes_any_alignment() {
        // Still reachable at the end, so it is no leak to a sanitizer.
        static KEPT: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
        let memory = Box::leak(Box::new([0; 1 + 1024 + 100]));
        KEPT.store(memory.as_mut_ptr(), Ordering::Relaxed);
        let address = memory[1..].as_ptr();
        let mut disk = RamDisk::from(&mut memory[1..]);
        assert_eq!(disk.num_blocks(), 2);
        assert_eq!(disk.len(), 1024);
        assert_eq!(disk.as_ptr(), address);
        disk.write_block(1, &[3; 512]).unwrap();
        assert_eq!(disk[512], 3);
    }

    #[test]
    fn copied_data_are_filled_up_with_zeros() {
        let disk = RamDisk::copy_from_slice(&[9; 513]);
        assert_eq!(disk[..513], [9; 513]);
        assert_eq!(disk[513..], [0; 511]);
    }

    #[test]
    fn empty_ragged_and_distant_requests_are_refused_and_change_nothing() {
        let mut disk = RamDisk::copy_from_slice(&[1; 1024]);
        let requests = [
            (0, 0),
            (0, 1),
            (0, 511),
            (0, 513),
            (0, 1536),
            (1, 1024),
            (2, 512),
            (u64::MAX, 512),
            (u64::MAX, 1024),
            (u64::MAX / 512, 512),
            // Truncated to 32 bits these would be blocks 0 and 1.
            (1 << 32, 512),
            ((1 << 32) + 1, 512),
        ];
        for (block_id, len) in requests {
            let mut buf = vec![2; len];
            assert_eq!(
                disk.write_block(block_id, &buf),
                Err(DevError::InvalidParam)
            );
            assert_eq!(
                disk.read_block(block_id, &mut buf),
                Err(DevError::InvalidParam)
            );
            assert!(buf.iter().all(|byte| *byte == 2));
        }
        assert!(disk.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn a_read_only_disk_refuses_writes_and_can_be_read() {
        let mut disk = RamDisk::copy_from_slice(&[1; 512]).into_read_only();
        assert!(disk.capabilities().read_only);
        assert_eq!(disk.write_block(0, &[2; 512]), Err(DevError::Unsupported));
        assert_eq!(disk.write_block(1, &[2; 512]), Err(DevError::InvalidParam));
        let mut buf = [0; 512];
        disk.read_block(0, &mut buf).unwrap();
        assert_eq!(buf, [1; 512]);
    }

    #[test]
    fn a_disk_can_be_sent_and_shared_without_being_told_so() {
        const fn is_send_and_sync<T: Send + Sync>() {}
        is_send_and_sync::<RamDisk>();
    }
}

/// Safe code cannot make a disk of a pointer:
///
/// ```compile_fail,E0599
/// use axdriver_block::ramdisk::RamDisk;
///
/// let disk = RamDisk::Heap(core::ptr::slice_from_raw_parts_mut(core::ptr::dangling_mut(), 4096));
/// ```
#[cfg(doctest)]
struct PointersMakeNoDisk;
