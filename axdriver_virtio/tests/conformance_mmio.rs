//! VirtIO 1.3, 4.2: virtio over MMIO. Each test is a row of `CONFORMANCE.md`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axdriver_base::{DevError, InterruptCause};
use axdriver_virtio::{MmioTransport, Transport, probe_mmio_device};
use common::{Access, Bench, Driver, Kind, Over, World, impatient, logged, numbered_disk};
use machine::hostile::{Fault, Hostile};
use machine::{Board, Entropy};

/// The two versions of the registers.
const MMIO: [Over; 2] = [Over::Modern, Over::Legacy];

/// Offsets of registers (4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

const READ_ONLY: [u64; 8] = [
    MAGIC,
    VERSION,
    DEVICE_ID,
    0x00c,
    DEVICE_FEATURES,
    QUEUE_SIZE_MAX,
    INTERRUPT_STATUS,
    CONFIG_GENERATION,
];
const WRITE_ONLY: [u64; 14] = [
    DEVICE_FEATURES_SEL,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    QUEUE_SEL,
    QUEUE_SIZE,
    QUEUE_NOTIFY,
    INTERRUPT_ACK,
    0x080,
    0x084,
    0x090,
    0x094,
    0x0a0,
    0x0a4,
    0x028,
];
/// QueueAlign and QueuePFN are of the legacy registers.
const READ_WRITE: [u64; 4] = [QUEUE_READY, STATUS, 0x03c, 0x040];

/// All accesses of probing, start, work, interrupts, reset and end, with offsets for addresses.
fn whole_life(kind: Kind, over: Over) -> Vec<Access> {
    let world = kind.plug(over);
    let tap = world.bench.tap(|_| None);
    let mut driver = world.start();
    driver.base().enable_interrupts().unwrap();
    world.work(&mut driver).unwrap();
    driver.acknowledge().unwrap();
    driver.configuration_changed().unwrap();
    driver.base().disable_interrupts().unwrap();
    driver.reset().unwrap();
    world.work(&mut driver).unwrap();
    drop(driver);
    world.bench.assert_clean();
    let base = world.bench.registers();
    let relative = |access: Access| Access {
        address: access.address - base,
        ..access
    };
    tap.take().into_iter().map(relative).collect()
}

#[test]
fn mmio_01_only_documented_registers_are_accessed_each_as_it_may_be() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        for access in whole_life(kind, over) {
            let allowed = match access.address {
                CONFIG.. => true,
                offset if access.write => !READ_ONLY.contains(&offset),
                offset => !WRITE_ONLY.contains(&offset),
            };
            let known = access.address >= CONFIG
                || READ_ONLY.contains(&access.address)
                || WRITE_ONLY.contains(&access.address)
                || READ_WRITE.contains(&access.address);
            assert!(allowed && known, "{kind:?} over {over:?}: {access:x?}");
        }
    }
}

#[test]
fn mmio_02_control_registers_are_accessed_aligned_and_with_32_bits() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        let accesses = whole_life(kind, over);
        let mut control = accesses.iter().filter(|access| access.address < CONFIG);
        assert!(control.all(|access| access.width == 4 && access.address % 4 == 0));
    }
}

#[test]
fn mmio_03_configuration_fields_are_accessed_by_their_width() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        let mut seen = 0;
        for access in whole_life(kind, over) {
            let Some(offset) = access.address.checked_sub(CONFIG) else {
                continue;
            };
            let width = match (kind, offset) {
                // The address byte by byte, the link as 16 bits.
                (Kind::Nic, 0..6) => 1,
                (Kind::Nic, _) => 2,
                // Also the halves of the capacity.
                (Kind::Disk | Kind::Display, _) => 4,
            };
            assert_eq!(access.width, width, "{kind:?} at {offset:#x}");
            seen += 1;
        }
        assert!(seen > 0);
    }
}

/// Probes a slot of which some registers read as something else, and returns the offsets that were accessed.
fn probe_changed(
    change: impl Fn(u64) -> Option<u64> + Send + 'static,
) -> (Option<axdriver_base::DeviceType>, Vec<u64>, Bench) {
    let bench = Over::Modern.plug(numbered_disk());
    let base = bench.registers();
    let tap = bench.tap(move |access| change(access.address - base));
    let slot = bench.board.mmio_slots()[0];
    logged();
    // SAFETY: the slot of this board.
    let found = unsafe { probe_mmio_device(slot.pointer(), slot.size) };
    let accesses = tap.take();
    assert!(accesses.iter().all(|access| !access.write), "{accesses:?}");
    let offsets = accesses
        .iter()
        .map(|access| access.address - base)
        .collect();
    (found.map(|(device_type, _)| device_type), offsets, bench)
}

#[test]
fn mmio_04_a_wrong_magic_value_is_no_device() {
    for magic in [0, 1, 0x7472_6977, 0x7669_7274, 0xffff_ffff] {
        let (found, accesses, _) = probe_changed(move |offset| (offset == MAGIC).then_some(magic));
        assert_eq!(found, None);
        assert_eq!(accesses, [MAGIC], "nothing else is touched");
    }
}

#[test]
fn mmio_05_a_version_other_than_1_and_2_is_no_device() {
    for version in [0, 3, 4, 0x100, 0xffff_ffff] {
        let (found, accesses, _) =
            probe_changed(move |offset| (offset == VERSION).then_some(version));
        assert_eq!(found, None);
        assert_eq!(accesses, [MAGIC, VERSION]);
    }
}

#[test]
fn mmio_06_an_empty_slot_is_no_device_and_no_error() {
    let (found, _, _) = probe_changed(|offset| (offset == DEVICE_ID).then_some(0));
    assert_eq!(found, None);
    let said = logged();
    assert!(
        said.iter()
            .all(|message| message.level >= log::Level::Debug),
        "{said:?}"
    );
}

/// Expects a write of the first register directly before each access of the second.
fn assert_selected_before(accesses: &[Access], select: u64, register: u64, write: bool) {
    let mut selected = None;
    let mut count = 0;
    for access in accesses {
        if access.write && access.address == select {
            selected = Some(access.value);
        }
        if access.write == write && access.address == register {
            assert!(
                selected.take().is_some(),
                "{register:#x} without {select:#x}"
            );
            count += 1;
        }
    }
    assert!(count >= 2, "both halves are accessed");
}

#[test]
fn mmio_07_the_half_of_the_device_features_is_selected_before_it_is_read() {
    for over in MMIO {
        let accesses = whole_life(Kind::Disk, over);
        assert_selected_before(&accesses, DEVICE_FEATURES_SEL, DEVICE_FEATURES, false);
    }
}

#[test]
fn mmio_08_the_half_of_the_driver_features_is_selected_before_it_is_written() {
    for over in MMIO {
        let accesses = whole_life(Kind::Disk, over);
        assert_selected_before(&accesses, DRIVER_FEATURES_SEL, DRIVER_FEATURES, true);
    }
}

#[test]
fn mmio_09_a_queue_is_at_most_as_large_as_offered() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        for offered in [4, 6, 8, 16, 32768] {
            let world = kind.plug_as(over, |device| device.queue_size(offered));
            let base = world.bench.registers();
            let tap = world.bench.tap(|_| None);
            let _driver = world.start();
            let sizes = tap.take();
            let mut sizes = sizes
                .iter()
                .filter(|access| access.writes(base + QUEUE_SIZE));
            assert!(sizes.all(|access| access.value <= offered.into()));
            world.bench.assert_rules_kept();
        }
    }
}

#[test]
fn mmio_10_a_queue_that_is_ready_is_left_alone() {
    for kind in Kind::ALL {
        let mut ready = [false; 4];
        let mut selected = 0;
        for access in whole_life(kind, Over::Modern) {
            if !access.write {
                continue;
            }
            match access.address {
                QUEUE_SEL => selected = usize::try_from(access.value).unwrap(),
                QUEUE_READY => ready[selected] = access.value != 0,
                STATUS if access.value == 0 => ready = [false; 4],
                QUEUE_SIZE | 0x080..=0x0a4 => assert!(!ready[selected], "{access:x?}"),
                _ => {}
            }
        }
    }
}

#[test]
fn mmio_11_a_queue_that_is_stopped_is_waited_for() {
    let bench = Over::Modern.plug(numbered_disk());
    let base = bench.registers();
    let disk = bench.disk();
    drop(disk);
    let ready_reads = Arc::new(AtomicU64::new(0));
    let counted = ready_reads.clone();
    let _tap = bench.tap(move |access| {
        // It takes three looks until the queue has stopped.
        let slow = access.reads(base + QUEUE_READY) && counted.fetch_add(1, Ordering::Relaxed) < 3;
        slow.then_some(1)
    });
    let mut transport = bench.transport();
    transport.queue_unset(0);
    assert_eq!(ready_reads.load(Ordering::Relaxed), 4);
}

/// A driver whose device's interrupt status has undefined bits set, and the values written to InterruptACK.
fn with_undefined_bits(over: Over, causes: u64) -> (InterruptCause, Vec<u64>) {
    let world = Kind::Disk.plug(over);
    let mut driver = world.start();
    let base = world.bench.registers();
    let tap = world.bench.tap(move |access| {
        access
            .reads(base + INTERRUPT_STATUS)
            .then_some(0xffff_fffc | causes)
    });
    let cause = driver.acknowledge().unwrap();
    let accesses = tap.take();
    let acks = accesses
        .iter()
        .filter(|access| access.writes(base + INTERRUPT_ACK));
    let acks = acks.map(|access| access.value).collect();
    drop(driver);
    (cause, acks)
}

#[test]
fn mmio_12_undefined_interrupt_causes_are_ignored() {
    for over in MMIO {
        assert_eq!(with_undefined_bits(over, 0).0, InterruptCause::empty());
        assert_eq!(with_undefined_bits(over, 1).0, InterruptCause::USED_BUFFERS);
    }
}

#[test]
fn mmio_13_undefined_interrupt_causes_are_not_acknowledged() {
    for over in MMIO {
        assert_eq!(with_undefined_bits(over, 0).1, [0; 0]);
        assert_eq!(with_undefined_bits(over, 1).1, [1]);
        assert_eq!(with_undefined_bits(over, 3).1, [3]);
    }
}

#[test]
fn mmio_15_magic_version_and_device_id_are_read_in_this_order_and_first() {
    let (found, accesses, _) = probe_changed(|_| None);
    assert!(found.is_some());
    assert_eq!(accesses[..3], [MAGIC, VERSION, DEVICE_ID]);
    let (_, accesses, _) = probe_changed(|offset| (offset == DEVICE_ID).then_some(0));
    assert_eq!(accesses, [MAGIC, VERSION, DEVICE_ID], "no other register");

    // A board watches its empty slots.
    let board = Board::emulated().mmio_empty().build().unwrap();
    for slot in board.mmio_slots() {
        // SAFETY: a slot of this board.
        assert!(unsafe { probe_mmio_device(slot.pointer(), slot.size) }.is_none());
    }
    assert_eq!(board.violations(), []);
}

#[test]
fn mmio_15_a_device_that_has_no_driver_here_is_not_touched() {
    let bench = Over::Modern.plug(Entropy::default());
    let slot = bench.board.mmio_slots()[0];
    let tap = bench.tap(|_| None);
    // SAFETY: the slot of this board.
    assert!(unsafe { probe_mmio_device(slot.pointer(), slot.size) }.is_none());
    assert!(tap.take().iter().all(|access| !access.write));
}

#[test]
fn mmio_16_the_registers_of_shared_memory_are_not_used() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        let accesses = whole_life(kind, over);
        assert!(
            accesses
                .iter()
                .all(|access| !(0xac..0xc0).contains(&access.address))
        );
    }
}

#[test]
fn mmio_17_a_queue_is_looked_at_before_it_is_set_up() {
    for kind in Kind::ALL {
        let accesses = whole_life(kind, Over::Modern);
        let sizes = accesses.iter().enumerate();
        let sizes = sizes.filter(|(_, access)| access.write && access.address == QUEUE_SIZE);
        for (at, _) in sizes {
            let before = |offset| {
                let read = |access: &Access| access.reads(offset);
                accesses[..at].iter().rposition(read).unwrap()
            };
            assert_eq!(accesses[before(QUEUE_READY)].value, 0);
            assert_ne!(accesses[before(QUEUE_SIZE_MAX)].value, 0);
        }
    }
}

#[test]
fn mmio_17_a_queue_that_is_in_use_or_missing_is_not_set_up() {
    for (register, value, error) in [
        (QUEUE_READY, 1, DevError::BadState),
        (QUEUE_SIZE_MAX, 0, DevError::Unsupported),
    ] {
        let world = Kind::Disk.plug(Over::Modern);
        let base = world.bench.registers();
        let tap = world
            .bench
            .tap(move |access| access.reads(base + register).then_some(value));
        assert_eq!(world.try_start(impatient()).err(), Some(error));
        assert!(
            !tap.take()
                .iter()
                .any(|access| access.writes(base + QUEUE_SIZE))
        );
        world.bench.assert_clean();
    }
}

fn interrupted(kind: Kind, over: Over) -> (World, Driver) {
    let world = kind.plug(over);
    let mut driver = world.start();
    driver.base().enable_interrupts().unwrap();
    world.work(&mut driver).unwrap();
    assert!(world.bench.device().interrupt_pending());
    (world, driver)
}

#[test]
fn mmio_18_the_cause_of_an_interrupt_is_read() {
    for over in MMIO {
        let (world, mut driver) = interrupted(Kind::Nic, over);
        let base = world.bench.registers();
        let tap = world.bench.tap(|_| None);
        assert_eq!(driver.acknowledge(), Ok(InterruptCause::USED_BUFFERS));
        assert!(tap.take()[0].reads(base + INTERRUPT_STATUS));
    }
}

#[test]
fn mmio_19_what_was_read_is_acknowledged_and_the_line_falls() {
    for (kind, over) in Kind::everywhere().filter(|(_, over)| *over != Over::Pci) {
        let (world, mut driver) = interrupted(kind, over);
        let base = world.bench.registers();
        let tap = world.bench.tap(|_| None);
        assert_eq!(driver.acknowledge(), Ok(InterruptCause::USED_BUFFERS));
        let accesses = tap.take();
        let ack = accesses
            .iter()
            .find(|access| access.writes(base + INTERRUPT_ACK));
        assert_eq!(ack.unwrap().value, 1);
        assert!(!world.bench.device().interrupt_pending());
        // On a shared line, the next interrupt is another device's.
        assert_eq!(driver.acknowledge(), Ok(InterruptCause::empty()));
    }
}

#[test]
fn a_slow_device_is_not_read_while_nothing_is_to_be_done() {
    let world = Kind::Nic.plug(Over::Modern);
    let mut nic = world.bench.nic::<8>();
    use axdriver_net::NetDriverOps;
    let tap = world.bench.tap(|_| None);
    for _ in 0..50 {
        assert_eq!(nic.receive().err(), Some(DevError::Again));
    }
    assert_eq!(tap.take(), []);
}

#[test]
fn a_transport_says_what_it_was_made_of() {
    let bench = Over::Modern.plug(numbered_disk());
    let slot = bench.board.mmio_slots()[0];
    // SAFETY: the slot of this board.
    let found = unsafe { probe_mmio_device(slot.pointer(), slot.size) };
    let transport: MmioTransport<'static> = found.unwrap().1;
    assert_eq!(transport.version() as u32, 2);
    assert_eq!(transport.vendor_id(), 0x554d_4551);
    bench.misbehave(Hostile::new().always(Fault::ResetIgnored));
    // Only looked at: dropping it neither resets nor waits.
    drop(transport);
    assert_eq!(bench.statuses(), [0; 0]);
}
