//! Devices of other programs, each behind a vhost-user socket.

use std::{rc::Rc, sync::Arc};

use anyhow::{Context, bail};
use machine::{
    Installed, Machine, Memory,
    memory::DEFAULT_BASE,
    qemu::{Disk, ImageFormat},
    vhost_user::{DisplayProgram, Socket, StorageDaemon, VhostUserDevice},
};
use smoltcp::time::Instant;

use super::{
    Board, Device, Map, Medium, PATIENCE, Place, Plan, SocketDevice, Transport, Work, image_format,
    memory_complaints,
};
use crate::{
    image::Image,
    scratch::UnnamedFile,
    time::{HostClock, Time},
};

/// Returns what there are programs for.
pub(super) fn everything(disk: Device, display: Device) -> Plan {
    let plan = Plan::default().with(Transport::default(), disk);
    match DisplayProgram::missing() {
        None => plan.with(Transport::default(), display),
        Some(why) => {
            log::warn!("no display: {why}");
            plan
        }
    }
}

/// Memory that is shared with other programs, and their devices.
pub(super) struct VhostUser {
    devices: Vec<Rc<SocketDevice>>,
    memory: Arc<Memory>,
    _installed: Installed,
    _programs: Vec<Program>,
}

/// A program that runs as long as the board, and what goes after it.
#[expect(dead_code, reason = "they end when they are dropped")]
enum Program {
    Storage(Box<StorageDaemon>, Option<UnnamedFile>),
    Display(DisplayProgram),
}

impl Program {
    /// Starts the program that has such a device, and returns where it listens.
    fn start(device: &Device) -> anyhow::Result<(Self, Socket)> {
        let (disk, file) = match device {
            Device::Disk(Medium::Blank(size)) => {
                let file = UnnamedFile::new(*size)?;
                (Disk::new(file.path(), ImageFormat::Raw), Some(file))
            }
            Device::Disk(Medium::Image { path, read_only }) => {
                let disk = Disk::new(path, image_format(path)?);
                (if *read_only { disk.read_only() } else { disk }, None)
            }
            Device::Disk(Medium::Elsewhere) => bail!("a disk has neither an image nor a socket"),
            Device::Nic(_) => bail!(
                "there is no program to start for a NIC: start one, and name its socket with --socket"
            ),
            Device::Display { .. } => {
                let program = DisplayProgram::start().context("cannot start vhost-user-gpu")?;
                let socket = program.socket();
                return Ok((Self::Display(program), socket));
            }
        };
        let daemon = StorageDaemon::start(&disk, 1).context("cannot start qemu-storage-daemon")?;
        let socket = daemon.socket();
        Ok((Self::Storage(Box::new(daemon), file), socket))
    }
}

impl VhostUser {
    pub(super) fn start(plan: &Plan) -> anyhow::Result<Self> {
        let memory = Memory::anonymous(DEFAULT_BASE, plan.memory_size())?;
        let mut sockets = plan.sockets.iter().map(Socket::at);
        let mut devices = Vec::new();
        let mut programs = Vec::new();
        for (number, (_, device)) in (1..).zip(&plan.parts) {
            let socket = match sockets.next() {
                Some(socket) => socket,
                None => {
                    let (program, socket) = Program::start(device)?;
                    programs.push(program);
                    socket
                }
            };
            let kind = match *device {
                Device::Disk(_) => VhostUserDevice::Block,
                Device::Nic(_) => VhostUserDevice::Network {
                    mac: [0x02, 0, 0, 0, 0, number],
                },
                Device::Display { width, height } => VhostUserDevice::Display { width, height },
            };
            devices.push(Rc::new(SocketDevice::new(socket, kind, memory.clone())));
        }
        // There are no registers: all that they would say goes over the sockets.
        let machine = Machine::new(memory.clone(), Arc::new(()));
        Ok(Self {
            devices,
            memory,
            _installed: machine.install(),
            _programs: programs,
        })
    }
}

impl Board for VhostUser {
    fn title(&self) -> &str {
        "vhost-user"
    }

    fn map(&self) -> Map {
        Map {
            sockets: self.devices.clone(),
            ..Map::default()
        }
    }

    fn screen(&self, place: &Place) -> anyhow::Result<Image> {
        let device = self.devices.iter().find(|device| device.place() == *place);
        let handle = device.and_then(|device| device.handle());
        let handle = handle.with_context(|| format!("there is no display at {place}"))?;
        super::picture(&handle.image(0))
    }

    fn network_time(&self, _place: &Place) -> anyhow::Result<Box<dyn Time>> {
        Ok(Box::new(HostClock))
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
            let mut interrupting = Vec::new();
            for device in &self.devices {
                if let Some(handle) = device.handle()
                    && handle.wait_for_interrupt(std::time::Duration::ZERO)?
                {
                    interrupting.push(device.place());
                }
            }
            if !interrupting.is_empty() || self.now() >= until {
                return Ok(interrupting);
            }
            HostClock.pass(Some(until));
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        for handle in self.devices.iter().filter_map(|device| device.handle()) {
            handle.check()?;
        }
        Ok(())
    }

    fn complaints(&self) -> Vec<String> {
        memory_complaints(&self.memory)
    }
}
