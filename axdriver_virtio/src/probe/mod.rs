//! What is behind these registers, and behind this PCI function?

mod bars;
mod mmio;
pub(crate) mod pci;

pub use self::{
    bars::{PciRangeAllocator, assign_bars},
    mmio::probe_mmio_device,
    pci::{PciBusProbe, probe_pci_bus, probe_pci_device},
};
