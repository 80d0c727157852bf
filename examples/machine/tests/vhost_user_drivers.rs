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

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axdriver_base::DevError;
use axdriver_block::BlockDriverOps;
use axdriver_virtio::{VirtIoBlkDev, WaitPolicy};
use machine::memory::DEFAULT_BASE;
use machine::qemu::{Disk, DiskOperation, Fault, ImageFormat};
use machine::vhost_user::{
    StorageDaemon, VhostUserDevice, VhostUserHandle, VhostUserOptions, VhostUserTransport,
};
use machine::{Installed, Machine, MachineHal, Memory};
use support::{LONG, Scratch, much, patiently, skip, write_at_random};

type BlkDev = VirtIoBlkDev<MachineHal, VhostUserTransport>;

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
