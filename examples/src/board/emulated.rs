//! The board in this process: devices that answer inside the register write.

use std::rc::Rc;

use anyhow::Context;
use machine::{Board as Machine, Builder, Device, Disk, Display, Nic, Version};
use smoltcp::time::Instant;

use super::{Board, DISK_SIZE, Map, PciMap, Place, RESOLUTION, Variant};
use crate::{
    image::Image,
    peer::Peer,
    time::{SimulatedClock, Time},
};

impl From<&Machine> for Map {
    fn from(machine: &Machine) -> Self {
        Self {
            slots: machine
                .mmio_slots()
                .iter()
                .map(|slot| (slot.base as u64, slot.size))
                .collect(),
            pci: Some(PciMap {
                ecam: machine.ecam(),
                window: machine.pci_window(),
            }),
        }
    }
}

/// A way to join a device to a board.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum Transport {
    /// Registers at an address.
    Mmio,
    /// Registers at an address, as they were before version 1.0 of VirtIO.
    LegacyMmio,
    /// A function on a PCI bus.
    #[default]
    Pci,
}

impl Transport {
    /// Joins a device to a board that is being put together.
    #[must_use]
    pub fn plug(self, builder: Builder, device: impl Into<Device>) -> Builder {
        match self {
            Self::Mmio => builder.mmio(Version::Modern, device),
            Self::LegacyMmio => builder.mmio(Version::Legacy, device),
            Self::Pci => builder.pci(device),
        }
    }
}

impl machine::Peer for Peer {
    fn receive(&mut self, frame: &[u8]) {
        self.receive(frame);
    }

    fn transmit(&mut self) -> Option<Vec<u8>> {
        self.take_frame().or_else(|| {
            self.poll();
            self.take_frame()
        })
    }
}

/// A clock whose going lets the devices do what they put off, and the hosts at the other ends of their cables too.
#[derive(Debug, Clone)]
pub struct MachineTime {
    clock: SimulatedClock,
    machine: Rc<Machine>,
}

impl MachineTime {
    /// Joins a clock to a machine.
    #[must_use]
    pub fn new(machine: &Rc<Machine>, clock: &SimulatedClock) -> Self {
        Self {
            clock: clock.clone(),
            machine: machine.clone(),
        }
    }
}

impl Time for MachineTime {
    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        self.clock.advance(until);
        self.machine.run();
    }
}

/// An emulated board, a disk, a NIC and a display on each of its buses.
pub(super) struct Emulated {
    machine: Rc<Machine>,
    title: String,
    clock: SimulatedClock,
    screens: Vec<(Place, Display)>,
    /// Pages of memory that were in use before any driver was.
    pages: usize,
}

impl Emulated {
    pub(super) fn start(variant: Variant, page: &[u8]) -> anyhow::Result<Self> {
        let clock = SimulatedClock::new();
        let transports: &[Transport] = match variant {
            Variant::Modern => &[Transport::Mmio, Transport::Pci],
            Variant::Legacy => &[Transport::LegacyMmio],
        };
        let mut builder = Machine::emulated();
        let mut displays = Vec::new();
        for (index, transport) in (1_u8..).zip(transports) {
            let disk = Disk::memory(usize::try_from(DISK_SIZE)?);
            let nic = Nic::new([0x02, 0, 0, 0, 0, index]);
            nic.attach(Peer::new(clock.clone(), page));
            let display = Display::new(RESOLUTION.0, RESOLUTION.1);
            builder = transport.plug(builder, disk);
            builder = transport.plug(builder, nic);
            builder = transport.plug(builder, &display);
            displays.push(display);
        }
        let machine = builder
            .build()
            .context("cannot have the memory of an emulated board")?;
        let map = Map::from(&machine);
        let places = map
            .probe()
            .into_iter()
            .filter(|found| found.device_type == super::DeviceType::Display);
        let screens = places.map(|found| found.place).zip(displays).collect();
        let title = match variant {
            Variant::Modern => "emulated board, modern registers",
            Variant::Legacy => "emulated board, legacy registers",
        };
        let pages = machine.memory().counters().pages_live;
        Ok(Self {
            machine: Rc::new(machine),
            title: title.to_owned(),
            clock,
            screens,
            pages,
        })
    }
}

impl Board for Emulated {
    fn title(&self) -> &str {
        &self.title
    }

    fn map(&self) -> Map {
        Map::from(&*self.machine)
    }

    fn screen(&mut self, place: Place) -> anyhow::Result<Image> {
        let display = self.screens.iter().find(|(screen, _)| *screen == place);
        let (_, display) = display.with_context(|| format!("there is no display at {place}"))?;
        super::picture(&display.image())
    }

    fn network_time(&mut self, _place: Place) -> anyhow::Result<Box<dyn Time>> {
        Ok(Box::new(MachineTime::new(&self.machine, &self.clock)))
    }

    fn complaints(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        for violation in self.machine.take_violations() {
            let complaint = violation.to_string();
            // A driver that breaks a rule tends to do so each time.
            if !complaints.contains(&complaint) {
                complaints.push(complaint);
            }
        }
        let memory = self.machine.memory();
        let pages = memory.counters().pages_live;
        if pages != self.pages {
            complaints.push(format!(
                "{pages} pages of memory are in use, {} were at first",
                self.pages
            ));
        }
        let overwritten = memory.overwritten_free_pages();
        if !overwritten.is_empty() {
            complaints.push(format!(
                "{} pages were written to after they were freed",
                overwritten.len()
            ));
        }
        complaints
    }
}
