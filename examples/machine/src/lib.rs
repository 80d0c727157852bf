#![doc = include_str!("../README.md")]

pub mod emulated;
pub mod hal;
pub mod hostile;
pub mod memory;
pub mod qemu;
pub mod registers;
pub mod trace;
pub mod vhost_user;

pub use emulated::{
    Board, Builder, Cable, Device, DeviceCounters, DeviceHandle, Disk, Display, Entropy, Function,
    Image, Nic, Peer, Slot, Version, Violation,
};
pub use hal::MachineHal;
pub use memory::{Buffer, Memory, MemoryCounters};
pub use registers::{Accesses, Installed, Machine, RegisterBus, mmio_transport, pci_root};
pub use trace::{Event, Record, Trace};
