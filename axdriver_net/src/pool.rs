//! The pool that frames come from and go back to, laid out so that a device can be given each buffer.

use alloc::{
    alloc::{alloc, alloc_zeroed, dealloc},
    boxed::Box,
    sync::Arc,
    vec::Vec,
};
use core::{alloc::Layout, fmt, ptr::NonNull};

use spin::Mutex;

use crate::{DevError, DevResult, NetBuf, NetBufBox, NetBufPtr};

/// The size of the smallest page that a device is given memory in, in bytes.
const PAGE_SIZE: usize = 4096;

/// The alignment of a buffer, in bytes: that of a cache line, so that no two buffers share one.
const ALIGN: usize = 64;

/// The bounds of the length of a buffer, in bytes. The lower one is a frame of 1514 bytes with a header of 12.
const BUFFER_LEN: core::ops::RangeInclusive<usize> = 1526..=65535;

/// Where the buffers lie in the memory of a pool.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Slots {
    /// The length of a buffer, in bytes.
    buf_len: usize,
    /// The distance between two buffers of a group, in bytes: a multiple of [`ALIGN`], at least `buf_len`.
    stride: usize,
    /// How many buffers share a group: at least 1.
    per_group: usize,
    /// The distance between two groups, in bytes: a multiple of [`PAGE_SIZE`], at least `stride * per_group`.
    group_len: usize,
}

impl Slots {
    /// Lays out buffers of `buf_len` bytes, or `None` when they are longer than the address space.
    const fn new(buf_len: usize) -> Option<Self> {
        if buf_len == 0 {
            return None;
        }
        if buf_len <= PAGE_SIZE {
            let stride = buf_len.next_multiple_of(ALIGN);
            return Some(Self {
                buf_len,
                stride,
                per_group: PAGE_SIZE / stride,
                group_len: PAGE_SIZE,
            });
        }
        match buf_len.checked_next_multiple_of(PAGE_SIZE) {
            None => None,
            Some(stride) => Some(Self {
                buf_len,
                stride,
                per_group: 1,
                group_len: stride,
            }),
        }
    }

    /// Returns the size of the memory for `count` buffers, in bytes, or `None` beyond the address space.
    const fn size(&self, count: usize) -> Option<usize> {
        count.div_ceil(self.per_group).checked_mul(self.group_len)
    }

    /// Returns where slot `slot` begins, in bytes from the start of the memory.
    ///
    /// For a slot below a `count` that has a [`size`](Self::size), nothing here overflows.
    const fn offset(&self, slot: usize) -> usize {
        slot / self.per_group * self.group_len + slot % self.per_group * self.stride
    }
}

/// A pool of buffers of one length, in one piece of memory that is fit for DMA.
///
/// * Buffers start at multiples of 64 bytes and share no cache line.
/// * A buffer of at most 4096 bytes does not cross a boundary of 4096 bytes, so it is contiguous for the device
///   whatever the mapping of virtual to physical pages. A longer one starts at such a boundary; where the pages behind
///   it are not contiguous, a driver has to give it to the device page by page.
///
/// The list of free buffers is behind a spin lock that is held for a few instructions. An interrupt handler that
/// allocates or drops buffers can spin for ever on a lock held by what it interrupted, so outside of the handler
/// the pool then has to be used with interrupts disabled.
///
/// ```
/// use axdriver_net::{DevError, NetBufPool};
///
/// let pool = NetBufPool::new(2, 2048)?;
/// let first = pool.alloc();
/// let second = pool.alloc();
/// assert!(first.is_some() && second.is_some());
/// assert!(pool.alloc().is_none());
/// drop(first);
/// assert!(pool.alloc().is_some());
/// # Ok::<(), DevError>(())
/// ```
pub struct NetBufPool {
    capacity: usize,
    slots: Slots,
    /// The start of `layout.size()` initialised bytes that the global allocator gave for `layout`. Slot `n` is the
    /// `buf_len` bytes at `slots.offset(n)`, and belongs to whoever holds `n`.
    memory: NonNull<u8>,
    /// The page-aligned layout of at least `slots.size(capacity)` bytes.
    layout: Layout,
    /// The slots that no [`NetBuf`] owns, each once. Its capacity is `capacity`, so it never grows.
    free: Mutex<Vec<usize>>,
}

// SAFETY: the memory belongs to the pool and has no tie to a thread.
unsafe impl Send for NetBufPool {}

// SAFETY: a shared pool gives out slots only through the lock, each to one owner, and touches the memory in no other way.
unsafe impl Sync for NetBufPool {}

impl NetBufPool {
    /// Makes a pool of `capacity` buffers of `buf_len` bytes each.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `capacity` is 0, `buf_len` is not in 1526..=65535, or the pool would be larger
    ///   than the address space.
    /// * [`DevError::NoMemory`]: the allocator has not enough.
    pub fn new(capacity: usize, buf_len: usize) -> DevResult<Arc<Self>> {
        if capacity == 0 || !BUFFER_LEN.contains(&buf_len) {
            return Err(DevError::InvalidParam);
        }
        let slots = Slots::new(buf_len).ok_or(DevError::InvalidParam)?;
        let size = slots.size(capacity).ok_or(DevError::InvalidParam)?;
        let layout =
            Layout::from_size_align(size, PAGE_SIZE).map_err(|_| DevError::InvalidParam)?;

        let mut free = Vec::new();
        free.try_reserve_exact(capacity)
            .map_err(|_| DevError::NoMemory)?;
        // The slot at the end is taken first, so this begins with slot 0.
        free.extend((0..capacity).rev());

        // SAFETY: the size is not 0, since neither the capacity nor the length of a buffer is.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(DevError::NoMemory)?;
        Ok(Arc::new(Self {
            capacity,
            slots,
            memory,
            layout,
            free: Mutex::new(free),
        }))
    }

    /// Returns how many buffers the pool has, free or not.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the length of each buffer, in bytes.
    #[must_use]
    pub const fn buffer_len(&self) -> usize {
        self.slots.buf_len
    }

    /// Returns how many buffers are free now.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.lock().len()
    }

    /// Takes a buffer with a header and a packet of 0 bytes, or returns `None` when all are taken.
    ///
    /// Its contents are what its last user left.
    #[must_use]
    pub fn alloc(self: &Arc<Self>) -> Option<NetBuf> {
        let slot = self.free.lock().pop()?;
        // SAFETY: a slot of the pool lies inside its memory, by the invariants of `free` and `layout`.
        let buf_ptr = unsafe { self.memory.add(self.slots.offset(slot)) };
        // SAFETY: the slot has just been taken from the free ones, and this is where it begins.
        Some(unsafe { NetBuf::from_slot(Arc::clone(self), slot, buf_ptr) })
    }

    /// Takes a buffer as [`alloc`](Self::alloc) does, in a box.
    ///
    /// Returns `None` as well when there is no memory for the box.
    #[must_use]
    pub fn alloc_boxed(self: &Arc<Self>) -> Option<NetBufBox> {
        let layout = Layout::new::<NetBuf>();
        let buf = self.alloc()?;
        // SAFETY: a `NetBuf` is not of size 0.
        let place = NonNull::new(unsafe { alloc(layout) })?.cast::<NetBuf>();
        // SAFETY: the allocator gave memory that fits a `NetBuf`, to be written once.
        unsafe { place.write(buf) };
        // SAFETY: the memory is from the global allocator, in the layout of a `NetBuf`, and now holds one.
        Some(unsafe { Box::from_raw(place.as_ptr()) })
    }

    /// Returns whether `ptr` is a buffer of this pool.
    #[must_use]
    pub fn owns(self: &Arc<Self>, ptr: &NetBufPtr) -> bool {
        ptr.net_buf().is_some_and(|buf| buf.is_from(self))
    }

    /// Makes a slot free again.
    ///
    /// # Safety
    ///
    /// The caller owns `slot` of this pool, and does not use it after this.
    pub(crate) unsafe fn give_back(&self, slot: usize) {
        self.free.lock().push(slot);
    }
}

impl Drop for NetBufPool {
    fn drop(&mut self) {
        // SAFETY: the memory came from this allocator with this layout. Every `NetBuf` keeps its pool alive, so nobody
        // has a slot now.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}

impl fmt::Debug for NetBufPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetBufPool")
            .field("capacity", &self.capacity)
            .field("buffer_len", &self.slots.buf_len)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn buffers_are_aligned_do_not_overlap_and_do_not_cross_pages(
            buf_len in 1..20_000_usize,
            count in 1..64_usize,
        ) {
            let slots = Slots::new(buf_len).ok_or(TestCaseError::fail("no layout"))?;
            let size = slots.size(count).ok_or(TestCaseError::fail("no size"))?;
            let mut end_of_last = 0;
            for slot in 0..count {
                let start = slots.offset(slot);
                let end = start + buf_len;
                prop_assert!(start >= end_of_last);
                prop_assert!(end <= size);
                prop_assert!(start.is_multiple_of(ALIGN));
                if buf_len <= PAGE_SIZE {
                    prop_assert_eq!(start / PAGE_SIZE, (end - 1) / PAGE_SIZE);
                } else {
                    prop_assert!(start.is_multiple_of(PAGE_SIZE));
                }
                end_of_last = end.next_multiple_of(ALIGN);
            }
            prop_assert!(size < end_of_last.next_multiple_of(PAGE_SIZE) + PAGE_SIZE);
        }

        #[test]
        fn a_layout_is_right_or_there_is_none(buf_len in any::<usize>(), count in any::<usize>()) {
            if let Some(size) = Slots::new(buf_len).and_then(|slots| slots.size(count)) {
                prop_assert!(size as u128 >= buf_len as u128 * count as u128);
            }
        }

        #[test]
        fn every_buffer_has_one_owner_at_a_time(
            takes in prop::collection::vec(any::<bool>(), 1..100),
        ) {
            let pool = NetBufPool::new(5, 1526).map_err(|error| {
                TestCaseError::fail(alloc::format!("{error}"))
            })?;
            let mut held = Vec::new();
            for (turn, take) in takes.into_iter().enumerate() {
                let mark = u8::try_from(turn)?;
                if take {
                    if let Some(mut buf) = pool.alloc() {
                        buf.raw_buf_mut().fill(mark);
                        held.push((mark, buf));
                    } else {
                        prop_assert_eq!(held.len(), 5);
                    }
                } else if !held.is_empty() {
                    held.swap_remove(turn % held.len());
                }
                prop_assert_eq!(pool.available(), 5 - held.len());
                for (mark, buf) in &held {
                    prop_assert!(buf.raw_buf().iter().all(|byte| byte == mark));
                }
            }
        }
    }

    #[test]
    fn no_buffer_of_a_frame_crosses_a_page() {
        let pool = NetBufPool::new(16, 1526).unwrap();
        let buffers: Vec<_> = (0..16).map(|_| pool.alloc().unwrap()).collect();
        for buf in &buffers {
            let start = buf.raw_buf().as_ptr().addr();
            assert_eq!(start / PAGE_SIZE, (start + 1525) / PAGE_SIZE);
            assert!(start.is_multiple_of(ALIGN));
        }
        assert!(pool.alloc().is_none() && pool.alloc_boxed().is_none());
    }

    #[test]
    fn impossible_pools_are_refused() {
        for (capacity, buf_len) in [
            (0, 2048),
            (1, 0),
            (1, 1525),
            (1, 65536),
            (1, usize::MAX),
            (usize::MAX, 2048),
            (usize::MAX / 2048, 2048),
            (usize::MAX / 1526, 1526),
        ] {
            let refused = NetBufPool::new(capacity, buf_len).err();
            assert_eq!(
                refused,
                Some(DevError::InvalidParam),
                "{capacity} {buf_len}"
            );
        }
    }

    #[test]
    fn new_buffers_are_zeros_with_nothing_in_them() {
        let pool = NetBufPool::new(1, 65535).unwrap();
        let buf = pool.alloc_boxed().unwrap();
        assert_eq!((pool.capacity(), pool.buffer_len()), (1, 65535));
        assert_eq!(
            (buf.capacity(), buf.header_len(), buf.packet_len()),
            (65535, 0, 0)
        );
        assert!(buf.raw_buf().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn buffers_can_be_dropped_in_another_thread() {
        let pool = NetBufPool::new(64, 1526).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let ptr = pool.alloc_boxed().map(NetBuf::into_buf_ptr);
                        drop(ptr);
                    }
                });
            }
        });
        assert_eq!(pool.available(), 64);
    }
}
