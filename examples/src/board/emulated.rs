//! The board in this process: devices that answer inside the register write.

use std::{
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use machine::{
    Board as Machine, Builder, Cable, Device as Part, Disk, Display, Nic, Version,
    qemu::ImageFormat,
};
use smoltcp::time::Instant;

use super::{
    Board, Device, FarEnd, Map, Medium, PciMap, Place, Plan, Transport, Work, image_format,
    map::places, memory_complaints,
};
use crate::{
    image::Image,
    peer::Peer,
    tap::Tap,
    time::{HostClock, SimulatedClock, Time},
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
            sockets: Vec::new(),
        }
    }
}

impl Transport {
    /// Joins a device to a board that is being put together.
    #[must_use]
    pub fn plug(self, builder: Builder, device: impl Into<Part>) -> Builder {
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

/// The other end of a NIC's cable at the host.
struct TapPeer {
    tap: Tap,
    /// Why frames no longer pass.
    error: Option<std::io::Error>,
}

impl TapPeer {
    fn note(&mut self, error: std::io::Error) {
        // A frame for an interface that is down is lost, as on a cable that is not plugged in.
        if error.raw_os_error() != Some(libc::EIO) {
            self.error.get_or_insert(error);
        }
    }
}

impl machine::Peer for TapPeer {
    fn receive(&mut self, frame: &[u8]) {
        if let Err(error) = self.tap.send(frame) {
            self.note(error);
        }
    }

    fn transmit(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1514];
        match self.tap.receive(&mut frame) {
            Ok(Some(length)) => {
                frame.truncate(length);
                Some(frame)
            }
            Ok(None) => None,
            Err(error) => {
                self.note(error);
                None
            }
        }
    }
}

/// A clock whose going lets the devices do what they put off, and the hosts at the other ends of their cables too.
struct MachineTime<T> {
    clock: T,
    machine: Rc<Machine>,
}

impl<T: Time> Time for MachineTime<T> {
    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        self.clock.pass(until);
        self.machine.run();
    }
}

/// An emulated board.
pub(super) struct Emulated {
    machine: Rc<Machine>,
    title: &'static str,
    clock: SimulatedClock,
    /// The devices and their interrupt lines.
    devices: Vec<(Place, u32, Made)>,
    taps: Vec<Arc<Mutex<TapPeer>>>,
}

/// A device that was made.
enum Made {
    Disk(Disk),
    Nic(Nic),
    Display(Display),
}

impl Emulated {
    pub(super) fn start(plan: &Plan) -> anyhow::Result<Self> {
        let clock = SimulatedClock::new();
        let mut builder = Machine::emulated().memory(plan.memory_size());
        if !plan.watched {
            builder = builder.without_watch();
        }
        let mut made = Vec::new();
        let mut joined = Vec::new();
        let mut taps = Vec::new();
        for (number, (transport, device)) in (1..).zip(plan.in_order()) {
            let device = match device {
                Device::Disk(medium) => Made::Disk(disk(medium)?),
                Device::Display { width, height } => Made::Display(Display::new(*width, *height)),
                Device::Nic(far_end) => {
                    let nic = Nic::new([0x02, 0, 0, 0, 0, number]);
                    match far_end {
                        FarEnd::Peer(page) => {
                            nic.attach(Peer::new(clock.clone(), &**page));
                        }
                        FarEnd::OtherNic => joined.push(nic.clone()),
                        FarEnd::Tap(name) => taps.push(nic.attach(TapPeer {
                            tap: Tap::open(name)?,
                            error: None,
                        })),
                        FarEnd::Elsewhere => bail!("an emulated NIC has no program behind it"),
                    }
                    Made::Nic(nic)
                }
            };
            let mut part = match &device {
                Made::Disk(disk) => Part::from(disk),
                Made::Nic(nic) => Part::from(nic),
                Made::Display(display) => Part::from(display),
            };
            if plan.delayed {
                part = part.answer_later();
            }
            builder = transport.plug(builder, part);
            made.push(device);
        }
        if let [one, other] = joined.as_slice() {
            Cable::join(one, other);
        }
        let machine = builder
            .build()
            .context("cannot have the memory of an emulated board")?;
        let places = places(machine.mmio_slots(), machine.pci_functions());
        let devices = places
            .into_iter()
            .zip(made)
            .map(|((place, line), device)| (place, line, device))
            .collect();
        Ok(Self {
            machine: Rc::new(machine),
            title: match plan.version()? {
                Version::Modern => "emulated board, modern registers",
                Version::Legacy => "emulated board, legacy registers",
            },
            clock,
            devices,
            taps,
        })
    }

    fn device(&self, place: &Place) -> anyhow::Result<&Made> {
        let device = self.devices.iter().find(|(other, ..)| other == place);
        let (.., made) = device.with_context(|| format!("there is no device at {place}"))?;
        Ok(made)
    }
}

fn disk(medium: &Medium) -> anyhow::Result<Disk> {
    let (path, read_only) = match medium {
        Medium::Blank(size) => return Ok(Disk::memory(usize::try_from(*size)?)),
        Medium::Image { path, read_only } => (path, *read_only),
        Medium::Elsewhere => bail!("an emulated disk has no program behind it"),
    };
    let name = path.display();
    ensure!(
        image_format(path)? == ImageFormat::Raw,
        "{name} is a qcow2 image, an emulated board takes raw ones only: use --board qemu, or make one with `qemu-img convert -O raw {name} disk.img`"
    );
    let disk = if read_only {
        Disk::file_read_only(path)
    } else {
        Disk::file(path)
    };
    disk.with_context(|| format!("cannot open {name}"))
}

impl Board for Emulated {
    fn title(&self) -> &str {
        self.title
    }

    fn map(&self) -> Map {
        Map::from(&*self.machine)
    }

    fn screen(&self, place: &Place) -> anyhow::Result<Image> {
        match self.device(place)? {
            Made::Display(display) => super::picture(&display.image()),
            _ => bail!("the device at {place} is no display"),
        }
    }

    fn network_time(&self, _place: &Place) -> anyhow::Result<Box<dyn Time>> {
        let machine = self.machine.clone();
        Ok(if self.taps.is_empty() {
            let clock = self.clock.clone();
            Box::new(MachineTime { clock, machine })
        } else {
            let clock = HostClock;
            Box::new(MachineTime { clock, machine })
        })
    }

    fn work(&self, place: &Place) -> Option<Work> {
        match self.device(place).ok()? {
            Made::Disk(disk) => {
                let counters = disk.counters();
                Some(Work {
                    done: counters.reads + counters.writes + counters.flushes,
                    dropped: 0,
                })
            }
            Made::Nic(nic) => {
                let counters = nic.counters();
                Some(Work {
                    done: counters.sent + counters.received,
                    dropped: counters.dropped,
                })
            }
            Made::Display(_) => None,
        }
    }

    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn sleep(&self, until: Option<Instant>) -> anyhow::Result<Vec<Place>> {
        let lines = self.machine.run();
        let devices = self.devices.iter();
        let interrupting: Vec<_> = devices
            .filter(|(_, line, _)| lines.contains(line))
            .map(|(place, ..)| place.clone())
            .collect();
        // Devices that have nothing to say now never will, unless time goes on.
        if interrupting.is_empty() && until.is_some() {
            self.clock.advance(until);
        }
        Ok(interrupting)
    }

    fn check(&self) -> anyhow::Result<()> {
        for tap in &self.taps {
            let mut tap = tap.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(error) = tap.error.take() {
                return Err(error).context("the TAP interface no longer takes or gives frames");
            }
        }
        Ok(())
    }

    fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for violation in self.machine.take_violations() {
            let complaint = violation.to_string();
            // A driver that breaks a rule tends to do so each time.
            if !complaints.contains(&complaint) {
                complaints.push(complaint);
            }
        }
        complaints.extend(memory_complaints(self.machine.memory()));
        complaints
    }
}
