//! QEMU as the board: its own virtio devices, with no guest.

use std::{cell::RefCell, path::Path, rc::Rc, time::Duration as RealDuration};

use anyhow::Context;
use axdriver_base::DeviceType;
use machine::{
    Version,
    qemu::{Bus, Cable, Disk, Display, ImageFormat, Nic, QemuBoard, QemuMachine, QemuOptions},
};
use smoltcp::time::Instant;

use super::{Board, DISK_SIZE, Map, PciMap, Place, RESOLUTION, Variant};
use crate::{
    image::Image,
    peer::Peer,
    scratch::Scratch,
    time::{HostClock, SimulatedClock, Time},
};

/// The longest wait for a frame from QEMU.
const NAP: RealDuration = RealDuration::from_millis(1);

/// A machine in QEMU, a disk, a NIC and a display on each of its buses.
pub(super) struct Qemu {
    title: String,
    /// The NICs in the order of their places, as long as nobody has their time.
    peers: Vec<(Place, Option<CableTime>)>,
    screens: Vec<Place>,
    board: Rc<RefCell<QemuBoard>>,
    _images: Scratch,
}

impl Qemu {
    pub(super) fn start(variant: Variant, page: &[u8]) -> anyhow::Result<Self> {
        let images = Scratch::new("qemu")?;
        let mut options = QemuOptions::new(QemuMachine::Aarch64Virt);
        let buses: &[Bus] = match variant {
            Variant::Modern => &[Bus::Mmio, Bus::Pci],
            Variant::Legacy => &[Bus::Mmio],
        };
        options = options.mmio(match variant {
            Variant::Modern => Version::Modern,
            Variant::Legacy => Version::Legacy,
        });
        let (width, height) = RESOLUTION;
        for (index, bus) in buses.iter().enumerate() {
            let path = images.path().join(format!("disk{index}.img"));
            make_image(&path)?;
            options = options
                .disk(Disk::new(path, ImageFormat::Raw).on(*bus))
                .nic(Nic::on_cable().on(*bus))
                .display(Display::new(width, height).on(*bus));
        }
        let mut board = QemuBoard::start(&options).context("cannot start QEMU as a board")?;
        let (major, minor, micro) = board.version();
        let kind = match variant {
            Variant::Modern => "modern",
            Variant::Legacy => "legacy",
        };
        let title = format!("QEMU {major}.{minor}.{micro}, {kind} registers");
        let mut peers = Vec::new();
        let mut screens = Vec::new();
        let map = Map::from(&board);
        for found in map.probe() {
            match found.device_type {
                DeviceType::Net => {
                    let cable = board
                        .take_cable(peers.len())
                        .context("a NIC has no cable")?;
                    peers.push((found.place, Some(CableTime::new(cable, page))));
                }
                DeviceType::Display => screens.push(found.place),
                _ => {}
            }
        }
        let board = Rc::new(RefCell::new(board));
        Ok(Self {
            title,
            peers,
            screens,
            board,
            _images: images,
        })
    }
}

fn make_image(path: &Path) -> anyhow::Result<()> {
    let make = || std::fs::File::create_new(path)?.set_len(DISK_SIZE);
    make().with_context(|| format!("cannot create {}", path.display()))
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
        }
    }
}

impl Board for Qemu {
    fn title(&self) -> &str {
        &self.title
    }

    fn map(&self) -> Map {
        Map::from(&*self.board.borrow())
    }

    fn screen(&mut self, place: Place) -> anyhow::Result<Image> {
        let index = self.screens.iter().position(|screen| *screen == place);
        let index = index.with_context(|| format!("there is no display at {place}"))?;
        super::picture(&self.board.borrow_mut().image(index, 0)?)
    }

    fn network_time(&mut self, place: Place) -> anyhow::Result<Box<dyn Time>> {
        let peer = self.peers.iter_mut().find(|(nic, _)| *nic == place);
        let time = peer.and_then(|(_, time)| time.take());
        Ok(Box::new(time.with_context(|| {
            format!("there is no cable for a NIC at {place}")
        })?))
    }

    fn complaints(&mut self) -> Vec<String> {
        self.board
            .borrow_mut()
            .check()
            .err()
            .map(|error| error.to_string())
            .into_iter()
            .collect()
    }
}

/// The host's clock, which takes frames from a cable to a peer and back as it goes.
struct CableTime {
    cable: Cable,
    peer: Peer,
    /// What the peer takes for the time.
    peer_clock: SimulatedClock,
    clock: HostClock,
}

impl CableTime {
    fn new(cable: Cable, page: &[u8]) -> Self {
        let peer_clock = SimulatedClock::new();
        Self {
            cable,
            peer: Peer::new(peer_clock.clone(), page),
            peer_clock,
            clock: HostClock,
        }
    }

    /// Gives the peer what has come, and returns whether that was anything.
    fn exchange(&mut self) -> std::io::Result<bool> {
        let mut any = false;
        while let Some(frame) = self.cable.try_receive()? {
            self.peer.receive(&frame);
            any = true;
        }
        self.peer_clock.set(self.clock.now());
        self.peer.poll();
        while let Some(frame) = self.peer.take_frame() {
            self.cable.send(&frame, NAP)?;
            any = true;
        }
        Ok(any)
    }
}

impl Time for CableTime {
    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        let exchanged = self.exchange().unwrap_or_else(|error| {
            // Without frames the stack's own patience ends the wait.
            log::warn!("the cable to QEMU: {error}");
            false
        });
        if !exchanged {
            self.clock.pass(until);
        }
    }
}
