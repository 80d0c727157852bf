//! Devices of other programs, each behind a vhost-user socket.

use std::{rc::Rc, sync::Arc};

use anyhow::{Context, bail};
use machine::{
    Installed, Machine, Memory,
    memory::DEFAULT_BASE,
    qemu::{Disk, ImageFormat},
    vhost_user::{Socket, StorageDaemon, VhostUserDevice},
};
use smoltcp::time::{Duration, Instant};

use super::{Board, Device, Map, Medium, Place, Plan, SocketDevice, Work, memory_complaints};
use crate::{
    image::Image,
    scratch::UnnamedFile,
    time::{HostClock, Time},
};

/// How long a device may take to interrupt, where nobody sets a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns what there are programs for.
pub(super) fn everything(disk: Device, _display: Device) -> Plan {
    Plan::default().with(super::Transport::default(), disk)
}

/// Memory that is shared with other programs, and their devices.
pub(super) struct VhostUser {
    devices: Vec<Rc<SocketDevice>>,
    memory: Arc<Memory>,
    _installed: Installed,
    /// After the devices, which are at their sockets.
    _daemons: Vec<StorageDaemon>,
    _media: Vec<UnnamedFile>,
}

impl VhostUser {
    pub(super) fn start(plan: &Plan) -> anyhow::Result<Self> {
        let memory = Memory::anonymous(DEFAULT_BASE, plan.memory_size())?;
        let mut sockets = plan.sockets.iter();
        let mut devices = Vec::new();
        let mut daemons = Vec::new();
        let mut media = Vec::new();
        for (number, (_, device)) in (1..).zip(&plan.parts) {
            let (socket, kind) = match device {
                Device::Disk(Medium::Blank(size)) => {
                    let file = UnnamedFile::new(*size)?;
                    let disk = Disk::new(file.path(), ImageFormat::Raw);
                    let daemon = StorageDaemon::start(&disk, 1)
                        .context("cannot start qemu-storage-daemon")?;
                    let socket = daemon.socket();
                    media.push(file);
                    daemons.push(daemon);
                    (Some(socket), VhostUserDevice::Block)
                }
                Device::Disk(Medium::Elsewhere) => (None, VhostUserDevice::Block),
                Device::Disk(Medium::Image { .. }) => {
                    bail!("the image of a vhost-user disk is for its program to choose")
                }
                Device::Nic(_) => {
                    let mac = [0x02, 0, 0, 0, 0, number];
                    (None, VhostUserDevice::Network { mac })
                }
                Device::Display { .. } => bail!("no vhost-user display"),
            };
            let socket = match socket {
                Some(socket) => socket,
                None => Socket::at(sockets.next().context("a device has no socket")?),
            };
            devices.push(Rc::new(SocketDevice::new(socket, kind, memory.clone())));
        }
        // There are no registers: all that they would say goes over the sockets.
        let machine = Machine::new(memory.clone(), Arc::new(()));
        Ok(Self {
            devices,
            memory,
            _installed: machine.install(),
            _daemons: daemons,
            _media: media,
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
        bail!("the device at {place} is no display")
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
