//! The emulated board, driven by virtio-drivers' own drivers: an independent reading of the other side.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Driver, NEXT, WRITE};
use machine::emulated::{PciBus, block_features, features, net_features, status};
use machine::{
    Board, Cable, Device, Disk, Display, Entropy, Event, MachineHal, Nic, Peer, Version,
};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::gpu::VirtIOGpu;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{BarInfo, Command, DeviceFunction};
use virtio_drivers::transport::{DeviceType, SomeTransport, Transport};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Where a device is plugged in.
#[derive(Clone, Copy, Debug)]
enum Place {
    Legacy,
    Modern,
    Pci,
}

const PLACES: [Place; 3] = [Place::Legacy, Place::Modern, Place::Pci];

fn plug(place: Place, devices: Vec<Device>) -> Board {
    let mut builder = Board::emulated();
    for device in devices {
        builder = match place {
            Place::Legacy => builder.mmio_legacy(device),
            Place::Modern => builder.mmio(Version::Modern, device),
            Place::Pci => builder.pci(device),
        };
    }
    builder.build().unwrap()
}

/// Gives a function's BARs addresses and switches it on.
fn assign(board: &Board, function: DeviceFunction) {
    let mut root = board.pci();
    let mut next = board.pci_window().start + 0x10_0000 * u64::from(function.device);
    let mut index = 0;
    while index < 6 {
        let info = root.bar_info(function, index).unwrap();
        let wide = info.as_ref().is_some_and(BarInfo::takes_two_entries);
        if let Some(BarInfo::Memory { address, size, .. }) = info {
            assert_eq!(address, 0, "BARs start without an address");
            root.set_bar_64(function, index, next);
            next += size;
        }
        index += if wide { 2 } else { 1 };
    }
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
}

fn transport(board: &Board, place: Place, index: usize) -> SomeTransport<'static> {
    match place {
        Place::Pci => {
            let function = board.pci_functions()[index].address;
            assign(board, function);
            PciTransport::new::<MachineHal, _>(&mut board.pci(), function)
                .unwrap()
                .into()
        }
        _ => board.mmio_slots()[index].transport().unwrap().into(),
    }
}

#[test]
fn a_disk_is_read_and_written_over_each_transport() {
    for place in PLACES {
        let disk = Disk::memory(1 << 20);
        disk.fill(512, &[7; 512]).unwrap();
        let board = plug(place, vec![Device::from(&disk)]);
        let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, place, 0)).unwrap();
        assert_eq!(driver.capacity(), 2048);
        let mut sectors = [0; 1024];
        driver.read_blocks(1, &mut sectors).unwrap();
        assert_eq!(sectors[..512], [7; 512]);
        assert_eq!(sectors[512..], [0; 512]);
        driver.write_blocks(2040, &[9; 4096]).unwrap();
        driver.read_blocks(2047, &mut sectors[..512]).unwrap();
        assert_eq!(sectors[..512], [9; 512]);
        driver.flush().unwrap();
        assert_eq!(disk.stable().unwrap()[2040 * 512..], [9; 4096]);
        let mut id = [0; 20];
        assert_eq!(driver.device_id(&mut id).unwrap(), 12);
        drop(driver);
        let counters = board.memory().counters();
        assert_eq!(
            (
                counters.pages_live,
                counters.bounces_live,
                counters.shares_live
            ),
            (0, 0, 0),
            "{place:?}"
        );
        assert!(board.memory().overwritten_free_pages().is_empty());
        assert_eq!(board.device(0).counters().completions, [5]);
    }
}

#[test]
fn unflushed_writes_are_lost_in_a_power_cut() {
    let disk = Disk::memory(1 << 16);
    let board = plug(Place::Modern, vec![Device::from(&disk)]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    driver.write_blocks(0, &[1; 512]).unwrap();
    driver.flush().unwrap();
    driver.write_blocks(0, &[2; 512]).unwrap();
    driver.write_blocks(1, &[3; 512]).unwrap();
    assert_eq!(
        disk.contents().unwrap()[..1024],
        [[2; 512], [3; 512]].concat()
    );
    disk.power_cut();
    let mut sectors = [9; 1024];
    driver.read_blocks(0, &mut sectors).unwrap();
    assert_eq!(sectors[..], [[1; 512], [0; 512]].concat());
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so() {
    let disk = Disk::memory(1 << 16).read_only();
    let board = plug(Place::Modern, vec![Device::from(&disk)]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    assert!(driver.readonly());
    driver.write_blocks(0, &[1; 512]).unwrap_err();
    assert!(ids(&board).contains(&"BLK-08"));
}

#[test]
fn a_disk_in_a_file_keeps_what_was_flushed() {
    let path = std::env::temp_dir().join(format!("machine-disk-{}", std::process::id()));
    std::fs::write(&path, [5; 2048]).unwrap();
    let board = plug(Place::Pci, vec![Device::from(Disk::file(&path).unwrap())]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Pci, 0)).unwrap();
    driver.write_blocks(1, &[6; 512]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [5; 2048]);
    driver.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[512..1024], [6; 512]);
    drop(driver);
    std::fs::remove_file(&path).unwrap();
}

fn frame(from: [u8; 6], to: [u8; 6], body: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &[0x88, 0xb5], body].concat()
}

#[test]
fn frames_go_from_nic_to_nic_over_each_transport() {
    for place in PLACES {
        let (one, other) = (Nic::new(MAC), Nic::new(OTHER));
        Cable::join(&one, &other);
        let board = plug(place, vec![Device::from(&one), Device::from(&other)]);
        let mut first =
            VirtIONet::<MachineHal, _, 16>::new(transport(&board, place, 0), 2048).unwrap();
        let mut second =
            VirtIONet::<MachineHal, _, 16>::new(transport(&board, place, 1), 2048).unwrap();
        assert_eq!(first.mac_address(), MAC);
        for round in 0..100_u8 {
            let sent = frame(MAC, OTHER, &[round; 46]);
            let mut buffer = first.new_tx_buffer(sent.len());
            buffer.packet_mut().copy_from_slice(&sent);
            first.send(buffer).unwrap();
            assert!(second.can_recv(), "{place:?}");
            let received = second.receive().unwrap();
            assert_eq!(received.packet(), sent);
            second.recycle_rx_buffer(received).unwrap();
        }
        assert_eq!(one.counters().sent, 100);
        assert_eq!(other.counters().received, 100);
        drop((first, second));
        assert_eq!(board.memory().counters().pages_live, 0);
    }
}

#[test]
fn frames_wait_for_buffers_and_for_the_test_without_a_cable() {
    let nic = Nic::new(MAC);
    let board = plug(Place::Modern, vec![Device::from(&nic)]);
    let frames: Vec<_> = (0..20).map(|body| frame(OTHER, MAC, &[body; 50])).collect();
    let mut driver =
        VirtIONet::<MachineHal, _, 8>::new(transport(&board, Place::Modern, 0), 2048).unwrap();
    for frame in &frames {
        nic.inject(frame);
    }
    assert!(!driver.can_recv());
    board.run();
    for frame in &frames {
        let received = driver.receive().unwrap();
        assert_eq!(received.packet(), frame);
        driver.recycle_rx_buffer(received).unwrap();
    }
    let buffer = driver.new_tx_buffer(60);
    driver.send(buffer).unwrap();
    assert_eq!(nic.take_sent(), [vec![0; 60]]);
}

#[test]
fn a_peer_answers_inside_the_doorbell() {
    #[derive(Default)]
    struct Echo(Vec<Vec<u8>>, usize);
    impl Peer for Echo {
        fn receive(&mut self, frame: &[u8]) {
            self.0.push(frame.to_vec());
            self.1 += 1;
        }
        fn transmit(&mut self) -> Option<Vec<u8>> {
            self.0.pop()
        }
    }
    let nic = Nic::new(MAC);
    let echo = nic.attach(Echo::default());
    let board = plug(Place::Pci, vec![Device::from(&nic)]);
    let mut driver =
        VirtIONet::<MachineHal, _, 8>::new(transport(&board, Place::Pci, 0), 2048).unwrap();
    let mut buffer = driver.new_tx_buffer(64);
    buffer.packet_mut().fill(3);
    driver.send(buffer).unwrap();
    let received = driver.receive().unwrap();
    assert_eq!(received.packet(), [3; 64]);
    driver.recycle_rx_buffer(received).unwrap();
    assert_eq!(echo.lock().unwrap().1, 1);
}

#[test]
fn a_display_shows_what_was_drawn_over_each_transport() {
    for place in PLACES {
        let display = Display::new(64, 48);
        let board = plug(place, vec![Device::from(&display)]);
        let mut driver = VirtIOGpu::<MachineHal, _>::new(transport(&board, place, 0)).unwrap();
        assert_eq!(driver.resolution().unwrap(), (64, 48));
        let pixels = driver.setup_framebuffer().unwrap();
        for (index, pixel) in pixels.chunks_exact_mut(4).enumerate().take(64 * 48) {
            pixel.copy_from_slice(&[1, 2, index.to_le_bytes()[0] & 63, 255]);
        }
        driver.flush().unwrap();
        let image = display.image();
        assert_eq!((image.width, image.height), (64, 48));
        assert_eq!(image.pixel(0, 0), Some([0, 2, 1, 255]));
        assert_eq!(image.pixel(63, 47), Some([63, 2, 1, 255]));
        assert_eq!(image.pixel(64, 0), None);
        driver
            .setup_cursor(&[0xff; 64 * 64 * 4], 3, 4, 0, 0)
            .unwrap();
        assert_eq!((display.cursor().x, display.cursor().y), (3, 4));
        driver.move_cursor(9, 8).unwrap();
        assert_eq!((display.cursor().x, display.cursor().y), (9, 8));
        let path =
            std::env::temp_dir().join(format!("machine-{}-{place:?}.png", std::process::id()));
        display.png(&path).unwrap();
        let decoder =
            png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut decoded = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut decoded).unwrap();
        assert_eq!(decoded, image.rgba);
        std::fs::remove_file(&path).unwrap();
        drop(driver);
        assert_eq!(display.image().rgba.len(), 0);
        assert_eq!(board.memory().counters().pages_live, 0);
    }
}

#[test]
fn a_display_tells_what_it_is_and_when_it_changes() {
    let display = Display::new(1280, 800).with_edid();
    let board = plug(Place::Modern, vec![Device::from(&display)]);
    let mut driver = VirtIOGpu::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    assert_eq!(driver.edid_preferred_resolution().unwrap(), (1280, 800));
    driver.ack_interrupt();
    assert!(!board.interrupt_pending(0));
    display.resize(800, 600);
    assert!(board.interrupt_pending(0));
    assert_eq!(driver.ack_interrupt().bits(), 2);
    assert_eq!(driver.resolution().unwrap(), (800, 600));
}

#[test]
fn empty_slots_have_device_id_0_and_foreign_types_are_there() {
    let board = Board::emulated()
        .mmio(Version::Modern, Entropy::new())
        .mmio_empty()
        .mmio_legacy(Entropy::new())
        .build()
        .unwrap();
    let slots = board.mmio_slots();
    assert_eq!(slots.len(), 32);
    assert_eq!(
        slots[0].transport().unwrap().device_type(),
        DeviceType::EntropySource
    );
    slots[1].transport().unwrap_err();
    assert!(slots[2].transport().unwrap().requires_legacy_layout());
    assert_eq!(slots[1].base, 0x0a00_0200);
}

#[test]
fn a_bus_has_a_bridge_and_its_functions_and_nothing_else() {
    let board = Board::emulated()
        .pci(Disk::memory(4096))
        .pci(Device::from(Nic::new(MAC)).transitional())
        .build()
        .unwrap();
    let found: Vec<_> = board
        .pci()
        .enumerate_bus(0)
        .map(|(function, info)| (function.device, info.vendor_id, info.device_id))
        .collect();
    assert_eq!(
        found,
        [
            (0, 0x1b36, 0x0008),
            (1, 0x1af4, 0x1042),
            (2, 0x1af4, 0x1000)
        ]
    );
    assert_eq!(board.pci().enumerate_bus(1).count(), 0);
}

#[test]
fn a_function_answers_only_while_its_command_register_lets_it() {
    // The driver forgets the indirect table of a request that is in flight when it is dropped, so it gets none.
    let disk = Device::from(Disk::memory(1 << 16)).withhold(features::RING_INDIRECT_DESC);
    let board = plug(Place::Pci, vec![disk]);
    let function = board.pci_functions()[0].address;
    let mut root = board.pci();
    assign(&board, function);
    let mut transport = PciTransport::new::<MachineHal, _>(&mut root, function).unwrap();
    assert_eq!(transport.max_queue_size(0), 128);
    root.set_command(function, Command::BUS_MASTER);
    assert_eq!(transport.max_queue_size(0), 0xffff);
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
    root.set_command(function, Command::MEMORY_SPACE);
    let (mut request, mut response) = (Default::default(), Default::default());
    let mut buffer = [0; 512];
    // SAFETY: the request, buffer and response outlive the driver's use of them.
    unsafe { driver.read_blocks_nb(0, &mut request, &mut buffer, &mut response) }.unwrap();
    assert_eq!(driver.peek_used(), None, "no bus mastering, no DMA");
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    drop(driver);
}

/// A board with a disk behind two bridges, and a second disk beside the inner one.
fn behind_bridges() -> (Board, DeviceFunction) {
    let disk = Device::from(Disk::memory(1 << 16)).withhold(features::RING_INDIRECT_DESC);
    let outer = PciBus::new()
        .bridge(PciBus::new().pci(disk))
        .pci(Disk::memory(4096));
    let board = Board::emulated().pci_bridge(outer).build().unwrap();
    let function = DeviceFunction {
        bus: 2,
        device: 0,
        function: 0,
    };
    (board, function)
}

/// Writes to a register of a bridge: device `device` of bus `bus`.
fn set_up(board: &Board, (bus, device): (u64, u64), register: u64, value: u64) {
    let address = board.ecam() + (bus << 20) + (device << 15) + register;
    board.machine().bus().write(address, 4, value);
}

const OUTER: (u64, u64) = (0, 1);
const INNER: (u64, u64) = (1, 0);

#[test]
fn a_bus_is_reached_by_the_numbers_of_its_bridges_alone() {
    let (board, _) = behind_bridges();
    let found = |bus| board.pci().enumerate_bus(bus).count();
    assert_eq!([1, 2].map(found), [0, 0]);
    set_up(&board, OUTER, 0x18, 0x0001_0100);
    assert_eq!([1, 2].map(found), [2, 0]);
    // The inner bridge leads there, but the outer one does not lead to it.
    set_up(&board, INNER, 0x18, 0x0002_0201);
    assert_eq!([1, 2].map(found), [2, 0]);
    set_up(&board, OUTER, 0x18, 0x0005_0100);
    assert_eq!([1, 2, 3, 4, 5].map(found), [2, 1, 0, 0, 0]);
    set_up(&board, OUTER, 0x18, 0x0005_0300);
    assert_eq!([1, 2, 3].map(found), [0, 0, 2]);
}

#[test]
fn a_bridge_forwards_what_its_registers_and_its_command_let_through() {
    let (board, function) = behind_bridges();
    set_up(&board, OUTER, 0x18, 0x0002_0100);
    set_up(&board, INNER, 0x18, 0x0002_0201);
    // The BAR is in the first MiB of the window.
    assign(&board, function);
    let start = board.pci_window().start >> 16;
    let exactly = start << 16 | start;
    let beyond = (start + 0x10) << 16 | (start + 0x10);
    for bridge in [OUTER, INNER] {
        set_up(&board, bridge, 0x20, exactly);
        // No prefetchable memory, and all of the command.
        set_up(&board, bridge, 0x24, 0xfff0);
        set_up(&board, bridge, 0x2c, 0);
        set_up(&board, bridge, 0x04, 6);
    }
    let mut root = board.pci();
    let mut transport = PciTransport::new::<MachineHal, _>(&mut root, function).unwrap();
    assert_eq!(transport.max_queue_size(0), 128);
    for bridge in [OUTER, INNER] {
        for (register, shut, open) in [
            (0x20, beyond, exactly),
            (0x20, 0xfff0, exactly),
            (0x04, 4, 6),
        ] {
            set_up(&board, bridge, register, shut);
            assert_eq!(transport.max_queue_size(0), 0xffff);
            set_up(&board, bridge, register, open);
            assert_eq!(transport.max_queue_size(0), 128);
        }
        // Prefetchable memory is forwarded as well.
        set_up(&board, bridge, 0x20, beyond);
        set_up(&board, bridge, 0x24, exactly);
        assert_eq!(transport.max_queue_size(0), 128);
        set_up(&board, bridge, 0x28, 1);
        assert_eq!(transport.max_queue_size(0), 0xffff);
        set_up(&board, bridge, 0x28, 0);
    }

    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport).unwrap();
    let (mut request, mut response) = (Default::default(), Default::default());
    let mut buffer = [0; 512];
    set_up(&board, OUTER, 0x04, 2);
    // SAFETY: the request, buffer and response outlive the driver's use of them.
    unsafe { driver.read_blocks_nb(0, &mut request, &mut buffer, &mut response) }.unwrap();
    assert_eq!(driver.peek_used(), None, "no bus mastering, no DMA");
    set_up(&board, OUTER, 0x04, 6);
    drop(driver);
}

#[test]
fn pins_rotate_behind_each_bridge() {
    let (board, _) = behind_bridges();
    // The inner disk is device 0 behind device 0 behind device 1, the other device 1 behind device 1.
    board.device(0).spurious_interrupt(1);
    assert_eq!(board.run(), [33]);
    board.device(1).spurious_interrupt(1);
    assert_eq!(board.run(), [33, 34]);
}

#[test]
fn a_later_answer_raises_the_line_when_the_board_runs() {
    let disk = Disk::memory(1 << 16);
    let board = plug(Place::Modern, vec![Device::from(&disk).answer_later()]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    let (mut request, mut response) = (Default::default(), Default::default());
    let mut buffer = [1; 512];
    // SAFETY: the request, buffer and response are left alone until `complete_read_blocks` below.
    let token =
        unsafe { driver.read_blocks_nb(0, &mut request, &mut buffer, &mut response) }.unwrap();
    assert_eq!(driver.peek_used(), None);
    assert!(!board.interrupt_pending(0));
    assert_eq!(board.run(), [0]);
    assert_eq!(driver.peek_used(), Some(token));
    assert_eq!(driver.ack_interrupt().bits(), 1);
    assert!(!board.interrupt_pending(0));
    // SAFETY: these are the buffers of the request that the token stands for.
    unsafe { driver.complete_read_blocks(token, &request, &mut buffer, &mut response) }.unwrap();
    assert_eq!(buffer, [0; 512]);
    assert_eq!(board.device(0).counters().interrupts, 1);
}

#[test]
fn a_resized_disk_tells_its_driver() {
    let disk = Disk::memory(1 << 16);
    let board = plug(Place::Pci, vec![Device::from(&disk)]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Pci, 0)).unwrap();
    let line = board.pci_functions()[0].line;
    disk.resize(1 << 17);
    assert!(board.interrupt_pending(line));
    assert_eq!(driver.ack_interrupt().bits(), 2);
    assert!(!board.interrupt_pending(line));
    driver.write_blocks(200, &[1; 512]).unwrap();
}

#[test]
fn events_tell_resets_from_frees_by_their_order() {
    let board = plug(Place::Modern, vec![Device::from(Disk::memory(1 << 16))]);
    let driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    board.memory().trace().clear();
    assert_eq!(
        board.device(0).status() & status::DRIVER_OK,
        status::DRIVER_OK
    );
    drop(driver);
    let events = board.events();
    let reset = events
        .iter()
        .find(|record| record.event == Event::Reset { device: 0 })
        .unwrap();
    let freed = events
        .iter()
        .find(|record| matches!(record.event, Event::PagesFreed { .. }))
        .unwrap();
    assert!(reset.sequence < freed.sequence);
    assert_eq!(board.device(0).status(), 0);
}

#[test]
fn a_link_that_goes_down_is_told_and_loses_frames() {
    let nic = Nic::new(MAC);
    let board = plug(Place::Modern, vec![Device::from(&nic)]);
    let mut driver = Driver::new(&board, 0);
    driver.start(!features::RING_EVENT_IDX, 2, 8);
    assert_eq!(driver.read_width(0x106, 2), 1);
    let generation = driver.read(0xfc);
    nic.set_link(false);
    assert!(board.interrupt_pending(0));
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x64, 2);
    assert!(!board.interrupt_pending(0));
    assert_eq!(driver.read_width(0x106, 2), 0);
    assert_ne!(driver.read(0xfc), generation);
    nic.inject(&[1; 60]);
    assert_eq!(nic.counters().dropped, 1);
    driver.reset();
    assert_eq!(ids(&board), [""; 0]);
}

#[test]
fn a_driver_that_accepts_an_mtu_has_to_keep_to_it() {
    let nic = Nic::new(MAC).mtu(3000);
    let board = plug(Place::Modern, vec![Device::from(&nic)]);
    let mut driver = Driver::new(&board, 0);
    driver.start(!(features::RING_EVENT_IDX | net_features::MTU), 2, 8);
    assert_eq!(driver.violations(), ["NET-06"]);
    driver.queues.clear();
    driver.reset();
    driver.violations();
    driver.start(!features::RING_EVENT_IDX, 2, 8);
    let buffer = board.memory().buffer(8192).unwrap();
    nic.inject(&[1; 60]);
    driver.send(0, &[(buffer.address(), 2000, WRITE, 0)]);
    assert_eq!(driver.violations(), ["NET-07"]);
    driver.send(1, &[(buffer.address() + 4096, 12 + 14 + 3005, 0, 0)]);
    assert_eq!(driver.violations(), ["NET-08"]);
    driver.reset();
}

#[test]
fn a_cache_that_is_switched_off_is_written_through() {
    let disk = Disk::memory(1 << 16).with_cache_control();
    let board = plug(Place::Modern, vec![Device::from(&disk)]);
    let mut driver = Driver::new(&board, 0);
    driver.start(!features::RING_EVENT_IDX, 1, 8);
    assert_eq!(
        board.device(0).accepted_features() & block_features::CONFIG_WCE,
        block_features::CONFIG_WCE
    );
    let (buffer, _) = driver.block_read(0);
    let at = buffer.address();
    driver.put(at, 1_u64);
    driver.put(at + 16, [5_u8; 32]);
    let write = [(at, 16 + 512, NEXT, 1), (at + 1000, 1, WRITE, 0)];
    driver.send(0, &write);
    assert_eq!(disk.unflushed_sectors(), 1);
    driver.write_width(0x120, 1, 0);
    assert_eq!(disk.unflushed_sectors(), 0);
    driver.put(at + 8, 1_u64);
    driver.send(0, &write);
    assert_eq!(disk.stable().unwrap()[512..544], [5; 32]);
    driver.reset();
    assert_eq!(ids(&board), [""; 0]);
}

#[test]
fn functions_four_apart_share_an_interrupt_line() {
    let disks: Vec<_> = (0..5).map(|_| Disk::memory(4096)).collect();
    let board = plug(Place::Pci, disks.iter().map(Device::from).collect());
    let lines: Vec<_> = board
        .pci_functions()
        .iter()
        .map(|function| function.line)
        .collect();
    assert_eq!(lines[0], lines[4]);
    assert_eq!(
        lines[..4]
            .iter()
            .collect::<std::collections::HashSet<_>>()
            .len(),
        4
    );
    board.device(4).spurious_interrupt(1);
    assert!(board.interrupt_pending(lines[0]));
    assert_eq!(board.run(), [lines[0]]);
}

#[test]
fn a_board_counts_what_costs() {
    let board = plug(Place::Modern, vec![Device::from(Disk::memory(1 << 16))]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    let before = (board.machine().accesses(), board.memory().counters());
    driver.read_blocks(0, &mut [0; 512]).unwrap();
    let after = (board.machine().accesses(), board.memory().counters());
    assert_eq!(after.0.writes - before.0.writes, 1, "a kick is one access");
    assert_eq!(after.0.reads, before.0.reads);
    assert_eq!(board.device(0).counters().kicks, [1]);
    assert_eq!(board.device(0).counters().interrupts, 1);
    // The request, the data, the status and the table of descriptors.
    assert_eq!(after.1.bounces - before.1.bounces, 4);
    // An allocation beyond the limit fails, and nothing is lost.
    board.memory().set_page_limit(Some(after.1.pages_live));
    let again = board.mmio_slots()[0].transport().unwrap();
    assert!(VirtIOBlk::<MachineHal, _>::new(again).is_err());
    drop(driver);
    assert_eq!(board.memory().counters().pages_live, 0);
}

#[test]
fn a_driver_may_live_on_another_thread() {
    let board = plug(Place::Modern, vec![Device::from(Disk::memory(1 << 16))]);
    let driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    let machine = board.machine().clone();
    std::thread::spawn(move || {
        let _installed = machine.install();
        // It is dropped before the machine is gone from the thread.
        let mut driver = driver;
        driver.write_blocks(0, &[1; 512]).unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(board.device(0).counters().completions, [1]);
    assert_eq!(board.memory().counters().pages_live, 0);
}

fn ids(board: &Board) -> Vec<&'static str> {
    let mut ids: Vec<_> = board
        .violations()
        .iter()
        .map(|violation| violation.id)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[test]
fn the_faults_of_the_published_drivers_are_seen() {
    // As the conformance table says of them, and no rule more.
    let disk = Disk::memory(1 << 16);
    let board = plug(Place::Modern, vec![Device::from(&disk)]);
    let mut driver = VirtIOBlk::<MachineHal, _>::new(transport(&board, Place::Modern, 0)).unwrap();
    driver.read_blocks(0, &mut [0; 512]).unwrap();
    driver.read_blocks(1 << 20, &mut [0; 512]).unwrap_err();
    drop(driver);
    assert_eq!(
        ids(&board),
        ["BLK-07", "GEN-10", "GEN-18", "GEN-21", "MMIO-15"]
    );

    let board = plug(Place::Pci, vec![Device::from(Nic::new(MAC))]);
    drop(VirtIONet::<MachineHal, _, 16>::new(transport(&board, Place::Pci, 0), 2048).unwrap());
    assert_eq!(
        ids(&board),
        ["GEN-18", "GEN-21", "PCI-04", "PCI-14", "VQ-25"]
    );
}
