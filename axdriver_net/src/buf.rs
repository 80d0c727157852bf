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
