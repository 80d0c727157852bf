//! The drivers of `axdriver_virtio` on QEMU's devices: their data, and what goes wrong.
//!
//! Without QEMU the tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes them fail instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use axdriver_base::DevError;
use axdriver_net::{NetDriverOps, smoltcp::SmoltcpDevice};
use axdriver_virtio::{VirtIoBlkDev, VirtIoNetDev, probe_mmio_device};
use machine::qemu::{
    Bus, Disk, DiskOperation, Display, Fault, ImageFormat, Nic, QemuBoard, QemuMachine, QemuOptions,
};
use machine::{MachineHal, Version};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use support::{
    Drivers, LONG, Scratch, draw, drawn, much, patiently, pattern, skip, write_at_random,
};

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

fn random_writes_reach_the_image(machine: QemuMachine, bus: Bus, version: Version) {
    let size = 16 << 20;
    let image = Scratch::sparse(&format!("random-{machine:?}-{bus:?}-{version:?}"), size);
    let disk = Disk::new(&image.0, ImageFormat::Raw).on(bus);
    let options = QemuOptions::new(machine).mmio(version).disk(disk);
    let board = QemuBoard::start(&options).unwrap();
    let mut drivers = Drivers::probe::<4>(&board);
    let expected = write_at_random(drivers.disks[0].as_mut(), much(), 1);
    assert!(image.read(0, expected.len()) == expected);
    drop(drivers);
    board.shut_down().unwrap();
    assert!(image.read(0, expected.len()) == expected);
}

#[test]
fn what_is_written_at_random_over_modern_mmio_is_in_the_image() {
    need!(VIRT);
    random_writes_reach_the_image(VIRT, Bus::Mmio, Version::Modern);
}

#[test]
fn what_is_written_at_random_over_legacy_mmio_is_in_the_image() {
    need!(VIRT);
    random_writes_reach_the_image(VIRT, Bus::Mmio, Version::Legacy);
}

#[test]
fn what_is_written_at_random_over_pci_is_in_the_image() {
    need!(Q35);
    random_writes_reach_the_image(Q35, Bus::Pci, Version::Modern);
}

#[test]
fn what_was_flushed_before_qemu_is_killed_is_in_the_image_and_calls_after_fail() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let image = Scratch::sparse(&format!("killed-{bus:?}"), 4 << 20);
        let disk = Disk::new(&image.0, ImageFormat::Raw).on(bus);
        let mut board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
        // Whoever waits for the dead waits for all that it is willing to.
        let impatiently = patiently().with_max_polls(40_000);
        let mut drivers = Drivers::probe_with::<4>(&board, impatiently);
        let disk = drivers.disks[0].as_mut();
        let expected = write_at_random(disk, 8 << 20, 7);
        // Not flushed, so that it may be there or not.
        disk.write_block(0, &[0xaa; 512]).unwrap();
        let killer = std::thread::spawn({
            let process = board.process_id().to_string();
            move || {
                std::thread::sleep(Duration::from_millis(20));
                std::process::Command::new("kill")
                    .args(["-KILL", &process])
                    .status()
                    .unwrap();
            }
        });
        // Into the kill, without a flush.
        let error = loop {
            match disk.write_block(0, &[0xbb; 65536]) {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        killer.join().unwrap();
        assert!(
            matches!(error, DevError::Io | DevError::BadState),
            "{error}"
        );
        assert_eq!(disk.read_block(0, &mut [0; 512]), Err(DevError::BadState));
        assert!(board.check().is_err());
        let tail = 65536;
        assert!(image.read(tail as u64, expected.len() - tail) == expected[tail..]);
        drop(drivers);
        board.kill();
    }
}

#[test]
fn errors_that_the_image_has_come_out_as_io() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let image = Scratch::image(&format!("errors-{bus:?}"), 1 << 20);
        let disk = Disk::new(&image.0, ImageFormat::Raw)
            .on(bus)
            .fault(Fault::of(DiskOperation::Read).sector(5))
            .fault(Fault::of(DiskOperation::Write).sector(6).error(28))
            .fault(Fault::of(DiskOperation::Flush).once());
        let board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
        let mut drivers = Drivers::probe::<4>(&board);
        let disk = drivers.disks[0].as_mut();
        let mut sector = [0; 512];
        for _ in 0..3 {
            assert_eq!(disk.read_block(5, &mut sector), Err(DevError::Io));
            assert_eq!(disk.write_block(6, &sector), Err(DevError::Io));
            assert_eq!(disk.read_block(0, &mut [0; 16 * 512]), Err(DevError::Io));
            // The device goes on.
            assert_eq!(disk.read_block(4, &mut sector), Ok(()));
            assert_eq!(sector[..], pattern(4 * 512, 512));
            assert_eq!(disk.write_block(5, &sector), Ok(()));
        }
        assert_eq!(disk.flush(), Err(DevError::Io));
        assert_eq!(disk.write_block(7, &sector), Ok(()));
        assert_eq!(disk.flush(), Ok(()));
    }
}

#[test]
fn a_read_only_image_refuses_writes() {
    need!(VIRT);
    let image = Scratch::image("read-only", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).read_only();
    let board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    let mut drivers = Drivers::probe::<4>(&board);
    let disk = drivers.disks[0].as_mut();
    assert!(disk.capabilities().read_only);
    assert_eq!(disk.write_block(0, &[0; 512]), Err(DevError::Unsupported));
    let mut sector = [0; 512];
    disk.read_block(3, &mut sector).unwrap();
    assert_eq!(sector[..], pattern(3 * 512, 512));
}

#[test]
fn a_disk_that_grows_or_shrinks_has_its_new_size() {
    need!(VIRT);
    let image = Scratch::image("grows", 1 << 20);
    let disk = Disk::new(&image.0, ImageFormat::Raw).on(Bus::Mmio);
    let mut board = QemuBoard::start(&QemuOptions::new(VIRT).disk(disk)).unwrap();
    let slot = board.mmio_slots()[0];
    // SAFETY: the registers are those of the board, and nobody else uses the slot.
    let (_, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }.unwrap();
    let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, patiently()).unwrap();
    use axdriver_base::{BaseDriverOps, InterruptCause};
    use axdriver_block::BlockDriverOps;
    assert_eq!(disk.num_blocks(), 2048);
    let mut sector = [0; 512];
    for megabytes in [3, 2] {
        board.qmp().block_resize("disk0", megabytes << 20).unwrap();
        let cause = disk.acknowledge_interrupt().unwrap();
        assert!(cause.contains(InterruptCause::CONFIGURATION));
        assert_eq!(disk.num_blocks(), megabytes << 11);
        assert_eq!(disk.read_block((megabytes << 11) - 1, &mut sector), Ok(()));
        let beyond = disk.read_block(megabytes << 11, &mut sector);
        assert_eq!(beyond, Err(DevError::InvalidParam));
    }
}

#[test]
fn a_cable_that_is_pulled_out_and_put_back_shows_in_the_link() {
    need!(VIRT);
    let nic = Nic::on_cable().on(Bus::Mmio);
    let mut board = QemuBoard::start(&QemuOptions::new(VIRT).nic(nic)).unwrap();
    let mut cable = board.take_cable(0).unwrap();
    let slot = board.mmio_slots()[0];
    // SAFETY: the registers are those of the board, and nobody else uses the slot.
    let (_, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }.unwrap();
    let mut nic = VirtIoNetDev::<MachineHal, _, 16>::try_new_with(transport, patiently()).unwrap();
    use axdriver_base::BaseDriverOps;
    assert_eq!(nic.capabilities().link, Some(true));
    board.qmp().set_link("nic0", false).unwrap();
    nic.acknowledge_interrupt().unwrap();
    assert_eq!(nic.capabilities().link, Some(false));
    board.qmp().set_link("nic0", true).unwrap();
    nic.acknowledge_interrupt().unwrap();
    assert_eq!(nic.capabilities().link, Some(true));

    let frame = pattern(0, 600);
    let mut buffer = nic.alloc_tx_buffer(frame.len()).unwrap();
    buffer.packet_mut().copy_from_slice(&frame);
    nic.transmit(buffer).unwrap();
    assert_eq!(cable.receive(LONG).unwrap(), frame);
}

#[test]
fn a_flood_comes_in_whole_and_in_order() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let nic = Nic::on_cable().on(bus);
        let mut board = QemuBoard::start(&QemuOptions::new(VIRT).nic(nic)).unwrap();
        let mut cable = board.take_cable(0).unwrap();
        let mut drivers = Drivers::probe::<64>(&board);
        let nic = drivers.nics[0].as_mut();
        let frames = 5000_u32;
        let mut destination = [0xff; 6].to_vec();
        destination.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
        let flood = std::thread::spawn(move || {
            for number in 0..frames {
                let mut frame = destination.clone();
                frame.extend(number.to_le_bytes());
                frame.resize(60 + number as usize % 1400, number as u8);
                cable.send(&frame, LONG).unwrap();
            }
            cable
        });
        let mut expected = 0;
        let end = Instant::now() + LONG;
        while expected < frames {
            assert!(Instant::now() < end, "{expected} of {frames} came");
            match nic.receive() {
                Ok(buffer) => {
                    let number = u32::from_le_bytes(buffer.packet()[14..18].try_into().unwrap());
                    // QEMU holds frames back while the NIC has no room for them.
                    assert_eq!(number, expected);
                    assert_eq!(buffer.packet_len(), 60 + number as usize % 1400);
                    expected = number + 1;
                    nic.recycle_rx_buffer(buffer).unwrap();
                }
                Err(DevError::Again) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        flood.join().unwrap();
    }
}

#[test]
fn what_is_drawn_is_what_qemu_shows() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let display = Display::new(300, 200).on(bus);
        let mut board = QemuBoard::start(&QemuOptions::new(VIRT).display(display)).unwrap();
        let mut drivers = Drivers::probe::<4>(&board);
        let display = drivers.displays[0].as_mut();
        let info = display.info();
        assert_eq!((info.width, info.height), (300, 200));
        for shade in [1, 99] {
            draw(display, shade);
            display.flush().unwrap();
            assert!(board.image(0, 0).unwrap() == drawn(shade, 300, 200));
        }
    }
}

/// A network stack on a NIC in QEMU's user network.
struct Network {
    start: Instant,
    device: SmoltcpDevice<Box<dyn NetDriverOps>>,
    interface: Interface,
    sockets: SocketSet<'static>,
}

/// The host, as QEMU's user network has it.
const HOST: IpAddress = IpAddress::v4(10, 0, 2, 2);

impl Network {
    /// Gets an address by DHCP.
    fn join(nic: Box<dyn NetDriverOps>) -> Self {
        let address = HardwareAddress::Ethernet(EthernetAddress(nic.mac_address().0));
        let mut device = SmoltcpDevice::new(nic);
        let interface = Interface::new(
            Config::new(address),
            &mut device,
            smoltcp::time::Instant::ZERO,
        );
        let mut network = Self {
            start: Instant::now(),
            device,
            interface,
            sockets: SocketSet::new(vec![]),
        };
        let dhcp = network.sockets.add(dhcpv4::Socket::new());
        let configuration = loop {
            network.poll();
            let socket = network.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp);
            if let Some(dhcpv4::Event::Configured(configuration)) = socket.poll() {
                break configuration;
            }
        };
        assert_eq!(configuration.address.to_string(), "10.0.2.15/24");
        network.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::Ipv4(configuration.address)).unwrap();
        });
        network
    }

    /// Lets frames come and go.
    fn poll(&mut self) {
        let now = self.start.elapsed();
        assert!(now < LONG, "what was asked for does not come");
        let now = smoltcp::time::Instant::from_micros(now.as_micros() as i64);
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
        std::thread::yield_now();
    }

    /// Sends a request over TCP, and returns the first `length` bytes of the answer.
    fn get_over_tcp(&mut self, port: u16, request: &[u8], length: usize) -> Vec<u8> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 16 * 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket
            .connect(self.interface.context(), (HOST, port), 49_152)
            .unwrap();
        let handle = self.sockets.add(socket);
        let mut received = Vec::new();
        let mut asked = false;
        while received.len() < length {
            self.poll();
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
            if socket.may_send() && !asked {
                socket.send_slice(request).unwrap();
                asked = true;
            }
            if socket.can_recv() {
                let mut chunk = [0; 4096];
                let length = socket.recv_slice(&mut chunk).unwrap();
                received.extend_from_slice(&chunk[..length]);
            }
        }
        received
    }

    /// Fetches a file by TFTP (RFC 1350), or returns the code of the error that the server answers with.
    fn get_by_tftp(&mut self, name: &str) -> Result<Vec<u8>, u16> {
        const BLOCK: usize = 512;
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(50_000).unwrap();
        let request = [&[0, 1], name.as_bytes(), b"\0octet\0"].concat();
        socket.send_slice(&request, (HOST, 69)).unwrap();
        let handle = self.sockets.add(socket);
        let mut received = Vec::new();
        let mut next = 1_u16;
        loop {
            self.poll();
            let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
            let Ok((packet, from)) = socket.recv() else {
                continue;
            };
            let ([0, kind, high, low], data) = packet.split_first_chunk().unwrap() else {
                panic!("{packet:?} is no packet of TFTP");
            };
            let number = u16::from_be_bytes([*high, *low]);
            let last = data.len() < BLOCK;
            match kind {
                3 if number == next => received.extend_from_slice(data),
                // One that came before.
                3 => assert_eq!(number, next.wrapping_sub(1)),
                _ => {
                    assert_eq!(*kind, 5);
                    self.sockets.remove(handle);
                    return Err(number);
                }
            }
            let acknowledgement = [0, 4, *high, *low];
            socket.send_slice(&acknowledgement, from.endpoint).unwrap();
            if number == next {
                next += 1;
                if last {
                    self.poll();
                    self.sockets.remove(handle);
                    return Ok(received);
                }
            }
        }
    }
}

/// Starts a board with a NIC in QEMU's user network.
fn on_user_network(options: &str) -> (QemuBoard, Network) {
    let nic = Nic::on_user_network(options);
    let board = QemuBoard::start(&QemuOptions::new(VIRT).nic(nic)).unwrap();
    let nic = Drivers::probe::<64>(&board).nics.pop().unwrap();
    (board, Network::join(nic))
}

#[test]
fn an_address_comes_by_dhcp_and_a_page_over_tcp() {
    need!(VIRT);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let page = pattern(0, 100_000);
    let server = std::thread::spawn({
        let page = page.clone();
        move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 3];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"GET");
            stream.write_all(&page).unwrap();
        }
    });
    let (_board, mut network) = on_user_network("");
    assert!(network.get_over_tcp(port, b"GET", page.len()) == page);
    drop(network);
    server.join().unwrap();
}

#[test]
fn a_file_of_the_host_comes_by_tftp() {
    need!(VIRT);
    let directory = Scratch::directory("tftp");
    // The second ends with a block that is empty.
    let sizes = [100_000, 64 * 512, 0];
    for size in sizes {
        let file = directory.0.join(size.to_string());
        std::fs::write(file, pattern(size, size)).unwrap();
    }
    let (_board, mut network) = on_user_network(&format!("tftp={}", directory.0.display()));
    for size in sizes {
        let fetched = network.get_by_tftp(&size.to_string()).unwrap();
        assert!(fetched == std::fs::read(directory.0.join(size.to_string())).unwrap());
    }
    let no_such_file = 1;
    assert_eq!(network.get_by_tftp("none"), Err(no_such_file));
}

#[test]
fn interrupts_come_when_they_are_asked_for_and_are_acknowledged() {
    use axdriver_base::InterruptCause;

    let places = [
        (VIRT, Bus::Mmio, Version::Modern),
        (VIRT, Bus::Mmio, Version::Legacy),
        (VIRT, Bus::Pci, Version::Modern),
        (Q35, Bus::Pci, Version::Modern),
    ];
    for (machine, bus, version) in places {
        if let Some(why) = QemuBoard::missing(machine) {
            skip(&why);
            continue;
        }
        for event_idx in ["on", "off"] {
            let nic = Nic::on_cable().on(bus).property("event_idx", event_idx);
            let options = QemuOptions::new(machine).mmio(version).nic(nic);
            let mut board = QemuBoard::start(&options).unwrap();
            let mut cable = board.take_cable(0).unwrap();
            board.intercept_interrupts().unwrap();
            let line = match bus {
                Bus::Mmio => board.mmio_slots()[0].line,
                _ => board.pci_functions()[0].line,
            };
            let mut drivers = Drivers::probe::<16>(&board);
            let nic = drivers.nics[0].as_mut();
            let frame = pattern(0, 200);
            for _ in 0..20 {
                nic.disable_interrupts().unwrap();
                while !nic.can_receive() {
                    cable.send(&frame, LONG).unwrap();
                    std::thread::yield_now();
                }
                while let Ok(buffer) = nic.receive() {
                    nic.recycle_rx_buffer(buffer).unwrap();
                }
                let _ = nic.acknowledge_interrupt().unwrap();
                // What came between the last look and here is said, and is not waited for.
                if nic.enable_interrupts().unwrap() {
                    continue;
                }
                cable.send(&frame, LONG).unwrap();
                assert!(board.wait_for_interrupt(line, LONG).unwrap());
                let cause = nic.acknowledge_interrupt().unwrap();
                assert!(cause.contains(InterruptCause::USED_BUFFERS));
                assert!(!board.interrupt_line(line).unwrap().asserted);
                let buffer = nic.receive().unwrap();
                assert_eq!(buffer.packet(), frame);
                nic.recycle_rx_buffer(buffer).unwrap();
            }
        }
    }
}
