//! The host as a board: memory, registers and virtio devices for drivers that run in a host process.

pub mod hal;
pub mod hostile;
pub mod memory;
pub mod qemu;
pub mod registers;
pub mod trace;

pub use hal::MachineHal;
pub use memory::{Buffer, Memory, MemoryCounters};
pub use registers::{Accesses, Installed, Machine, RegisterBus, mmio_transport, pci_root};
pub use trace::{Event, Record, Trace};
