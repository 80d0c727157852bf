//! The disk driver of `axdriver_virtio` on QEMU's storage daemon, behind a vhost-user socket.
//!
//! Without `qemu-storage-daemon` the tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes them
//! fail instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axdriver_base::{DevError, DevResult};
use axdriver_block::{BlockDriverOps, conformance};
use axdriver_net::{NetDriverOps, conformance as net_rules};
use axdriver_virtio::{VirtIoBlkDev, VirtIoNetDev, WaitPolicy};
use machine::memory::DEFAULT_BASE;
use machine::qemu::{Disk, DiskOperation, Fault, ImageFormat};
use machine::vhost_user::{
    Socket, StorageDaemon, VhostUserDevice, VhostUserHandle, VhostUserOptions, VhostUserTransport,
};
use machine::{Installed, Machine, MachineHal, Memory};
use support::{LONG, Scratch, much, patiently, skip, write_at_random};

type BlkDev = VirtIoBlkDev<MachineHal, VhostUserTransport>;

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

/// Leaves the test, with a line that says so, where the daemon is missing.
macro_rules! need_daemon {
    () => {
        if let Some(why) = StorageDaemon::missing() {
            skip(&why);
            return;
        }
    };
}

/// A disk of the daemon's and what it needs, in the order in which they go.
struct Rig {
    disk: BlkDev,
    handle: VhostUserHandle,
    daemon: StorageDaemon,
    memory: Arc<Memory>,
    _installed: Installed,
}

fn rig(disk: &Disk, options: VhostUserOptions, wait: WaitPolicy) -> Rig {
    let daemon = StorageDaemon::start(disk, 1).unwrap();
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20).unwrap();
    let installed = Machine::new(memory.clone(), Arc::new(())).install();
    let transport = VhostUserTransport::connect(daemon.socket(), memory.clone(), options).unwrap();
    let handle = transport.handle();
    Rig {
        disk: BlkDev::try_new_with(transport, wait).unwrap(),
        handle,
        daemon,
        memory,
        _installed: installed,
    }
}

fn options() -> VhostUserOptions {
    VhostUserOptions::new(VhostUserDevice::Block)
}

fn contract_holds(image: &Disk, options: VhostUserOptions) {
    let mut rig = rig(image, options.clone(), patiently());
    let verdict = conformance::check(&mut rig.disk);
    verdict.unwrap_or_else(|violation| panic!("{violation} with {options:?}"));
    rig.handle.check().unwrap();
    let Rig { disk, memory, .. } = rig;
    drop(disk);
    let counters = memory.counters();
    assert_eq!((counters.pages_live, counters.shares_live), (0, 0));
    assert!(memory.overwritten_free_pages().is_empty());
}

#[test]
fn the_contract_holds_with_and_without_each_queue_feature() {
    need_daemon!();
    let image = Scratch::image("vu-features", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    for withheld in [0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC] {
        contract_holds(&disk, options().without_features(withheld));
    }
}

#[test]
fn the_contract_holds_with_queues_of_4_to_1024() {
    need_daemon!();
    let image = Scratch::image("vu-sizes", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    for size in [4, 8, 16, 64, 256, 1024] {
        contract_holds(&disk, options().queue_size(size));
    }
}

#[test]
fn the_contract_holds_on_a_qcow2_image_and_on_one_that_is_read_only() {
    need_daemon!();
    let image = Scratch::image("vu-read-only", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).read_only();
    contract_holds(&disk, options());
    let image = Scratch::new("vu-qcow2");
    let create = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image.0)
        .arg("8M")
        .status();
    if create.is_err() {
        skip("skipped: qemu-img was not found: install qemu-utils");
        return;
    }
    contract_holds(&Disk::new(&image.0, ImageFormat::Qcow2), options());
    let check = Command::new("qemu-img").arg("check").arg(&image.0).output();
    assert!(check.unwrap().status.success());
}

#[test]
fn what_is_written_at_random_is_in_the_image() {
    need_daemon!();
    let image = Scratch::sparse("vu-random", 16 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    let mut rig = rig(&disk, options(), patiently());
    let expected = write_at_random(&mut rig.disk, much(), 3);
    assert!(image.read(0, expected.len()) == expected);
}

#[test]
fn errors_that_the_image_has_come_out_as_io() {
    need_daemon!();
    let image = Scratch::image("vu-errors", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw)
        .fault(Fault::of(DiskOperation::Read).sector(5))
        .fault(Fault::of(DiskOperation::Flush));
    let mut rig = rig(&disk, options(), patiently());
    let mut sector = [0; 512];
    assert_eq!(rig.disk.read_block(5, &mut sector), Err(DevError::Io));
    assert_eq!(rig.disk.read_block(4, &mut sector), Ok(()));
    assert_eq!(rig.disk.write_block(4, &sector), Ok(()));
    assert_eq!(rig.disk.flush(), Err(DevError::Io));
    rig.handle.check().unwrap();
}

#[test]
fn a_daemon_that_dies_gives_an_error_keeps_what_was_flushed_and_is_found_again() {
    need_daemon!();
    let image = Scratch::sparse("vu-dies", 4 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    let impatiently = patiently().with_max_polls(40_000);
    let mut rig = rig(&disk, options(), impatiently);
    let expected = write_at_random(&mut rig.disk, 8 << 20, 5);
    let killer = std::thread::spawn({
        let process = rig.daemon.process_id().to_string();
        move || {
            std::thread::sleep(Duration::from_millis(20));
            let kill = Command::new("kill").args(["-KILL", &process]).status();
            assert!(kill.unwrap().success());
        }
    });
    let head = &expected[..65536];
    let error = loop {
        match rig.disk.write_block(0, head) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    killer.join().unwrap();
    assert!(
        matches!(error, DevError::Io | DevError::BadState),
        "{error}"
    );
    assert!(rig.handle.check().is_err());
    assert_eq!(
        rig.disk.read_block(0, &mut [0; 512]),
        Err(DevError::BadState)
    );
    assert!(image.read(0, expected.len()) == expected);

    assert!(rig.disk.reset().is_err());
    rig.daemon.restart().unwrap();
    rig.disk.reset().unwrap();
    let mut read = vec![0; 65536];
    rig.disk.read_block(1000, &mut read).unwrap();
    assert!(read == expected[1000 * 512..][..65536]);
    rig.disk.write_block(0, &[0x77; 512]).unwrap();
    rig.disk.flush().unwrap();
    assert_eq!(image.read(0, 512), [0x77; 512]);
}

#[test]
fn a_daemon_that_hangs_gives_an_error_in_time_and_serves_again_when_it_goes_on() {
    need_daemon!();
    let image = Scratch::image("vu-hangs", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    let impatiently = patiently().with_max_polls(30_000);
    let quick = options().answer_limit(Duration::from_millis(200));
    let mut rig = rig(&disk, quick, impatiently);
    rig.disk.write_block(1, &[0x11; 512]).unwrap();
    rig.daemon.pause().unwrap();
    assert_eq!(rig.disk.read_block(1, &mut [0; 512]), Err(DevError::Io));
    assert!(rig.disk.read_block(1, &mut [0; 512]).is_err());
    // The buffer that the daemon was lent is not given back to it by mistake once it goes on.
    rig.daemon.resume().unwrap();
    let end = Instant::now() + LONG;
    while let Err(error) = rig.disk.reset() {
        assert!(Instant::now() < end, "{error}");
    }
    let mut sector = [0; 512];
    rig.disk.read_block(1, &mut sector).unwrap();
    assert_eq!(sector, [0x11; 512]);
    assert!(rig.memory.overwritten_free_pages().is_empty());
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
    fn connect(&self, memory: &Arc<Memory>, withheld: u64) -> VhostUserTransport {
        let mac = [2, 0, 0, 0, 0, 9];
        let options = VhostUserOptions::new(VhostUserDevice::Network { mac });
        let end = Instant::now() + LONG;
        loop {
            let socket = Socket::at(&self.socket.0);
            let options = options.clone().without_features(withheld);
            match VhostUserTransport::connect(socket, memory.clone(), options) {
                Ok(transport) => return transport,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
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
        std::thread::sleep(Duration::from_micros(if attempts < 100 {
            10
        } else {
            1000
        }));
        attempts < 5000
    }
}

#[test]
fn the_contract_of_a_nic_holds_on_dpdk() {
    let Some(mirror) = Mirror::start() else {
        skip("skipped: dpdk-testpmd was not found: install dpdk-dev (Debian's name for it)");
        return;
    };
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20).unwrap();
    let _installed = Machine::new(memory.clone(), Arc::new(())).install();
    for withheld in [0, EVENT_IDX, INDIRECT_DESC] {
        let transport = mirror.connect(&memory, withheld);
        let handle = transport.handle();
        let mut nic =
            VirtIoNetDev::<MachineHal, _, 256>::try_new_with(transport, patiently()).unwrap();
        assert_eq!(nic.capabilities().link, Some(true));
        let verdict = net_rules::check(&mut nic, &mut Reflection);
        verdict.unwrap_or_else(|violation| panic!("{violation} without {withheld:#x}"));
        handle.check().unwrap();
    }
}
