//! Drivers for virtio disks, NICs and displays, behind the axdriver traits.
//!
//! An OS implements [`VirtIoHal`], which gives the drivers memory that devices can reach, and hands
//! over a register address or a PCI function. It gets a [`VirtIoBlkDev`], a [`VirtIoNetDev`] or a
//! [`VirtIoGpuDev`] back, whose traits are those of `axdriver_block`, `axdriver_net` and
//! `axdriver_display`. Each device class is behind a Cargo feature; see below.
//!
//! # From a register address to a block read back
//!
#![cfg_attr(feature = "block", doc = "```")]
#![cfg_attr(not(feature = "block"), doc = "```ignore")]
//! use axdriver_base::{DevError, DevResult, DeviceType};
//! use axdriver_block::BlockDriverOps;
//! use axdriver_virtio::{VirtIoBlkDev, VirtIoHal, probe_mmio_device};
//!
//! /// Finds a disk behind the registers, writes its first block and reads it back.
//! ///
//! /// # Safety
//! ///
//! /// `registers` must be the 512 bytes of registers of a virtio-mmio slot that nobody else uses.
//! unsafe fn start<H: VirtIoHal>(registers: *mut u8) -> DevResult<Vec<u8>> {
//!     // SAFETY: the caller's promise.
//!     let found = unsafe { probe_mmio_device(registers, 0x200) };
//!     let Some((DeviceType::Block, transport)) = found else {
//!         return Err(DevError::Unsupported);
//!     };
//!     let mut disk = VirtIoBlkDev::<H, _>::try_new(transport)?;
//!     let written = vec![0x5a; disk.block_size()];
//!     disk.write_block(0, &written)?;
//!     disk.flush()?; // from here on, the block outlives a power cut
//!     let mut read = vec![0; disk.block_size()];
//!     disk.read_block(0, &mut read)?;
//!     // What cannot be is refused, and nothing is read.
//!     let beyond = disk.num_blocks();
//!     assert_eq!(disk.read_block(beyond, &mut read), Err(DevError::InvalidParam));
//!     Ok(read)
//! }
//!
//! // On this computer a board is emulated; a kernel has an address from its device tree instead.
//! use machine::{Board, MachineHal, emulated::{Disk, Version}};
//! let board = Board::emulated().mmio(Version::Modern, Disk::memory(1 << 20)).build()?;
//! let registers = board.mmio_slots()[0].pointer();
//! // SAFETY: the board's first slot, which nobody else uses.
//! assert_eq!(unsafe { start::<MachineHal>(registers) }?, [0x5a; 512]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Over PCI, [`probe_pci_buses`] walks a bus and those behind its bridges, sets up bridges and BARs
//! where no firmware did, and yields the devices it knows. [`route_pci_interrupt`] says where the
//! interrupt of one comes out.
//!
//! # What can be relied upon
//!
//! * **The device is not trusted.** Every index, id and length that it reports is checked against
//!   what the driver asked for. A lie resets the device; the caller gets [`DevError::Io`], then
//!   [`DevError::BadState`] until the driver's `reset`. Nothing that a device says panics or
//!   hangs.
//! * **The caller's memory is the caller's.** When a call returns, the device is done with the
//!   buffer, or has been reset. What the driver lends for longer belongs to it. Memory is freed
//!   after a reset, never before; a device that will not reset keeps what it was told of, and the
//!   log says so.
//! * **Every wait ends**: see [`WaitPolicy`].
//! * **The heap is not used on the way of a request or frame**, and a batch costs one notification,
//!   which is one register write over either transport.
//! * **Interrupts** are off until [`enable_interrupts`]. The interrupt side can be split off, so
//!   that a handler needs no lock: see [`InterruptHandle`].
//!
//! The specification that this follows is VirtIO 1.3; section numbers in the sources are its.
//! `CONFORMANCE.md` in this crate has its requirements in a table, each with the test that holds
//! it. Legacy MMIO devices (version 1) are driven too; legacy PCI devices are not.
//!
//! # Features
//!
//! | feature | what it adds | needs the heap |
//! |---|---|---|
//! | `block` | `VirtIoBlkDev` | no |
//! | `net` | `VirtIoNetDev` | yes, for its buffers |
//! | `gpu` | `VirtIoGpuDev` | no |
//! | `alloc` | nothing by itself; `net` asks for it | |
//!
//! None is on by default. Probing works without any.
//!
//! [`DevError::Io`]: axdriver_base::DevError::Io
//! [`DevError::BadState`]: axdriver_base::DevError::BadState
//! [`enable_interrupts`]: axdriver_base::BaseDriverOps::enable_interrupts

#![no_std]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

#[cfg(test)]
use machine as _;

#[cfg(feature = "block")]
mod blk;
mod convert;
#[cfg(any(feature = "block", feature = "net", feature = "gpu"))]
mod dma;
#[cfg(feature = "gpu")]
mod gpu;
mod interrupt;
#[cfg(any(feature = "block", feature = "net", feature = "gpu"))]
mod lifecycle;
#[cfg(feature = "net")]
mod net;
mod probe;
#[cfg(any(feature = "block", feature = "net", feature = "gpu"))]
mod queue;
mod transport;
#[cfg(any(feature = "block", feature = "net", feature = "gpu"))]
mod wait;

pub use virtio_drivers::{
    BufferDirection, Hal as VirtIoHal, PhysAddr,
    transport::{
        Transport,
        mmio::{MmioError, MmioVersion, VirtIOHeader},
        pci::{VirtioPciError, bus as pci},
    },
};

#[cfg(feature = "block")]
pub use self::blk::VirtIoBlkDev;
#[cfg(feature = "gpu")]
pub use self::gpu::VirtIoGpuDev;
#[cfg(feature = "net")]
pub use self::net::VirtIoNetDev;
#[cfg(any(feature = "block", feature = "net", feature = "gpu"))]
pub use self::wait::WaitPolicy;
pub use self::{
    convert::{as_dev_err, as_dev_type},
    interrupt::InterruptHandle,
    probe::{
        PciBridge, PciBusProbe, PciRangeAllocator, assign_bars, probe_mmio_device, probe_pci_buses,
        probe_pci_device, route_pci_interrupt,
    },
    transport::{MmioTransport, PciTransport},
};
