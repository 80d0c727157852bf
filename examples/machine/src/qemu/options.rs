//! What a machine in QEMU is made of, and the command line that makes it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::QemuError;
use super::process::Launch;
use crate::emulated::Version;

/// The machines of QEMU's that serve as a board.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum QemuMachine {
    /// `qemu-system-aarch64 -M virt`: 32 virtio-mmio slots and a PCI root.
    Aarch64Virt,
    /// `qemu-system-x86_64 -M q35`: a PCI root.
    X86Q35,
}

impl QemuMachine {
    /// Returns the name of the program that has this machine.
    pub fn program(self) -> &'static str {
        match self {
            Self::Aarch64Virt => "qemu-system-aarch64",
            Self::X86Q35 => "qemu-system-x86_64",
        }
    }

    /// Returns the first guest-physical address of the memory that a driver may use.
    pub fn memory_base(self) -> u64 {
        match self {
            Self::Aarch64Virt => 0x4000_0000,
            // The memory below 1 MiB has holes. `pc-dimm` puts a module of ours above 4 GiB, where
            // an address that lost its upper half is noticed.
            Self::X86Q35 => 0x1_4000_0000,
        }
    }

    pub(super) fn mmio_slots(self) -> usize {
        match self {
            Self::Aarch64Virt => 32,
            Self::X86Q35 => 0,
        }
    }
}

/// The bus that a device is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bus {
    /// A virtio-mmio slot.
    Mmio,
    /// The PCI root bus.
    Pci,
    /// A PCI Express root port of its own, on the root bus: a slot that the device can be unplugged from.
    RootPort,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The blocks of the disk and nothing else.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl ImageFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What a disk does that QEMU's `blkdebug` can make fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum DiskOperation {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Writing zeroes.
    WriteZeroes,
    /// Discarding.
    Discard,
    /// Flushing.
    Flush,
}

impl DiskOperation {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write-zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
        }
    }
}

/// A rule by which an operation of a disk fails.
#[derive(Clone, Debug)]
pub struct Fault {
    operation: DiskOperation,
    error: i32,
    sector: Option<u64>,
    once: bool,
}

impl Fault {
    /// Makes each operation of a kind fail with `EIO`.
    pub fn of(operation: DiskOperation) -> Self {
        Self {
            operation,
            error: 5,
            sector: None,
            once: false,
        }
    }

    /// Makes it fail with another error of the host's, by its number.
    pub fn error(mut self, number: i32) -> Self {
        self.error = number;
        self
    }

    /// Makes only operations fail that touch `sector` (512 bytes).
    pub fn sector(mut self, sector: u64) -> Self {
        self.sector = Some(sector);
        self
    }

    /// Makes only the first operation fail.
    pub fn once(mut self) -> Self {
        self.once = true;
        self
    }

    fn rule(&self) -> Value {
        let mut rule = json!({
            "event": "none",
            "iotype": self.operation.name(),
            "errno": self.error,
            "once": self.once,
        });
        if let Some(sector) = self.sector {
            rule["sector"] = json!(sector);
        }
        rule
    }
}

/// What a device has in common with any other: its bus, and QEMU's properties of it.
#[derive(Clone, Debug)]
struct Device {
    bus: Bus,
    properties: Vec<(String, String)>,
}

impl Device {
    fn new() -> Self {
        Self {
            bus: Bus::Pci,
            properties: Vec::new(),
        }
    }
}

/// Methods of each kind of device, in one place.
macro_rules! device_methods {
    ($type:ty) => {
        impl $type {
            /// Puts the device on a bus. The default is [`Bus::Pci`].
            pub fn on(mut self, bus: Bus) -> Self {
                self.device.bus = bus;
                self
            }

            /// Sets a property of QEMU's device, such as `event_idx`, to `on` or `off` or a number.
            pub fn property(mut self, name: &str, value: &str) -> Self {
                self.device
                    .properties
                    .push((name.to_owned(), value.to_owned()));
                self
            }
        }
    };
}

/// A disk on an image file.
///
/// Properties that matter to a driver: `queue-size`, `num-queues`, `event_idx`, `indirect_desc`,
/// `iommu_platform`, `config-wce`, `write-cache`, `discard`, `write-zeroes`, `logical_block_size`,
/// `serial`.
#[derive(Clone, Debug)]
pub struct Disk {
    device: Device,
    image: Image,
    read_only: bool,
    faults: Vec<Fault>,
}

/// What a disk holds its blocks in.
#[derive(Clone, Debug)]
enum Image {
    File { path: PathBuf, format: ImageFormat },
    Null { size: u64 },
}

device_methods!(Disk);

impl Disk {
    /// A disk on the image at `path`, which QEMU opens for writing.
    pub fn new(path: impl Into<PathBuf>, format: ImageFormat) -> Self {
        Self::on_image(Image::File {
            path: path.into(),
            format,
        })
    }

    /// A disk of `size` bytes that reads as zeroes and forgets what is written, at no cost.
    pub fn null(size: u64) -> Self {
        Self::on_image(Image::Null { size })
    }

    fn on_image(image: Image) -> Self {
        Self {
            device: Device::new(),
            image,
            read_only: false,
            faults: Vec::new(),
        }
    }

    /// Returns the path of the image, if the disk has one.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        match &self.image {
            Image::File { path, .. } => Some(path.clone()),
            Image::Null { .. } => None,
        }
    }

    /// Checks what QEMU's own check would not name well.
    pub(crate) fn check(&self) -> Result<(), QemuError> {
        match self.path() {
            Some(path) if path.to_str().is_none() => Err(QemuError::Options {
                message: format!(
                    "disk image {}: QEMU takes no path that is not UTF-8; rename it",
                    path.display()
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Makes the disk read-only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Adds a rule by which an operation fails.
    pub fn fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }
}

/// A NIC. Properties that matter to a driver: `mac`, `mq`, `mrg_rxbuf`, `csum`, `guest_csum`,
/// `host_mtu`, `status`, `rx_queue_size`, `tx_queue_size`, `event_idx`, `indirect_desc`,
/// `iommu_platform`.
#[derive(Clone, Debug)]
pub struct Nic {
    device: Device,
    pub(super) far_end: FarEnd,
}

device_methods!(Nic);

/// What is at the far end of a NIC's cable.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum FarEnd {
    /// A [`Cable`](super::Cable) that the board hands out.
    Cable,
    /// A back end of QEMU's, by its options without the `id`.
    Netdev(String),
}

impl Nic {
    /// A NIC whose cable's other end is [`QemuBoard::take_cable`](super::QemuBoard::take_cable).
    pub fn on_cable() -> Self {
        Self {
            device: Device::new(),
            far_end: FarEnd::Cable,
        }
    }

    /// A NIC in QEMU's user network: a DHCP server gives it 10.0.2.15, and 10.0.2.2 is the host.
    ///
    /// `options` are those of `-netdev user`, such as `tftp=DIRECTORY,bootfile=NAME`; it may be empty.
    pub fn on_user_network(options: &str) -> Self {
        let separator = if options.is_empty() { "" } else { "," };
        Self::on_netdev(&format!("user{separator}{options}"))
    }

    /// A NIC on any back end of QEMU's, such as `tap,ifname=tap0,script=no,downscript=no`.
    pub fn on_netdev(options: &str) -> Self {
        Self {
            device: Device::new(),
            far_end: FarEnd::Netdev(options.to_owned()),
        }
    }
}

/// A display. Properties that matter to a driver: `max_outputs`, `edid`, `event_idx`,
/// `indirect_desc`, `iommu_platform`.
#[derive(Clone, Debug)]
pub struct Display {
    device: Device,
}

device_methods!(Display);

impl Display {
    /// A display of a size in pixels.
    pub fn new(width: u32, height: u32) -> Self {
        let display = Self {
            device: Device::new(),
        };
        display
            .property("xres", &width.to_string())
            .property("yres", &height.to_string())
    }
}

/// What a board in QEMU is made of.
///
/// Devices of a bus sit in the order in which they were added: the first on MMIO in slot 0, the
/// first on PCI as device 1 of bus 0, where a root port stands for the device behind it. QEMU's
/// names for them, as QMP wants them, count by kind: the first disk is the device `disk0` and the
/// block node `disk0`, the first NIC `nic0`, the first display `display0`.
///
/// ```
/// use machine::qemu::{Bus, Disk, Display, ImageFormat, Nic, QemuMachine, QemuOptions};
///
/// let options = QemuOptions::new(QemuMachine::Aarch64Virt)
///     .disk(Disk::new("disk.img", ImageFormat::Raw).on(Bus::Mmio).property("queue-size", "64"))
///     .nic(Nic::on_user_network(""))
///     .display(Display::new(640, 480))
///     .property_of_all("event_idx", "off");
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
pub struct QemuOptions {
    pub(super) machine: QemuMachine,
    pub(super) program: Option<PathBuf>,
    pub(super) memory_size: u64,
    pub(super) mmio: Version,
    pub(super) disks: Vec<Disk>,
    pub(super) nics: Vec<Nic>,
    displays: Vec<Display>,
    /// The display and its head that a monitor can be plugged into.
    pub(super) monitor: Option<(usize, u32)>,
    /// The devices in the order in which they were added.
    order: Vec<Kind>,
    properties: Vec<(String, String)>,
    arguments: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Disk(usize),
    Nic(usize),
    Display(usize),
}

/// Where a device is found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    MmioSlot(usize),
    PciDevice(u8),
    /// Behind the root port with this device number.
    RootPort(u8),
}

/// The number of the PCI device that comes first. 0 is the host bridge.
const FIRST_PCI_DEVICE: u8 = 1;

/// The last PCI device number that both machines leave free.
const LAST_PCI_DEVICE: u8 = 24;

impl QemuOptions {
    /// A machine without devices, with 64 MiB of memory and modern MMIO slots.
    pub fn new(machine: QemuMachine) -> Self {
        Self {
            machine,
            program: None,
            memory_size: 64 << 20,
            mmio: Version::Modern,
            disks: Vec::new(),
            nics: Vec::new(),
            displays: Vec::new(),
            monitor: None,
            order: Vec::new(),
            properties: Vec::new(),
            arguments: Vec::new(),
        }
    }

    /// Sets the program to start, instead of the one that is found in `PATH`.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// Sets the size of the memory that drivers may use, in bytes: a multiple of 1 MiB.
    pub fn memory_size(mut self, size: u64) -> Self {
        self.memory_size = size;
        self
    }

    /// Sets the layout of the registers of all MMIO slots.
    pub fn mmio(mut self, version: Version) -> Self {
        self.mmio = version;
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.order.push(Kind::Disk(self.disks.len()));
        self.disks.push(disk);
        self
    }

    /// Adds a NIC.
    pub fn nic(mut self, nic: Nic) -> Self {
        self.order.push(Kind::Nic(self.nics.len()));
        self.nics.push(nic);
        self
    }

    /// Adds a display.
    pub fn display(mut self, display: Display) -> Self {
        self.order.push(Kind::Display(self.displays.len()));
        self.displays.push(display);
        self
    }

    /// Lets [`QemuBoard::monitor`](super::QemuBoard::monitor) plug a monitor into head `head` of the display with this number.
    /// QEMU has a plug for one monitor only, so the last call counts.
    pub fn monitor(mut self, display: usize, head: u32) -> Self {
        self.monitor = Some((display, head));
        self
    }

    /// Sets a property of every virtio device, unless the device has a value of its own.
    pub fn property_of_all(mut self, name: &str, value: &str) -> Self {
        self.properties.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds an argument to QEMU's command line as it is.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Returns the disk images, in the order of their numbers.
    pub(super) fn images(&self) -> Vec<Option<PathBuf>> {
        self.disks.iter().map(Disk::path).collect()
    }

    /// Checks what QEMU's own check would not name well.
    pub(super) fn check(&self) -> Result<(), QemuError> {
        if self.memory_size == 0 || !self.memory_size.is_multiple_of(1 << 20) {
            return Err(QemuError::Options {
                message: format!(
                    "a memory of {} bytes: it has to be a multiple of 1 MiB",
                    self.memory_size
                ),
            });
        }
        self.disks.iter().try_for_each(Disk::check)?;
        self.places().map(|_| ())
    }

    /// Returns where each device goes, in the order in which they were added.
    pub(super) fn places(&self) -> Result<Vec<Place>, QemuError> {
        let mut slots = 0..self.machine.mmio_slots();
        let mut devices = FIRST_PCI_DEVICE..=LAST_PCI_DEVICE;
        let place = |kind: &Kind| match self.device(*kind).bus {
            Bus::Mmio => slots.next().map(Place::MmioSlot),
            Bus::Pci => devices.next().map(Place::PciDevice),
            Bus::RootPort => devices.next().map(Place::RootPort),
        };
        self.order
            .iter()
            .map(place)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| QemuError::Options {
                message: format!(
                    "too many devices: {:?} has {} MMIO slots and room for {} PCI devices",
                    self.machine,
                    self.machine.mmio_slots(),
                    LAST_PCI_DEVICE - FIRST_PCI_DEVICE + 1,
                ),
            })
    }

    fn device(&self, kind: Kind) -> &Device {
        match kind {
            Kind::Disk(number) => &self.disks[number].device,
            Kind::Nic(number) => &self.nics[number].device,
            Kind::Display(number) => &self.displays[number].device,
        }
    }

    /// Adds the machine and its devices to a command line.
    ///
    /// `memory` is the path of the file that holds the memory, as the child sees it, and `cables`
    /// are the child's numbers of the sockets of the NICs that are on a cable.
    pub(super) fn write_to(
        &self,
        launch: &mut Launch,
        memory: &str,
        cables: &[i32],
    ) -> Result<(), QemuError> {
        let size = self.memory_size;
        launch.option("-accel", "tcg").option(
            "-object",
            json!({
                "qom-type": "memory-backend-file",
                "id": "memory",
                "size": size,
                "mem-path": memory,
                "share": true,
            })
            .to_string(),
        );
        match self.mmio {
            Version::Legacy => launch.option("-global", "virtio-mmio.force-legacy=true"),
            Version::Modern => launch.option("-global", "virtio-mmio.force-legacy=false"),
        };
        match self.machine {
            QemuMachine::Aarch64Virt => launch
                .option("-M", "virt,highmem=off,memory-backend=memory")
                .option("-m", format!("{}M", size >> 20))
                .option("-cpu", "cortex-a57")
                .option("-global", "cortex-a57-arm-cpu.start-powered-off=on"),
            QemuMachine::X86Q35 => launch
                .option("-M", "q35")
                // Slots are controlled by their root ports, not by ACPI, which takes a running guest.
                .option(
                    "-global",
                    "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
                )
                .option(
                    "-m",
                    format!("16M,slots=1,maxmem={}M", (size >> 20).saturating_add(16)),
                )
                .option(
                    "-device",
                    format!(
                        "pc-dimm,id=dimm,memdev=memory,addr={:#x}",
                        self.machine.memory_base()
                    ),
                ),
        };

        for (number, disk) in self.disks.iter().enumerate() {
            for node in disk.nodes(number, false) {
                launch.option("-blockdev", node.to_string());
            }
        }
        let mut cables = cables.iter();
        for (number, nic) in self.nics.iter().enumerate() {
            let options = match &nic.far_end {
                FarEnd::Netdev(options) => options.clone(),
                FarEnd::Cable => match cables.next() {
                    Some(socket) => format!("socket,fd={socket}"),
                    None => "socket".to_owned(),
                },
            };
            let (kind, rest) = options
                .split_once(',')
                .map_or((&*options, String::new()), |(kind, rest)| {
                    (kind, format!(",{rest}"))
                });
            launch.option("-netdev", format!("{kind},id=net{number}{rest}"));
        }
        for (kind, place) in self.order.iter().zip(self.places()?) {
            if let Place::RootPort(number) = place {
                let port = format!(
                    "pcie-root-port,id=port{number},bus=pcie.0,addr={number:#x},chassis={number},slot={number}"
                );
                launch.option("-device", port);
            }
            launch.option("-device", self.device_option(*kind, place));
        }
        if let Some((display, head)) = self.monitor {
            launch.option("-vnc", format!("none,display=display{display},head={head}"));
        }
        for argument in &self.arguments {
            launch.arg(argument);
        }
        Ok(())
    }

    fn device_option(&self, kind: Kind, place: Place) -> String {
        let bus = match place {
            Place::MmioSlot(_) => "device",
            Place::PciDevice(_) | Place::RootPort(_) => "pci",
        };
        let mut option = match kind {
            // Errors go to the driver: QEMU's default is to stop the machine when the host's disk is full.
            Kind::Disk(number) => format!(
                "virtio-blk-{bus},id=disk{number},drive={},rerror=report,werror=report",
                disk_node(number)
            ),
            Kind::Nic(number) => format!("virtio-net-{bus},id=nic{number},netdev=net{number}"),
            Kind::Display(number) => format!("virtio-gpu-{bus},id=display{number}"),
        };
        match place {
            Place::MmioSlot(slot) => option += &format!(",bus=virtio-mmio-bus.{slot}"),
            Place::PciDevice(number) => option += &format!(",bus=pcie.0,addr={number:#x}"),
            Place::RootPort(number) => option += &format!(",bus=port{number}"),
        }
        let own = &self.device(kind).properties;
        let of_all = self
            .properties
            .iter()
            .filter(|(name, _)| !own.iter().any(|(own, _)| own == name));
        let mut properties: Vec<_> = own.iter().chain(of_all).collect();
        let modern_only = ("disable-legacy".to_owned(), "on".to_owned());
        let has = |name: &str| properties.iter().any(|(known, _)| known == name);
        // A transitional device could be driven without the feature, so QEMU wants this too.
        let on_pci = !matches!(place, Place::MmioSlot(_));
        if on_pci && has("iommu_platform") && !has("disable-legacy") {
            properties.push(&modern_only);
        }
        for (name, value) in properties {
            // QEMU reads a doubled comma as one that does not end the value.
            option += &format!(",{name}={}", value.replace(',', ",,"));
        }
        option
    }
}

impl Disk {
    /// Returns QEMU's block nodes of this disk, the lowest first. With `alone`, nobody else may write to its image, which
    /// goes without saying for the disk of a machine.
    pub(crate) fn nodes(&self, number: usize, alone: bool) -> Vec<Value> {
        let (file, top) = (file_node(number), disk_node(number));
        let alone = alone && matches!(self.image, Image::File { .. });
        let watched = alone || !self.faults.is_empty();
        let whole = if watched {
            format!("whole{number}")
        } else {
            top.clone()
        };
        let mut nodes = match &self.image {
            Image::File { path, format } => vec![
                json!({ "driver": "file", "node-name": file, "filename": absolute(path) }),
                json!({ "driver": format.name(), "node-name": whole, "file": file }),
            ],
            Image::Null { size } => vec![json!({
                "driver": "null-co", "node-name": whole, "size": size, "read-zeroes": true,
            })],
        };
        if watched {
            let mut node = json!({ "driver": "blkdebug", "node-name": top, "image": whole });
            if !self.faults.is_empty() {
                let rules: Vec<_> = self.faults.iter().map(Fault::rule).collect();
                node["inject-error"] = json!(rules);
            }
            if alone {
                node["unshare-child-perms"] = json!(["write", "resize"]);
            }
            nodes.push(node);
        }
        for node in &mut nodes {
            node["read-only"] = json!(self.read_only);
            node["discard"] = json!("unmap");
        }
        nodes
    }

    /// Returns whether the disk can only be read.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }
}

/// Returns the name of the block node that a disk is on.
pub(crate) fn disk_node(number: usize) -> String {
    format!("disk{number}")
}

/// Returns the name of the block node that is the image file of a disk.
pub(super) fn file_node(number: usize) -> String {
    format!("file{number}")
}

/// Returns the path as it is meant here, wherever QEMU is started.
fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_a_bus_sit_in_the_order_in_which_they_were_added() {
        let disk = || Disk::new("a", ImageFormat::Raw);
        let options = QemuOptions::new(QemuMachine::Aarch64Virt)
            .disk(disk().on(Bus::Mmio))
            .nic(Nic::on_cable())
            .display(Display::new(1, 1).on(Bus::Mmio))
            .disk(disk())
            .nic(Nic::on_cable().on(Bus::RootPort));
        assert_eq!(
            options.places().unwrap(),
            [
                Place::MmioSlot(0),
                Place::PciDevice(1),
                Place::MmioSlot(1),
                Place::PciDevice(2),
                Place::RootPort(3)
            ]
        );
    }

    #[test]
    fn a_bus_that_the_machine_lacks_is_refused() {
        let options = QemuOptions::new(QemuMachine::X86Q35).nic(Nic::on_cable().on(Bus::Mmio));
        assert!(matches!(options.check(), Err(QemuError::Options { .. })));
    }

    #[test]
    fn a_value_of_a_device_goes_before_that_of_all() {
        let options = QemuOptions::new(QemuMachine::Aarch64Virt)
            .nic(Nic::on_cable().property("event_idx", "on"))
            .property_of_all("event_idx", "off")
            .property_of_all("serial", "a,b");
        assert_eq!(
            options.device_option(Kind::Nic(0), Place::PciDevice(1)),
            "virtio-net-pci,id=nic0,netdev=net0,bus=pcie.0,addr=0x1,event_idx=on,serial=a,,b"
        );
    }
}
