//! The boards that the examples run on, what is found on them, and drivers for that.

mod emulated;
mod qemu;

use std::fmt;

use anyhow::{Context, bail, ensure};
use axdriver_base::DeviceType;
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    InterruptHandle, MmioTransport, MmioVersion, PciRangeAllocator, PciTransport, VirtIoBlkDev,
    VirtIoGpuDev, VirtIoNetDev, WaitPolicy,
    pci::{DeviceFunction, MmioCam, PciRoot},
    probe_mmio_device, probe_pci_bus, probe_pci_device,
};
use embedded_graphics::pixelcolor::Rgb888;
use machine::{MachineHal, registers::register_pointer};

pub use self::emulated::{MachineTime, Transport};
use crate::{image::Image, time::Time};

/// The number of buffers in each of a NIC's queues.
const NET_QUEUE_SIZE: usize = 64;

/// The size of each disk of a board, in bytes.
const DISK_SIZE: u64 = 16 << 20;

/// The width and the height of each display of a board.
const RESOLUTION: (u32, u32) = (1280, 800);

/// A kind of board.
#[derive(Debug, Clone, Copy, Eq, PartialEq, clap::ValueEnum)]
pub enum BoardKind {
    /// Devices in this process: nothing to install, the same in each run.
    Emulated,
    /// QEMU's devices, with QEMU as a child process and no guest in it.
    Qemu,
}

/// How the registers of a board's devices look.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub enum Variant {
    /// Version 1.0 or later of VirtIO, on MMIO and PCI.
    Modern,
    /// Before version 1.0 of VirtIO, on MMIO.
    Legacy,
}

impl BoardKind {
    /// Makes a board with a disk, a NIC and a display on each bus, and installs it on this thread.
    ///
    /// The other end of each NIC's cable is a [`Peer`](crate::peer::Peer) that serves `page`.
    ///
    /// # Errors
    ///
    /// The host has not what the board takes: memory, or QEMU.
    pub fn start(self, variant: Variant, page: &[u8]) -> anyhow::Result<Box<dyn Board>> {
        Ok(match self {
            Self::Emulated => Box::new(emulated::Emulated::start(variant, page)?),
            Self::Qemu => Box::new(qemu::Qemu::start(variant, page)?),
        })
    }
}

/// A board that is installed on this thread for as long as this lives.
pub trait Board {
    /// Returns what the board is, in a few words.
    fn title(&self) -> &str;

    /// Returns where to look for devices.
    fn map(&self) -> Map;

    /// Returns what a display shows.
    ///
    /// # Errors
    ///
    /// There is no display at `place`, or it shows nothing.
    fn screen(&mut self, place: Place) -> anyhow::Result<Image>;

    /// Returns the clock for a stack on a NIC, once.
    ///
    /// The other end of the cable lives as this clock goes.
    ///
    /// # Errors
    ///
    /// There is no NIC at `place`, or somebody has its clock.
    fn network_time(&mut self, place: Place) -> anyhow::Result<Box<dyn Time>>;

    /// Returns what the board saw drivers do against the rules, and what they left behind. Boards that do not look return
    /// nothing.
    fn complaints(&mut self) -> Vec<String> {
        Vec::new()
    }
}

/// Returns what a display shows as a picture.
///
/// # Errors
///
/// It shows nothing.
pub fn picture(shown: &machine::Image) -> anyhow::Result<Image> {
    ensure!(!shown.rgba.is_empty(), "the display shows nothing");
    let pixels = shown
        .rgba
        .chunks_exact(4)
        .map(|rgba| Rgb888::new(rgba[0], rgba[1], rgba[2]));
    Image::from_pixels(shown.width, shown.height, pixels)
}

/// Where a device is.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub enum Place {
    /// Registers at an address.
    Mmio {
        /// The first register.
        base: u64,
        /// In bytes.
        size: usize,
    },
    /// A function on the first PCI bus.
    Pci(DeviceFunction),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mmio { base, .. } => write!(f, "{base:#x}"),
            Self::Pci(function) => write!(f, "{function}"),
        }
    }
}

/// A device that was found.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub struct Found {
    /// Where it is.
    pub place: Place,
    /// The name of its transport.
    pub transport: &'static str,
    /// What it is.
    pub device_type: DeviceType,
}

/// Where to look for devices.
#[derive(Debug, Clone, Default, Eq, PartialEq)]
pub struct Map {
    /// Register windows of virtio-mmio: address, and size in bytes. Some may be empty.
    pub slots: Vec<(u64, usize)>,
    /// The PCI root, if there is one.
    pub pci: Option<PciMap>,
}

/// Where the PCI root is.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct PciMap {
    /// The address of the configuration space (ECAM).
    pub ecam: u64,
    /// The addresses that BARs may be given.
    pub window: std::ops::Range<u64>,
}

impl PciMap {
    fn root(&self) -> PciRoot<MmioCam<'static>> {
        machine::pci_root(self.ecam)
    }
}

/// One of the two transports, with a device behind it.
enum Link {
    Mmio(MmioTransport<'static>),
    Pci(Box<PciTransport>),
}

impl Link {
    /// Takes the interrupt side away from the transport, which has it until then.
    fn split_interrupt(&mut self) -> anyhow::Result<InterruptHandle<'static>> {
        let handle = match self {
            Self::Mmio(transport) => transport.split_interrupt(),
            Self::Pci(transport) => transport.split_interrupt(),
        };
        handle.context("the interrupt side of a new transport is gone")
    }
}

/// Makes a driver of type `$driver` on `$link`, whichever transport that is, in a box.
macro_rules! start {
    (@new $transport:expr, $driver:ident; $wait:expr) => {
        $driver::<MachineHal, _>::try_new_with($transport, $wait)
    };
    (@new $transport:expr, $driver:ident $(, $size:expr)?) => {
        $driver::<MachineHal, _ $(, $size)?>::try_new($transport)
    };
    ($link:expr, $driver:ident $(, $size:expr)? $(; $wait:expr)?) => {
        match $link {
            Link::Mmio(transport) => {
                start!(@new transport, $driver $(, $size)? $(; $wait)?).map(|driver| Box::new(driver) as _)
            }
            Link::Pci(transport) => {
                start!(@new *transport, $driver $(, $size)? $(; $wait)?).map(|driver| Box::new(driver) as _)
            }
        }
    };
}

impl Map {
    /// Looks for virtio disks, NICs and displays, on MMIO and then on PCI. BARs without an address are given one.
    ///
    /// The board must be installed on this thread, as for all that follows.
    #[must_use]
    pub fn probe(&self) -> Vec<Found> {
        let mut found = Vec::new();
        for &(base, size) in &self.slots {
            // SAFETY: a register address is a number to the installed board, which answers any.
            let probed = unsafe { probe_mmio_device(register_pointer(base), size) };
            if let Some((device_type, transport)) = probed {
                let transport = match transport.version() {
                    MmioVersion::Legacy => "legacy MMIO",
                    MmioVersion::Modern => "MMIO",
                };
                found.push(Found {
                    place: Place::Mmio { base, size },
                    transport,
                    device_type,
                });
            }
        }
        if let Some(pci) = &self.pci {
            let mut root = pci.root();
            let mut window =
                PciRangeAllocator::new(pci.window.start, pci.window.end - pci.window.start);
            for (function, device_type, _) in
                probe_pci_bus::<MachineHal, _>(&mut root, 0, Some(&mut window))
            {
                found.push(Found {
                    place: Place::Pci(function),
                    transport: "PCI",
                    device_type,
                });
            }
        }
        found
    }

    fn connect(&self, place: Place) -> anyhow::Result<Link> {
        match place {
            Place::Mmio { base, size } => {
                // SAFETY: as in `probe`.
                let probed = unsafe { probe_mmio_device(register_pointer(base), size) };
                probed.map(|(_, transport)| Link::Mmio(transport))
            }
            Place::Pci(function) => {
                let pci = self.pci.as_ref().context("the board has no PCI root")?;
                let mut root = pci.root();
                let info = root
                    .enumerate_bus(function.bus)
                    .find(|(found, _)| *found == function);
                info.and_then(|(_, info)| {
                    probe_pci_device::<MachineHal, _>(&mut root, function, &info)
                })
                .map(|(_, transport)| Link::Pci(Box::new(transport)))
            }
        }
        .with_context(|| format!("there is no virtio device at {place} any more"))
    }

    /// Starts the driver of a disk.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_disk(&self, place: Place) -> anyhow::Result<Box<dyn BlockDriverOps>> {
        let disk = start!(self.connect(place)?, VirtIoBlkDev);
        disk.with_context(|| format!("the disk at {place} does not start"))
    }

    /// Starts the driver of a NIC.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_nic(&self, place: Place) -> anyhow::Result<Box<dyn NetDriverOps>> {
        let nic = start!(self.connect(place)?, VirtIoNetDev, NET_QUEUE_SIZE);
        nic.with_context(|| format!("the NIC at {place} does not start"))
    }

    /// Starts the driver of a disk that waits as `wait` says, and gives the side of it that belongs in an interrupt handler.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_disk_with_interrupt(
        &self,
        place: Place,
        wait: WaitPolicy,
    ) -> anyhow::Result<(Box<dyn BlockDriverOps>, InterruptHandle<'static>)> {
        let mut link = self.connect(place)?;
        let handle = link.split_interrupt()?;
        let disk = start!(link, VirtIoBlkDev; wait);
        Ok((
            disk.with_context(|| format!("the disk at {place} does not start"))?,
            handle,
        ))
    }

    /// Starts the driver of a NIC, and gives the side of it that belongs in an interrupt handler.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_nic_with_interrupt(
        &self,
        place: Place,
    ) -> anyhow::Result<(Box<dyn NetDriverOps>, InterruptHandle<'static>)> {
        let mut link = self.connect(place)?;
        let handle = link.split_interrupt()?;
        let nic = start!(link, VirtIoNetDev, NET_QUEUE_SIZE);
        Ok((
            nic.with_context(|| format!("the NIC at {place} does not start"))?,
            handle,
        ))
    }

    /// Starts the driver of a display.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_display(&self, place: Place) -> anyhow::Result<Box<dyn DisplayDriverOps>> {
        let display = start!(self.connect(place)?, VirtIoGpuDev);
        display.with_context(|| format!("the display at {place} does not start"))
    }

    /// Starts a driver, and returns what it says of the device.
    ///
    /// # Errors
    ///
    /// There is no device, it does not start, or there is no driver for its type.
    pub fn describe(&self, found: &Found) -> anyhow::Result<Description> {
        let (name, size) = match found.device_type {
            DeviceType::Block => {
                let disk = self.start_disk(found.place)?;
                let size = disk.num_blocks().saturating_mul(disk.block_size() as u64);
                (disk.device_name().to_owned(), crate::report::size(size))
            }
            DeviceType::Net => {
                let nic = self.start_nic(found.place)?;
                (nic.device_name().to_owned(), nic.mac_address().to_string())
            }
            DeviceType::Display => {
                let display = self.start_display(found.place)?;
                let info = display.info();
                (
                    display.device_name().to_owned(),
                    format!("{} x {}", info.width, info.height),
                )
            }
            other => bail!("there is no driver for {other:?}"),
        };
        Ok(Description { name, size })
    }
}

/// What a driver says of its device.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Description {
    /// The name of the device, or of the driver.
    pub name: String,
    /// The size of a disk, the address of a NIC, or the resolution of a display.
    pub size: String,
}
