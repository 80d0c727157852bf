//! The shared parts of the examples on devices of the emulated board.

#![expect(clippy::unwrap_used, reason = "what a test cannot do without ends it")]

use axdriver_base::DeviceType;
use examples::{
    board::{BoardKind, Map, Place, Transport, Variant},
    registers, work,
};
use machine::{Board, Disk, hostile::Hostile};

const TRANSPORTS: [Transport; 3] = [Transport::Mmio, Transport::LegacyMmio, Transport::Pci];

fn disk_on(transport: Transport, disk: &Disk) -> (Board, Map, Place) {
    let board = transport.plug(Board::emulated(), disk).build().unwrap();
    let map = Map::from(&board);
    let place = map.probe()[0].place.clone();
    (board, map, place)
}

#[test]
fn a_device_in_use_goes_on_while_it_is_described() {
    for transport in TRANSPORTS {
        let disk = Disk::memory(1 << 20);
        let (board, map, place) = disk_on(transport, &disk);
        let mut driver = map.start_disk(&place).unwrap();
        let status = board.device(0).status();
        for found in map.probe() {
            let text = registers::describe(&map, &found).unwrap();
            assert!(text.contains("DRIVER_OK"), "{text}");
        }
        assert_eq!(board.device(0).status(), status);
        driver.write_block(3, &[5; 512]).unwrap();
        driver.flush().unwrap();
        assert_eq!(disk.stable().unwrap()[3 * 512], 5);
    }
}

#[test]
fn files_are_kept_on_each_transport_and_no_page_is_lost() {
    for transport in TRANSPORTS {
        let disk = Disk::memory(4 << 20);
        let (board, map, place) = disk_on(transport, &disk);
        work::keep_files(&mut || map.start_disk(&place)).unwrap();
        // What was flushed is there after a power cut.
        assert_eq!(disk.unflushed_sectors(), 0);
        assert_eq!(board.memory().counters().pages_live, 0);
        assert!(board.violations().is_empty(), "{:?}", board.violations());
    }
}

#[test]
fn a_read_only_disk_keeps_no_files_and_says_why() {
    let disk = Disk::memory(4 << 20).read_only();
    let (_board, map, place) = disk_on(Transport::Pci, &disk);
    let error = work::keep_files(&mut || map.start_disk(&place)).unwrap_err();
    assert!(format!("{error:#}").contains("read-only"), "{error:#}");
}

#[test]
fn a_disk_that_loses_a_block_is_found_out() {
    let disk = Disk::memory(1 << 20);
    let (_board, map, place) = disk_on(Transport::Pci, &disk);
    let mut driver = map.start_disk(&place).unwrap();
    work::verify(&mut driver, work::Step::Fill, &mut |_| {}).unwrap();
    let mut contents = disk.contents().unwrap();
    // Two blocks changed places.
    let (one, other) = contents.split_at_mut(700 * 512);
    one[600 * 512..601 * 512].swap_with_slice(&mut other[..512]);
    disk.fill(0, &contents).unwrap();
    let error = work::verify(&mut driver, work::Step::Check, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("block 600"), "{error}");
}

#[test]
fn a_device_that_vanishes_is_an_error_and_not_a_hang() {
    for transport in TRANSPORTS {
        let disk = Disk::memory(4 << 20);
        let (board, map, place) = disk_on(transport, &disk);
        board.device(0).vanish();
        assert!(map.start_disk(&place).is_err());
        assert!(work::keep_files(&mut || map.start_disk(&place)).is_err());
        assert!(map.probe().is_empty());
    }
}

#[test]
fn lies_of_a_disk_end_in_an_error_or_in_good_files() {
    for seed in 0..20 {
        let disk = Disk::memory(4 << 20);
        let (board, map, place) = disk_on(Transport::Mmio, &disk);
        board.device(0).misbehave(Hostile::seed(seed));
        // A driver that has failed ends the work; what it gave before was right, or the comparison would say so.
        let result = work::keep_files(&mut || map.start_disk(&place));
        if let Err(error) = result {
            assert!(
                !format!("{error:#}").contains("not what was written"),
                "seed {seed}: {error:#}"
            );
        }
    }
}

#[test]
fn both_variants_of_the_board_have_their_devices() {
    let devices = |variant: Variant| {
        let board = BoardKind::Emulated
            .start(&variant.everything(b"page"))
            .unwrap();
        let map = board.map();
        let found = map.probe();
        for device in &found {
            map.describe(device).unwrap();
        }
        found
            .iter()
            .map(|device| (device.transport, device.device_type))
            .collect::<Vec<_>>()
    };
    let types = [DeviceType::Block, DeviceType::Net, DeviceType::Display];
    let modern: Vec<_> = ["MMIO", "PCI"]
        .into_iter()
        .flat_map(|name| types.map(|kind| (name, kind)))
        .collect();
    assert_eq!(devices(Variant::Modern), modern);
    assert_eq!(
        devices(Variant::Legacy),
        types.map(|kind| ("legacy MMIO", kind))
    );
}
