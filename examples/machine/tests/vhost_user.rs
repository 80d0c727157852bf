//! vhost-user as a board: QEMU's storage daemon behind a socket, and back ends that fail.
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

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use machine::memory::DEFAULT_BASE;
use machine::qemu::{
    Disk, DiskOperation, Fault, ImageFault, ImageFormat, QemuBoard, QemuError, QemuMachine,
    QemuOptions,
};
use machine::vhost_user::{
    Socket, StorageDaemon, VhostUserDevice, VhostUserError, VhostUserHandle, VhostUserOptions,
    VhostUserTransport,
};
use machine::{Installed, Machine, MachineHal, Memory};
use support::{LONG, Scratch, pattern, skip};
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};

const SHORT: Duration = Duration::from_millis(200);
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

fn disk_on(image: &Scratch) -> Disk {
    Disk::new(&image.0, ImageFormat::Raw)
}

fn machine() -> (Arc<Memory>, Installed) {
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20).unwrap();
    let installed = Machine::new(memory.clone(), Arc::new(())).install();
    (memory, installed)
}

fn options() -> VhostUserOptions {
    VhostUserOptions::new(VhostUserDevice::Block)
}

fn connect(
    daemon: &StorageDaemon,
    memory: &Arc<Memory>,
    options: VhostUserOptions,
) -> (VhostUserTransport, VhostUserHandle) {
    let transport = VhostUserTransport::connect(daemon.socket(), memory.clone(), options).unwrap();
    let handle = transport.handle();
    (transport, handle)
}

#[test]
fn a_disk_reads_and_writes_its_image() {
    need_daemon!();
    for withheld in [0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC] {
        let image = Scratch::image("rw", 1 << 20);
        let daemon = StorageDaemon::start(&disk_on(&image), 1).unwrap();
        let (memory, _installed) = machine();
        let (transport, handle) = connect(&daemon, &memory, options().without_features(withheld));
        let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
        assert_eq!(disk.capacity(), 2048);

        let mut sectors = vec![0; 5 * 512];
        disk.read_blocks(3, &mut sectors).unwrap();
        assert_eq!(sectors, pattern(3 * 512, 5 * 512));

        disk.write_blocks(2000, &[0x5c; 4096]).unwrap();
        disk.flush().unwrap();
        assert_eq!(image.read(2000 * 512, 4096), [0x5c; 4096]);
        handle.check().unwrap();
        drop(disk);
        assert_eq!(memory.counters().pages_live, 0);
        assert_eq!(memory.counters().shares_live, 0);
    }
}

#[test]
fn a_completion_is_an_interrupt_until_it_is_acknowledged() {
    need_daemon!();
    let daemon = StorageDaemon::start(&Disk::null(1 << 20), 1).unwrap();
    let (memory, _installed) = machine();
    let (transport, handle) = connect(&daemon, &memory, options());
    let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
    let mut buffer = memory.buffer(512).unwrap();
    for _ in 0..3 {
        let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
        // SAFETY: all three live, and are not touched, until the request is completed below.
        let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut buffer, &mut response) };
        // The daemon also calls when it is given the eventfd, before anything is done.
        while disk.peek_used().is_none() {
            assert!(handle.wait_for_interrupt(LONG).unwrap());
            assert!(handle.acknowledge() == InterruptStatus::QUEUE_INTERRUPT);
        }
        // SAFETY: these are those of the request.
        unsafe { disk.complete_read_blocks(token.unwrap(), &request, &mut buffer, &mut response) }
            .unwrap();
    }
    let _ = handle.acknowledge();
    assert!(!handle.wait_for_interrupt(Duration::ZERO).unwrap());
    assert!(handle.acknowledge() == InterruptStatus::empty());
}

#[test]
fn a_disk_that_is_resized_says_so() {
    need_daemon!();
    let image = Scratch::image("resize", 1 << 20);
    let mut daemon = StorageDaemon::start(&disk_on(&image), 1).unwrap();
    let (major, minor, _) = daemon.qmp().version();
    if (major, minor) < (8, 1) {
        skip(&format!(
            "skipped: qemu-storage-daemon {major}.{minor} keeps the size of an export; 8.1 tells of a new one"
        ));
        return;
    }
    let (memory, _installed) = machine();
    let (mut transport, handle) = connect(&daemon, &memory, options());
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    let capacity = |transport: &VhostUserTransport| transport.read_config_space::<u64>(0).unwrap();
    assert_eq!(capacity(&transport), 2048);
    let generation = transport.read_config_generation();
    assert_eq!(generation, transport.read_config_generation());
    daemon.qmp().block_resize("disk0", 3 << 20).unwrap();
    assert!(handle.wait_for_interrupt(LONG).unwrap());
    assert!(transport.ack_interrupt() == InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT);
    assert_ne!(generation, transport.read_config_generation());
    assert_eq!(capacity(&transport), 3 << 11);
}

#[test]
fn errors_of_the_image_come_out_as_errors_of_the_disk() {
    need_daemon!();
    let image = Scratch::image("faults", 1 << 20);
    let disk = disk_on(&image)
        .fault(Fault::of(DiskOperation::Read).sector(5))
        .fault(Fault::of(DiskOperation::Flush));
    let daemon = StorageDaemon::start(&disk, 1).unwrap();
    let (memory, _installed) = machine();
    let (transport, _) = connect(&daemon, &memory, options());
    let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
    let mut sector = [0; 512];
    let failed = Err(virtio_drivers::Error::IoError);
    assert_eq!(disk.read_blocks(4, &mut sector), Ok(()));
    assert_eq!(disk.read_blocks(5, &mut sector), failed);
    assert_eq!(disk.write_blocks(6, &sector), Ok(()));
    assert_eq!(disk.flush(), failed);
}

#[test]
fn configuration_beyond_its_end_is_refused_without_asking() {
    need_daemon!();
    let daemon = StorageDaemon::start(&Disk::null(1 << 20), 1).unwrap();
    let (memory, _installed) = machine();
    let (transport, handle) = connect(&daemon, &memory, options());
    for offset in [57, 60, usize::MAX] {
        let result = transport.read_config_space::<u32>(offset);
        assert_eq!(result, Err(virtio_drivers::Error::ConfigSpaceTooSmall));
    }
    handle.check().unwrap();
}

#[test]
fn as_many_queues_as_the_daemon_has_are_offered() {
    need_daemon!();
    let daemon = StorageDaemon::start(&Disk::null(1 << 20), 4).unwrap();
    let (memory, _installed) = machine();
    let (mut transport, _) = connect(&daemon, &memory, options().queue_size(64));
    let sizes: Vec<_> = (0..6)
        .map(|queue| transport.max_queue_size(queue))
        .collect();
    assert_eq!(sizes, [64, 64, 64, 64, 0, 0]);
}

#[test]
fn a_driver_starts_again_on_the_same_connection() {
    need_daemon!();
    let image = Scratch::image("again", 1 << 20);
    let daemon = StorageDaemon::start(&disk_on(&image), 1).unwrap();
    let (memory, _installed) = machine();
    for round in 0..3 {
        let (transport, _) = connect(&daemon, &memory, options());
        let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
        disk.write_blocks(round, &[0xee; 512]).unwrap();
        let mut sector = [0; 512];
        disk.read_blocks(round, &mut sector).unwrap();
        assert_eq!(sector, [0xee; 512]);
    }
}

fn go_live(transport: &mut VhostUserTransport, memory: &Memory) {
    transport.set_status(DeviceStatus::empty());
    assert_eq!(transport.get_status(), DeviceStatus::empty());
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    let features = transport.read_device_features() & (1 << 32);
    transport.write_driver_features(features);
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::FEATURES_OK);
    let (rings, _) = memory.allocate(3).unwrap();
    transport.queue_set(0, 16, rings, rings + 4096, rings + 8192);
    transport.set_status(
        DeviceStatus::ACKNOWLEDGE | DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK,
    );
}

#[test]
fn a_daemon_that_dies_is_noticed_and_a_reset_finds_the_next_one() {
    need_daemon!();
    let image = Scratch::image("dies", 1 << 20);
    let mut daemon = StorageDaemon::start(&disk_on(&image), 1).unwrap();
    let (memory, _installed) = machine();
    let (mut transport, handle) = connect(&daemon, &memory, options());
    go_live(&mut transport, &memory);
    assert!(
        !transport
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );

    daemon.kill();
    while !transport
        .get_status()
        .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    {
        assert!(handle.wait_for_interrupt(LONG).unwrap());
        let _ = handle.acknowledge();
    }
    assert!(matches!(handle.check(), Err(VhostUserError::Disconnected)));
    transport.notify(0);
    assert!(transport.read_config_space::<u64>(0).is_err());
    // The memory is given up for certain, so a reset succeeds, but there is nothing to drive.
    transport.set_status(DeviceStatus::empty());
    assert_eq!(transport.get_status(), DeviceStatus::empty());
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    assert!(
        transport
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );

    daemon.restart().unwrap();
    transport.set_status(DeviceStatus::empty());
    handle.check().unwrap();
    let mut disk = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
    let mut sector = [0; 512];
    disk.read_blocks(9, &mut sector).unwrap();
    assert_eq!(sector[..], pattern(9 * 512, 512));
}

#[test]
fn a_daemon_that_hangs_is_given_up_in_time_and_does_not_count_as_reset() {
    need_daemon!();
    let image = Scratch::image("hangs", 1 << 20);
    let daemon = StorageDaemon::start(&disk_on(&image), 1).unwrap();
    let (memory, _installed) = machine();
    let (mut transport, handle) = connect(&daemon, &memory, options().answer_limit(SHORT));
    go_live(&mut transport, &memory);

    daemon.pause().unwrap();
    let before = Instant::now();
    assert!(transport.read_config_space::<u64>(0).is_err());
    assert!(before.elapsed() >= SHORT);
    assert!(matches!(
        handle.check(),
        Err(VhostUserError::Silent {
            request: "GET_CONFIG",
            ..
        })
    ));
    transport.set_status(DeviceStatus::empty());
    assert!(
        transport
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );

    // Once it goes on it is done with the old connection before it takes a new one.
    daemon.resume().unwrap();
    let end = Instant::now() + LONG;
    while transport.get_status() != DeviceStatus::empty() {
        assert!(Instant::now() < end);
        transport.set_status(DeviceStatus::empty());
    }
    assert_eq!(transport.read_config_space::<u64>(0), Ok(2048));
}

/// Listens at a socket and does to the first connection what `serve` does.
fn back_end(
    name: &str,
    serve: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static,
) -> (Socket, Scratch) {
    let path = Scratch::new(name);
    let listener = UnixListener::bind(&path.0).unwrap();
    std::thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            serve(stream);
        }
    });
    (Socket::at(&path.0), path)
}

fn refusal(socket: Socket) -> VhostUserError {
    let memory = Memory::anonymous(DEFAULT_BASE, 1 << 20).unwrap();
    let error = VhostUserTransport::connect(socket, memory, options().answer_limit(SHORT));
    let error = error.unwrap_err();
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn nobody_at_the_socket_is_told_by_its_path() {
    let error = refusal(Socket::at("/no/such/socket"));
    assert!(matches!(error, VhostUserError::NotListening { .. }));
    assert!(error.to_string().contains("/no/such/socket"));
}

#[test]
fn a_back_end_that_says_nothing_is_given_up_in_time() {
    let (socket, _path) = back_end("mute", |stream| {
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    assert!(matches!(
        refusal(socket),
        VhostUserError::Silent {
            request: "GET_FEATURES",
            ..
        }
    ));
}

#[test]
fn a_back_end_that_hangs_up_is_told_from_one_that_is_silent() {
    let (socket, _path) = back_end("hangup", |mut stream| {
        let _ = stream.read(&mut [0; 12]);
    });
    assert!(matches!(refusal(socket), VhostUserError::Disconnected));
}

#[test]
fn a_back_end_that_talks_nonsense_is_cut_off() {
    let (socket, _path) = back_end("nonsense", |mut stream| {
        let _ = stream.write_all(&[0xff; 4096]);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = refusal(socket);
    assert!(matches!(error, VhostUserError::Protocol { .. }), "{error}");
}

#[test]
fn a_back_end_that_answers_half_is_given_up_in_time() {
    let (socket, _path) = back_end("half", |mut stream| {
        // The header of an answer to GET_FEATURES, and half of its payload.
        let mut answer = Vec::new();
        for number in [1u32, 5, 8, 0] {
            answer.extend(number.to_ne_bytes());
        }
        let _ = stream.write_all(&answer);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(matches!(refusal(socket), VhostUserError::Silent { .. }));
}

#[test]
fn an_image_that_is_missing_or_in_use_is_named() {
    need_daemon!();
    let fault = |image: &Scratch| match StorageDaemon::start(&disk_on(image), 1).map(drop) {
        Err(QemuError::Image { path, fault }) if path == image.0 => Some(fault),
        Err(error) => panic!("{error}"),
        Ok(()) => None,
    };
    assert_eq!(fault(&Scratch::new("nowhere")), Some(ImageFault::Missing));
    let image = Scratch::image("shared", 1 << 20);
    let holder = StorageDaemon::start(&disk_on(&image), 1).unwrap();
    assert_eq!(fault(&image), Some(ImageFault::InUse));
    drop(holder);
    assert_eq!(fault(&image), None);
    if let Some(why) = QemuBoard::missing(QemuMachine::Aarch64Virt) {
        skip(&why);
        return;
    }
    let machine = QemuOptions::new(QemuMachine::Aarch64Virt).disk(disk_on(&image));
    let _holder = QemuBoard::start(&machine).unwrap();
    assert_eq!(fault(&image), Some(ImageFault::InUse));
}
