//! The contract between network card drivers and the stacks that use them.
//!
//! A driver implements [`NetDriverOps`]; a network stack takes anything that does. Frames cross it in buffers that
//! belong to the driver, as [`NetBufPtr`], and a buffer that is dropped goes back there.
//!
//! ```
//! use axdriver_net::{DevError, DevResult, NetDriverOps};
//!
//! /// Looks at all frames that have come in, and returns how many bytes they have.
//! fn count_bytes<D: NetDriverOps + ?Sized>(nic: &mut D) -> DevResult<usize> {
//!     let mut bytes = 0;
//!     loop {
//!         match nic.receive() {
//!             Ok(frame) => {
//!                 bytes += frame.packet_len();
//!                 nic.recycle_rx_buffer(frame)?;
//!             }
//!             Err(DevError::Again) => return Ok(bytes),
//!             Err(error) => return Err(error),
//!         }
//!     }
//! }
//! # #[cfg(feature = "loopback")]
//! # {
//! # use axdriver_net::{EthernetAddress, loopback::LoopbackNic};
//!
//! let mut nic = LoopbackNic::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 4)?;
//! let frame = nic.alloc_tx_buffer(60)?;
//! nic.transmit(frame)?;
//! assert_eq!(count_bytes(&mut nic), Ok(60));
//! assert_eq!(nic.alloc_tx_buffer(1515).err(), Some(DevError::InvalidParam));
//! # }
//! # Ok::<(), DevError>(())
//! ```
//!
//! # Features
//!
//! * `alloc` (default): `NetBuf` and `NetBufPool`; implements the traits for `Box<T>`.
//! * `conformance`: the contract as code for any driver, in the module `conformance`. Needs `alloc`.
//! * `loopback`: a network card that receives what it transmits, `loopback::LoopbackNic`. Needs `alloc`.
//! * `smoltcp`: smoltcp over any driver, `smoltcp::SmoltcpDevice`. Needs `alloc`.

#![no_std]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod address;
#[expect(unsafe_code, reason = "guards the ownership of frames")]
mod buf;
mod capabilities;
#[cfg(feature = "conformance")]
pub mod conformance;
mod forward;
#[cfg(feature = "loopback")]
pub mod loopback;
#[cfg(feature = "alloc")]
#[expect(unsafe_code, reason = "guards the memory that frames are in")]
mod pool;
#[cfg(feature = "smoltcp")]
pub mod smoltcp;

#[doc(no_inline)]
pub use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};

pub use self::{address::EthernetAddress, buf::NetBufPtr, capabilities::NetCapabilities};
#[cfg(feature = "alloc")]
pub use self::{
    buf::{NetBuf, NetBufBox},
    pool::NetBufPool,
};

/// What a network card driver implements: sending and receiving whole Ethernet frames, without blocking.
///
/// Frames are in buffers that belong to the driver and are lent as [`NetBufPtr`]. A frame begins with the Ethernet
/// header and ends before the frame check sequence.
///
/// * To send: [`recycle_tx_buffers`](Self::recycle_tx_buffers), [`can_transmit`](Self::can_transmit),
///   [`alloc_tx_buffer`](Self::alloc_tx_buffer), fill it, [`transmit`](Self::transmit).
/// * To receive: [`receive`](Self::receive), look at it, [`recycle_rx_buffer`](Self::recycle_rx_buffer).
///
/// A buffer is never lost. One that is dropped goes back to its owner (see [`NetBufPtr`]), and so does one that comes
/// with an error: the call has consumed it. What is dropped instead of transmitted can be allocated again, and what is
/// dropped instead of recycled is used for receiving again, at the latest when [`receive`](Self::receive) is next called.
pub trait NetDriverOps: BaseDriverOps {
    /// Returns the Ethernet address of the device. It is that of one station: not all zeros, and no group's.
    fn mac_address(&self) -> EthernetAddress;

    /// Returns whether there is room to send: the next [`alloc_tx_buffer`](Self::alloc_tx_buffer) of a valid size and
    /// the [`transmit`](Self::transmit) of that buffer will not fail for want of it.
    fn can_transmit(&self) -> bool;

    /// Returns whether a frame has come in: the next [`receive`](Self::receive) is not [`DevError::Again`], unless the
    /// device has got the frame wrong.
    fn can_receive(&self) -> bool;

    /// Returns how many received frames the device can hold until they are taken. It is at least 1.
    fn rx_queue_size(&self) -> usize;

    /// Returns how many frames the device can hold until they are sent. It is at least 1.
    fn tx_queue_size(&self) -> usize;

    /// Gives back a buffer that [`receive`](Self::receive) returned, for later frames.
    ///
    /// # Errors
    ///
    /// The buffer is consumed in any case.
    ///
    /// * [`DevError::InvalidParam`]: the buffer is not this driver's. It has gone back to its owner.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first. The buffer has gone back to its owner.
    fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult;

    /// Takes back the buffers of all frames that have been sent.
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device failed to send one of them. All that can be taken back has been.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first.
    fn recycle_tx_buffers(&mut self) -> DevResult;

    /// Hands a frame to the device to be sent, and returns at once.
    ///
    /// The frame is the whole [packet](NetBufPtr::packet) of `tx_buf`, which [`alloc_tx_buffer`](Self::alloc_tx_buffer)
    /// has made. Frames leave in the order of the calls.
    ///
    /// # Errors
    ///
    /// The buffer is consumed in any case, and the frame is not sent.
    ///
    /// * [`DevError::InvalidParam`]: the buffer is not this driver's. It has gone back to its owner.
    /// * [`DevError::Again`]: there is no room now. Ask [`can_transmit`](Self::can_transmit) first, to keep the frame;
    ///   [`recycle_tx_buffers`](Self::recycle_tx_buffers) makes room.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first.
    fn transmit(&mut self, tx_buf: NetBufPtr) -> DevResult;

    /// Takes a frame that has come in. Frames are returned in the order in which they came.
    ///
    /// # Errors
    ///
    /// * [`DevError::Again`]: none has. Nothing is changed.
    /// * [`DevError::Io`]: the device said something impossible about the next frame (too long, too short), which has
    ///   been thrown away. Its buffer is in use for receiving again.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first.
    fn receive(&mut self) -> DevResult<NetBufPtr>;

    /// Returns a buffer for a frame of `size` bytes, from the Ethernet header on.
    ///
    /// Its contents are unspecified (an old frame, as a rule), so write all of it.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `size` is 0 or above [`NetCapabilities::max_frame_len`]. No buffer is used up.
    /// * [`DevError::NoMemory`]: there is no buffer now. [`recycle_tx_buffers`](Self::recycle_tx_buffers) brings some back.
    fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr>;

    /// Returns what the device can do.
    ///
    /// The default is what is true of a device of which nothing more is known.
    fn capabilities(&self) -> NetCapabilities {
        NetCapabilities::new()
    }
}

/// Proves that the trait can be used behind a pointer.
const _: Option<&dyn NetDriverOps> = None;

/// The examples of the README, as tests.
#[cfg(all(doctest, feature = "loopback"))]
#[doc = include_str!("../README.md")]
struct Readme;
