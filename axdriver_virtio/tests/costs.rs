//! What the drivers cost, counted: allocations, register accesses, notifications, interrupts, shared
//! buffers. The heap of the emulated board does not count, nor what a test itself does.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(clippy::unwrap_used, reason = "tests fail this way")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use axdriver_base::{BaseDriverOps, DevError, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    MmioTransport, PciRangeAllocator, PciTransport, Transport, VirtIoBlkDev, VirtIoGpuDev,
    VirtIoNetDev, probe_mmio_device, probe_pci_buses,
};
use machine::{
    Board, Device, Disk, Display, MachineHal, Nic, Version, emulated::features, registers::inside,
};

/// The system's heap, with a count of what is asked for by the thread, but for the board.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    if inside() == 0 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
    }
}

// SAFETY: all is left to the system's heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// What something cost.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Cost {
    allocations: u64,
    /// Registers read and written.
    reads: u64,
    writes: u64,
    /// Buffers shared with the device.
    shares: u64,
    /// Notifications of all queues.
    kicks: u64,
    interrupts: u64,
}

fn total(board: &Board) -> Cost {
    let accesses = board.machine().accesses();
    let counters = board.device(0).counters();
    Cost {
        reads: accesses.reads,
        writes: accesses.writes,
        shares: board.memory().counters().shares,
        kicks: counters.kicks.iter().sum(),
        interrupts: counters.interrupts,
        allocations: ALLOCATIONS.get(),
    }
}

/// Returns what `work` costs, and what it returns.
fn cost_of<R>(board: &Board, work: impl FnOnce() -> R) -> (Cost, R) {
    let before = total(board);
    // What the board counts its own things with does not count.
    let allocations = ALLOCATIONS.get();
    let result = work();
    let allocations = ALLOCATIONS.get() - allocations;
    let after = total(board);
    let cost = Cost {
        allocations,
        reads: after.reads - before.reads,
        writes: after.writes - before.writes,
        shares: after.shares - before.shares,
        kicks: after.kicks - before.kicks,
        interrupts: after.interrupts - before.interrupts,
    };
    (cost, result)
}

/// Where a device is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Mmio,
    Legacy,
    Pci,
}

const PLACES: [Place; 3] = [Place::Mmio, Place::Legacy, Place::Pci];

fn board(place: Place, device: Device) -> Board {
    let board = Board::emulated();
    match place {
        Place::Mmio => board.mmio(Version::Modern, device),
        Place::Legacy => board.mmio_legacy(device),
        Place::Pci => board.pci(device),
    }
    .build()
    .unwrap()
}

fn mmio(board: &Board) -> MmioTransport<'static> {
    let slot = board.mmio_slots()[0];
    // SAFETY: the registers of a slot of the board, which nobody else uses.
    unsafe { probe_mmio_device(slot.pointer(), slot.size) }
        .unwrap()
        .1
}

fn pci(board: &Board) -> PciTransport {
    let window = board.pci_window();
    let mut window = PciRangeAllocator::new(window.start, window.end - window.start);
    let mut root = board.pci();
    probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window))
        .next()
        .unwrap()
        .2
}

/// Lets `$check` see a driver of each device in each place: `$check(board, driver, place)`.
macro_rules! in_each_place {
    ($device:expr, $driver:ident, $check:ident) => {
        for place in PLACES {
            let board = board(place, $device);
            match place {
                Place::Pci => $check(&board, $driver(pci(&board)), place),
                _ => $check(&board, $driver(mmio(&board)), place),
            }
        }
    };
}

fn disk<T: Transport>(transport: T) -> VirtIoBlkDev<MachineHal, T> {
    VirtIoBlkDev::try_new(transport).unwrap()
}

fn nic<T: Transport>(transport: T) -> VirtIoNetDev<MachineHal, T, 128> {
    VirtIoNetDev::try_new(transport).unwrap()
}

fn display<T: Transport>(transport: T) -> VirtIoGpuDev<MachineHal, T> {
    VirtIoGpuDev::try_new(transport).unwrap()
}

#[test]
fn a_block_request_is_one_register_access_one_shared_buffer_and_no_allocation() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut disk: VirtIoBlkDev<MachineHal, T>,
        place: Place,
    ) {
        let mut bytes = vec![0; 64 << 10];
        for len in [512, 4096, 64 << 10] {
            let expected = Cost {
                writes: 1,
                kicks: 1,
                shares: 1,
                ..Cost::default()
            };
            for block in 0..100 {
                let (cost, result) = cost_of(board, || disk.read_block(block, &mut bytes[..len]));
                assert_eq!((cost, result), (expected, Ok(())), "{place:?}");
                let (cost, result) = cost_of(board, || disk.write_block(block, &bytes[..len]));
                assert_eq!((cost, result), (expected, Ok(())), "{place:?}");
            }
        }
        let (cost, result) = cost_of(board, || disk.flush());
        let expected = Cost {
            writes: 1,
            kicks: 1,
            ..Cost::default()
        };
        assert_eq!((cost, result), (expected, Ok(())), "{place:?}");
    }
    in_each_place!(Device::from(Disk::memory(1 << 20)), disk, check);
    in_each_place!(
        Device::from(Disk::memory(1 << 20)).withhold(features::RING_EVENT_IDX),
        disk,
        check
    );
    in_each_place!(
        Device::from(Disk::memory(1 << 20)).queue_size(4),
        disk,
        check
    );
}

#[test]
fn what_cannot_be_costs_nothing() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut disk: VirtIoBlkDev<MachineHal, T>,
        place: Place,
    ) {
        let mut bytes = [0; 512];
        let end = disk.num_blocks();
        let (cost, result) = cost_of(board, || disk.read_block(end, &mut bytes));
        assert_eq!(
            (cost, result),
            (Cost::default(), Err(DevError::InvalidParam)),
            "{place:?}"
        );
    }
    in_each_place!(Device::from(Disk::memory(1 << 20)), disk, check);
}

/// The frames of a batch, which is less than the queue holds.
const BATCH: u64 = 100;

#[test]
fn a_batch_of_frames_to_a_busy_nic_is_one_notification_and_no_allocation() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut nic: VirtIoNetDev<MachineHal, T, 128>,
        place: Place,
    ) {
        for _ in 0..5 {
            let (cost, ()) = cost_of(board, || {
                for _ in 0..BATCH {
                    let mut buf = nic.alloc_tx_buffer(1514).unwrap();
                    buf.packet_mut().fill(2);
                    nic.transmit(buf).unwrap();
                }
            });
            let expected = Cost {
                writes: 1,
                kicks: 1,
                shares: BATCH,
                ..Cost::default()
            };
            assert_eq!(cost, expected, "{place:?}");
            board.run();
            let (cost, result) = cost_of(board, || nic.recycle_tx_buffers());
            assert_eq!((cost, result), (Cost::default(), Ok(())), "{place:?}");
        }
    }
    in_each_place!(Device::from(Nic::new([2; 6])).answer_later(), nic, check);
}

#[test]
fn a_nic_that_asks_not_to_be_notified_is_not() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut nic: VirtIoNetDev<MachineHal, T, 128>,
        place: Place,
    ) {
        let (cost, ()) = cost_of(board, || {
            for _ in 0..BATCH {
                let buf = nic.alloc_tx_buffer(60).unwrap();
                nic.transmit(buf).unwrap();
            }
        });
        let expected = Cost {
            shares: BATCH,
            ..Cost::default()
        };
        assert_eq!(cost, expected, "{place:?}");
    }
    in_each_place!(
        Device::from(Nic::new([2; 6]))
            .withhold(features::RING_EVENT_IDX)
            .quiet(),
        nic,
        check
    );
}

#[test]
fn a_frame_sent_at_once_is_one_register_access() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut nic: VirtIoNetDev<MachineHal, T, 128>,
        place: Place,
    ) {
        for _ in 0..3 * BATCH {
            let (cost, ()) = cost_of(board, || {
                let buf = nic.alloc_tx_buffer(1514).unwrap();
                nic.transmit(buf).unwrap();
            });
            let expected = Cost {
                writes: 1,
                kicks: 1,
                shares: 1,
                ..Cost::default()
            };
            assert_eq!(cost, expected, "{place:?}");
        }
    }
    in_each_place!(Device::from(Nic::new([2; 6])), nic, check);
}

#[test]
fn a_batch_of_frames_is_received_without_an_allocation_and_refilled_with_at_most_one_notification()
{
    for place in PLACES {
        let card = Nic::new([2; 6]);
        let board = board(place, Device::from(&card).answer_later());
        match place {
            Place::Pci => check(&board, &card, nic(pci(&board)), place),
            _ => check(&board, &card, nic(mmio(&board)), place),
        }
    }

    fn check<T: Transport + Send + Sync>(
        board: &Board,
        card: &Nic,
        mut nic: VirtIoNetDev<MachineHal, T, 128>,
        place: Place,
    ) {
        for _ in 0..5 {
            for _ in 0..BATCH {
                card.inject(&[2; 1514]);
            }
            board.run();
            let (cost, ()) = cost_of(board, || {
                for _ in 0..BATCH {
                    let buf = nic.receive().unwrap();
                    assert_eq!(buf.packet(), [2; 1514]);
                    nic.recycle_rx_buffer(buf).unwrap();
                }
            });
            // Not even one while the device has buffers left.
            assert!(cost.kicks <= 1, "{place:?}: {cost:?}");
            let expected = Cost {
                writes: cost.kicks,
                kicks: cost.kicks,
                shares: BATCH,
                ..Cost::default()
            };
            assert_eq!(cost, expected, "{place:?}");
        }
    }
}

#[test]
fn looking_for_frames_hardly_ever_touches_a_register() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut nic: VirtIoNetDev<MachineHal, T, 128>,
        place: Place,
    ) {
        let (cost, ()) = cost_of(board, || {
            for _ in 0..60 {
                assert!(!nic.can_receive());
                assert!(nic.can_transmit());
                assert_eq!(nic.receive().err(), Some(DevError::Again));
            }
        });
        assert_eq!(cost, Cost::default(), "{place:?}");
        // Now and then, whether the device is still there.
        let (cost, ()) = cost_of(board, || {
            for _ in 0..100_000 {
                assert_eq!(nic.receive().err(), Some(DevError::Again));
            }
        });
        assert!(cost.reads <= 100 && cost.writes == 0, "{place:?}: {cost:?}");
    }
    in_each_place!(Device::from(Nic::new([2; 6])), nic, check);
}

#[test]
fn silenced_devices_raise_no_interrupt_and_asking_for_them_costs_no_register_access() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut disk: VirtIoBlkDev<MachineHal, T>,
        place: Place,
    ) {
        let mut bytes = [0; 512];
        let mut requests = |disk: &mut VirtIoBlkDev<MachineHal, T>| {
            cost_of(board, || {
                for block in 0..BATCH {
                    disk.read_block(block, &mut bytes).unwrap();
                }
            })
            .0
        };
        assert_eq!(requests(&mut disk).interrupts, 0, "{place:?}");
        let (cost, more) = cost_of(board, || disk.enable_interrupts());
        assert_eq!((cost, more), (Cost::default(), Ok(false)), "{place:?}");
        assert_eq!(requests(&mut disk).interrupts, BATCH, "{place:?}");
        let (cost, cause) = cost_of(board, || disk.acknowledge_interrupt());
        assert_eq!(cause, Ok(InterruptCause::USED_BUFFERS));
        // 4.1.4.5, 4.2.2: over PCI, reading is acknowledging.
        let writes = if place == Place::Pci { 0 } else { 1 };
        assert_eq!((cost.reads, cost.writes), (1, writes), "{place:?}");
        let (cost, result) = cost_of(board, || disk.disable_interrupts());
        assert_eq!((cost, result), (Cost::default(), Ok(())), "{place:?}");
        assert_eq!(requests(&mut disk).interrupts, 0, "{place:?}");
    }
    in_each_place!(Device::from(Disk::memory(1 << 20)), disk, check);
    in_each_place!(
        Device::from(Disk::memory(1 << 20)).withhold(features::RING_EVENT_IDX),
        disk,
        check
    );
}

#[test]
fn a_picture_is_one_notification() {
    fn check<T: Transport + Send + Sync>(
        board: &Board,
        mut display: VirtIoGpuDev<MachineHal, T>,
        place: Place,
    ) {
        for _ in 0..3 {
            let (cost, result) = cost_of(board, || {
                display.fb().as_bytes_mut().fill(1);
                display.flush()
            });
            let expected = Cost {
                writes: 1,
                kicks: 1,
                ..Cost::default()
            };
            assert_eq!((cost, result), (expected, Ok(())), "{place:?}");
        }
    }
    in_each_place!(Device::from(Display::new(64, 64)), display, check);
}
