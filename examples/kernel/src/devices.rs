//! The disks, network cards and displays of this machine.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use axdriver_base::{BaseDriverOps, DevResult, DeviceType};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    InterruptHandle, PciRangeAllocator, Transport, VirtIoBlkDev, VirtIoGpuDev, VirtIoNetDev,
    WaitPolicy,
    pci::{Cam, ConfigurationAccess, DeviceFunction, MmioCam, PciRoot},
    probe_mmio_device, probe_pci_buses, route_pci_interrupt,
};

use crate::error::{Error, Result};
use crate::hal::KernelHal;
use crate::machine::{Machine, MmioSlot, PciHost};
use crate::slot::Slot;
use crate::{interrupts, paging, println};

/// How the drivers wait: asleep, and for every interrupt at most [`interrupts::PATIENCE`].
const ASLEEP: WaitPolicy = WaitPolicy::new()
    .with_max_polls(u64::MAX)
    .with_relax(interrupts::sleep_between_looks);

/// How many frames a network card holds in each direction.
const NET_QUEUE: usize = 64;

/// The size of the configuration space of one bus.
pub(crate) const BUS_SIZE: usize = 1 << 20;

/// The last bus that is looked at: room for the bridges of small machines, and a mapping that is made soon.
const LAST_BUS: u8 = 15;

/// Where a device is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// At these registers.
    Mmio(u64),
    /// At this PCI function.
    Pci(DeviceFunction),
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mmio(base) => write!(formatter, "mmio {base:#x}"),
            Self::Pci(function) => write!(formatter, "pci {function}"),
        }
    }
}

/// A driver that is told when its device has changed.
pub(crate) trait Reconfigure {
    /// Reads the device's configuration anew.
    fn reconfigure(&mut self) -> DevResult;
}

impl<T: Transport> Reconfigure for VirtIoBlkDev<KernelHal, T> {
    fn reconfigure(&mut self) -> DevResult {
        self.configuration_changed()
    }
}

impl<T: Transport> Reconfigure for VirtIoNetDev<KernelHal, T, NET_QUEUE> {
    fn reconfigure(&mut self) -> DevResult {
        self.configuration_changed()
    }
}

/// Any driver of a disk.
pub(crate) trait Disk: BlockDriverOps + Reconfigure {
    /// Starts the device over, after it has failed. It interrupts again.
    fn start_over(&mut self) -> DevResult;
}

impl<T: Transport + Send + Sync> Disk for VirtIoBlkDev<KernelHal, T> {
    fn start_over(&mut self) -> DevResult {
        self.reset()?;
        self.enable_interrupts().map(|_| ())
    }
}

/// Any driver of a network card.
pub(crate) trait Nic: NetDriverOps + Reconfigure {}
impl<D: NetDriverOps + Reconfigure> Nic for D {}

/// A device and its driver.
pub(crate) struct Device<D: ?Sized> {
    /// Where the device is.
    pub(crate) place: Place,
    /// Its interrupts; see [`interrupts::count_of`].
    pub(crate) source: usize,
    /// Its driver.
    pub(crate) driver: Box<D>,
}

/// What was found, by kind.
#[derive(Default)]
pub(crate) struct Devices {
    /// The disks.
    pub(crate) disks: Vec<Device<dyn Disk>>,
    /// The network cards.
    pub(crate) nics: Vec<Device<dyn Nic>>,
    /// The displays.
    pub(crate) displays: Vec<Device<dyn DisplayDriverOps>>,
    /// The PCI host's configuration space.
    configuration: Option<MmioCam<'static>>,
    storm: bool,
}

impl Devices {
    /// Looks for devices everywhere, and starts a driver for each. With `storm`, nobody serves the
    /// interrupts of displays; for a test.
    ///
    /// # Errors
    ///
    /// * [`Error::Device`]: a device was found that does not start.
    /// * [`Error::Machine`]: nobody knows where a device's interrupt goes.
    /// * [`Error::Memory`]: there is none for it.
    pub(crate) fn find(machine: &Machine, storm: bool) -> Result<Self> {
        let mut devices = Self {
            storm,
            ..Self::default()
        };
        for slot in &machine.slots {
            devices.look_at_slot(*slot)?;
        }
        if let Some(host) = &machine.pci {
            devices.walk_pci(host)?;
        }
        Ok(devices)
    }

    fn look_at_slot(&mut self, slot: MmioSlot) -> Result {
        let registers = paging::map_registers(slot.base, slot.size)?;
        // SAFETY: the machine's description says that a virtio-mmio slot lies there, and each slot
        // is looked at once.
        let found = unsafe { probe_mmio_device(registers.as_ptr(), slot.size) };
        let Some((kind, mut transport)) = found else {
            return Ok(());
        };
        let interrupt = transport.split_interrupt();
        self.start(
            Place::Mmio(slot.base),
            kind,
            transport,
            interrupt,
            slot.line,
        )
    }

    /// Walks bus 0 and what is behind its bridges.
    fn walk_pci(&mut self, host: &PciHost) -> Result {
        let buses = 0..=host.last_bus.min(LAST_BUS);
        let registers = paging::map_registers(host.configuration, buses.len() * BUS_SIZE)?;
        // SAFETY: the machine's description says that the configuration space of these buses lies
        // there, and no other is accessed.
        let configuration = unsafe { MmioCam::new(registers.as_ptr(), Cam::Ecam) };
        // SAFETY: the copy only reads as long as the original is in use.
        let reader = unsafe { configuration.unsafe_clone() };
        let mut window = host
            .window
            .as_ref()
            .map(|window| PciRangeAllocator::new(window.start, window.end - window.start));
        let mut root = PciRoot::new(configuration);
        for (function, kind, mut transport) in
            probe_pci_buses::<KernelHal, _>(&mut root, buses, window.as_mut())
        {
            // Interrupt Line (PCI Local Bus Specification 3.0, 6.2.4).
            let [line, ..] = reader.read_word(function, 0x3c).to_le_bytes();
            // The machine's description knows the lines of bus 0.
            let line = route_pci_interrupt(&reader, 0, function)
                .and_then(|(root, pin)| host.lines.line(root.device, pin, line))
                .ok_or(Error::Machine("nobody knows the line of a PCI function"))?;
            let interrupt = transport.split_interrupt();
            self.start(Place::Pci(function), kind, transport, interrupt, line)?;
        }
        self.configuration = Some(reader);
        Ok(())
    }

    /// Returns the slot that a device is plugged into, if it can be pulled from there.
    pub(crate) fn slot(&mut self, place: Place) -> Option<Slot<'_>> {
        let Place::Pci(function) = place else {
            return None;
        };
        let configuration = self.configuration.as_mut()?;
        let (port, _) = route_pci_interrupt(configuration, 0, function)?;
        Slot::of(configuration, port)
    }

    /// Starts the driver for a device. From here on the device interrupts, and the driver sleeps.
    fn start<T: Transport + Send + Sync + 'static>(
        &mut self,
        place: Place,
        kind: DeviceType,
        transport: T,
        interrupt: Option<InterruptHandle<'static>>,
        line: u32,
    ) -> Result {
        let interrupt = interrupt.ok_or(Error::Machine("a device without interrupt"))?;
        let served = !self.storm || kind != DeviceType::Display;
        let source = interrupts::add_source(line, served.then_some(interrupt));
        match kind {
            DeviceType::Block => {
                let mut driver = VirtIoBlkDev::<KernelHal, T>::try_new(transport)
                    .map_err(|error| Error::Device("a disk does not start", error))?;
                interrupting(&mut driver)?;
                driver.set_wait_policy(ASLEEP);
                let driver = Box::new(driver);
                self.disks.push(Device {
                    place,
                    source,
                    driver,
                });
            }
            DeviceType::Net => {
                let mut driver = VirtIoNetDev::<KernelHal, T, NET_QUEUE>::try_new(transport)
                    .map_err(|error| Error::Device("a network card does not start", error))?;
                interrupting(&mut driver)?;
                let driver = Box::new(driver);
                self.nics.push(Device {
                    place,
                    source,
                    driver,
                });
            }
            DeviceType::Display => {
                let mut driver = VirtIoGpuDev::<KernelHal, T>::try_new(transport)
                    .map_err(|error| Error::Device("a display does not start", error))?;
                interrupting(&mut driver)?;
                driver.set_wait_policy(ASLEEP);
                let driver = Box::new(driver);
                self.displays.push(Device {
                    place,
                    source,
                    driver,
                });
            }
            _ => println!("{place}: nothing here drives a {kind:?}"),
        }
        Ok(())
    }
}

/// Asks a device for interrupts.
fn interrupting(driver: &mut dyn BaseDriverOps) -> Result {
    let answer: DevResult<bool> = driver.enable_interrupts();
    answer
        .map(|_| ())
        .map_err(|error| Error::Device("a device does not interrupt", error))
}
