//! What a device behind a vhost-user socket says in the log, alone in its program since a log belongs to all of one.
//!
//! Without `qemu-storage-daemon` the test is skipped, with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes it fail
//! instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::sync::{Arc, Mutex};

use log::{LevelFilter, Log, Metadata, Record};
use machine::memory::DEFAULT_BASE;
use machine::qemu::Disk;
use machine::vhost_user::{StorageDaemon, VhostUserDevice, VhostUserOptions, VhostUserTransport};
use machine::{Machine, MachineHal, Memory};
use support::{LONG, skip};
use virtio_drivers::device::blk::VirtIOBlk;

/// The lines of the log.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl Log for Lines {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format!("{} {}", record.level(), record.args());
        self.0.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

impl Lines {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[test]
fn a_device_is_dropped_without_a_word_and_one_that_dies_is_told_of_once() {
    if let Some(why) = StorageDaemon::missing() {
        skip(&why);
        return;
    }
    log::set_logger(&LINES).unwrap();
    log::set_max_level(LevelFilter::Warn);
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20).unwrap();
    let _installed = Machine::new(memory.clone(), Arc::new(())).install();
    let mut daemon = StorageDaemon::start(&Disk::null(1 << 20), 1).unwrap();
    let connect = |daemon: &StorageDaemon| {
        let options = VhostUserOptions::new(VhostUserDevice::Block);
        VhostUserTransport::connect(daemon.socket(), memory.clone(), options).unwrap()
    };
    let drive = |transport| {
        let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
        disk.read_blocks(0, &mut [0; 512]).unwrap();
        disk
    };

    for _ in 0..10 {
        drop(connect(&daemon));
        drop(drive(connect(&daemon)));
    }
    assert_eq!(LINES.take(), [""; 0]);

    let transport = connect(&daemon);
    let handle = transport.handle();
    let disk = drive(transport);
    daemon.kill();
    assert!(handle.wait_for_interrupt(LONG).unwrap());
    drop(disk);
    assert_eq!(
        LINES.take(),
        ["WARN the vhost-user device has gone: its program ended or closed the connection"]
    );

    daemon.restart().unwrap();
    let transport = connect(&daemon);
    // It tells of the device, and does not keep the connection.
    let _handle = transport.handle();
    drop(drive(transport));
    drop(daemon);
    assert_eq!(LINES.take(), [""; 0]);
}
