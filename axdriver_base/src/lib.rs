//! What every device driver shares: the base trait, the errors, and the words for interrupts.
//!
//! A driver implements [`BaseDriverOps`] and, on top of it, the trait of its device class, which lives in a crate of
//! its own: `axdriver_block` for disks, `axdriver_net` for network cards, `axdriver_display` for displays. Those crates
//! re-export what they need from here, so most programs do not name this one.
//!
//! ```
//! use axdriver_base::{BaseDriverOps, DevError, DeviceType};
//!
//! struct Uart;
//!
//! impl BaseDriverOps for Uart {
//!     fn device_name(&self) -> &str {
//!         "uart"
//!     }
//!
//!     fn device_type(&self) -> DeviceType {
//!         DeviceType::Char
//!     }
//! }
//!
//! let mut uart = Uart;
//! assert_eq!(uart.device_type(), DeviceType::Char);
//! // A driver that knows nothing of interrupts says so, and its callers poll.
//! assert_eq!(uart.enable_interrupts(), Err(DevError::Unsupported));
//! ```
//!
//! # Features
//!
//! * `alloc`: implements the trait for `Box<T>`.
//! * `conformance`: the contract of the trait as code, in the module `conformance`.

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

#[cfg(feature = "conformance")]
pub mod conformance;
mod device;
mod error;
mod forward;
mod interrupt;

pub use self::{
    device::{BaseDriverOps, DeviceType},
    error::{DevError, DevResult},
    interrupt::InterruptCause,
};

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
