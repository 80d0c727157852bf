//! Each of the three drivers, so that a test can be run on all of them, and the work that it is to do.

use axdriver_base::{BaseDriverOps, DevError, DevResult, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::WaitPolicy;
use machine::Device;

use super::{AnyTransport, Bench, Disk, Display, MAC, Nic, Over, numbered_disk};

/// A type of device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Disk,
    Nic,
    Display,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Disk, Self::Nic, Self::Display];

    /// All kinds over all transports.
    pub(crate) fn everywhere() -> impl Iterator<Item = (Self, Over)> {
        let over = |kind| Over::ALL.map(|over| (kind, over));
        Self::ALL.into_iter().flat_map(over)
    }

    /// All kinds over the transports since 1.0.
    pub(crate) fn everywhere_since_1() -> impl Iterator<Item = (Self, Over)> {
        Self::everywhere().filter(|(_, over)| *over != Over::Legacy)
    }

    /// Returns a board with a device of this kind.
    pub(crate) fn plug(self, over: Over) -> World {
        self.plug_as(over, |device| device)
    }

    /// Returns a board with a device of this kind, which `change` makes something special of.
    pub(crate) fn plug_as(self, over: Over, change: impl FnOnce(Device) -> Device) -> World {
        let disk = numbered_disk();
        let nic = machine::Nic::new(MAC);
        let display = machine::Display::new(16, 8);
        let device = match self {
            Self::Disk => Device::from(&disk),
            Self::Nic => Device::from(&nic),
            Self::Display => Device::from(&display),
        };
        World {
            bench: over.plug(change(device)),
            kind: self,
            disk,
            nic,
            display,
        }
    }
}

/// A board with one device, seen from both sides.
pub(crate) struct World {
    pub(crate) bench: Bench,
    pub(crate) kind: Kind,
    pub(crate) disk: machine::Disk,
    pub(crate) nic: machine::Nic,
    pub(crate) display: machine::Display,
}

/// A driver of any kind.
pub(crate) enum Driver {
    Disk(Disk),
    Nic(Box<Nic>),
    Display(Display),
}

impl World {
    pub(crate) fn start(&self) -> Driver {
        self.try_start(WaitPolicy::new()).unwrap()
    }

    pub(crate) fn try_start(&self, wait: WaitPolicy) -> DevResult<Driver> {
        self.try_start_on(self.bench.transport(), wait)
    }

    pub(crate) fn try_start_on(
        &self,
        transport: AnyTransport,
        wait: WaitPolicy,
    ) -> DevResult<Driver> {
        Ok(match self.kind {
            Kind::Disk => Driver::Disk(Disk::try_new_with(transport, wait)?),
            Kind::Nic => Driver::Nic(Box::new(Nic::try_new_with(transport, wait)?)),
            Kind::Display => Driver::Display(Display::try_new_with(transport, wait)?),
        })
    }

    /// Lets the driver do some of everything that it is for. Where a call says `Ok`, what it did is checked.
    pub(crate) fn work(&self, driver: &mut Driver) -> DevResult {
        match driver {
            Driver::Disk(disk) => self.store(disk),
            Driver::Nic(nic) => self.talk(nic, true),
            Driver::Display(display) => self.draw(display),
        }
    }

    /// As [`work`](Self::work), for a device that may swap the buffers of frames, which no driver can notice.
    pub(crate) fn work_with_swapped_frames(&self, driver: &mut Driver) -> DevResult {
        match driver {
            Driver::Nic(nic) => self.talk(nic, false),
            _ => self.work(driver),
        }
    }

    fn store(&self, disk: &mut Disk) -> DevResult {
        let mut read = [0; 512];
        disk.read_block(7, &mut read)?;
        assert_eq!(read, [7; 512], "what is read is what the disk holds");
        let written: Vec<u8> = (0..=250).cycle().take(1024).collect();
        disk.write_block(20, &written)?;
        assert_eq!(self.disk.contents().unwrap()[20 * 512..22 * 512], written);
        disk.flush()?;
        assert_eq!(self.disk.stable().unwrap()[20 * 512..22 * 512], written);
        let mut read = [0; 1024];
        disk.read_block(20, &mut read)?;
        assert_eq!(read[..], written, "what was written is read");
        Ok(())
    }

    fn talk<const QS: usize>(&self, nic: &mut Nic<QS>, exact: bool) -> DevResult {
        let frame: Vec<u8> = (0..200).map(|byte: u8| byte ^ 0x5a).collect();
        nic.recycle_tx_buffers()?;
        let mut buf = nic.alloc_tx_buffer(frame.len())?;
        buf.packet_mut().copy_from_slice(&frame);
        self.nic.take_sent();
        nic.transmit(buf)?;
        self.bench.board.run();
        let sent = self.nic.take_sent();
        if sent.is_empty() {
            // It is with the device, which has failed without having said so.
            return Err(DevError::Again);
        }
        assert_eq!(sent, [&frame[..]], "what is sent arrives");
        nic.recycle_tx_buffers()?;

        self.nic.inject(&frame);
        self.bench.board.run();
        for _ in 0..80 {
            match nic.receive() {
                Ok(buf) => {
                    let packet = buf.packet();
                    if exact {
                        // A device may say that less has come in than has, and a legacy device that it is more.
                        let legacy = self.bench.over == Over::Legacy;
                        let right =
                            frame.starts_with(packet) || (legacy && packet.starts_with(&frame));
                        assert!(right, "what comes in is received");
                    }
                    let whole = packet.len() == frame.len();
                    nic.recycle_rx_buffer(buf)?;
                    return if whole { Ok(()) } else { Err(DevError::Io) };
                }
                Err(DevError::Again) => {
                    self.bench.board.run();
                }
                Err(error) => return Err(error),
            }
        }
        Err(DevError::Again)
    }

    fn draw(&self, display: &mut Display) -> DevResult {
        let info = display.info();
        assert_eq!((info.width, info.height), (16, 8));
        let shade = display.fb().as_bytes()[0].wrapping_add(1);
        display.fb().as_bytes_mut().fill(shade);
        display.flush()?;
        let pixel = self.display.image().pixel(15, 7);
        assert_eq!(pixel, Some([shade, shade, shade, 255]), "it is shown");
        Ok(())
    }
}

impl Driver {
    pub(crate) fn reset(&mut self) -> DevResult {
        match self {
            Self::Disk(disk) => disk.reset(),
            Self::Nic(nic) => nic.reset(),
            Self::Display(display) => display.reset(),
        }
    }

    pub(crate) fn set_wait_policy(&mut self, wait: WaitPolicy) {
        match self {
            Self::Disk(disk) => disk.set_wait_policy(wait),
            Self::Nic(nic) => nic.set_wait_policy(wait),
            Self::Display(display) => display.set_wait_policy(wait),
        }
    }

    /// What an OS calls when the interrupt said that the configuration has changed.
    pub(crate) fn configuration_changed(&mut self) -> DevResult {
        match self {
            Self::Disk(disk) => disk.configuration_changed(),
            Self::Nic(nic) => nic.configuration_changed(),
            Self::Display(display) => display.configuration_changed().map(drop),
        }
    }

    /// The part of the contract that all drivers share.
    pub(crate) fn base(&mut self) -> &mut dyn BaseDriverOps {
        match self {
            Self::Disk(disk) => disk,
            Self::Nic(nic) => &mut **nic,
            Self::Display(display) => display,
        }
    }

    pub(crate) fn acknowledge(&mut self) -> DevResult<InterruptCause> {
        self.base().acknowledge_interrupt()
    }

    /// Makes a call that needs the device, which fails if the device does.
    pub(crate) fn ask(&mut self) -> DevResult {
        match self {
            Self::Disk(disk) => disk.flush(),
            Self::Nic(nic) => nic.recycle_tx_buffers(),
            Self::Display(display) => display.flush(),
        }
    }
}
