//! QEMU as the board: its own virtio devices, with no guest.

use std::{
    cell::{RefCell, RefMut},
    rc::Rc,
    time::Duration as RealDuration,
};

use anyhow::{Context, bail, ensure};
use machine::{
    Version,
    qemu::{Bus, Cable, Disk, Display, ImageFormat, Nic, QemuBoard, QemuMachine, QemuOptions},
};
use smoltcp::time::Instant;

use super::{
    Board, Device, FarEnd, Map, Medium, PATIENCE, PciMap, Place, Plan, Transport, Work,
    image_format, map::places, memory_complaints,
};
use crate::{
    image::Image,
    peer::Peer,
    scratch::UnnamedFile,
    time::{HostClock, SimulatedClock, Time},
};

/// The longest wait for a frame from QEMU.
const NAP: RealDuration = RealDuration::from_millis(1);

/// A machine in QEMU.
pub(super) struct Qemu {
    title: String,
    /// The devices, their interrupt lines, and their numbers within their kind.
    devices: Vec<(Place, u32, usize)>,
    /// The hosts at the other ends of the NICs' cables.
    hosts: Vec<(Place, Rc<RefCell<FarHost>>)>,
    board: RefCell<QemuBoard>,
    /// The contents of disks that have no image.
    _media: Vec<UnnamedFile>,
}

impl Qemu {
    pub(super) fn start(plan: &Plan) -> anyhow::Result<Self> {
        let version = plan.version()?;
        let mut options = QemuOptions::new(QemuMachine::Aarch64Virt)
            .mmio(version)
            .memory_size(plan.memory_size() as u64);
        let mut media = Vec::new();
        let mut numbers = [0; 3];
        let mut pages = Vec::new();
        let parts = plan.in_order();
        let mut kinds = Vec::new();
        for (transport, device) in &parts {
            let bus = match transport {
                Transport::Mmio | Transport::LegacyMmio => Bus::Mmio,
                Transport::Pci => Bus::Pci,
            };
            let kind = match device {
                Device::Disk(medium) => {
                    options = options.disk(disk(medium, &mut media)?.on(bus));
                    0
                }
                Device::Nic(far_end) => {
                    options = options.nic(nic(far_end)?.on(bus));
                    1
                }
                Device::Display { width, height } => {
                    options = options.display(Display::new(*width, *height).on(bus));
                    2
                }
            };
            kinds.push(numbers[kind]);
            numbers[kind] += 1;
            pages.push(match device {
                Device::Nic(FarEnd::Peer(page)) => Some(page),
                _ => None,
            });
        }
        let mut board = QemuBoard::start(&options).context("cannot start QEMU as a board")?;
        board
            .intercept_interrupts()
            .context("QEMU does not tell of interrupts")?;
        let (major, minor, micro) = board.version();
        let kind = match version {
            Version::Modern => "modern",
            Version::Legacy => "legacy",
        };
        let places = places(board.mmio_slots(), board.pci_functions());
        let mut hosts = Vec::new();
        for (((place, _), page), number) in places.iter().zip(pages).zip(&kinds) {
            if let Some(page) = page {
                let cable = board.take_cable(*number).context("a NIC has no cable")?;
                let host = FarHost::new(cable, page);
                hosts.push((place.clone(), Rc::new(RefCell::new(host))));
            }
        }
        let devices = places
            .into_iter()
            .zip(kinds)
            .map(|((place, line), number)| (place, line, number))
            .collect();
        Ok(Self {
            title: format!("QEMU {major}.{minor}.{micro}, {kind} registers"),
            devices,
            hosts,
            board: RefCell::new(board),
            _media: media,
        })
    }

    fn board(&self) -> RefMut<'_, QemuBoard> {
        self.board.borrow_mut()
    }
}

fn disk(medium: &Medium, media: &mut Vec<UnnamedFile>) -> anyhow::Result<Disk> {
    match medium {
        Medium::Blank(size) => {
            let file = UnnamedFile::new(*size)?;
            let disk = Disk::new(file.path(), ImageFormat::Raw);
            media.push(file);
            Ok(disk)
        }
        Medium::Image { path, read_only } => {
            let disk = Disk::new(path, image_format(path)?);
            Ok(if *read_only { disk.read_only() } else { disk })
        }
        Medium::Elsewhere => bail!("a disk of QEMU's has no program behind it"),
    }
}

fn nic(far_end: &FarEnd) -> anyhow::Result<Nic> {
    Ok(match far_end {
        FarEnd::Peer(_) => Nic::on_cable(),
        FarEnd::OtherNic => Nic::on_netdev("hubport,hubid=0"),
        FarEnd::Tap(name) => {
            ensure!(
                !name.is_empty() && !name.contains(','),
                "{name:?} is no name of an interface"
            );
            Nic::on_netdev(&format!("tap,ifname={name},script=no,downscript=no"))
        }
        FarEnd::Elsewhere => bail!("a NIC of QEMU's has no program behind it"),
    })
}

impl From<&QemuBoard> for Map {
    fn from(board: &QemuBoard) -> Self {
        Self {
            slots: board
                .mmio_slots()
                .iter()
                .map(|slot| (slot.base as u64, slot.size))
                .collect(),
            pci: Some(PciMap {
                ecam: board.ecam(),
                window: board.pci_window(),
            }),
            sockets: Vec::new(),
        }
    }
}

impl Board for Qemu {
    fn title(&self) -> &str {
        &self.title
    }

    fn map(&self) -> Map {
        Map::from(&*self.board())
    }

    fn screen(&self, place: &Place) -> anyhow::Result<Image> {
        let display = self.devices.iter().find(|(other, ..)| other == place);
        let (.., number) = display.with_context(|| format!("there is no display at {place}"))?;
        super::picture(&self.board().image(*number, 0)?)
    }

    fn network_time(&self, place: &Place) -> anyhow::Result<Box<dyn Time>> {
        let host = self.hosts.iter().find(|(nic, _)| nic == place);
        Ok(match host {
            Some((_, host)) => Box::new(CableTime(host.clone())),
            None => Box::new(HostClock),
        })
    }

    fn work(&self, _place: &Place) -> Option<Work> {
        None
    }

    fn now(&self) -> Instant {
        HostClock.now()
    }

    fn sleep(&self, until: Option<Instant>) -> anyhow::Result<Vec<Place>> {
        let until = until.unwrap_or_else(|| self.now() + PATIENCE);
        loop {
            for (_, host) in &self.hosts {
                host.borrow_mut().exchange();
            }
            let mut interrupting = Vec::new();
            for (place, line, _) in &self.devices {
                if self.board().interrupt_line(*line)?.asserted {
                    interrupting.push(place.clone());
                }
            }
            if !interrupting.is_empty() || self.now() >= until {
                return Ok(interrupting);
            }
            HostClock.pass(Some(until));
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        Ok(self.board().check()?)
    }

    fn complaints(&self) -> Vec<String> {
        let mut board = self.board();
        let mut complaints = memory_complaints(board.memory());
        complaints.extend(board.check().err().map(|error| error.to_string()));
        complaints
    }
}

/// A host at the other end of a cable.
struct FarHost {
    cable: Cable,
    peer: Peer,
    /// What the peer takes for the time.
    clock: SimulatedClock,
}

impl FarHost {
    fn new(cable: Cable, page: &[u8]) -> Self {
        let clock = SimulatedClock::new();
        Self {
            cable,
            peer: Peer::new(clock.clone(), page),
            clock,
        }
    }

    /// Gives the peer what has come, and returns whether that was anything.
    fn exchange(&mut self) -> bool {
        self.try_exchange().unwrap_or_else(|error| {
            // Without frames the stack's own patience ends the wait.
            log::warn!("the cable to QEMU: {error}");
            false
        })
    }

    fn try_exchange(&mut self) -> std::io::Result<bool> {
        let mut any = false;
        while let Some(frame) = self.cable.try_receive()? {
            self.peer.receive(&frame);
            any = true;
        }
        self.clock.set(HostClock.now());
        self.peer.poll();
        while let Some(frame) = self.peer.take_frame() {
            self.cable.send(&frame, NAP)?;
            any = true;
        }
        Ok(any)
    }
}

/// The host's clock, which takes frames from a cable to its other end and back as it goes.
struct CableTime(Rc<RefCell<FarHost>>);

impl Time for CableTime {
    fn now(&self) -> Instant {
        HostClock.now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        if !self.0.borrow_mut().exchange() {
            HostClock.pass(until);
        }
    }
}
