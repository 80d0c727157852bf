//! The memory of a machine: one shared mapping, seen by the driver at host addresses and by devices at guest-physical ones.
//!
//! Two kinds of `unsafe` live here: making a memory file, and looking at pages that a [`Buffer`] owns.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};

use crate::trace::{Event, Trace};

/// Size of a page, in bytes.
pub const PAGE_SIZE: usize = 4096;
const PAGE: u64 = 4096;

/// How many pages, the last ones, copies of lent buffers take turns in.
const BOUNCE_PAGES: usize = 256;

/// What a page holds from the moment it is freed.
pub const POISON: u8 = 0xa5;

/// Where the memory of a machine begins, unless the board says otherwise.
pub const DEFAULT_BASE: u64 = 0x4000_0000;

/// Watches memory leave the hands of devices.
///
/// [`Memory`] calls it before the memory changes, so that a board can tell whether a device could still reach it.
pub trait MemoryWatch: Send + Sync {
    /// `len` bytes at `address` are about to be freed, or taken back by the driver.
    fn leaving(&self, address: u64, len: usize);
}

/// Numbers of pages and buffers, to find leaks with.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct MemoryCounters {
    /// Pages allocated and not yet freed; those of lent copies are not among them.
    pub pages_live: usize,
    /// The most that `pages_live` ever was.
    pub pages_peak: usize,
    /// How often pages were allocated.
    pub allocations: u64,
    /// Lent copies of buffers outside of the memory, not yet taken back.
    pub bounces_live: usize,
    /// How often a copy was lent.
    pub bounces: u64,
    /// Buffers lent and not yet taken back, copied or not.
    pub shares_live: i64,
    /// How often a buffer was lent.
    pub shares: u64,
    /// Bytes copied for buffers outside of the memory, both ways.
    pub bytes_copied: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Page {
    /// Never used.
    Fresh,
    Live,
    /// Freed, and filled with [`POISON`].
    Poisoned,
}

#[derive(Clone, Copy, Debug)]
struct Bounce {
    pages: usize,
    len: usize,
}

#[derive(Debug)]
struct Pages {
    state: Vec<Page>,
    /// Where the next search begins, so that freed pages rest for as long as possible.
    next: usize,
    /// The same for copies, which stay among the last pages for as long as there is room.
    next_bounce: usize,
    /// By guest-physical address.
    bounces: HashMap<u64, Bounce>,
    counters: MemoryCounters,
    /// The most pages that may be live, when a test wants allocation to fail.
    limit: Option<usize>,
    /// Freed pages that somebody wrote to, found when they were allocated anew.
    overwritten: Vec<u64>,
    /// `Some` exactly while a page is live, so that the mapping outlives every pointer into it.
    keep_alive: Option<Arc<Memory>>,
}

/// The memory of a machine.
///
/// It is one `MAP_SHARED` mapping of a memory file or of a file with a name, so that other processes can map it too. Its
/// guest-physical addresses differ from its host addresses. Freed pages are filled with [`POISON`] and used again as late as
/// possible; [`overwritten_free_pages`](Self::overwritten_free_pages) finds those that a device wrote to afterwards.
#[derive(Debug)]
pub struct Memory {
    guest: GuestMemoryMmap,
    base: u64,
    size: usize,
    /// Host address of the first byte, to compare others with.
    host: usize,
    file: Arc<File>,
    path: Option<PathBuf>,
    pages: Mutex<Pages>,
    trace: Trace,
    watch: Mutex<Option<Weak<dyn MemoryWatch>>>,
    shares_live: AtomicU64,
    shares: AtomicU64,
    this: Weak<Memory>,
}

impl Memory {
    /// Returns `size` bytes of memory without a name at guest-physical `base`.
    ///
    /// # Errors
    ///
    /// * `InvalidInput`: `base` is 0, or `base` or `size` is not a whole number of pages, or `size` is 0, or the end overflows.
    /// * Whatever the host says when it makes or maps the memory file.
    pub fn anonymous(base: u64, size: usize) -> io::Result<Arc<Self>> {
        // SAFETY: the name is a string that ends in 0, and no flag asks for more.
        let descriptor = unsafe { libc::memfd_create(c"machine".as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `memfd_create` has just returned this descriptor, so nobody else owns it.
        let file = unsafe { File::from_raw_fd(descriptor) };
        Self::map(file, None, base, size)
    }

    /// Returns memory at guest-physical `base` that is the file at `path`, created if need be and made `size` bytes long.
    ///
    /// # Errors
    ///
    /// * `InvalidInput`: as for [`anonymous`](Self::anonymous).
    /// * Whatever the host says when it opens or maps the file.
    pub fn file(path: impl AsRef<Path>, base: u64, size: usize) -> io::Result<Arc<Self>> {
        let path = path.as_ref();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        Self::map(file, Some(path.to_path_buf()), base, size)
    }

    fn map(file: File, path: Option<PathBuf>, base: u64, size: usize) -> io::Result<Arc<Self>> {
        let fits = u64::try_from(size)
            .ok()
            .and_then(|size| base.checked_add(size))
            .is_some();
        if base == 0
            || !base.is_multiple_of(PAGE)
            || size == 0
            || !size.is_multiple_of(PAGE_SIZE)
            || !fits
        {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        file.set_len(size as u64)?;
        let file = Arc::new(file);
        let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), size)
            .map_err(io::Error::other)?;
        let host = mapping.as_ptr().addr();
        let region = GuestRegionMmap::new(mapping, GuestAddress(base))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let guest = GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)?;
        let memory = Arc::new_cyclic(|this| Self {
            guest,
            base,
            size,
            host,
            file,
            path,
            pages: Mutex::new(Pages {
                state: vec![Page::Fresh; size / PAGE_SIZE],
                next: 0,
                next_bounce: 0,
                bounces: HashMap::new(),
                counters: MemoryCounters::default(),
                limit: None,
                overwritten: Vec::new(),
                keep_alive: None,
            }),
            trace: Trace::new(0),
            watch: Mutex::new(None),
            shares_live: AtomicU64::new(0),
            shares: AtomicU64::new(0),
            this: this.clone(),
        });
        register(&memory);
        Ok(memory)
    }

    /// Returns the memory as devices see it, at guest-physical addresses.
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// Returns the guest-physical address of the first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Returns the size, in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the host address of the first byte.
    pub fn host(&self) -> NonNull<u8> {
        self.host_address(self.base, 1)
            .unwrap_or(NonNull::dangling())
    }

    /// Returns the file that is mapped, for other processes to map too. The memory starts at its offset 0.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Returns the path of the file that is mapped, if it has a name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns the trace that the memory and the board write to. It keeps nothing until its limit is set.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Tells `watch` of all memory that is freed or taken back from now on.
    pub fn set_watch(&self, watch: Weak<dyn MemoryWatch>) {
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch);
    }

    /// Returns the counts of pages and buffers.
    pub fn counters(&self) -> MemoryCounters {
        let mut counters = self.lock().counters;
        counters.shares = self.shares.load(Ordering::Relaxed);
        counters.shares_live = self.shares_live.load(Ordering::Relaxed).cast_signed();
        counters
    }

    /// Lets allocations fail that would bring the number of live pages above `limit`.
    pub fn set_page_limit(&self, limit: Option<usize>) {
        self.lock().limit = limit;
    }

    /// Returns the guest-physical address of what lies at `host`, if all `len` bytes are in this memory.
    pub fn translate(&self, host: NonNull<u8>, len: usize) -> Option<u64> {
        let offset = host.addr().get().checked_sub(self.host)?;
        (offset.checked_add(len)? <= self.size).then(|| self.base + offset as u64)
    }

    /// Returns the host address of what lies at guest-physical `address`, if all `len` bytes are in this memory.
    pub fn host_address(&self, address: u64, len: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(address.checked_sub(self.base)?).ok()?;
        if offset.checked_add(len)? > self.size {
            return None;
        }
        let host = self.guest.get_host_address(GuestAddress(address)).ok()?;
        NonNull::new(host)
    }

    /// Allocates `pages` pages in a row, filled with 0. The memory stays mapped until they are freed.
    ///
    /// Returns their guest-physical and their host address, or `None` when so many are not free in a row.
    pub fn allocate(&self, pages: usize) -> Option<(u64, NonNull<u8>)> {
        let address = self.take(pages, true)?;
        self.fill(address, pages * PAGE_SIZE, 0);
        self.trace.push(Event::PagesAllocated { address, pages });
        Some((address, self.host_address(address, pages * PAGE_SIZE)?))
    }

    /// Frees pages, and fills them with [`POISON`]. Returns whether `address` and `pages` are pages that are live.
    ///
    /// # Safety
    ///
    /// The pages come from [`allocate`](Self::allocate) in one piece, and nobody uses a pointer to them any more.
    pub unsafe fn free(&self, address: u64, pages: usize) -> bool {
        self.leaving(address, pages * PAGE_SIZE);
        self.trace.push(Event::PagesFreed { address, pages });
        self.give_back(address, pages, true)
    }

    /// Returns a buffer inside the memory, `len` bytes filled with 0, that drivers can lend without a copy.
    ///
    /// Returns `None` when `len` is 0 or the memory is full.
    pub fn buffer(&self, len: usize) -> Option<Buffer> {
        if len == 0 {
            return None;
        }
        let pages = len.div_ceil(PAGE_SIZE);
        let memory = self.this.upgrade()?;
        let (address, _) = self.allocate(pages)?;
        Some(Buffer {
            memory,
            address,
            len,
        })
    }

    /// Returns the guest-physical addresses of freed pages that somebody wrote to after they were freed.
    pub fn overwritten_free_pages(&self) -> Vec<u64> {
        let pages = self.lock();
        let mut found = pages.overwritten.clone();
        for (index, state) in pages.state.iter().enumerate() {
            let address = self.base + index as u64 * PAGE;
            if *state == Page::Poisoned && !self.is_poison(address) {
                found.push(address);
            }
        }
        found
    }

    /// Takes pages for a copy of `len` bytes, filled with [`POISON`].
    pub(crate) fn take_bounce(&self, len: usize) -> Option<u64> {
        let pages = len.div_ceil(PAGE_SIZE);
        let address = self.take(pages, false)?;
        self.lock().bounces.insert(address, Bounce { pages, len });
        Some(address)
    }

    /// Returns the length of the copy at `address`, if there is one.
    pub(crate) fn bounce_len(&self, address: u64) -> Option<usize> {
        self.lock().bounces.get(&address).map(|bounce| bounce.len)
    }

    /// Gives the pages of the copy at `address` back.
    pub(crate) fn free_bounce(&self, address: u64) {
        let bounce = self.lock().bounces.remove(&address);
        if let Some(bounce) = bounce {
            self.give_back(address, bounce.pages, false);
        }
    }

    /// Counts a buffer that is lent.
    pub(crate) fn count_share(&self, address: u64, len: usize, bounced: bool) {
        self.shares.fetch_add(1, Ordering::Relaxed);
        self.shares_live.fetch_add(1, Ordering::Relaxed);
        self.trace.push(Event::Shared {
            address,
            len,
            bounced,
        });
    }

    /// Counts a buffer that is taken back. To be called before its memory changes hands.
    pub(crate) fn count_unshare(&self, address: u64, len: usize, bounced: bool) {
        self.shares_live.fetch_sub(1, Ordering::Relaxed);
        self.leaving(address, len);
        self.trace.push(Event::Unshared {
            address,
            len,
            bounced,
        });
    }

    /// Counts bytes that were copied.
    pub(crate) fn count_copy(&self, len: usize) {
        self.lock().counters.bytes_copied += len as u64;
    }

    fn leaving(&self, address: u64, len: usize) {
        let watch = self
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .and_then(Weak::upgrade);
        if let Some(watch) = watch {
            watch.leaving(address, len);
        }
    }

    fn take(&self, count: usize, allocation: bool) -> Option<u64> {
        let mut guard = self.lock();
        let pages = &mut *guard;
        if count == 0 || count > pages.state.len() {
            return None;
        }
        if allocation
            && let Some(limit) = pages.limit
            && pages.counters.pages_live + count > limit
        {
            return None;
        }
        // Copies go around in a small part of the memory, so that it stays in the processor's cache.
        let last = pages.state.len().saturating_sub(BOUNCE_PAGES);
        let start = if allocation {
            find_run(&pages.state, pages.next, count)?
        } else {
            find_run(&pages.state[last..], pages.next_bounce, count)
                .map(|start| last + start)
                .or_else(|| find_run(&pages.state, pages.next, count))?
        };
        let address = self.base + start as u64 * PAGE;
        for (index, state) in pages.state[start..start + count].iter_mut().enumerate() {
            let page = address + index as u64 * PAGE;
            if *state == Page::Poisoned && !self.is_poison(page) {
                pages.overwritten.push(page);
            }
            if !allocation && (*state == Page::Fresh || pages.overwritten.last() == Some(&page)) {
                self.fill(page, PAGE_SIZE, POISON);
            }
            *state = Page::Live;
        }
        if allocation {
            pages.next = start + count;
            pages.counters.allocations += 1;
            pages.counters.pages_live += count;
            pages.counters.pages_peak = pages.counters.pages_peak.max(pages.counters.pages_live);
        } else {
            pages.next_bounce = start.saturating_sub(last) + count;
            pages.counters.bounces += 1;
            pages.counters.bounces_live += 1;
        }
        if pages.keep_alive.is_none() {
            pages.keep_alive = self.this.upgrade();
        }
        Some(address)
    }

    fn give_back(&self, address: u64, count: usize, allocation: bool) -> bool {
        let mut guard = self.lock();
        let pages = &mut *guard;
        let Some(first) = address
            .checked_sub(self.base)
            .filter(|offset| offset.is_multiple_of(PAGE))
            .and_then(|offset| usize::try_from(offset / PAGE).ok())
        else {
            return false;
        };
        let Some(states) = first
            .checked_add(count)
            .and_then(|end| pages.state.get_mut(first..end))
        else {
            return false;
        };
        if states.iter().any(|state| *state != Page::Live) {
            return false;
        }
        states.fill(Page::Poisoned);
        self.fill(address, count * PAGE_SIZE, POISON);
        if allocation {
            pages.counters.pages_live -= count;
        } else {
            pages.counters.bounces_live -= 1;
        }
        let idle = pages.counters.pages_live == 0 && pages.counters.bounces_live == 0;
        let last = if idle { pages.keep_alive.take() } else { None };
        // The lock is released first: `last` may be what keeps this very memory alive.
        drop(guard);
        drop(last);
        true
    }

    fn is_poison(&self, address: u64) -> bool {
        let mut bytes = [0; PAGE_SIZE];
        self.guest
            .read_slice(&mut bytes, GuestAddress(address))
            .is_ok()
            && bytes == [POISON; PAGE_SIZE]
    }

    fn fill(&self, address: u64, len: usize, byte: u8) {
        let bytes = [byte; PAGE_SIZE];
        for start in (0..len).step_by(PAGE_SIZE) {
            let part = &bytes[..PAGE_SIZE.min(len - start)];
            // A range inside the memory: all callers pass pages that they hold.
            let _ = self
                .guest
                .write_slice(part, GuestAddress(address + start as u64));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the start of `count` pages in a row that are not live, searching from `from` to the end and then from the start.
fn find_run(state: &[Page], from: usize, count: usize) -> Option<usize> {
    let search = |begin: usize, end: usize| {
        let mut run = 0;
        for (index, page) in state.iter().enumerate().take(end).skip(begin) {
            run = if *page == Page::Live { 0 } else { run + 1 };
            if run == count {
                return Some(index + 1 - count);
            }
        }
        None
    };
    search(from, state.len()).or_else(|| search(0, state.len()))
}

/// All memories there are, to find the one that a host address belongs to.
static MEMORIES: Mutex<Vec<Weak<Memory>>> = Mutex::new(Vec::new());

fn register(memory: &Arc<Memory>) {
    let mut memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
    memories.retain(|memory| memory.strong_count() > 0);
    memories.push(Arc::downgrade(memory));
}

/// Returns the memory that `host` points into.
pub(crate) fn memory_of(host: NonNull<u8>) -> Option<Arc<Memory>> {
    let memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
    let all: Vec<_> = memories.iter().filter_map(Weak::upgrade).collect();
    drop(memories);
    all.into_iter()
        .find(|memory| memory.translate(host, 1).is_some())
}

/// A buffer inside the memory of a machine.
///
/// It starts at a page, and a driver can lend it to a device without a copy.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    /// Guest-physical address of `len` bytes that this buffer alone owns.
    address: u64,
    len: usize,
}

impl Buffer {
    /// Returns the guest-physical address.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Some(host) = self.memory.host_address(self.address, self.len) else {
            return &[];
        };
        // SAFETY: `host` points to `len` bytes, initialised and live, that this buffer alone owns.
        unsafe { std::slice::from_raw_parts(host.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Some(host) = self.memory.host_address(self.address, self.len) else {
            return &mut [];
        };
        // SAFETY: as for `deref`, and `&mut self` proves that nobody else looks.
        unsafe { std::slice::from_raw_parts_mut(host.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the pages come from `allocate` in `Memory::buffer`, and nobody can use the buffer after its drop.
        unsafe { self.memory.free(self.address, self.len.div_ceil(PAGE_SIZE)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Arc<Memory> {
        Memory::anonymous(DEFAULT_BASE, 1 << 20).unwrap()
    }

    #[test]
    fn guest_addresses_differ_from_host_addresses_and_mean_the_same_bytes() {
        let memory = memory();
        let mut buffer = memory.buffer(5000).unwrap();
        buffer[4999] = 7;
        assert_eq!(
            memory
                .guest()
                .read_obj::<u8>(GuestAddress(buffer.address() + 4999))
                .unwrap(),
            7
        );
        assert_ne!(buffer.address(), buffer.as_ptr().addr() as u64);
        let host = NonNull::from(&mut buffer[..]).cast();
        assert_eq!(memory.translate(host, 5000), Some(buffer.address()));
    }

    #[test]
    fn freed_pages_are_poisoned_and_not_reused_at_once() {
        let memory = memory();
        let buffer = memory.buffer(PAGE_SIZE).unwrap();
        let address = buffer.address();
        drop(buffer);
        let byte: u8 = memory.guest().read_obj(GuestAddress(address)).unwrap();
        assert_eq!(byte, POISON);
        let again = memory.buffer(PAGE_SIZE).unwrap();
        assert_ne!(again.address(), address);
        assert!(again.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_write_to_a_freed_page_is_found() {
        let memory = memory();
        let address = memory.buffer(1).unwrap().address();
        assert!(memory.overwritten_free_pages().is_empty());
        memory
            .guest()
            .write_obj(1u8, GuestAddress(address + 77))
            .unwrap();
        assert_eq!(memory.overwritten_free_pages(), [address]);
    }

    #[test]
    fn pages_are_counted_and_limited() {
        let memory = memory();
        memory.set_page_limit(Some(3));
        let two = memory.allocate(2).unwrap();
        assert!(memory.allocate(2).is_none());
        assert_eq!(memory.counters().pages_live, 2);
        // SAFETY: the pages are those just allocated, and nobody has used them.
        assert!(unsafe { memory.free(two.0, 2) });
        // SAFETY: they are not live any more, which is refused.
        assert!(!unsafe { memory.free(two.0, 2) });
        assert_eq!(memory.counters().pages_live, 0);
    }

    #[test]
    fn all_pages_can_be_used_and_no_more() {
        let memory = Memory::anonymous(DEFAULT_BASE, 4 * PAGE_SIZE).unwrap();
        let first = memory.buffer(PAGE_SIZE).unwrap();
        let second = memory.buffer(3 * PAGE_SIZE).unwrap();
        assert!(memory.buffer(1).is_none());
        drop(first);
        assert!(memory.buffer(PAGE_SIZE).is_some());
        drop(second);
    }

    #[test]
    fn the_mapping_outlives_its_handle_while_a_page_is_live() {
        let memory = memory();
        let weak = Arc::downgrade(&memory);
        let (address, host) = memory.allocate(1).unwrap();
        drop(memory);
        let memory = memory_of(host).unwrap();
        // SAFETY: the page is the one just allocated, and nobody uses it.
        assert!(unsafe { memory.free(address, 1) });
        drop(memory);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn bad_bases_and_sizes_are_refused() {
        for (base, size) in [(0, 4096), (1, 4096), (4096, 0), (4096, 5), (!0xfff, 8192)] {
            assert!(Memory::anonymous(base, size).is_err());
        }
    }

    #[test]
    fn a_file_holds_what_the_driver_wrote() {
        let path = std::env::temp_dir().join(format!("machine-memory-{}", std::process::id()));
        let memory = Memory::file(&path, DEFAULT_BASE, 8192).unwrap();
        let mut buffer = memory.buffer(4).unwrap();
        buffer.copy_from_slice(b"here");
        let offset = usize::try_from(buffer.address() - DEFAULT_BASE).unwrap();
        assert_eq!(&std::fs::read(&path).unwrap()[offset..offset + 4], b"here");
        assert_eq!(memory.path(), Some(path.as_path()));
        std::fs::remove_file(&path).unwrap();
    }
}
