//! Where a board's devices are, what is found there, and drivers for that.

use std::{cell::RefCell, fmt, rc::Rc, sync::Arc};

use anyhow::{Context, bail};
use axdriver_base::{DeviceType, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    InterruptHandle, MmioTransport, MmioVersion, PciRangeAllocator, PciTransport, VirtIoBlkDev,
    VirtIoGpuDev, VirtIoNetDev, WaitPolicy,
    pci::{DeviceFunction, MmioCam, PciRoot},
    probe_mmio_device, probe_pci_buses, probe_pci_device,
};
use machine::{
    Function, MachineHal, Memory, Slot,
    registers::register_pointer,
    vhost_user::{Socket, VhostUserDevice, VhostUserHandle, VhostUserOptions, VhostUserTransport},
};

/// The number of buffers in each of a NIC's queues.
const NET_QUEUE_SIZE: usize = 64;

/// The PCI buses that are walked. The configuration space of each board has these at least.
const BUSES: std::ops::RangeInclusive<u8> = 0..=15;

/// Where a device is.
#[derive(Debug, Clone, Eq, PartialEq)]
pub enum Place {
    /// Registers at an address.
    Mmio {
        /// The first register.
        base: u64,
        /// In bytes.
        size: usize,
    },
    /// A function on a PCI bus.
    Pci(DeviceFunction),
    /// A program's socket.
    Socket(Socket),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mmio { base, .. } => write!(f, "{base:#x}"),
            Self::Pci(function) => write!(f, "{function}"),
            Self::Socket(socket) => write!(f, "{socket}"),
        }
    }
}

/// Returns where the devices of a board are that has only these, and their interrupt lines: MMIO comes before PCI.
pub(super) fn places(slots: &[Slot], functions: &[Function]) -> Vec<(Place, u32)> {
    let slots = slots
        .iter()
        .filter(|slot| slot.device.is_some())
        .map(|slot| {
            let (base, size) = (slot.base as u64, slot.size);
            (Place::Mmio { base, size }, slot.line)
        });
    let functions = functions
        .iter()
        .map(|function| (Place::Pci(function.address), function.line));
    slots.chain(functions).collect()
}

/// A device that was found.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Found {
    /// Where it is.
    pub place: Place,
    /// The name of its transport.
    pub transport: &'static str,
    /// What it is.
    pub device_type: DeviceType,
}

/// Where to look for devices.
#[derive(Debug, Clone, Default)]
pub struct Map {
    /// Register windows of virtio-mmio: address, and size in bytes. Some may be empty.
    pub slots: Vec<(u64, usize)>,
    /// The PCI root, if there is one.
    pub pci: Option<PciMap>,
    /// Devices of other programs.
    pub sockets: Vec<Rc<SocketDevice>>,
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

/// A device of another program, behind a socket.
#[derive(Debug)]
pub struct SocketDevice {
    socket: Socket,
    device: VhostUserDevice,
    memory: Arc<Memory>,
    /// The side of the last connection that does not belong to the driver.
    handle: RefCell<Option<VhostUserHandle>>,
}

impl SocketDevice {
    /// Says where the device is, what it is, and which memory its drivers use.
    #[must_use]
    pub fn new(socket: Socket, device: VhostUserDevice, memory: Arc<Memory>) -> Self {
        Self {
            socket,
            device,
            memory,
            handle: RefCell::new(None),
        }
    }

    /// Connects to the program.
    ///
    /// # Errors
    ///
    /// Nobody listens, or what answers is no such device.
    pub fn connect(&self) -> anyhow::Result<VhostUserTransport> {
        let options = VhostUserOptions::new(self.device);
        let transport =
            VhostUserTransport::connect(self.socket.clone(), self.memory.clone(), options)?;
        self.handle.replace(Some(transport.handle()));
        Ok(transport)
    }

    /// Returns where the device is.
    #[must_use]
    pub fn place(&self) -> Place {
        Place::Socket(self.socket.clone())
    }

    /// Returns the side of the last connection that does not belong to the driver.
    #[must_use]
    pub fn handle(&self) -> Option<VhostUserHandle> {
        self.handle.borrow().clone()
    }

    fn device_type(&self) -> DeviceType {
        match self.device {
            VhostUserDevice::Network { .. } => DeviceType::Net,
            VhostUserDevice::Display { .. } => DeviceType::Display,
            _ => DeviceType::Block,
        }
    }
}

/// One of the transports, with a device behind it.
enum Link {
    Mmio(MmioTransport<'static>),
    Pci(Box<PciTransport>),
    Socket(Box<VhostUserTransport>),
}

/// The side of a device that belongs in an interrupt handler.
pub enum Handle {
    /// Of a device with registers.
    Registers(InterruptHandle<'static>),
    /// Of another program's.
    Socket(VhostUserHandle),
}

impl Handle {
    /// Acknowledges an interrupt, and returns what it meant.
    pub fn acknowledge(&self) -> InterruptCause {
        match self {
            Self::Registers(handle) => handle.acknowledge(),
            Self::Socket(handle) => InterruptCause::from_bits_truncate(handle.acknowledge().bits()),
        }
    }
}

impl Link {
    /// Takes the interrupt side away from the transport, which has it until then.
    fn split_interrupt(&mut self) -> anyhow::Result<Handle> {
        let handle = match self {
            Self::Mmio(transport) => transport.split_interrupt(),
            Self::Pci(transport) => transport.split_interrupt(),
            Self::Socket(transport) => return Ok(Handle::Socket(transport.handle())),
        };
        let handle = handle.context("the interrupt side of a new transport is gone")?;
        Ok(Handle::Registers(handle))
    }
}

/// How the drivers wait for devices of other processes: at first awake, then asleep, and not for ever.
const PATIENTLY: WaitPolicy = WaitPolicy::new()
    .with_max_polls(200_000)
    .with_relax(|polls| {
        if polls > 20_000 {
            std::thread::sleep(std::time::Duration::from_micros(50));
        } else if polls > 200 {
            std::thread::yield_now();
        }
        true
    });

/// Makes a driver of type `$driver` on `$link`, whichever transport that is, in a box.
macro_rules! start {
    (@new $transport:expr, $wait:expr, $driver:ident $(, $size:expr)?) => {
        $driver::<MachineHal, _ $(, $size)?>::try_new_with($transport, $wait)
            .map(|driver| Box::new(driver) as _)
    };
    ($link:expr, $wait:expr, $driver:ident $(, $size:expr)?) => {
        match $link {
            Link::Mmio(transport) => start!(@new transport, $wait, $driver $(, $size)?),
            Link::Pci(transport) => start!(@new *transport, $wait, $driver $(, $size)?),
            Link::Socket(transport) => start!(@new *transport, $wait, $driver $(, $size)?),
        }
    };
}

impl Map {
    /// Looks for virtio disks, NICs and displays, on MMIO, on PCI and behind sockets. BARs without an address are given one.
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
                probe_pci_buses::<MachineHal, _>(&mut root, BUSES, Some(&mut window))
            {
                found.push(Found {
                    place: Place::Pci(function),
                    transport: "PCI",
                    device_type,
                });
            }
        }
        found.extend(self.sockets.iter().map(|device| Found {
            place: device.place(),
            transport: "vhost-user",
            device_type: device.device_type(),
        }));
        found
    }

    /// Returns the device at a socket.
    ///
    /// # Errors
    ///
    /// The board has none there.
    pub fn socket(&self, socket: &Socket) -> anyhow::Result<&SocketDevice> {
        let device = self.sockets.iter().find(|device| device.socket == *socket);
        Ok(device.with_context(|| format!("the board has no device at {socket}"))?)
    }

    fn connect(&self, place: &Place) -> anyhow::Result<Link> {
        match place {
            Place::Mmio { base, size } => {
                // SAFETY: as in `probe`.
                let probed = unsafe { probe_mmio_device(register_pointer(*base), *size) };
                probed.map(|(_, transport)| Link::Mmio(transport))
            }
            Place::Pci(function) => {
                let pci = self.pci.as_ref().context("the board has no PCI root")?;
                let mut root = pci.root();
                let info = root
                    .enumerate_bus(function.bus)
                    .find(|(found, _)| found == function);
                info.and_then(|(_, info)| {
                    probe_pci_device::<MachineHal, _>(&mut root, *function, &info)
                })
                .map(|(_, transport)| Link::Pci(Box::new(transport)))
            }
            Place::Socket(socket) => Some(Link::Socket(Box::new(self.socket(socket)?.connect()?))),
        }
        .with_context(|| format!("there is no virtio device at {place} any more"))
    }

    /// Starts the driver of a disk.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_disk(&self, place: &Place) -> anyhow::Result<Box<dyn BlockDriverOps>> {
        let disk = start!(self.connect(place)?, PATIENTLY, VirtIoBlkDev);
        disk.with_context(|| format!("the disk at {place} does not start"))
    }

    /// Starts the driver of a NIC.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_nic(&self, place: &Place) -> anyhow::Result<Box<dyn NetDriverOps>> {
        let nic = start!(
            self.connect(place)?,
            PATIENTLY,
            VirtIoNetDev,
            NET_QUEUE_SIZE
        );
        nic.with_context(|| format!("the NIC at {place} does not start"))
    }

    /// Starts the driver of a disk that waits as `wait` says, and gives the side of it that belongs in an interrupt handler.
    ///
    /// # Errors
    ///
    /// There is no device, or it does not start.
    pub fn start_disk_with_interrupt(
        &self,
        place: &Place,
        wait: WaitPolicy,
    ) -> anyhow::Result<(Box<dyn BlockDriverOps>, Handle)> {
        let mut link = self.connect(place)?;
        let handle = link.split_interrupt()?;
        let disk = start!(link, wait, VirtIoBlkDev);
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
        place: &Place,
    ) -> anyhow::Result<(Box<dyn NetDriverOps>, Handle)> {
        let mut link = self.connect(place)?;
        let handle = link.split_interrupt()?;
        let nic = start!(link, PATIENTLY, VirtIoNetDev, NET_QUEUE_SIZE);
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
    pub fn start_display(&self, place: &Place) -> anyhow::Result<Box<dyn DisplayDriverOps>> {
        let display = start!(self.connect(place)?, PATIENTLY, VirtIoGpuDev);
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
                let disk = self.start_disk(&found.place)?;
                let size = disk.num_blocks().saturating_mul(disk.block_size() as u64);
                (disk.device_name().to_owned(), crate::report::size(size))
            }
            DeviceType::Net => {
                let nic = self.start_nic(&found.place)?;
                (nic.device_name().to_owned(), nic.mac_address().to_string())
            }
            DeviceType::Display => {
                let display = self.start_display(&found.place)?;
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
