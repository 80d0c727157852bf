//! An owned frame: in the form that crosses the driver trait, and in the form that drivers keep.

#[cfg(feature = "alloc")]
use alloc::{boxed::Box, sync::Arc};
use core::{fmt, mem::ManuallyDrop, ptr::NonNull, slice};

#[cfg(feature = "alloc")]
use crate::{DevError, DevResult, NetBufPool};

/// The function that gives the object behind a [`NetBufPtr`] back to its owner.
type Release = unsafe fn(NonNull<u8>);

/// Who made a [`NetBufPtr`], which says what its raw pointer is.
#[derive(Clone, Copy)]
enum Origin {
    /// [`NetBufPtr::new`]: only its maker knows.
    Unmanaged,
    /// [`NetBufPtr::with_release`]: only its maker knows, but this function may be called on it once.
    Managed(Release),
    /// [`NetBuf::into_buf_ptr`]: a [`NetBufBox`] as [`Box::into_raw`] has left it.
    #[cfg(feature = "alloc")]
    NetBuf,
}

/// A buffer with a frame in it, as it crosses [`NetDriverOps`](crate::NetDriverOps): owned, whatever it is made of.
///
/// It has exclusive access to its packet. Dropping it gives the buffer back to its owner, unless it was made by
/// [`new`](Self::new), which leaves that to the driver.
pub struct NetBufPtr {
    /// Names the object that holds the buffer. What it points to is said by `origin`.
    raw_ptr: NonNull<u8>,
    /// Valid for reads and writes of `len` initialised bytes that nobody else reaches while `self` lives.
    buf_ptr: NonNull<u8>,
    /// At most [`isize::MAX`].
    len: usize,
    /// True of `raw_ptr` until `self` is dropped or taken apart.
    origin: Origin,
}

// SAFETY: the packet is reached through `self` only, and bytes may change threads. The object behind the raw pointer
// may be used and released in any thread: the makers of `new` and `with_release` promise it, and `NetBufBox` is `Send`.
unsafe impl Send for NetBufPtr {}

// SAFETY: a shared `NetBufPtr` gives nothing but reads of its bytes and copies of its pointers.
unsafe impl Sync for NetBufPtr {}

impl NetBufPtr {
    /// Makes a pointer to the packet of `len` bytes at `buf_ptr`, inside an object that `raw_ptr` stands for.
    ///
    /// The object is not released when the pointer is dropped: its driver has to find it by the raw pointer.
    /// [`with_release`](Self::with_release) has no such trap.
    ///
    /// # Safety
    ///
    /// * Until the result is dropped or [taken apart](Self::into_raw), `buf_ptr` is valid for reads and writes of `len`
    ///   initialised bytes, which lie in one allocation, are at most [`isize::MAX`], and are not accessed in any other
    ///   way by the program or a device.
    /// * This holds in whatever thread the result is. `raw_ptr` is never dereferenced by this crate.
    #[must_use]
    pub const unsafe fn new(raw_ptr: NonNull<u8>, buf_ptr: NonNull<u8>, len: usize) -> Self {
        Self {
            raw_ptr,
            buf_ptr,
            len,
            origin: Origin::Unmanaged,
        }
    }

    /// Makes a pointer as [`new`](Self::new) does, whose drop calls `release` on `raw_ptr`.
    ///
    /// # Safety
    ///
    /// * What [`new`](Self::new) demands.
    /// * `release(raw_ptr)` may be called once, in any thread, after which nobody uses the object through `raw_ptr`.
    #[must_use]
    pub const unsafe fn with_release(
        raw_ptr: NonNull<u8>,
        buf_ptr: NonNull<u8>,
        len: usize,
        release: unsafe fn(NonNull<u8>),
    ) -> Self {
        Self {
            raw_ptr,
            buf_ptr,
            len,
            origin: Origin::Managed(release),
        }
    }

    /// Returns the pointer that stands for the object, as its maker gave it.
    #[must_use]
    pub const fn raw_ptr<T>(&self) -> *mut T {
        self.raw_ptr.as_ptr().cast()
    }

    /// Takes the pointer apart: returns the one that stands for the object, which is not released.
    #[must_use]
    pub fn into_raw(self) -> NonNull<u8> {
        ManuallyDrop::new(self).raw_ptr
    }

    /// Returns the length of the packet, in bytes.
    #[must_use]
    pub const fn packet_len(&self) -> usize {
        self.len
    }

    /// Returns the packet.
    #[must_use]
    pub const fn packet(&self) -> &[u8] {
        // SAFETY: by the invariant of `buf_ptr` these are `len` initialised bytes that only `self` reaches, and it is
        // borrowed for as long.
        unsafe { slice::from_raw_parts(self.buf_ptr.as_ptr(), self.len) }
    }

    /// Returns the packet, to be written.
    #[must_use]
    pub const fn packet_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `packet`, and `self` is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.buf_ptr.as_ptr(), self.len) }
    }

    /// Returns the [`NetBuf`] inside, if it is one.
    #[cfg(feature = "alloc")]
    pub(crate) const fn net_buf(&self) -> Option<&NetBuf> {
        match self.origin {
            // SAFETY: by the invariant of `origin`, `raw_ptr` owns a live `NetBuf`. Its packet, which `packet_mut` may
            // have lent, is not part of it, and no other reference to it exists.
            Origin::NetBuf => Some(unsafe { self.raw_ptr.cast().as_ref() }),
            Origin::Unmanaged | Origin::Managed(_) => None,
        }
    }
}

impl Drop for NetBufPtr {
    fn drop(&mut self) {
        match self.origin {
            Origin::Unmanaged => {}
            // SAFETY: the caller of `with_release` promised that this may be called once. The origin of a pointer does
            // not change, and `into_raw` forgets the pointer, so this is the one time.
            Origin::Managed(release) => unsafe { release(self.raw_ptr) },
            #[cfg(feature = "alloc")]
            // SAFETY: `raw_ptr` is a box that `into_buf_ptr` has taken apart, and whoever takes it over instead of this
            // drop forgets the pointer.
            Origin::NetBuf => drop(unsafe { NetBufBox::from_raw(self.raw_ptr.cast().as_ptr()) }),
        }
    }
}

impl fmt::Debug for NetBufPtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetBufPtr")
            .field("buf_ptr", &self.buf_ptr)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A [`NetBuf`] in a box, which is how drivers keep them and how they become a [`NetBufPtr`].
#[cfg(feature = "alloc")]
pub type NetBufBox = Box<NetBuf>;

/// A buffer of a [`NetBufPool`], which it goes back to when dropped.
///
/// ```text
///   ______________________ capacity ______________________
///  /                                                      \
/// +------------------+------------------+------------------+
/// |      Header      |      Packet      |      Unused      |
/// +------------------+------------------+------------------+
///  \__ header_len __/ \__ packet_len __/
/// ```
///
/// The header is what a device wants before the frame; the packet is the frame. Both are always inside the buffer.
///
/// ```
/// use axdriver_net::{DevError, NetBufPool};
///
/// let pool = NetBufPool::new(8, 2048)?;
/// let mut buf = pool.alloc_boxed().ok_or(DevError::NoMemory)?;
/// buf.try_set_lens(12, 60)?;
/// buf.packet_mut().fill(0xaa);
/// assert_eq!(buf.packet_with_header().len(), 72);
/// // What does not fit is refused, and nothing is changed.
/// assert_eq!(buf.try_set_lens(12, 2037), Err(DevError::InvalidParam));
/// assert_eq!(buf.packet().len(), 60);
/// # Ok::<(), DevError>(())
/// ```
#[cfg(feature = "alloc")]
pub struct NetBuf {
    /// At most `capacity`.
    header_len: usize,
    /// At most `capacity - header_len`.
    packet_len: usize,
    /// The length of a buffer of `pool`.
    capacity: usize,
    /// The first byte of slot `slot` of `pool`: `capacity` initialised bytes that belong to `self` alone.
    buf_ptr: NonNull<u8>,
    /// The slot of `pool` that `self` owns.
    slot: usize,
    /// Keeps the memory at `buf_ptr` alive.
    pool: Arc<NetBufPool>,
}

// SAFETY: the memory at `buf_ptr` is reached through `self` only and kept alive by `pool`, which is `Send` and `Sync`.
#[cfg(feature = "alloc")]
unsafe impl Send for NetBuf {}

// SAFETY: a shared `NetBuf` gives nothing but reads.
#[cfg(feature = "alloc")]
unsafe impl Sync for NetBuf {}

#[cfg(feature = "alloc")]
impl NetBuf {
    /// Makes the owner of a slot.
    ///
    /// # Safety
    ///
    /// `slot` has been taken from `pool` and is not owned otherwise; `buf_ptr` points to it.
    pub(crate) unsafe fn from_slot(
        pool: Arc<NetBufPool>,
        slot: usize,
        buf_ptr: NonNull<u8>,
    ) -> Self {
        Self {
            header_len: 0,
            packet_len: 0,
            capacity: pool.buffer_len(),
            buf_ptr,
            slot,
            pool,
        }
    }

    /// Returns the length of the whole buffer, in bytes.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the length of the header, in bytes.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.header_len
    }

    /// Returns the length of the packet, in bytes.
    #[must_use]
    pub const fn packet_len(&self) -> usize {
        self.packet_len
    }

    /// Returns the header.
    #[must_use]
    pub const fn header(&self) -> &[u8] {
        self.raw_buf().split_at(self.header_len).0
    }

    /// Returns the packet.
    #[must_use]
    pub const fn packet(&self) -> &[u8] {
        self.packet_with_header().split_at(self.header_len).1
    }

    /// Returns the packet, to be written.
    #[must_use]
    pub const fn packet_mut(&mut self) -> &mut [u8] {
        let (header_len, packet_len) = (self.header_len, self.packet_len);
        let (_, rest) = self.raw_buf_mut().split_at_mut(header_len);
        rest.split_at_mut(packet_len).0
    }

    /// Returns the header and the packet, which lie next to each other.
    #[must_use]
    pub const fn packet_with_header(&self) -> &[u8] {
        self.raw_buf().split_at(self.header_len + self.packet_len).0
    }

    /// Returns the whole buffer.
    #[must_use]
    pub const fn raw_buf(&self) -> &[u8] {
        // SAFETY: by the invariant of `buf_ptr` these are `capacity` initialised bytes that only `self` reaches, and it
        // is borrowed for as long.
        unsafe { slice::from_raw_parts(self.buf_ptr.as_ptr(), self.capacity) }
    }

    /// Returns the whole buffer, to be written.
    #[must_use]
    pub const fn raw_buf_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `raw_buf`, and `self` is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.buf_ptr.as_ptr(), self.capacity) }
    }

    /// Sets the lengths of the header and the packet, in bytes.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: the two together are longer than the buffer. Nothing is changed.
    pub const fn try_set_lens(&mut self, header_len: usize, packet_len: usize) -> DevResult {
        match header_len.checked_add(packet_len) {
            Some(len) if len <= self.capacity => {
                self.header_len = header_len;
                self.packet_len = packet_len;
                Ok(())
            }
            _ => Err(DevError::InvalidParam),
        }
    }

    /// Sets the length of the header, in bytes, at most up to what the packet leaves of the buffer.
    ///
    /// Where a length from outside has to be checked, use [`try_set_lens`](Self::try_set_lens).
    pub fn set_header_len(&mut self, header_len: usize) {
        self.header_len = header_len.min(self.capacity - self.packet_len);
    }

    /// Sets the length of the packet, in bytes, at most up to what the header leaves of the buffer.
    ///
    /// Where a length from outside has to be checked, use [`try_set_lens`](Self::try_set_lens).
    pub fn set_packet_len(&mut self, packet_len: usize) {
        self.packet_len = packet_len.min(self.capacity - self.header_len);
    }

    /// Returns whether the buffer is of this pool.
    #[must_use]
    pub fn is_from(&self, pool: &Arc<NetBufPool>) -> bool {
        Arc::ptr_eq(&self.pool, pool)
    }

    /// Turns the buffer into the form that crosses the driver trait. It goes back to its pool when that is dropped.
    #[must_use]
    pub fn into_buf_ptr(mut self: Box<Self>) -> NetBufPtr {
        let buf_ptr = NonNull::from(self.packet_mut()).cast();
        let len = self.packet_len;
        NetBufPtr {
            raw_ptr: NonNull::from(Box::leak(self)).cast(),
            buf_ptr,
            len,
            origin: Origin::NetBuf,
        }
    }

    /// Turns a pointer back into the buffer that it was made of, if that is a buffer of `pool`.
    ///
    /// # Errors
    ///
    /// The pointer itself, unharmed, if it was not made by [`into_buf_ptr`](Self::into_buf_ptr) of a buffer of `pool`.
    pub fn try_from_buf_ptr(
        ptr: NetBufPtr,
        pool: &Arc<NetBufPool>,
    ) -> Result<NetBufBox, NetBufPtr> {
        if pool.owns(&ptr) {
            // SAFETY: only a pointer that `into_buf_ptr` has made is owned by a pool.
            Ok(unsafe { Self::from_buf_ptr(ptr) })
        } else {
            Err(ptr)
        }
    }

    /// Turns a pointer back into the buffer that it was made of.
    ///
    /// # Safety
    ///
    /// `ptr` was made by [`into_buf_ptr`](Self::into_buf_ptr).
    #[must_use]
    pub unsafe fn from_buf_ptr(ptr: NetBufPtr) -> Box<Self> {
        let raw_ptr = ptr.into_raw().cast();
        // SAFETY: `into_buf_ptr` got this pointer by taking a box apart, and the `NetBufPtr` that owned it is forgotten.
        unsafe { Box::from_raw(raw_ptr.as_ptr()) }
    }
}

#[cfg(feature = "alloc")]
impl Drop for NetBuf {
    fn drop(&mut self) {
        // SAFETY: `self` owns the slot, and is not used again.
        unsafe { self.pool.give_back(self.slot) };
    }
}

#[cfg(feature = "alloc")]
impl fmt::Debug for NetBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetBuf")
            .field("header_len", &self.header_len)
            .field("packet_len", &self.packet_len)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    static RELEASED: AtomicUsize = AtomicUsize::new(0);

    /// Counts, and forgets the object, which is on the stack of the test.
    unsafe fn release(_: NonNull<u8>) {
        RELEASED.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_managed_pointer_is_released_once_when_dropped_and_not_when_taken_apart() {
        let mut packet = [1_u8, 2, 3];
        let raw = NonNull::from(&mut packet).cast::<u8>();
        // SAFETY: the packet is used through the pointer only, and releasing it does nothing.
        let mut ptr = unsafe { NetBufPtr::with_release(raw, raw, 3, release) };
        ptr.packet_mut()[0] = 9;
        assert_eq!(ptr.packet(), [9, 2, 3]);
        assert_eq!(ptr.packet_len(), 3);
        assert_eq!(ptr.raw_ptr::<u8>(), raw.as_ptr());
        assert_eq!(RELEASED.load(Ordering::Relaxed), 0);
        drop(ptr);
        assert_eq!(RELEASED.load(Ordering::Relaxed), 1);

        // SAFETY: as above; the first pointer is gone.
        let ptr = unsafe { NetBufPtr::with_release(raw, raw, 3, release) };
        assert_eq!(ptr.into_raw(), raw);
        // SAFETY: as above.
        drop(unsafe { NetBufPtr::new(raw, raw, 3) });
        assert_eq!(RELEASED.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn pointers_and_buffers_can_be_sent_and_shared() {
        const fn is_send_and_sync<T: Send + Sync>() {}
        is_send_and_sync::<NetBufPtr>();
        #[cfg(feature = "alloc")]
        is_send_and_sync::<NetBuf>();
        #[cfg(feature = "alloc")]
        is_send_and_sync::<NetBufPool>();
    }

    #[cfg(feature = "alloc")]
    mod with_alloc {
        use proptest::prelude::*;

        use super::super::*;

        fn pool(capacity: usize) -> Arc<NetBufPool> {
            NetBufPool::new(capacity, 2048).unwrap()
        }

        #[test]
        fn a_dropped_pointer_gives_its_buffer_back() {
            let pool = pool(1);
            for _ in 0..10 {
                let ptr = pool.alloc_boxed().unwrap().into_buf_ptr();
                assert_eq!(pool.available(), 0);
                drop(ptr);
                assert_eq!(pool.available(), 1);
            }
        }

        #[test]
        fn a_pointer_goes_back_to_the_buffer_that_it_was_made_of() {
            let pool = pool(1);
            let mut buf = pool.alloc_boxed().unwrap();
            buf.try_set_lens(12, 60).unwrap();
            buf.packet_mut().fill(3);
            let mut ptr = buf.into_buf_ptr();
            assert_eq!(ptr.packet(), [3; 60]);
            ptr.packet_mut().fill(4);
            let buf = NetBuf::try_from_buf_ptr(ptr, &pool).unwrap();
            assert_eq!((buf.header_len(), buf.packet_len()), (12, 60));
            assert_eq!(buf.packet(), [4; 60]);
            assert_eq!(buf.packet_with_header().len(), 72);
            assert_eq!(buf.header().len(), 12);
        }

        #[test]
        fn a_foreign_pointer_is_given_back_unharmed() {
            let (ours, theirs) = (pool(1), pool(1));
            let mut buf = theirs.alloc_boxed().unwrap();
            buf.set_packet_len(60);
            buf.packet_mut().fill(7);
            let foreign = NetBuf::try_from_buf_ptr(buf.into_buf_ptr(), &ours).unwrap_err();
            assert_eq!(foreign.packet(), [7; 60]);
            assert!(theirs.owns(&foreign) && !ours.owns(&foreign));
            drop(foreign);
            assert_eq!(theirs.available(), 1);
        }

        #[test]
        fn a_pointer_that_lies_about_its_object_is_not_believed() {
            let pool = pool(1);
            let mut buf = pool.alloc_boxed().unwrap();
            buf.set_packet_len(60);
            let inside = NonNull::from(buf.packet_mut()).cast::<u8>();
            let mut object = 0_u64;
            let raw = NonNull::from(&mut object).cast();
            // SAFETY: the packet is that of `buf`, which is not used while the pointer lives.
            let ptr = unsafe { NetBufPtr::new(raw, inside, 60) };
            assert!(!pool.owns(&ptr));
            assert!(NetBuf::try_from_buf_ptr(ptr, &pool).is_err());
        }

        #[test]
        fn buffers_outlive_the_handle_of_their_pool() {
            let pool = pool(1);
            let mut buf = pool.alloc().unwrap();
            drop(pool);
            buf.raw_buf_mut().fill(1);
            assert_eq!(buf.raw_buf(), [1; 2048]);
        }

        #[test]
        fn a_length_from_a_device_cannot_leave_the_buffer() {
            let pool = pool(1);
            let mut buf = pool.alloc_boxed().unwrap();
            assert_eq!(buf.try_set_lens(12, 2048 - 12), Ok(()));
            assert_eq!(buf.try_set_lens(12, 2048 - 11), Err(DevError::InvalidParam));
            assert_eq!(buf.try_set_lens(1, usize::MAX), Err(DevError::InvalidParam));
            assert_eq!(buf.try_set_lens(12, 0), Ok(()));
            assert_eq!(buf.try_set_lens(12, 59_988), Err(DevError::InvalidParam));
            assert_eq!(buf.packet_len(), 0);
            buf.set_packet_len(59_988);
            assert_eq!(buf.packet().len(), 2048 - 12);
            assert_eq!(buf.into_buf_ptr().packet().len(), 2048 - 12);
        }

        #[derive(Clone, Debug)]
        enum Step {
            Header(usize),
            Packet(usize),
            Both(usize, usize),
        }

        fn len() -> impl Strategy<Value = usize> {
            prop_oneof![0..5000_usize, any::<usize>(), usize::MAX - 8..=usize::MAX]
        }

        fn step() -> impl Strategy<Value = Step> {
            prop_oneof![
                len().prop_map(Step::Header),
                len().prop_map(Step::Packet),
                (len(), len()).prop_map(|(header, packet)| Step::Both(header, packet)),
            ]
        }

        proptest! {
            #[test]
            fn whatever_lengths_are_set_the_packet_stays_inside(
                steps in prop::collection::vec(step(), 1..20),
            ) {
                let pool = pool(1);
                let mut buf = pool.alloc_boxed().ok_or(TestCaseError::fail("no buffer"))?;
                let raw = buf.raw_buf().as_ptr_range();
                for step in steps {
                    match step {
                        Step::Header(len) => buf.set_header_len(len),
                        Step::Packet(len) => buf.set_packet_len(len),
                        Step::Both(header, packet) => {
                            let before = (buf.header_len(), buf.packet_len());
                            let fits = header.checked_add(packet).is_some_and(|len| len <= 2048);
                            prop_assert_eq!(buf.try_set_lens(header, packet).is_ok(), fits);
                            let now = (buf.header_len(), buf.packet_len());
                            prop_assert_eq!(now, if fits { (header, packet) } else { before });
                        }
                    }
                    let packet = buf.packet_mut().as_ptr_range();
                    prop_assert!(raw.start <= packet.start && packet.end <= raw.end);
                    prop_assert_eq!(buf.packet().len(), buf.packet_len());
                    prop_assert_eq!(
                        buf.packet_with_header().len(),
                        buf.header_len() + buf.packet_len()
                    );
                }
            }
        }
    }
}

/// Safe code cannot make a buffer of a pointer:
///
/// ```compile_fail,E0133
/// use axdriver_net::NetBufPtr;
/// use core::ptr::NonNull;
///
/// let buffer = NetBufPtr::new(NonNull::dangling(), NonNull::dangling(), 4096);
/// ```
#[cfg(doctest)]
struct PointersMakeNoBuffer;
