//! QEMU as a board: that its devices answer the drivers of `virtio-drivers`, and that nothing is left of it.
//!
//! Without QEMU the tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes them fail instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use machine::qemu::{
    Bus, Disk, DiskOperation, Display, Fault, ImageFault, ImageFormat, Nic, QemuBoard, QemuError,
    QemuMachine, QemuOptions,
};
use machine::{MachineHal, Slot, Version};
use support::{LONG, Scratch, pattern, skip};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::gpu::VirtIOGpu;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{BarInfo, DeviceFunction, MemoryBarType, PciRoot};
use virtio_drivers::transport::pci::bus::{Command as PciCommand, ConfigurationAccess};
use virtio_drivers::transport::{DeviceType, InterruptStatus, SomeTransport};

const VIRT: QemuMachine = QemuMachine::Aarch64Virt;
const Q35: QemuMachine = QemuMachine::X86Q35;

/// Leaves the test, with a line that says so, where QEMU is missing.
macro_rules! need {
    ($machine:expr) => {
        if let Some(why) = QemuBoard::missing($machine) {
            skip(&why);
            return;
        }
    };
}

/// Gives every memory BAR of a function an address, and the function leave to use them and memory.
fn assign(root: &mut PciRoot<impl ConfigurationAccess>, function: DeviceFunction, next: &mut u64) {
    let bars = root.bars(function).unwrap();
    for (index, bar) in (0..).zip(&bars) {
        let Some(BarInfo::Memory {
            address_type, size, ..
        }) = bar
        else {
            continue;
        };
        if *size == 0 {
            continue;
        }
        let address = next.next_multiple_of(*size);
        *next = address + size;
        match address_type {
            MemoryBarType::Width64 => root.set_bar_64(function, index, address),
            _ => root.set_bar_32(function, index, u32::try_from(address).unwrap()),
        }
    }
    root.set_command(function, PciCommand::MEMORY_SPACE | PciCommand::BUS_MASTER);
}

/// Reads 4 bytes of registers.
fn register(board: &QemuBoard, address: usize) -> u64 {
    board.machine().bus().read(address as u64, 4)
}

/// Returns the transports of all devices of a kind, MMIO before PCI.
fn transports(board: &QemuBoard, kind: DeviceType) -> Vec<SomeTransport<'static>> {
    let on_mmio = board
        .mmio_slots()
        .iter()
        // Dropping a transport resets its device, so only those that are wanted are made.
        .filter(|slot| register(board, slot.base + 8) == kind as u64)
        .map(|slot| slot.transport().unwrap().into());
    let mut found: Vec<SomeTransport<'static>> = on_mmio.collect();
    let mut root = board.pci();
    let mut next = board.pci_window().start;
    let functions: Vec<_> = root.enumerate_bus(0).collect();
    for (function, information) in functions {
        if virtio_drivers::transport::pci::virtio_device_type(&information) == Some(kind) {
            assign(&mut root, function, &mut next);
            let transport = PciTransport::new::<MachineHal, _>(&mut root, function).unwrap();
            found.push(transport.into());
        }
    }
    found
}

fn only_transport(board: &QemuBoard, kind: DeviceType) -> SomeTransport<'static> {
    let mut found = transports(board, kind);
    assert_eq!(found.len(), 1);
    found.pop().unwrap()
}

fn only_disk(board: &QemuBoard) -> VirtIOBlk<MachineHal, SomeTransport<'static>> {
    VirtIOBlk::new(only_transport(board, DeviceType::Block)).unwrap()
}

fn a_disk_reads_and_writes_its_image(options: QemuOptions, image: &Scratch) {
    let board = QemuBoard::start(&options).unwrap();
    let mut disk = only_disk(&board);
    assert_eq!(disk.capacity(), 2048);

    let mut sectors = vec![0; 5 * 512];
    disk.read_blocks(3, &mut sectors).unwrap();
    assert_eq!(sectors, pattern(3 * 512, 5 * 512));

    let mut inside = board.memory().buffer(8192).unwrap();
    inside.fill(0x5c);
    disk.write_blocks(2048 - 16, &inside).unwrap();
    disk.flush().unwrap();
    assert_eq!(image.read((2048 - 16) * 512, 8192), vec![0x5c; 8192]);

    drop(disk);
    assert_eq!(board.memory().counters().shares_live, 0);
    drop(inside);
    assert_eq!(board.memory().counters().pages_live, 0);
    board.shut_down().unwrap();
}

#[test]
fn a_disk_on_modern_mmio_reads_and_writes_its_image() {
    need!(VIRT);
    let image = Scratch::image("modern", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).on(Bus::Mmio);
    a_disk_reads_and_writes_its_image(QemuOptions::new(VIRT).disk(disk), &image);
}

#[test]
fn a_disk_on_legacy_mmio_reads_and_writes_its_image() {
    need!(VIRT);
    let image = Scratch::image("legacy", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).on(Bus::Mmio);
    let options = QemuOptions::new(VIRT).mmio(Version::Legacy).disk(disk);
    a_disk_reads_and_writes_its_image(options, &image);
}

#[test]
fn a_disk_on_pci_reads_and_writes_its_image() {
    need!(VIRT);
    let image = Scratch::image("pci", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    a_disk_reads_and_writes_its_image(QemuOptions::new(VIRT).disk(disk), &image);
}

#[test]
fn a_disk_of_a_pc_with_memory_above_4_gib_reads_and_writes_its_image() {
    need!(Q35);
    let image = Scratch::image("q35", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw);
    a_disk_reads_and_writes_its_image(QemuOptions::new(Q35).disk(disk), &image);
}

#[test]
fn slots_and_pci_devices_are_where_the_options_put_them() {
    need!(VIRT);
    let image = Scratch::image("places", 1 << 20);
    let options = QemuOptions::new(VIRT)
        .nic(Nic::on_cable().on(Bus::Mmio))
        .disk(Disk::new(&image.0, ImageFormat::Raw).on(Bus::Mmio))
        .display(Display::new(64, 64))
        .nic(Nic::on_user_network(""));
    let board = QemuBoard::start(&options).unwrap();
    let kind = |slot: usize| register(&board, board.mmio_slots()[slot].base + 8);
    assert_eq!((kind(0), kind(1), kind(2)), (1, 2, 0));
    let devices: Vec<_> = board.mmio_slots().iter().map(|slot| slot.device).collect();
    assert_eq!(devices[..3], [Some(0), Some(1), None]);
    let functions: Vec<_> = board
        .pci_functions()
        .iter()
        .map(|function| (function.address.device, function.device))
        .collect();
    assert_eq!(functions, [(1, 2), (2, 3)]);
    let kinds: Vec<_> = board
        .pci()
        .enumerate_bus(0)
        .filter_map(|(function, information)| {
            let kind = virtio_drivers::transport::pci::virtio_device_type(&information)?;
            Some((function.device, kind))
        })
        .collect();
    assert_eq!(kinds, [(1, DeviceType::GPU), (2, DeviceType::Network)]);
}

#[test]
fn an_interrupt_line_is_raised_by_a_completion_and_lowered_by_its_acknowledgement() {
    for machine in [VIRT, Q35] {
        need!(machine);
        let buses: &[Bus] = match machine {
            QemuMachine::Aarch64Virt => &[Bus::Mmio, Bus::Pci],
            _ => &[Bus::Pci],
        };
        for &bus in buses {
            let image = Scratch::image("interrupt", 1 << 20);
            let disk = Disk::new(&image.0, ImageFormat::Raw).on(bus);
            let mut board = QemuBoard::start(&QemuOptions::new(machine).disk(disk)).unwrap();
            board.intercept_interrupts().unwrap();
            let line = match bus {
                Bus::Mmio => board.mmio_slots()[0].line,
                _ => board.pci_functions()[0].line,
            };
            let mut disk = only_disk(&board);
            assert!(!board.interrupt_line(line).unwrap().asserted);
            for round in 1..=3 {
                disk.read_blocks(0, &mut [0; 512]).unwrap();
                assert!(board.wait_for_interrupt(line, LONG).unwrap(), "{bus:?}");
                assert!(disk.ack_interrupt() == InterruptStatus::QUEUE_INTERRUPT);
                let state = board.interrupt_line(line).unwrap();
                assert!(!state.asserted);
                assert_eq!(state.raised, round);
            }
        }
    }
}

#[test]
fn frames_go_both_ways_through_a_cable() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let nic = Nic::on_cable().on(bus).property("mac", "52:54:00:aa:bb:cc");
        let mut board = QemuBoard::start(&QemuOptions::new(VIRT).nic(nic)).unwrap();
        let mut cable = board.take_cable(0).unwrap();
        assert!(board.take_cable(0).is_none());
        let transport = only_transport(&board, DeviceType::Network);
        let mut nic = VirtIONetRaw::<MachineHal, _, 16>::new(transport).unwrap();
        assert_eq!(nic.mac_address(), [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]);

        let mut frame = vec![0xff; 6];
        frame.extend(nic.mac_address());
        frame.extend([0x88, 0xb5]);
        frame.extend(pattern(0, 200));
        nic.send(&frame).unwrap();
        assert_eq!(cable.receive(LONG).unwrap(), frame);

        cable.send(&frame, LONG).unwrap();
        let mut buffer = [0; 2048];
        let (header, length) = nic.receive_wait(&mut buffer).unwrap();
        assert_eq!(&buffer[header..header + length], frame);
    }
}

#[test]
fn pulling_the_cable_raises_a_configuration_interrupt_and_shows_in_the_status() {
    need!(VIRT);
    let nic = Nic::on_cable().on(Bus::Mmio);
    let mut board = QemuBoard::start(&QemuOptions::new(VIRT).nic(nic)).unwrap();
    board.intercept_interrupts().unwrap();
    let Slot { base, line, .. } = board.mmio_slots()[0];
    let transport = only_transport(&board, DeviceType::Network);
    let mut nic = VirtIONetRaw::<MachineHal, _, 16>::new(transport).unwrap();
    // VirtIO 1.3, 5.1.4: the status follows the 6 bytes of the MAC address; bit 0 is the link.
    let link = |board: &QemuBoard| register(board, base + 0x104) >> 16 & 1;
    assert_eq!(link(&board), 1);
    board.qmp().set_link("nic0", false).unwrap();
    assert!(board.wait_for_interrupt(line, LONG).unwrap());
    // QEMU sets the bit for used buffers along with it.
    let news = InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT;
    assert!(nic.ack_interrupt().contains(news));
    assert_eq!(link(&board), 0);
}

#[test]
fn what_a_driver_draws_is_what_the_display_shows() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let display = Display::new(160, 100).on(bus);
        let mut board = QemuBoard::start(&QemuOptions::new(VIRT).display(display)).unwrap();
        let transport = only_transport(&board, DeviceType::GPU);
        let mut gpu = VirtIOGpu::<MachineHal, _>::new(transport).unwrap();
        assert_eq!(gpu.resolution().unwrap(), (160, 100));
        let pixels = gpu.setup_framebuffer().unwrap();
        for (index, pixel) in pixels.chunks_exact_mut(4).enumerate() {
            let (x, y) = (index % 160, index / 160);
            pixel.copy_from_slice(&[x as u8, y as u8, (x ^ y) as u8, 0]);
        }
        gpu.flush().unwrap();
        let image = board.image(0, 0).unwrap();
        assert_eq!((image.width, image.height), (160, 100));
        for (x, y) in (0..160).flat_map(|x| (0..100).map(move |y| (x, y))) {
            let expected = [(x ^ y) as u8, y as u8, x as u8, 255];
            assert_eq!(image.pixel(x, y), Some(expected), "at {x}, {y}");
        }
    }
}

#[test]
fn errors_of_the_image_come_out_as_errors_of_the_disk() {
    need!(VIRT);
    let image = Scratch::image("faults", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw)
        .on(Bus::Mmio)
        .fault(Fault::of(DiskOperation::Read).sector(5))
        .fault(Fault::of(DiskOperation::Write).sector(6).error(28))
        .fault(Fault::of(DiskOperation::Flush).once());
    let board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    let mut disk = only_disk(&board);
    let mut sector = [0; 512];
    let failed = Err(virtio_drivers::Error::IoError);
    assert_eq!(disk.read_blocks(4, &mut sector), Ok(()));
    assert_eq!(disk.read_blocks(5, &mut sector), failed);
    assert_eq!(disk.read_blocks(6, &mut sector), Ok(()));
    // `ENOSPC` too, at which QEMU left to itself stops the machine.
    assert_eq!(disk.write_blocks(6, &sector), failed);
    assert_eq!(disk.write_blocks(5, &sector), Ok(()));
    assert_eq!(disk.flush(), failed);
    assert_eq!(disk.flush(), Ok(()));
}

#[test]
fn a_disk_that_is_resized_says_so() {
    need!(VIRT);
    let image = Scratch::image("resize", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).on(Bus::Mmio);
    let mut board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    let mut disk = only_disk(&board);
    board.qmp().block_resize("disk0", 3 << 20).unwrap();
    let news = InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT;
    assert!(disk.ack_interrupt().contains(news));
    let capacity = register(&board, board.mmio_slots()[0].base + 0x100);
    assert_eq!(capacity, 3 << 11);
}

#[test]
fn a_qcow2_image_holds_what_was_written_and_is_sound() {
    need!(VIRT);
    let image = Scratch::new("qcow2");
    let create = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image.0)
        .arg("64M")
        .status();
    if create.is_err() {
        skip("skipped: qemu-img was not found: install qemu-utils");
        return;
    }
    let disk = Disk::new(&image.0, ImageFormat::Qcow2).on(Bus::Mmio);
    let board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    let mut disk = only_disk(&board);
    assert_eq!(disk.capacity(), 64 << 11);
    for sector in [0, 77_777, (64 << 11) - 16] {
        disk.write_blocks(sector, &pattern(sector, 8192)).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    board.shut_down().unwrap();

    let check = Command::new("qemu-img").arg("check").arg(&image.0).output();
    assert!(check.unwrap().status.success());
    let raw = Scratch::new("qcow2-raw");
    let convert = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([&image.0, &raw.0])
        .status();
    assert!(convert.unwrap().success());
    for sector in [0, 77_777, (64 << 11) - 16] {
        assert_eq!(raw.read(sector as u64 * 512, 8192), pattern(sector, 8192));
    }
}

fn refusal(options: &QemuOptions) -> QemuError {
    let error = QemuBoard::start(options).unwrap_err();
    eprintln!("{error}");
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn a_missing_program_is_named() {
    let options = QemuOptions::new(VIRT).program("/no/such/qemu-system-aarch64");
    let error = refusal(&options);
    assert!(
        matches!(&error, QemuError::NotInstalled { program } if program.ends_with("qemu-system-aarch64"))
    );
    assert!(error.to_string().contains("/no/such/qemu-system-aarch64"));
}

#[test]
fn a_qemu_that_is_too_old_is_told_by_its_version() {
    let script = Scratch::new("old-qemu");
    let text = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 4.2.1 (Debian)' && exit\n\
        echo 'qemu-system-aarch64: -object {...}: invalid object' >&2; exit 1\n";
    std::fs::write(&script.0, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script.0, mode).unwrap();
    let error = refusal(&QemuOptions::new(VIRT).program(&script.0));
    assert!(matches!(error, QemuError::TooOld { version, .. } if version == "4.2"));
}

#[test]
fn an_image_that_is_missing_in_use_or_of_another_format_is_named() {
    need!(VIRT);
    let good = Scratch::image("good", 1 << 20);
    let missing = Scratch::new("missing");
    let start = |path: &Path, format| {
        let disks = [(&*good.0, ImageFormat::Raw), (path, format)];
        let options = disks
            .into_iter()
            .fold(QemuOptions::new(VIRT), |options, (path, format)| {
                options.disk(Disk::new(path, format))
            });
        match refusal(&options) {
            QemuError::Image { path, fault } => (path, fault),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        start(&missing.0, ImageFormat::Raw),
        (missing.0.clone(), ImageFault::Missing)
    );
    let other = Scratch::image("other", 1 << 20);
    let (path, fault) = start(&other.0, ImageFormat::Qcow2);
    assert_eq!(path, other.0);
    assert!(matches!(fault, ImageFault::Format { .. }));

    let disk = Disk::new(&other.0, ImageFormat::Raw);
    let _holder = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    assert_eq!(
        start(&other.0, ImageFormat::Raw),
        (other.0.clone(), ImageFault::InUse)
    );
}

#[test]
fn a_property_or_a_device_that_qemu_lacks_is_named() {
    need!(VIRT);
    let nic =
        |name, value| refusal(&QemuOptions::new(VIRT).nic(Nic::on_cable().property(name, value)));
    for (name, value) in [("colour", "red"), ("event_idx", "perhaps")] {
        let error = nic(name, value);
        assert!(matches!(&error, QemuError::Property { .. }), "{error:?}");
        assert!(error.to_string().contains(name));
    }
    let error = refusal(&QemuOptions::new(VIRT).nic(Nic::on_netdev("carrier-pigeon")));
    assert!(
        matches!(&error, QemuError::UnknownDevice { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("carrier-pigeon"));
}

#[test]
fn a_board_that_is_killed_reads_all_ones_and_says_why() {
    need!(VIRT);
    let mut board = QemuBoard::start(&QemuOptions::new(VIRT)).unwrap();
    let base = board.mmio_slots()[0].base;
    assert_eq!(register(&board, base), 0x7472_6976);
    board.check().unwrap();
    board.kill();
    assert_eq!(register(&board, base) as u32, u32::MAX);
    board.machine().bus().write(base as u64, 4, 0);
    assert!(matches!(board.check(), Err(QemuError::Gone { .. })));
}

fn is_running(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|text| {
        // The state follows the name in brackets; a zombie is not running.
        text.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('Z'))
    })
}

#[test]
fn a_panic_leaves_no_process() {
    need!(VIRT);
    let (sender, receiver) = std::sync::mpsc::channel();
    let result = std::thread::spawn(move || {
        let board = QemuBoard::start(&QemuOptions::new(VIRT)).unwrap();
        sender.send(board.process_id()).unwrap();
        panic!("on purpose");
    })
    .join();
    assert!(result.is_err());
    assert!(!is_running(receiver.recv().unwrap()));
}

/// Not a test by itself: what `a_killed_program_leaves_no_process` runs and kills.
#[test]
fn holder() {
    let Some(path) = std::env::var_os("MACHINE_TEST_HOLDER") else {
        return;
    };
    let board = QemuBoard::start(&QemuOptions::new(VIRT)).unwrap();
    std::fs::write(&path, board.process_id().to_string()).unwrap();
    std::thread::sleep(LONG);
}

#[test]
fn a_killed_program_leaves_no_process() {
    need!(VIRT);
    for signal in ["-KILL", "-INT"] {
        let note = Scratch::new(&format!("holder{signal}"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "holder", "--nocapture"])
            .env("MACHINE_TEST_HOLDER", &note.0)
            .spawn()
            .unwrap();
        let end = Instant::now() + LONG;
        let qemu: u32 = loop {
            assert!(Instant::now() < end);
            if let Ok(text) = std::fs::read_to_string(&note.0)
                && let Ok(number) = text.parse()
            {
                break number;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(is_running(qemu));
        let id = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &id])
                .status()
                .unwrap()
                .success()
        );
        child.wait().unwrap();
        let end = Instant::now() + LONG;
        while is_running(qemu) {
            assert!(Instant::now() < end, "QEMU outlives {signal}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
