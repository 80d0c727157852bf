//! What is behind these registers, behind this PCI function, and behind this bridge?

mod bars;
mod bridge;
mod mmio;
pub(crate) mod pci;

pub use self::{
    bars::{PciRangeAllocator, assign_bars},
    bridge::{PciBridge, route_pci_interrupt},
    mmio::probe_mmio_device,
    pci::{PciBusProbe, probe_pci_buses, probe_pci_device},
};
