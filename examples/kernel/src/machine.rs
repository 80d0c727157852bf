//! What the machine consists of, as far as it tells.

use alloc::vec::Vec;
use core::ops::Range;

use crate::arch::{Arch, Architecture};
use crate::error::{Error, Result};
use crate::paging;
use crate::tree::Tree;

/// What the start-up of an architecture knows when it is done.
#[derive(Clone, Debug)]
pub(crate) struct Boot {
    /// A range of memory that the direct map shows; it may hold the kernel's image and what follows.
    pub(crate) memory: Range<u64>,
    /// What the user says.
    pub(crate) command_line: &'static str,
    /// Where to learn more.
    pub(crate) description: Description,
}

#[cfg(not(target_arch = "x86_64"))]
impl Boot {
    /// Takes memory and command line from a device tree; a broken one is left to the caller of
    /// [`Machine::discover`] to complain about.
    ///
    /// # Safety
    ///
    /// A device tree lies at `tree`, which nothing changes as long as the kernel runs.
    pub(crate) unsafe fn from_tree(tree: *const u8) -> Self {
        // SAFETY: the caller promises that there is a tree; its header has 40 bytes.
        let header = unsafe { core::slice::from_raw_parts(tree, 40) };
        let size = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let is_tree = header[..4] == [0xd0, 0x0d, 0xfe, 0xed];
        // SAFETY: the second word is the tree's size, and the caller promises that it does not change.
        let bytes = unsafe { core::slice::from_raw_parts(tree, if is_tree { size } else { 0 }) };
        let tree = Tree::new(bytes).ok();
        Self {
            memory: tree.and_then(|tree| tree.memory()).unwrap_or(0..0),
            command_line: tree
                .and_then(|tree| tree.command_line())
                .unwrap_or_default(),
            description: Description::Tree(bytes),
        }
    }
}

/// Who tells what the machine consists of.
#[expect(dead_code, reason = "each architecture has one of them")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Description {
    /// A device tree.
    Tree(&'static [u8]),
    /// The command line, and ACPI tables if their root's physical address is not 0.
    Pc {
        /// The physical address of ACPI's root pointer.
        rsdp: u64,
    },
}

/// The places at which devices can be.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    /// Slots for virtio-mmio devices, which may be empty.
    pub(crate) slots: Vec<MmioSlot>,
    /// The PCI host.
    pub(crate) pci: Option<PciHost>,
    /// Whether all devices see the processor's caches.
    pub(crate) coherent: bool,
}

/// The registers of a virtio-mmio device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct MmioSlot {
    /// Their physical address.
    pub(crate) base: u64,
    /// Their size, in bytes.
    pub(crate) size: usize,
    /// The interrupt controller's line.
    pub(crate) line: u32,
}

/// A PCI host with memory-mapped configuration space (ECAM).
#[derive(Debug)]
pub(crate) struct PciHost {
    /// The physical address of the configuration space of bus 0.
    pub(crate) configuration: u64,
    /// The last bus that it is there for.
    pub(crate) last_bus: u8,
    /// Addresses for BARs; `None` if firmware has assigned them all.
    pub(crate) window: Option<Range<u64>>,
    /// Which lines the functions' pins lead to.
    pub(crate) lines: PciLines,
}

/// Which lines PCI functions' pins lead to.
#[derive(Debug)]
pub(crate) enum PciLines {
    /// As the device tree says.
    Table(Vec<PciLine>),
    /// As this kind of board has it; see [`Architecture::pci_line`].
    Board,
}

/// A row of the device tree's `interrupt-map`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PciLine {
    /// The bits of `device` that count.
    pub(crate) device_mask: u32,
    /// Bus, device and function, from bit 16, 11 and 8.
    pub(crate) device: u32,
    /// The bits of `pin` that count.
    pub(crate) pin_mask: u32,
    /// 1 for INTA#.
    pub(crate) pin: u32,
    /// The interrupt controller's line.
    pub(crate) line: u32,
}

impl PciLines {
    /// Returns the line of a device on bus 0 with these values in its registers Interrupt Pin (1 is
    /// INTA#) and Interrupt Line.
    #[must_use]
    pub(crate) fn line(&self, device: u8, pin: u8, interrupt_line: u8) -> Option<u32> {
        match self {
            Self::Table(rows) => rows
                .iter()
                .find(|row| {
                    (u32::from(device) << 11 ^ row.device) & row.device_mask == 0
                        && (u32::from(pin) ^ row.pin) & row.pin_mask == 0
                })
                .map(|row| row.line),
            Self::Board => Arch::pci_line(device, pin.checked_sub(1)?, interrupt_line),
        }
    }
}

impl Machine {
    /// Finds out what the machine consists of.
    ///
    /// # Errors
    ///
    /// * [`Error::Machine`]: what tells of it is broken.
    pub(crate) fn discover(boot: &Boot) -> Result<Self> {
        match boot.description {
            Description::Tree(bytes) => Ok(Tree::new(bytes)?.machine()),
            Description::Pc { rsdp } => Ok(Self {
                slots: boot
                    .command_line
                    .split_whitespace()
                    .filter_map(|word| word.strip_prefix("virtio_mmio.device="))
                    .map(|slot| parse_slot(slot).ok_or(Error::Machine("virtio_mmio.device=")))
                    .collect::<Result<_>>()?,
                pci: acpi_pci_host(rsdp),
                coherent: true,
            }),
        }
    }
}

/// Reads `512@0xfeb00e00:12`, as Linux's `virtio_mmio.device=` has it: size, address, line.
fn parse_slot(text: &str) -> Option<MmioSlot> {
    let (size, rest) = text.split_once('@')?;
    let (base, line) = rest.split_once(':')?;
    let (digits, unit) = match size.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 1024),
        None => (size, 1),
    };
    Some(MmioSlot {
        base: u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?,
        size: digits.parse::<usize>().ok()?.checked_mul(unit)?,
        line: line.split(':').next()?.parse().ok()?,
    })
}

/// Finds the PCI host in ACPI's table MCFG (PCI Firmware Specification 3.3, 4.1.2).
fn acpi_pci_host(rsdp: u64) -> Option<PciHost> {
    if rsdp == 0 {
        return None;
    }
    // Offset 16: the address of the RSDT, which holds 32-bit addresses of tables after its header of 36 bytes.
    let root = u64::from(acpi_field(rsdp, 16)?);
    let size = u64::from(acpi_field(root, 4)?);
    let table = (36..size)
        .step_by(4)
        .filter_map(|offset| acpi_field(root, offset).map(u64::from))
        .find(|&table| acpi_field(table, 0) == Some(u32::from_le_bytes(*b"MCFG")))?;
    let low = u64::from(acpi_field(table, 44)?);
    let high = u64::from(acpi_field(table, 48)?);
    // Segment, first and last bus.
    let [.., last_bus] = acpi_field(table, 52)?.to_le_bytes();
    Some(PciHost {
        configuration: high << 32 | low,
        last_bus,
        window: None,
        lines: PciLines::Board,
    })
}

/// Returns 32 bits of an ACPI table, or `None` if they do not lie below 4 GiB.
fn acpi_field(table: u64, offset: u64) -> Option<u32> {
    let address = table.checked_add(offset)?;
    if address > 0xffff_fffc {
        return None;
    }
    let field = paging::memory_at(address).cast::<u32>();
    // SAFETY: the direct map shows the first 4 GiB on the architecture that has these tables. What
    // lies there may be anything, and any bits are a `u32`; the firmware's tables are not changed.
    Some(unsafe { field.read_unaligned() })
}
