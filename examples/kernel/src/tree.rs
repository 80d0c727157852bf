//! What the device tree says, where a machine has one.
//!
//! Its buses are taken to translate no addresses, which is so on the boards that this kernel knows.

use alloc::vec::Vec;
use core::ops::Range;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};

use crate::arch::{Arch, Architecture};
use crate::devices::BUS_SIZE;
use crate::error::{Error, Result};
use crate::machine::{Machine, MmioSlot, PciHost, PciLine, PciLines};

/// What there are drivers behind: virtio-mmio slots, and PCI hosts.
const DEVICES: [&str; 2] = ["virtio,mmio", "pci-host-ecam-generic"];

/// A device tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree<'a>(Fdt<'a>);

impl<'a> Tree<'a> {
    /// Reads a tree.
    ///
    /// # Errors
    ///
    /// * [`Error::Machine`]: it is none, or it is broken.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        Fdt::new(bytes)
            .map(Self)
            .map_err(|_| Error::Machine("the device tree is broken"))
    }

    /// Returns the largest range of memory.
    #[must_use]
    pub(crate) fn memory(&self) -> Option<Range<u64>> {
        self.0
            .root()
            .children()
            .filter(|node| node.name_without_address() == "memory")
            .flat_map(registers)
            .max_by_key(|range| range.end - range.start)
    }

    /// Returns the command line.
    #[must_use]
    pub(crate) fn command_line(&self) -> Option<&'a str> {
        let chosen = self.0.find_node("/chosen")?;
        chosen.property("bootargs")?.value_as().ok()
    }

    /// Returns the first node, parents before children, that `wanted` holds for.
    pub(crate) fn find(&self, mut wanted: impl FnMut(FdtNode<'a>) -> bool) -> Option<FdtNode<'a>> {
        fn walk<'a>(
            node: FdtNode<'a>,
            wanted: &mut impl FnMut(FdtNode<'a>) -> bool,
        ) -> Option<FdtNode<'a>> {
            if wanted(node) {
                return Some(node);
            }
            node.children().find_map(|child| walk(child, wanted))
        }
        walk(self.0.root(), &mut wanted)
    }

    /// Returns the first node that is compatible with one of `names`.
    #[must_use]
    pub(crate) fn find_compatible(&self, names: &[&str]) -> Option<FdtNode<'a>> {
        self.find(|node| names.iter().any(|name| node.is_compatible(name)))
    }

    /// Returns the virtio-mmio slots and the PCI host.
    #[must_use]
    pub(crate) fn machine(&self) -> Machine {
        let mut slots = Vec::new();
        let mut pci = None;
        self.find(|node| {
            if node.is_compatible(DEVICES[0]) {
                slots.extend(slot(node));
            } else if node.is_compatible(DEVICES[1]) {
                pci = self.pci_host(node);
            }
            false
        });
        slots.sort_by_key(|slot: &MmioSlot| slot.base);
        Machine {
            slots,
            pci,
            coherent: all_coherent(self.0.root(), Arch::FLUSH.is_none()),
        }
    }

    fn pci_host(&self, node: FdtNode<'a>) -> Option<PciHost> {
        // Each range: 3 cells for the bus's address, of which the first tells the kind, 2 for the
        // processor's, 2 for the size (PCI Bus Binding to Open Firmware, 2.2.1.1).
        let ranges = cells(node, "ranges");
        let window = ranges.chunks_exact(7).find_map(|range| {
            let start = u64::from(range[1]) << 32 | u64::from(range[2]);
            let size = u64::from(range[5]) << 32 | u64::from(range[6]);
            (range[0] >> 24 & 3 == 2).then_some(start..start.saturating_add(size))
        });
        let configuration = registers(node).next()?;
        let buses = (configuration.end - configuration.start) / BUS_SIZE as u64;
        Some(PciHost {
            configuration: configuration.start,
            last_bus: u8::try_from(buses.checked_sub(1)?).unwrap_or(u8::MAX),
            window,
            lines: self
                .pci_lines(node)
                .map_or(PciLines::Board, PciLines::Table),
        })
    }

    /// Returns what `interrupt-map` says: for each device and pin, a line.
    fn pci_lines(&self, node: FdtNode<'a>) -> Option<Vec<PciLine>> {
        let map = cells(node, "interrupt-map");
        let mask = cells(node, "interrupt-map-mask");
        let (device_mask, pin_mask) = (*mask.first()?, *mask.get(3)?);
        let mut lines = Vec::new();
        let mut rest = map.as_slice();
        // Each row: 3 cells for the device, 1 for the pin, the controller, its unit's address, and its specifier.
        while let [device, _, _, pin, controller, more @ ..] = rest {
            let controller = self.find(|node| node.phandle() == Ok(Some(*controller)))?;
            let address = count(controller, "#address-cells");
            let specifier = count(controller, "#interrupt-cells");
            lines.push(PciLine {
                device_mask,
                device: *device,
                pin_mask,
                pin: *pin,
                line: Arch::specified_line(more.get(address..address + specifier)?)?,
            });
            rest = more.get(address + specifier..)?;
        }
        (!lines.is_empty()).then_some(lines)
    }
}

/// Returns whether the devices at and below a node see the processor's caches; `inherited` is what
/// the buses above say.
fn all_coherent(node: FdtNode<'_>, inherited: bool) -> bool {
    let says = |property| node.property(property).is_some();
    let coherent = says("dma-coherent") || inherited && !says("dma-noncoherent");
    let has_devices = DEVICES.iter().any(|name| node.is_compatible(name));
    (coherent || !has_devices) && node.children().all(|child| all_coherent(child, coherent))
}

/// Returns the ranges of a node's `reg`.
pub(crate) fn registers(node: FdtNode<'_>) -> impl Iterator<Item = Range<u64>> {
    node.reg()
        .ok()
        .flatten()
        .into_iter()
        .flatten()
        .filter_map(|register| {
            let start: u64 = register.address().ok()?;
            let size: u64 = register.size().ok()?;
            Some(start..start.checked_add(size)?)
        })
}

/// Returns a property's value as cells; none if it is not there.
pub(crate) fn cells(node: FdtNode<'_>, name: &str) -> Vec<u32> {
    let Some(property) = node.property(name) else {
        return Vec::new();
    };
    let (cells, _) = property.value().as_chunks::<4>();
    cells.iter().map(|cell| u32::from_be_bytes(*cell)).collect()
}

/// Returns a property's value as a count; 0 if it is not there.
fn count(node: FdtNode<'_>, name: &str) -> usize {
    cells(node, name)
        .first()
        .map_or(0, |&count| usize::try_from(count).unwrap_or(usize::MAX))
}

fn slot(node: FdtNode<'_>) -> Option<MmioSlot> {
    let range = registers(node).next()?;
    Some(MmioSlot {
        base: range.start,
        size: usize::try_from(range.end - range.start).ok()?,
        line: Arch::specified_line(&cells(node, "interrupts"))?,
    })
}
