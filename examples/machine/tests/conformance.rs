//! The contracts of the traits, on the drivers of `axdriver_virtio` with devices of several makers.
//!
//! `cargo test -p machine --test conformance -- --board qemu` checks one board, without `--board` all of them are checked.
//! `--board vhost-user --socket PATH --destroy-all-data` checks the disk of a program that runs already. All else is as with
//! any test: `--list`, a part of a name, `--test-threads`.
//!
//! Where a program is missing its tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes those
//! fail that need QEMU.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use axdriver_base::{DevError, DevResult};
use axdriver_block::conformance as block_rules;
use axdriver_display::conformance as display_rules;
use axdriver_net::{NetDriverOps, conformance as net_rules};
use axdriver_virtio::{VirtIoBlkDev, VirtIoGpuDev, VirtIoNetDev};
use clap::Parser;
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use machine::emulated::features::{RING_EVENT_IDX as EVENT_IDX, RING_INDIRECT_DESC as INDIRECT};
use machine::memory::DEFAULT_BASE;
use machine::qemu::{
    Bus, Cable, Disk, Display, ImageFormat, Nic, QemuBoard, QemuMachine, QemuOptions,
};
use machine::vhost_user::{
    DisplayProgram, Socket, StorageDaemon, VhostUserDevice, VhostUserOptions, VhostUserTransport,
};
use machine::{Board, Device, Machine, MachineHal, Memory, Version};
use support::{Drivers, LONG, Scratch, patiently, skip};

type Outcome = Result<(), Failed>;

/// Checks the contracts of the drivers on the devices of a board.
#[derive(Parser)]
struct Args {
    /// The board; all of them without this.
    #[arg(long, value_enum)]
    board: Option<BoardKind>,

    /// Checks the disk of the program at this socket instead, with --board vhost-user.
    #[arg(long, value_name = "PATH", requires_all = ["board", "destroy_all_data"])]
    socket: Option<PathBuf>,

    /// Says that all that is on the disk at --socket may be lost.
    #[arg(long)]
    destroy_all_data: bool,

    #[command(flatten)]
    test: Arguments,
}

#[derive(Clone, Copy, Eq, PartialEq, clap::ValueEnum)]
enum BoardKind {
    /// The devices in this process.
    Emulated,
    /// QEMU's, of `virt` and q35.
    Qemu,
    /// Those of other programs: qemu-storage-daemon, vhost-user-gpu, DPDK's testpmd.
    VhostUser,
}

fn main() -> std::process::ExitCode {
    let mut args = Args::parse();
    if args.socket.is_some() && args.board != Some(BoardKind::VhostUser) {
        eprintln!("error: --socket is for --board vhost-user only");
        return std::process::ExitCode::from(2);
    }
    let wanted = |board| args.board.is_none_or(|only| only == board);
    let mut trials = Vec::new();
    if let Some(socket) = &args.socket {
        // It serves one at a time.
        args.test.test_threads = Some(1);
        trials.extend(disk_trials(&at_socket(socket.clone())));
    } else {
        if wanted(BoardKind::Emulated) {
            trials.extend(emulated());
        }
        if wanted(BoardKind::Qemu) {
            trials.extend(qemu());
        }
        if wanted(BoardKind::VhostUser) {
            trials.extend(vhost_user());
        }
    }
    Conclusion::exit_code(&libtest_mimic::run(&args.test, trials))
}

/// The features that change how a queue is spoken, by their names and their values.
const QUEUE_FEATURES: [(&str, u64); 4] = [
    ("with EVENT_IDX and INDIRECT_DESC", 0),
    ("without EVENT_IDX", EVENT_IDX),
    ("without INDIRECT_DESC", INDIRECT),
    ("without EVENT_IDX and INDIRECT_DESC", EVENT_IDX | INDIRECT),
];

/// The far end of a NIC's cable.
trait FarEnd {
    fn send(&mut self, frame: &[u8]) -> DevResult;
    fn receive(&mut self) -> DevResult<Vec<u8>>;
    fn wait(&mut self, attempts: u32) -> bool;
}

/// A far end, as the rules for NICs want it.
struct Peer(Box<dyn FarEnd>);

impl<D: ?Sized> net_rules::Peer<D> for Peer {
    fn send(&mut self, _dev: &mut D, frame: &[u8]) -> DevResult {
        self.0.send(frame)
    }

    fn receive(&mut self, _dev: &mut D, frame: &mut [u8]) -> DevResult<usize> {
        let received = self.0.receive()?;
        let length = received.len().min(frame.len());
        frame[..length].copy_from_slice(&received[..length]);
        Ok(received.len())
    }

    fn wait(&mut self, _dev: &mut D, attempts: u32) -> bool {
        self.0.wait(attempts)
    }
}

/// Waits for a device of another process. Returns whether to go on.
fn nap(attempts: u32) -> bool {
    let time = if attempts < 100 { 10 } else { 1000 };
    std::thread::sleep(Duration::from_micros(time));
    attempts < 5000
}

/// Checks all rules of all drivers, and that nothing is left behind.
fn check(
    mut drivers: Drivers,
    memory: &Memory,
    mut peer: impl FnMut(usize) -> Option<Box<dyn FarEnd>>,
    board_is_well: impl FnOnce() -> Outcome,
) -> Outcome {
    if drivers.disks.len() + drivers.nics.len() + drivers.displays.len() == 0 {
        return Err("no device was found".into());
    }
    for disk in &mut drivers.disks {
        block_rules::check(disk.as_mut())?;
    }
    for (number, nic) in drivers.nics.iter_mut().enumerate() {
        let peer = peer(number).ok_or("a NIC has no far end")?;
        net_rules::check(nic.as_mut(), &mut Peer(peer))?;
    }
    for display in &mut drivers.displays {
        display_rules::check(display.as_mut())?;
    }
    board_is_well()?;
    drop(drivers);
    let counters = memory.counters();
    if (counters.pages_live, counters.shares_live) != (0, 0) {
        return Err(format!("left behind: {counters:?}").into());
    }
    match memory.overwritten_free_pages().len() {
        0 => Ok(()),
        pages => Err(format!("{pages} pages were written to after they were freed").into()),
    }
}

/// Returns an image of 1 MiB.
fn image() -> Scratch {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Scratch::image(&format!("conformance-{number}"), 1 << 20)
}

fn trial(board: &str, name: String, run: impl FnOnce() -> Outcome + Send + 'static) -> Trial {
    Trial::test(name, run).with_kind(board)
}

// The emulated board.

struct Emulated {
    board: Rc<Board>,
    nic: machine::Nic,
    sent: VecDeque<Vec<u8>>,
}

impl FarEnd for Emulated {
    fn send(&mut self, frame: &[u8]) -> DevResult {
        self.nic.inject(frame);
        Ok(())
    }

    fn receive(&mut self) -> DevResult<Vec<u8>> {
        self.sent.extend(self.nic.take_sent());
        self.sent.pop_front().ok_or(DevError::Again)
    }

    fn wait(&mut self, attempts: u32) -> bool {
        self.board.run();
        attempts < 10
    }
}

fn emulated() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (place, transport) in [
        ("modern MMIO", Some(Version::Modern)),
        ("legacy MMIO", Some(Version::Legacy)),
        ("PCI", None),
    ] {
        for (features, withheld) in QUEUE_FEATURES {
            for size in [4, 8, 16, 64, 256, 1024] {
                let name = format!("{place}, queues of {size}, {features}");
                trials.push(trial("emulated", name, move || {
                    check_emulated(transport, withheld, size)
                }));
            }
        }
    }
    trials
}

fn check_emulated(transport: Option<Version>, withheld: u64, size: u16) -> Outcome {
    let nic = machine::Nic::new([2, 0, 0, 0, 0, 1]);
    let devices = [
        Device::from(&machine::Disk::memory(1 << 20)),
        Device::from(&nic),
        Device::from(&machine::Display::new(200, 120)),
    ];
    let mut builder = Board::emulated();
    for device in devices {
        let device = device.withhold(withheld).queue_size(size);
        builder = match transport {
            Some(version) => builder.mmio(version, device),
            None => builder.pci(device),
        };
    }
    let board = Rc::new(builder.build()?);
    let drivers = Drivers::find::<1024>(
        board.mmio_slots(),
        board.pci(),
        board.pci_window(),
        patiently(),
    );
    let far_end = || -> Box<dyn FarEnd> {
        Box::new(Emulated {
            board: board.clone(),
            nic: nic.clone(),
            sent: VecDeque::new(),
        })
    };
    check(drivers, board.memory(), |_| Some(far_end()), || Ok(()))?;
    match board.violations().first() {
        None => Ok(()),
        Some(violation) => Err(violation.into()),
    }
}

// QEMU.

impl FarEnd for Cable {
    fn send(&mut self, frame: &[u8]) -> DevResult {
        Cable::send(self, frame, LONG).map_err(|_| DevError::Io)
    }

    fn receive(&mut self) -> DevResult<Vec<u8>> {
        let received = self.try_receive().map_err(|_| DevError::Io)?;
        received.ok_or(DevError::Again)
    }

    fn wait(&mut self, attempts: u32) -> bool {
        nap(attempts)
    }
}

const VIRT: QemuMachine = QemuMachine::Aarch64Virt;
const Q35: QemuMachine = QemuMachine::X86Q35;

/// Each transport, with QEMU's name for its machine.
const TRANSPORTS: [(&str, QemuMachine, Bus, Version); 6] = [
    ("virt, modern MMIO", VIRT, Bus::Mmio, Version::Modern),
    ("virt, legacy MMIO", VIRT, Bus::Mmio, Version::Legacy),
    ("virt, PCI", VIRT, Bus::Pci, Version::Modern),
    ("q35, PCI", Q35, Bus::Pci, Version::Modern),
    (
        "virt, PCI behind a root port",
        VIRT,
        Bus::RootPort,
        Version::Modern,
    ),
    (
        "q35, PCI behind a root port",
        Q35,
        Bus::RootPort,
        Version::Modern,
    ),
];

fn qemu() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (place, machine, bus, version) in TRANSPORTS {
        for (features, withheld) in QUEUE_FEATURES {
            let value = |bit| if withheld & bit == 0 { "on" } else { "off" };
            let properties = [
                ("event_idx", value(EVENT_IDX)),
                ("indirect_desc", value(INDIRECT)),
            ];
            let name = format!("{place}, {features}");
            trials.push(trial("qemu", name, move || {
                let image = image();
                let mut options = three_devices(&image, machine, bus, version);
                for (name, value) in properties {
                    options = options.property_of_all(name, value);
                }
                check_qemu::<64>(machine, &options)
            }));
        }
        if version == Version::Modern {
            let name = format!("{place}, platform addresses");
            trials.push(trial("qemu", name, move || {
                let image = image();
                let options = three_devices(&image, machine, bus, version);
                check_qemu::<64>(machine, &options.property_of_all("iommu_platform", "on"))
            }));
        }
    }
    for (place, bus) in [("modern MMIO", Bus::Mmio), ("PCI", Bus::Pci)] {
        for size in [4, 8, 16, 32, 64, 128, 256, 512, 1024] {
            let name = format!("virt, {place}, disk queue of {size}");
            trials.push(trial("qemu", name, move || {
                let image = image();
                let disk = Disk::new(&image.0, ImageFormat::Raw)
                    .on(bus)
                    .property("queue-size", &size.to_string());
                check_qemu::<64>(VIRT, &QemuOptions::new(VIRT).disk(disk))
            }));
        }
        trials.push(nic_queue::<4>(place, bus));
        trials.push(nic_queue::<16>(place, bus));
        trials.push(nic_queue::<64>(place, bus));
        trials.push(nic_queue::<256>(place, bus));
        trials.push(nic_queue::<1024>(place, bus));
    }
    let name = "virt, PCI, without the features that devices may lack".to_owned();
    trials.push(trial("qemu", name, check_plain_qemu));
    trials
}

fn three_devices(image: &Scratch, machine: QemuMachine, bus: Bus, version: Version) -> QemuOptions {
    QemuOptions::new(machine)
        .mmio(version)
        .disk(Disk::new(&image.0, ImageFormat::Raw).on(bus))
        .nic(Nic::on_cable().on(bus))
        .display(Display::new(200, 120).on(bus))
}

fn nic_queue<const QS: usize>(place: &str, bus: Bus) -> Trial {
    let name = format!("virt, {place}, NIC queues of {QS}");
    trial("qemu", name, move || {
        let nic = Nic::on_cable().on(bus).property("rx_queue_size", "1024");
        check_qemu::<QS>(VIRT, &QemuOptions::new(VIRT).nic(nic))
    })
}

fn check_plain_qemu() -> Outcome {
    let image = image();
    let disk = Disk::new(&image.0, ImageFormat::Raw)
        .property("config-wce", "off")
        .property("discard", "off")
        .property("write-zeroes", "off")
        .property("physical_block_size", "4096")
        .property("logical_block_size", "4096")
        .property("num-queues", "4");
    let nic = Nic::on_cable()
        .property("mrg_rxbuf", "off")
        .property("csum", "off")
        .property("guest_csum", "off")
        .property("ctrl_vq", "off")
        .property("host_mtu", "1400");
    let display = Display::new(320, 200)
        .property("edid", "off")
        .property("max_outputs", "2");
    let options = QemuOptions::new(VIRT)
        .disk(disk)
        .disk(Disk::null(1 << 20).read_only())
        .nic(nic)
        .display(display);
    check_qemu::<64>(VIRT, &options)
}

fn check_qemu<const QS: usize>(machine: QemuMachine, options: &QemuOptions) -> Outcome {
    if let Some(why) = QemuBoard::missing(machine) {
        skip(&why);
        return Ok(());
    }
    let mut board = QemuBoard::start(options)?;
    let memory = board.memory().clone();
    let drivers = Drivers::probe::<QS>(&board);
    let mut cables: Vec<_> = (0..drivers.nics.len())
        .map(|number| board.take_cable(number))
        .collect();
    let far_end = |number: usize| Some(Box::new(cables[number].take()?) as _);
    check(drivers, &memory, far_end, || Ok(board.check()?))
}

// vhost-user.

/// A program that has a disk, and what goes after it.
struct Program {
    socket: Socket,
    _daemon: Option<(StorageDaemon, Scratch)>,
}

/// Gives a disk, or `None` where its program is missing.
type Start = Arc<dyn Fn() -> Result<Option<Program>, Failed> + Send + Sync>;

/// A disk of a program that runs already.
fn at_socket(path: PathBuf) -> Start {
    Arc::new(move || {
        let socket = Socket::at(&path);
        let _daemon = None;
        Ok(Some(Program { socket, _daemon }))
    })
}

/// A disk of a new qemu-storage-daemon.
fn on_daemon(format: ImageFormat, read_only: bool) -> Start {
    Arc::new(move || {
        if let Some(why) = StorageDaemon::missing() {
            skip(&why);
            return Ok(None);
        }
        let image = image();
        if format == ImageFormat::Qcow2 {
            let create = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&image.0)
                .arg("1M")
                .status();
            if create.is_err() {
                skip("skipped: qemu-img was not found: install qemu-utils (Debian's name for it)");
                return Ok(None);
            }
        }
        let disk = Disk::new(&image.0, format);
        let disk = if read_only { disk.read_only() } else { disk };
        let daemon = StorageDaemon::start(&disk, 1)?;
        Ok(Some(Program {
            socket: daemon.socket(),
            _daemon: Some((daemon, image)),
        }))
    })
}

fn disk_options() -> VhostUserOptions {
    VhostUserOptions::new(VhostUserDevice::Block)
}

fn disk_trials(start: &Start) -> Vec<Trial> {
    let features = QUEUE_FEATURES.map(|(name, bits)| {
        let options = disk_options().without_features(bits);
        disk_trial(&format!("disk, {name}"), start, options)
    });
    let sizes = [4, 8, 16, 64, 256, 1024].map(|size| {
        let options = disk_options().queue_size(size);
        disk_trial(&format!("disk, queue of {size}"), start, options)
    });
    features.into_iter().chain(sizes).collect()
}

fn disk_trial(name: &str, start: &Start, options: VhostUserOptions) -> Trial {
    let start = start.clone();
    trial("vhost-user", name.to_owned(), move || {
        let Some(program) = start()? else {
            return Ok(());
        };
        let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20)?;
        let _installed = Machine::new(memory.clone(), Arc::new(())).install();
        let transport =
            VhostUserTransport::connect(program.socket.clone(), memory.clone(), options)?;
        let handle = transport.handle();
        let disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently())?;
        let mut drivers = Drivers::default();
        drivers.disks.push(Box::new(disk));
        check(drivers, &memory, |_| None, || Ok(handle.check()?))
    })
}

/// DPDK's `testpmd`, which sends every frame back to where it came from.
struct Mirror {
    child: Child,
    socket: Scratch,
}

impl Mirror {
    /// Starts it, unless it is not installed.
    fn start() -> Option<Self> {
        let socket = Scratch::new("testpmd.sock");
        let device = format!("net_vhost0,iface={},queues=1", socket.0.display());
        let child = Command::new("dpdk-testpmd")
            .args(["--lcores", "0@0,1@1", "--no-huge", "-m", "256", "--no-pci"])
            .args(["--no-shconf", "--no-telemetry", "--vdev", &device, "--"])
            .args(["-i", "--auto-start", "--forward-mode=io"])
            .args(["--port-topology=loop", "--no-mlockall"])
            .args(["--total-num-mbufs=4096", "--txd=256", "--rxd=256"])
            // It ends when this closes, which happens at the latest when this program ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { child, socket })
    }

    /// Waits for it to listen, and makes a NIC of it.
    fn connect(&self, memory: &Arc<Memory>, withheld: u64) -> Result<VhostUserTransport, Failed> {
        let mac = [2, 0, 0, 0, 0, 9];
        let options = VhostUserOptions::new(VhostUserDevice::Network { mac });
        let options = options.without_features(withheld);
        let end = Instant::now() + LONG;
        loop {
            let socket = Socket::at(&self.socket.0);
            match VhostUserTransport::connect(socket, memory.clone(), options.clone()) {
                Ok(transport) => return Ok(transport),
                Err(error) if Instant::now() >= end => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes back from the mirror, as the rules for NICs want it.
struct Reflection;

impl<D: NetDriverOps + ?Sized> net_rules::Peer<D> for Reflection {
    fn send(&mut self, dev: &mut D, frame: &[u8]) -> DevResult {
        net_rules::Peer::send(&mut net_rules::Mirror, dev, frame)
    }

    fn receive(&mut self, dev: &mut D, frame: &mut [u8]) -> DevResult<usize> {
        net_rules::Peer::receive(&mut net_rules::Mirror, dev, frame)
    }

    fn wait(&mut self, _dev: &mut D, attempts: u32) -> bool {
        nap(attempts)
    }
}

/// Checks the NIC of a testpmd with each choice of features, which is one trial because it is slow to start.
fn check_testpmd() -> Outcome {
    let Some(mirror) = Mirror::start() else {
        skip("skipped: dpdk-testpmd was not found: install dpdk-dev (Debian's name for it)");
        return Ok(());
    };
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20)?;
    let _installed = Machine::new(memory.clone(), Arc::new(())).install();
    for (features, withheld) in QUEUE_FEATURES {
        let transport = mirror.connect(&memory, withheld)?;
        let handle = transport.handle();
        let mut nic = VirtIoNetDev::<MachineHal, _, 256>::try_new_with(transport, patiently())?;
        net_rules::check(&mut nic, &mut Reflection)
            .map_err(|violation| format!("{violation}, {features}"))?;
        handle.check()?;
    }
    Ok(())
}

fn check_display(options: VhostUserOptions) -> Outcome {
    if let Some(why) = DisplayProgram::missing() {
        skip(&why);
        return Ok(());
    }
    let program = DisplayProgram::start()?;
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20)?;
    let _installed = Machine::new(memory.clone(), Arc::new(())).install();
    let transport = VhostUserTransport::connect(program.socket(), memory.clone(), options)?;
    let handle = transport.handle();
    let display = VirtIoGpuDev::<MachineHal, _>::try_new_with(transport, patiently())?;
    let mut drivers = Drivers::default();
    drivers.displays.push(Box::new(display));
    check(drivers, &memory, |_| None, || Ok(handle.check()?))
}

fn display_trials() -> Vec<Trial> {
    let options = || {
        let (width, height) = (200, 120);
        VhostUserOptions::new(VhostUserDevice::Display { width, height })
    };
    let display = |name: String, options: VhostUserOptions| {
        trial("vhost-user", name, move || check_display(options))
    };
    let features = QUEUE_FEATURES.map(|(name, bits)| {
        let options = options().without_features(bits);
        display(format!("display, {name}"), options)
    });
    let sizes = [4, 64, 1024].map(|size| {
        let options = options().queue_size(size);
        display(format!("display, queues of {size}"), options)
    });
    features.into_iter().chain(sizes).collect()
}

fn vhost_user() -> Vec<Trial> {
    let mut trials = disk_trials(&on_daemon(ImageFormat::Raw, false));
    let qcow2 = on_daemon(ImageFormat::Qcow2, false);
    trials.push(disk_trial("disk, qcow2 image", &qcow2, disk_options()));
    let read_only = on_daemon(ImageFormat::Raw, true);
    trials.push(disk_trial("disk, read-only", &read_only, disk_options()));
    let name = "NIC of DPDK's testpmd".to_owned();
    trials.push(trial("vhost-user", name, check_testpmd));
    trials.extend(display_trials());
    trials
}
