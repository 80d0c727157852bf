//! The boards that the examples run on: what they are made of, and what they tell beside their devices.

mod emulated;
mod map;
mod qemu;
mod vhost_user;

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use embedded_graphics::pixelcolor::Rgb888;
use machine::{Memory, Version, qemu::ImageFormat};
use smoltcp::time::{Duration, Instant};

pub use self::map::{Description, Found, Handle, Map, PciMap, Place, SocketDevice};
use crate::{image::Image, time::Time};

/// The size of each disk of a board with everything, in bytes.
const DISK_SIZE: u64 = 16 << 20;

/// The width and the height of each display of a board with everything.
const RESOLUTION: (u32, u32) = (1280, 800);

/// How long a device of another process may take to interrupt, where nobody sets a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of board.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum BoardKind {
    /// Devices in this process: nothing to install, the same in each run.
    #[default]
    Emulated,
    /// QEMU's devices, with QEMU as a child process and no guest in it.
    Qemu,
    /// Devices of other programs, behind vhost-user sockets.
    VhostUser,
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

/// What a disk holds its blocks in.
#[derive(Debug, Clone, Eq, PartialEq)]
pub enum Medium {
    /// Memory of so many bytes, all 0 at first.
    Blank(u64),
    /// An image of the host.
    Image {
        /// Where it is.
        path: PathBuf,
        /// Whether it is opened for reading only.
        read_only: bool,
    },
    /// Whatever the program behind the socket has.
    Elsewhere,
}

/// Where the cable of a NIC ends.
#[derive(Debug, Clone, Eq, PartialEq)]
pub enum FarEnd {
    /// At a [`Peer`](crate::peer::Peer) that serves this page.
    Peer(Vec<u8>),
    /// At the other NIC of the board.
    OtherNic,
    /// At a TAP interface of the host.
    Tap(String),
    /// Wherever the program behind the socket has it.
    Elsewhere,
}

/// A device that a board is to have.
#[derive(Debug, Clone, Eq, PartialEq)]
pub enum Device {
    /// A disk.
    Disk(Medium),
    /// A NIC.
    Nic(FarEnd),
    /// A display.
    Display {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
}

/// The devices that a board is to have, and how they are joined to it.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    parts: Vec<(Transport, Device)>,
    watched: bool,
    delayed: bool,
    sockets: Vec<PathBuf>,
}

impl Plan {
    /// Adds a device.
    #[must_use]
    pub fn with(mut self, transport: Transport, device: Device) -> Self {
        self.parts.push((transport, device));
        self
    }

    /// Has an emulated board look at what the drivers do, which takes time, for [`Board::complaints`].
    #[must_use]
    pub fn watched(mut self) -> Self {
        self.watched = true;
        self
    }

    /// Has the devices of an emulated board answer later and raise an interrupt line then, as those of a real machine do.
    #[must_use]
    pub fn delayed(mut self) -> Self {
        self.delayed = true;
        self
    }

    /// Returns the devices in the order of their places: MMIO comes before PCI.
    fn in_order(&self) -> Vec<&(Transport, Device)> {
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort_by_key(|(transport, _)| *transport == Transport::Pci);
        parts
    }

    /// Returns how the registers on MMIO look.
    ///
    /// # Errors
    ///
    /// They would have to look both ways.
    fn version(&self) -> anyhow::Result<Version> {
        let has = |wanted| self.parts.iter().any(|(transport, _)| *transport == wanted);
        match (has(Transport::Mmio), has(Transport::LegacyMmio)) {
            (true, true) => bail!("a board has either modern or legacy MMIO"),
            (_, true) => Ok(Version::Legacy),
            _ => Ok(Version::Modern),
        }
    }

    /// Returns how much memory drivers for all of it take, in bytes: a whole number of MiB.
    fn memory_size(&self) -> usize {
        /// Queues, commands and buffers on their way.
        const OTHERS: usize = 64 << 20;

        let framebuffers = self.parts.iter().map(|(_, device)| match device {
            Device::Display { width, height } => *width as usize * *height as usize * 4,
            Device::Disk(_) | Device::Nic(_) => 0,
        });
        (OTHERS + framebuffers.sum::<usize>()).next_multiple_of(1 << 20)
    }
}

/// Which of its registers a board with everything has.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub enum Variant {
    /// Those of version 1.0 of VirtIO or later, on MMIO and PCI.
    Modern,
    /// Those of before version 1.0, on MMIO.
    Legacy,
    /// None: programs behind sockets.
    Sockets,
}

impl Variant {
    /// Returns a disk, a NIC and a display on each bus, the other end of each NIC's cable at a host that serves `page`.
    ///
    /// Behind sockets, it is what there are programs for here.
    #[must_use]
    pub fn everything(self, page: &[u8]) -> Plan {
        let (width, height) = RESOLUTION;
        let disk = Device::Disk(Medium::Blank(DISK_SIZE));
        let display = Device::Display { width, height };
        let transports: &[Transport] = match self {
            Self::Modern => &[Transport::Mmio, Transport::Pci],
            Self::Legacy => &[Transport::LegacyMmio],
            Self::Sockets => return vhost_user::everything(disk, display),
        };
        transports
            .iter()
            .fold(Plan::default().watched(), |plan, &transport| {
                plan.with(transport, disk.clone())
                    .with(transport, Device::Nic(FarEnd::Peer(page.to_owned())))
                    .with(transport, display.clone())
            })
    }
}

impl BoardKind {
    /// Returns the variants of a board with everything.
    #[must_use]
    pub fn variants(self) -> &'static [Variant] {
        match self {
            Self::Emulated | Self::Qemu => &[Variant::Modern, Variant::Legacy],
            Self::VhostUser => &[Variant::Sockets],
        }
    }

    /// Makes a board, and installs it on this thread.
    ///
    /// # Errors
    ///
    /// The host has not what the board takes: memory, an image, QEMU, a program at a socket.
    pub fn start(self, plan: &Plan) -> anyhow::Result<Box<dyn Board>> {
        Ok(match self {
            Self::Emulated => Box::new(emulated::Emulated::start(plan)?),
            Self::Qemu => Box::new(qemu::Qemu::start(plan)?),
            Self::VhostUser => Box::new(vhost_user::VhostUser::start(plan)?),
        })
    }
}

/// The options of a program that uses a device or two: on which board, and how they are joined to it.
#[derive(Debug, clap::Args)]
pub struct BoardArgs {
    /// The board that the devices are on.
    #[arg(long, value_enum, default_value_t)]
    pub board: BoardKind,

    /// How the devices are joined to an emulated board or to QEMU's.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,

    /// The socket of the program that has the device, with --board vhost-user. Once for each device. Without it, programs of
    /// QEMU's are started for disks and displays.
    #[arg(long, value_name = "PATH", conflicts_with = "transport")]
    pub socket: Vec<PathBuf>,
}

impl BoardArgs {
    /// Makes a board with these devices, and installs it on this thread.
    ///
    /// # Errors
    ///
    /// * There are not as many sockets as devices that need one.
    /// * As those of [`BoardKind::start`].
    pub fn start(
        &self,
        devices: impl IntoIterator<Item = Device>,
    ) -> anyhow::Result<Box<dyn Board>> {
        let mut plan = devices.into_iter().fold(Plan::default(), |plan, device| {
            plan.with(self.transport, device)
        });
        match self.board {
            // Without any, programs are started.
            BoardKind::VhostUser => ensure!(
                self.socket.is_empty() || self.socket.len() == plan.parts.len(),
                "{} sockets are given with --socket, {} are needed",
                self.socket.len(),
                plan.parts.len()
            ),
            _ if !self.socket.is_empty() => bail!("--socket is for --board vhost-user only"),
            _ => {}
        }
        plan.sockets.clone_from(&self.socket);
        self.board.start(&plan)
    }
}

/// What a device has done.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq)]
pub struct Work {
    /// Requests of a disk, or frames of a NIC in both directions.
    pub done: u64,
    /// Frames that were lost for want of a buffer.
    pub dropped: u64,
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
    fn screen(&self, place: &Place) -> anyhow::Result<Image>;

    /// Returns the clock for a stack on a NIC. The other end of the cable lives as this clock goes.
    ///
    /// # Errors
    ///
    /// There is no NIC at `place`.
    fn network_time(&self, place: &Place) -> anyhow::Result<Box<dyn Time>>;

    /// Returns what a disk or a NIC has done, where the board counts that.
    fn work(&self, place: &Place) -> Option<Work>;

    /// Returns the time.
    fn now(&self) -> Instant;

    /// Sleeps until a device interrupts, or until `until`. Returns the devices that interrupt.
    ///
    /// Without `until`, it returns also when it is certain, or as good as certain, that none ever will.
    ///
    /// # Errors
    ///
    /// The board does not tell of interrupts, or has gone.
    fn sleep(&self, until: Option<Instant>) -> anyhow::Result<Vec<Place>>;

    /// Returns why the devices, or what their cables lead to, can no longer be used.
    ///
    /// # Errors
    ///
    /// They can not.
    fn check(&self) -> anyhow::Result<()>;

    /// Returns what the board saw drivers do against the rules, and what they left behind.
    fn complaints(&self) -> Vec<String>;
}

/// Returns what a display shows as a picture.
///
/// # Errors
///
/// It shows nothing.
fn picture(shown: &machine::Image) -> anyhow::Result<Image> {
    ensure!(!shown.rgba.is_empty(), "the display shows nothing");
    let pixels = shown
        .rgba
        .chunks_exact(4)
        .map(|rgba| Rgb888::new(rgba[0], rgba[1], rgba[2]));
    Image::from_pixels(shown.width, shown.height, pixels)
}

/// Returns what drivers did to memory that they should not have.
fn memory_complaints(memory: &Memory) -> Vec<String> {
    let mut complaints = Vec::new();
    let pages = memory.counters().pages_live;
    if pages != 0 {
        complaints.push(format!("{pages} pages of memory were not given back"));
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

/// Looks at an image, and returns its format or refuses what is none with a reason.
fn image_format(path: &Path) -> anyhow::Result<ImageFormat> {
    let name = path.display();
    let mut file = File::open(path).with_context(|| format!("cannot open {name}"))?;
    ensure!(
        !file.metadata()?.is_dir(),
        "{name} is a directory, not a disk image"
    );
    let size = file
        .seek(SeekFrom::End(0))
        .with_context(|| format!("cannot tell the size of {name}"))?;
    ensure!(
        size >= 512,
        "{name} is no disk image: it has {size} bytes, less than a block of 512"
    );
    file.rewind()?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .with_context(|| format!("cannot read {name}"))?;
    if magic == *b"QFI\xfb" {
        return Ok(ImageFormat::Qcow2);
    }
    if !size.is_multiple_of(512) {
        log::warn!(
            "the last {} bytes of {name} are no whole block, and are not on the disk",
            size % 512
        );
    }
    Ok(ImageFormat::Raw)
}
