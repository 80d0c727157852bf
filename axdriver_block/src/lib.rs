//! The contract between disk drivers and the operating systems that use them.
//!
//! A driver implements [`BlockDriverOps`]; a file system takes anything that does. The contract is the same for all
//! drivers, down to which error is returned for what, and it stands at the trait.
//!
//! ```
//! use axdriver_block::{BlockDriverOps, DevError, DevResult};
//!
//! /// Reads the boot sector of a disk and returns whether it is signed.
//! fn is_bootable<D: BlockDriverOps + ?Sized>(disk: &mut D) -> DevResult<bool> {
//!     let mut sector = [0; 512];
//!     if disk.block_size() != sector.len() {
//!         return Err(DevError::Unsupported);
//!     }
//!     disk.read_block(0, &mut sector)?;
//!     Ok(sector.ends_with(&[0x55, 0xaa]))
//! }
//! # #[cfg(feature = "ramdisk")]
//! # {
//! # use axdriver_block::ramdisk::RamDisk;
//!
//! assert_eq!(is_bootable(&mut RamDisk::new(1024)), Ok(false));
//! assert_eq!(is_bootable(&mut RamDisk::new(0)), Err(DevError::InvalidParam));
//! # }
//! ```
//!
//! # Features
//!
//! * `alloc`: implements the traits for `Box<T>`.
//! * `conformance`: the contract as code for any driver, in the module `conformance`. Needs `alloc`.
//! * `ramdisk`: a disk in memory, `ramdisk::RamDisk`. Needs `alloc`.

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod capabilities;
#[cfg(feature = "conformance")]
pub mod conformance;
mod forward;
#[cfg(feature = "ramdisk")]
pub mod ramdisk;
pub mod request;

#[doc(no_inline)]
pub use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};

pub use self::{
    capabilities::BlockCapabilities,
    request::{check_request, check_write},
};

/// What a disk driver implements: reading, writing and flushing whole blocks.
///
/// Every request names its first block and brings a buffer, whose length says how many blocks are meant. Drivers
/// call [`check_request`] or [`check_write`] first, so that all of them refuse the same requests with the same errors:
///
/// * An empty buffer, one that is not a whole number of blocks, and a range that leaves the device, are
///   [`DevError::InvalidParam`]. Nothing is read or written, and the buffer is untouched.
/// * A write to a read-only device is [`DevError::Unsupported`], provided that the range is right. Nothing is written.
///
/// The methods return when the request is complete, so the buffer is the caller's again in any case.
pub trait BlockDriverOps: BaseDriverOps {
    /// Returns the size of the device, in blocks.
    ///
    /// It can change while the driver runs (see [`InterruptCause::CONFIGURATION`]). The product with
    /// [`block_size`](Self::block_size) is at most [`u64::MAX`].
    fn num_blocks(&self) -> u64;

    /// Returns the size of a block, in bytes. It is at least 1 and never changes.
    fn block_size(&self) -> usize;

    /// Reads as many blocks as `buf` holds, beginning with the block `block_id`.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `buf` is empty or not a whole number of blocks, or the range leaves the device.
    ///   `buf` is untouched.
    /// * [`DevError::Io`]: the device failed. The contents of `buf` are unspecified.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first. The contents of `buf` are unspecified.
    /// * [`DevError::Again`], [`DevError::NoMemory`]: there is no room for the request at the moment. `buf` is untouched.
    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult;

    /// Writes the blocks in `buf`, beginning with the block `block_id`.
    ///
    /// On `Ok` every later read returns the new data. Whether they outlive a loss of power is settled by
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `buf` is empty or not a whole number of blocks, or the range leaves the device.
    ///   Nothing is written.
    /// * [`DevError::Unsupported`]: the device is read-only. Nothing is written.
    /// * [`DevError::Io`]: the device failed. The contents of the range are unspecified, those of other blocks unchanged.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first. The contents of the range are
    ///   unspecified.
    /// * [`DevError::Again`], [`DevError::NoMemory`]: there is no room for the request at the moment. Nothing is written.
    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult;

    /// Makes all earlier writes durable: on `Ok` they outlive a loss of power.
    ///
    /// A device without a volatile cache has nothing to do and returns `Ok`, as does a read-only one.
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device failed. Any write since the last successful flush may be lost with the power.
    /// * [`DevError::Unsupported`]: the device may have a volatile cache, but no way to flush it. Nothing is promised.
    /// * [`DevError::BadState`]: the device or its driver has to be reset first. Nothing is promised.
    /// * [`DevError::Again`], [`DevError::NoMemory`]: there is no room for the request at the moment. Nothing is promised.
    fn flush(&mut self) -> DevResult;

    /// Returns what the device can do.
    ///
    /// The default is what is true of a device of which nothing more is known.
    fn capabilities(&self) -> BlockCapabilities {
        BlockCapabilities::new()
    }
}

/// Proves that the trait can be used behind a pointer.
const _: Option<&dyn BlockDriverOps> = None;

/// The examples of the README, as tests.
#[cfg(all(doctest, feature = "ramdisk", feature = "conformance"))]
#[doc = include_str!("../README.md")]
struct Readme;
