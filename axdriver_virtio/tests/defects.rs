//! Faults that virtio drivers in the field have, none of which these drivers have.
//!
//! Each test would fail on `axdriver` 0.2 over `virtio-drivers` 0.13. The numbers are of a list of such faults:
//!
//! * In the trait crates, with tests there: D12 (`RamDisk` could be made of any pointer; its contents are private now), D13
//!   (two framebuffers of one display at once; `fb` takes `&mut self` now), D20 (buffers that cross pages,
//!   `no_buffer_of_a_frame_crosses_a_page`), D54 (errors without traits, `errors_can_be_copied_compared_and_boxed`), D60
//!   (`impossible_pools_are_refused`, where 1526 bytes are possible).
//! * In the queue alone, with tests in `src/queue/tests.rs`: D6 (`litmus_no_kick_is_lost_with_event_idx` and its sibling), D7
//!   (`a_batch_over_the_wrap_of_the_index_is_not_lost`), D8 (`an_event_index_that_stays_put_is_passed_once`,
//!   `a_batch_of_100_is_one_kick`), D35 (`a_chain_of_over_4_gib_is_refused`), D56
//!   (`a_chain_longer_than_the_queue_never_fits_even_indirectly`), D58 (the rings are accessed through atomics only, also by
//!   the device of the litmus tests, which runs in another thread).
//! * D50 (other byte orders) has no test: every access to shared memory goes through the little-endian functions of
//!   `src/dma.rs` and `src/queue/ring.rs`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::rc::Rc;

use axdriver_base::{BaseDriverOps, DevError, DeviceType, InterruptCause};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::{EthernetAddress, NetBufPool, NetDriverOps};
use axdriver_virtio::{
    BufferDirection, MmioTransport, PciRangeAllocator, PhysAddr, Transport, VirtIoBlkDev,
    VirtIoGpuDev, VirtIoHal, VirtIoNetDev, WaitPolicy, as_dev_err, probe_mmio_device,
};
use common::{
    AnyTransport, Bench, Capability, DISK_SIZE, Disk, Driver, FakeFunction, FakeRoot, Kind, MAC,
    Nic, Over, first, impatient, is_queue_enabled, is_release, is_reset, is_status_read,
    numbered_disk,
};
use machine::emulated::features;
use machine::hostile::{Fault, Hostile};
use machine::{Device, Entropy, Event, MachineHal};

/// Sends a frame of 60 bytes.
fn send<const QS: usize>(nic: &mut Nic<QS>) -> Result<(), DevError> {
    let mut buf = nic.alloc_tx_buffer(60)?;
    buf.packet_mut().fill(1);
    nic.transmit(buf)
}

/// D1: a received length beyond the buffer was handed out as the length of the packet.
#[test]
fn a_received_frame_is_never_longer_than_its_buffer() {
    for over in Over::ALL {
        for fault in [Fault::FrameOversized, Fault::UsedLenLong] {
            let nic = machine::Nic::new(MAC);
            let bench = over.plug(&nic);
            let mut driver = bench.nic::<8>();
            bench.once(fault);
            nic.inject(&[5; 100]);
            bench.board.run();
            match driver.receive() {
                Err(error) => assert_eq!(error, DevError::Io),
                // A legacy device's length is not to be relied on, and cut off at the buffer.
                Ok(buf) => assert!(over == Over::Legacy && buf.packet_len() <= 4096),
            }
        }
    }
}

/// D2: the buffers of a NIC were freed before the device was reset, at the end and when a start failed.
#[test]
fn a_nic_is_reset_before_its_buffers_are_freed() {
    for over in Over::ALL {
        let bench = over.plug(machine::Nic::new(MAC));
        let driver = bench.nic::<8>();
        bench.board.memory().trace().clear();
        drop(driver);
        let events = bench.events();
        let reset = first(&events, "a reset", is_reset);
        assert!(reset < first(&events, "a release", is_release));

        // The transmit queue is in use already when the receive queue is there.
        let bench = over.plug(machine::Nic::new(MAC));
        let (selector, ready) = match over {
            Over::Pci => (0x16, 0x1c),
            Over::Modern => (0x30, 0x44),
            Over::Legacy => (0x30, 0x40),
        };
        let base = bench.registers();
        let mut selected = 0;
        let tap = bench.tap(move |access| {
            if access.writes(base + selector) {
                selected = access.value;
            }
            (selected == 1 && access.reads(base + ready)).then_some(1)
        });
        let started = Nic::<8>::try_new(bench.transport());
        assert_eq!(started.err(), Some(DevError::BadState));
        drop(tap);
        bench.assert_clean();
    }
}

/// D3: after a wrong id the request stayed with the device, and its late completion wrote into memory of others.
#[test]
fn a_device_that_answers_with_a_wrong_id_has_no_access_afterwards() {
    for over in Over::ALL {
        let bench = over.plug(Device::from(&numbered_disk()).answer_later());
        let _running = bench.run_while_waiting();
        let mut disk = Disk::try_new_with(bench.transport(), common::running()).unwrap();
        for fault in [
            Fault::UsedIdOutOfRange,
            Fault::CompleteNever,
            Fault::UsedIdHighBits,
        ] {
            bench.once(fault);
            let mut block = [0xcc; 512];
            assert_eq!(disk.read_block(5, &mut block), Err(DevError::Io), "{fault}");
            let after = block;
            bench.behave();
            for _ in 0..10 {
                bench.board.run();
            }
            assert_eq!(block, after, "nothing is written late");
            disk.reset().unwrap();
        }
        drop(disk);
        bench.assert_clean();
    }
}

/// D4: after a wrong id every later request failed, and took descriptors with it.
#[test]
fn a_wrong_id_is_over_with_a_reset_however_often() {
    for over in Over::ALL {
        let bench = over.plug(numbered_disk());
        let mut disk = bench.disk();
        for round in 0..50 {
            bench.once(Fault::UsedIdWrong);
            assert_eq!(disk.read_block(5, &mut [0; 512]), Err(DevError::Io));
            assert_eq!(disk.read_block(5, &mut [0; 512]), Err(DevError::BadState));
            disk.reset().unwrap();
            let mut block = [0; 512];
            disk.read_block(5, &mut block).unwrap();
            assert_eq!(block, [5; 512], "round {round}");
        }
        drop(disk);
        bench.assert_clean();
    }
}

/// D5: a flush was said to be done without having been asked for, though the device has a cache.
#[test]
fn a_flush_makes_writes_outlive_a_loss_of_power() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        driver.write_block(0, &[0xf1; 512]).unwrap();
        driver.flush().unwrap();
        driver.write_block(1, &[0xf2; 512]).unwrap();
        disk.power_cut();
        assert_eq!(disk.counters().flushes, 1);
        assert_eq!(disk.stable().unwrap()[..512], [0xf1; 512]);
        assert_eq!(
            disk.stable().unwrap()[512..1024],
            [1; 512],
            "it was not flushed"
        );
    }
}

/// D8: with EVENT_IDX, each frame of a burst was a notification that the device had not asked for.
#[test]
fn a_burst_of_frames_is_one_notification() {
    for over in Over::ALL {
        let cable = machine::Nic::new(MAC);
        let bench = over.plug(Device::from(&cable).answer_later());
        let mut nic = bench.nic::<128>();
        for _ in 0..100 {
            send(&mut nic).unwrap();
        }
        assert_eq!(bench.device().counters().kicks[1], 1);
        assert_eq!(cable.counters().sent, 0, "it has not looked yet");
        bench.board.run();
        assert_eq!(cable.counters().sent, 100, "and finds all of them");
    }
}

/// D9: with EVENT_IDX interrupts could not be silenced, and what came in between was not told.
#[test]
fn silenced_interrupts_stay_silent_and_enabling_them_tells_what_has_come_in() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<8>();
        driver.disable_interrupts().unwrap();
        for _ in 0..20 {
            send(&mut driver).unwrap();
            nic.inject(&[1; 60]);
            bench.board.run();
            let buf = driver.receive().unwrap();
            driver.recycle_rx_buffer(buf).unwrap();
        }
        driver.recycle_tx_buffers().unwrap();
        assert_eq!(bench.device().counters().interrupts, 0);
        // What comes in while nobody listens is told when somebody does.
        nic.inject(&[1; 60]);
        bench.board.run();
        assert_eq!(driver.enable_interrupts(), Ok(true));
        driver.receive().map(drop).unwrap();
        assert_eq!(driver.enable_interrupts(), Ok(false));
        nic.inject(&[1; 60]);
        bench.board.run();
        assert_eq!(bench.device().counters().interrupts, 1);
    }
}

/// D10: block numbers beyond 32 bits were cut off where a pointer has 32.
#[test]
fn a_block_beyond_32_bits_is_asked_for_as_it_is() {
    const BLOCK: u64 = (1 << 32) + 5;
    let bench = Over::Modern.plug(numbered_disk());
    let base = bench.registers();
    // The disk says that it is larger than it is.
    let _tap = bench.tap(move |access| access.reads(base + 0x104).then_some(2));
    let mut disk = bench.disk();
    assert_eq!(disk.num_blocks() >> 32, 2);
    disk.read_block(BLOCK, &mut [0; 512]).unwrap_err();
    let asked = bench.broken_rules();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert!(
        asked[0].contains(&format!("at sector {BLOCK} of")),
        "{asked:?}"
    );
}

/// D11: any pointer was taken for a buffer of the driver.
#[test]
fn a_foreign_buffer_goes_back_to_its_owner() {
    for over in Over::ALL {
        let bench = over.plug(machine::Nic::new(MAC));
        let other = over.plug(machine::Nic::new(MAC));
        let mut stranger = other.nic::<8>();
        let installed = bench.board.machine().install();
        let mut driver = bench.nic::<8>();
        let pool = NetBufPool::new(1, 2048).unwrap();
        for _ in 0..20 {
            let mut foreign = pool.alloc_boxed().unwrap();
            foreign.try_set_lens(12, 60).unwrap();
            let refused = driver.transmit(foreign.into_buf_ptr());
            assert_eq!(refused, Err(DevError::InvalidParam));
            let foreign = stranger.alloc_tx_buffer(60).unwrap();
            let refused = driver.recycle_rx_buffer(foreign);
            assert_eq!(refused, Err(DevError::InvalidParam));
        }
        assert_eq!(pool.available(), 1);
        send(&mut driver).unwrap();
        drop(driver);
        drop(installed);
        drop(stranger);
        bench.assert_clean();
    }
}

/// D11: a buffer that was dropped was lost, with its place in the pool.
#[test]
fn dropped_buffers_are_used_again() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<4>();
        for _ in 0..100 {
            drop(driver.alloc_tx_buffer(100).unwrap());
            nic.inject(&[1; 60]);
            bench.board.run();
            drop(driver.receive().unwrap());
        }
    }
}

/// Whether a type is `Send` and `Sync`, as constants that the inherent implementation overrides.
struct Markers<T: ?Sized>(PhantomData<T>);

trait NotSend {
    const IS_SEND: bool = false;
}

impl<T: ?Sized> NotSend for Markers<T> {}

impl<T: ?Sized + Send> Markers<T> {
    const IS_SEND: bool = true;
}

trait NotSync {
    const IS_SYNC: bool = false;
}

impl<T: ?Sized> NotSync for Markers<T> {}

impl<T: ?Sized + Sync> Markers<T> {
    const IS_SYNC: bool = true;
}

/// A transport that belongs to its thread.
struct ThreadBound(
    AnyTransport,
    #[expect(dead_code, reason = "not Send")] Rc<()>,
);

impl Transport for ThreadBound {
    fn device_type(&self) -> virtio_drivers::transport::DeviceType {
        self.0.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.read_device_features()
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.0.write_driver_features(driver_features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.0.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.0.notify(queue);
    }

    fn get_status(&self) -> virtio_drivers::transport::DeviceStatus {
        self.0.get_status()
    }

    fn set_status(&mut self, status: virtio_drivers::transport::DeviceStatus) {
        self.0.set_status(status);
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.0.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.0.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.0
            .queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.0.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.0.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> virtio_drivers::transport::InterruptStatus {
        self.0.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.0.read_config_generation()
    }

    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        self.0.read_config_space(offset)
    }

    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.0.write_config_space(offset, value)
    }
}

/// D14: drivers claimed to be `Send` and `Sync` whatever their transport was.
#[test]
fn a_driver_changes_threads_exactly_if_its_transport_does() {
    const {
        type Good<T> = VirtIoBlkDev<MachineHal, T>;
        assert!(Markers::<Good<AnyTransport>>::IS_SEND && Markers::<Good<AnyTransport>>::IS_SYNC);
        assert!(!Markers::<Good<ThreadBound>>::IS_SEND && !Markers::<Good<ThreadBound>>::IS_SYNC);
        type Net<T> = VirtIoNetDev<MachineHal, T, 8>;
        assert!(Markers::<Net<AnyTransport>>::IS_SEND && Markers::<Net<AnyTransport>>::IS_SYNC);
        assert!(!Markers::<Net<ThreadBound>>::IS_SEND && !Markers::<Net<ThreadBound>>::IS_SYNC);
        type Gpu<T> = VirtIoGpuDev<MachineHal, T>;
        assert!(Markers::<Gpu<AnyTransport>>::IS_SEND && Markers::<Gpu<AnyTransport>>::IS_SYNC);
        assert!(!Markers::<Gpu<ThreadBound>>::IS_SEND && !Markers::<Gpu<ThreadBound>>::IS_SYNC);
    }
    // On its own thread it works all the same.
    let bench = Over::Modern.plug(numbered_disk());
    let transport = ThreadBound(bench.transport(), Rc::new(()));
    drop(VirtIoBlkDev::<MachineHal, _>::try_new(transport).unwrap());
    bench.assert_clean();
}

/// D15: probing followed any pointer in safe code.
#[test]
fn probing_an_address_is_unsafe() {
    struct Function<F>(F);

    impl<F: Fn(*mut u8, usize) -> Option<(DeviceType, MmioTransport<'static>)>> Function<F> {
        /// It may be called without `unsafe`.
        fn is_safe(&self) -> bool {
            true
        }
    }

    trait Unsafe {
        fn is_safe(&self) -> bool {
            false
        }
    }

    impl<F> Unsafe for &Function<F> {}

    fn safe(_: *mut u8, _: usize) -> Option<(DeviceType, MmioTransport<'static>)> {
        None
    }
    assert!(Function(safe).is_safe());
    assert!(!(&Function(probe_mmio_device)).is_safe());
}

/// D16: offset and length of a capability were added in 32 bits, and memory outside of the BAR was mapped.
#[test]
fn nothing_outside_of_a_bar_is_mapped() {
    for fault in [Fault::OffsetWraps, Fault::OffsetBeyondBar] {
        let hostile = Hostile::new().always(fault);
        let bench = Over::Pci.plug(Device::from(&numbered_disk()).hostile(hostile));
        assert!(bench.find_pci().is_none());
        let mapped = |event: &Event| matches!(event, Event::Mapped { .. });
        assert!(!bench.events().iter().any(mapped));
        bench.assert_rules_kept();
    }
    for (offset, length) in [
        (0xffff_f000, 0x2000),
        (0xffff_ffff, 1),
        (0x3fff, 2),
        (1, u32::MAX),
    ] {
        for index in 0..3 {
            let bench = Over::Pci.plug(numbered_disk());
            drop(bench.find_pci());
            let mut capabilities = Capability::honest();
            capabilities[index].offset = offset;
            capabilities[index].length = length;
            let function = FakeFunction::new(bench.registers(), &capabilities);
            let (mut root, _) = FakeRoot::new(function);
            let transport =
                axdriver_virtio::PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
            assert!(transport.is_err());
            bench.assert_rules_kept();
        }
    }
}

/// D17: a reserved BAR number led to a write into the header of the configuration space.
#[test]
fn a_reserved_bar_number_is_not_calculated_with() {
    for bar in 6..=u8::MAX {
        let mut capabilities = Capability::honest();
        for capability in &mut capabilities {
            capability.bar = bar;
        }
        let (mut root, fake) = FakeRoot::new(FakeFunction::new(0x1000_0000, &capabilities));
        let before = fake.space();
        let transport =
            axdriver_virtio::PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION);
        assert!(transport.is_err());
        assert_eq!(fake.space(), before);
        let beside = |(register, _): &(u8, u32)| !matches!(register, 0x04 | 0x10..0x28);
        assert!(!fake.writes().iter().any(beside));
    }
}

/// D18: an error after a buffer was given to the device dropped it while the device had it.
#[test]
fn an_error_leaves_no_buffer_with_the_device() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(Device::from(&nic).answer_later());
        let mut driver = bench.nic::<4>();
        nic.inject(&[1; 60]);
        send(&mut driver).unwrap();
        bench.board.run();
        let received = driver.receive().unwrap();
        for _ in 0..3 {
            send(&mut driver).unwrap();
        }
        // Frames are in flight in both directions when the device fails.
        bench.device().needs_reset();
        assert_eq!(driver.configuration_changed(), Err(DevError::Io));
        assert_eq!(driver.recycle_rx_buffer(received), Err(DevError::BadState));
        assert_eq!(send(&mut driver), Err(DevError::BadState));
        bench.assert_rules_kept();
        driver.reset().unwrap();
        send(&mut driver).unwrap();
        bench.board.run();
        drop(driver);
        bench.assert_clean();
    }
}

/// D19: memory of the framebuffer was freed while the device still read from it.
#[test]
fn a_display_that_fails_halfway_is_reset_before_its_memory_is_freed() {
    for over in Over::ALL {
        for command in 0..6 {
            let hostile = Hostile::new().after(command, Fault::GpuResponseType);
            let device = Device::from(machine::Display::new(16, 8)).hostile(hostile);
            let bench = over.plug(device);
            let started = common::Display::try_new_with(bench.transport(), impatient());
            if let Ok(mut display) = started {
                assert_eq!(display.flush(), Err(DevError::Io));
            }
            bench.assert_clean();
        }
    }
}

/// Lets a device lie once, and expects an error then, a stable error after that, and that a reset mends it.
#[track_caller]
fn assert_lie_is_found(kind: Kind, over: Over, fault: Fault) {
    let world = kind.plug(over);
    let mut driver = world.try_start(impatient()).unwrap();
    world.bench.once(fault);
    let result = world.work(&mut driver);
    assert_eq!(
        result,
        Err(DevError::Io),
        "{fault} of {kind:?} over {over:?}"
    );
    assert_eq!(driver.ask(), Err(DevError::BadState));
    assert_eq!(driver.ask(), Err(DevError::BadState));
    driver.reset().unwrap();
    world.work(&mut driver).unwrap();
    drop(driver);
    world.bench.assert_clean();
}

/// D21: an id beyond the queue was used as an index, which panicked.
#[test]
fn an_id_beyond_the_queue_is_an_error() {
    for (kind, over) in Kind::everywhere() {
        assert_lie_is_found(kind, over, Fault::UsedIdOutOfRange);
    }
}

/// D22: an id was cut off to 16 bits.
#[test]
fn an_id_with_high_bits_is_an_error() {
    for (kind, over) in Kind::everywhere() {
        assert_lie_is_found(kind, over, Fault::UsedIdHighBits);
    }
}

/// D23: an id that was not in flight stayed in the queue for ever, and the driver said that there was work for ever.
#[test]
fn an_id_that_is_not_in_flight_does_not_wedge_the_nic() {
    for over in Over::ALL {
        for fault in [
            Fault::UsedIdWrong,
            Fault::CompleteTwice,
            Fault::UsedIndexJump,
        ] {
            let nic = machine::Nic::new(MAC);
            let bench = over.plug(&nic);
            let mut driver = bench.nic::<8>();
            bench.once(fault);
            nic.inject(&[1; 60]);
            bench.board.run();
            // Frames are kept: what is given back may be what the device speaks of again.
            let outcomes: Vec<_> = (0..4).map(|_| driver.receive()).collect();
            let errors = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
            let errors: Vec<_> = errors.copied().collect();
            assert!(errors.contains(&DevError::Io), "{fault}: {errors:?}");
            assert_eq!(errors.last(), Some(&DevError::BadState), "{fault}");
            drop(outcomes);
            assert!(!driver.can_receive() && !driver.can_transmit());
            driver.reset().unwrap();
            nic.inject(&[2; 60]);
            bench.board.run();
            assert_eq!(driver.receive().unwrap().packet(), [2; 60]);
        }
    }
}

/// D24: each runt took a receive buffer away, until none was left.
#[test]
fn runts_use_up_no_receive_buffer() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<4>();
        bench.misbehave(Hostile::new().always(Fault::FrameRunt));
        for _ in 0..40 {
            nic.inject(&[1; 60]);
            bench.board.run();
            assert_eq!(driver.receive().err(), Some(DevError::Io));
        }
        bench.behave();
        for _ in 0..20 {
            nic.inject(&[2; 60]);
            bench.board.run();
            let buf = driver.receive().unwrap();
            assert_eq!(buf.packet(), [2; 60]);
            driver.recycle_rx_buffer(buf).unwrap();
        }
    }
}

/// D25: each request for too large a buffer took one away.
#[test]
fn oversized_requests_do_not_use_up_buffers() {
    let bench = Over::Modern.plug(machine::Nic::new(MAC));
    let mut driver = bench.nic::<4>();
    for _ in 0..100 {
        for size in [0, 1515, 4096, 1 << 20, usize::MAX] {
            let refused = driver.alloc_tx_buffer(size).map(drop);
            assert_eq!(refused, Err(DevError::InvalidParam));
        }
    }
    let held: Vec<_> = (0..4)
        .map(|_| driver.alloc_tx_buffer(1514).unwrap())
        .collect();
    drop(held);
    send(&mut driver).unwrap();
}

/// D26: each error in transmitting took a buffer away.
#[test]
fn errors_in_transmit_do_not_use_up_buffers() {
    let bench = Over::Modern.plug(Device::from(machine::Nic::new(MAC)).answer_later());
    let mut driver = bench.nic::<4>();
    for _ in 0..4 {
        send(&mut driver).unwrap();
    }
    for _ in 0..100 {
        // There is no room, or no buffer because there is no room.
        let refused = send(&mut driver);
        assert!(matches!(refused, Err(DevError::Again | DevError::NoMemory)));
    }
    bench.board.run();
    for _ in 0..4 {
        send(&mut driver).unwrap();
    }
    bench.device().needs_reset();
    driver.configuration_changed().unwrap_err();
    for _ in 0..100 {
        assert_eq!(send(&mut driver), Err(DevError::BadState));
    }
    driver.reset().unwrap();
    for _ in 0..4 {
        send(&mut driver).unwrap();
    }
}

/// D27: an error of the display, or none that is enabled, was a panic at the start.
#[test]
fn a_display_that_cannot_be_started_is_an_error() {
    for over in Over::ALL {
        for (fault, error) in [
            (Fault::GpuResponseType, DevError::Io),
            (Fault::DisplayEmpty, DevError::Unsupported),
            (Fault::QueueSize(0), DevError::Unsupported),
        ] {
            let hostile = Hostile::new().always(fault);
            let device = Device::from(machine::Display::new(16, 8)).hostile(hostile);
            let bench = over.plug(device);
            let started = common::Display::try_new_with(bench.transport(), impatient());
            assert_eq!(started.err(), Some(error), "{fault}");
            bench.assert_clean();
        }
        let bench = over.plug(machine::Display::new(0, 0));
        let started = common::Display::try_new(bench.transport());
        assert_eq!(started.err(), Some(DevError::Unsupported));
        bench.assert_clean();
    }
}

/// D28: the size of the framebuffer overflowed 32 bits, and it was smaller than the driver said.
#[test]
fn a_display_whose_bytes_overflow_is_refused() {
    for over in Over::ALL {
        let hostile = Hostile::new().always(Fault::DisplayHuge);
        let bench = over.plug(Device::from(machine::Display::new(16, 8)).hostile(hostile));
        let started = common::Display::try_new(bench.transport());
        assert_eq!(started.err(), Some(DevError::Unsupported));
        bench.assert_clean();
    }
    for (width, height) in [(u32::MAX, 1), (1, u32::MAX), (65536, 16384), (16385, 1)] {
        let bench = Over::Modern.plug(machine::Display::new(width, height));
        let started = common::Display::try_new(bench.transport());
        assert_eq!(
            started.err(),
            Some(DevError::Unsupported),
            "{width} x {height}"
        );
    }
    // What could be, but for want of memory.
    let bench = Over::Modern.plug(machine::Display::new(16384, 16384));
    let started = common::Display::try_new(bench.transport());
    assert_eq!(started.err(), Some(DevError::NoMemory));
    bench.assert_clean();
}

/// D29: the size was asked for again after the framebuffer was made, and could be another.
#[test]
fn a_display_is_as_large_as_its_framebuffer_whatever_it_says_later() {
    for over in Over::ALL {
        let display = machine::Display::new(16, 8);
        let hostile = Hostile::new().times(u32::MAX, 1, Fault::DisplayHuge);
        let bench = over.plug(Device::from(&display).hostile(hostile));
        let mut driver = bench.display();
        let check = |driver: &mut common::Display| {
            let info = driver.info();
            assert_eq!((info.width, info.height, info.fb_size), (16, 8, 16 * 8 * 4));
            assert_eq!(driver.fb().as_bytes().len(), info.fb_size);
        };
        check(&mut driver);
        display.resize(20, 10);
        assert_eq!(driver.configuration_changed(), Err(DevError::Unsupported));
        check(&mut driver);
        driver.flush().unwrap();
        assert_eq!(driver.reset(), Err(DevError::Unsupported));
        check(&mut driver);
    }
}

/// D30: a completion in which nothing was written was taken for the response before.
#[test]
fn the_response_before_is_not_taken_for_a_response() {
    for over in Over::SINCE_1 {
        for fault in [Fault::GpuResponseShort, Fault::UsedLenZero] {
            for command in 0..4 {
                let hostile = Hostile::new().after(command, fault);
                let device = Device::from(machine::Display::new(16, 8)).hostile(hostile);
                let bench = over.plug(device);
                let started = common::Display::try_new_with(bench.transport(), impatient());
                assert_eq!(
                    started.err(),
                    Some(DevError::Io),
                    "{fault} of command {command}"
                );
                bench.assert_clean();
            }
        }
    }
}

/// D31: an empty or ragged buffer was a panic.
#[test]
fn empty_and_ragged_buffers_are_refused() {
    for over in Over::ALL {
        let bench = over.plug(numbered_disk());
        let mut disk = bench.disk();
        for len in [0, 1, 100, 511, 513, 1023] {
            let mut buffer = vec![0; len];
            assert_eq!(disk.read_block(0, &mut buffer), Err(DevError::InvalidParam));
            assert_eq!(disk.write_block(0, &buffer), Err(DevError::InvalidParam));
        }
        bench.assert_rules_kept();
    }
}

/// D32: waits for the device had no end.
#[test]
fn every_wait_ends() {
    for (kind, over) in Kind::everywhere() {
        for fault in [
            Fault::CompleteNever,
            Fault::ConfigRestless,
            Fault::ResetIgnored,
        ] {
            let world = kind.plug(over);
            let mut driver = world.try_start(impatient()).unwrap();
            world.bench.misbehave(Hostile::new().always(fault));
            let _ = world.work(&mut driver);
            let _ = driver.configuration_changed();
            let _ = driver.reset();
            world.bench.behave();
            driver.reset().unwrap();
            world.work(&mut driver).unwrap();
            drop(driver);
            world.bench.assert_rules_kept();
        }
    }
}

/// D32: a device that is gone reads as all ones, for which the drop of a PCI transport waited for ever.
#[test]
fn a_driver_whose_device_is_gone_can_be_dropped() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.try_start(impatient()).unwrap();
        world.bench.device().vanish();
        assert!(world.work(&mut driver).is_err());
        assert!(driver.reset().is_err());
        drop(driver);
    }
}

/// D33: a list of capabilities that loops was followed for ever.
#[test]
fn a_list_of_capabilities_that_loops_has_an_end() {
    for fault in [Fault::CapabilityLoop, Fault::CapabilityOffEnd] {
        let hostile = Hostile::new().always(fault);
        let world = Kind::Disk.plug_as(Over::Pci, |device| device.hostile(hostile));
        // What is in the list before it goes wrong is right.
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        drop(driver);
        world.bench.assert_clean();
    }
}

/// D34: the place of the doorbell was read again at each notification, and a place that does not exist was a panic.
#[test]
fn the_place_of_a_doorbell_is_read_once_and_checked() {
    let world = Kind::Disk.plug(Over::Pci);
    let mut driver = world.start();
    let bar = world.bench.registers();
    let tap = world.bench.tap(|_| None);
    world
        .bench
        .misbehave(Hostile::new().always(Fault::NotifyOffsetOutOfRange));
    driver.ask().unwrap();
    let accesses = tap.take();
    assert!(
        !accesses.iter().any(|access| access.reads(bar + 0x1e)),
        "{accesses:x?}"
    );
    drop(tap);
    assert_eq!(driver.reset(), Err(DevError::Unsupported));
    world.bench.behave();
    driver.reset().unwrap();
    world.work(&mut driver).unwrap();
}

/// D35, P-2: memory was allocated for each request.
#[test]
fn no_memory_for_devices_is_allocated_for_a_request() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        let before = world.bench.board.memory().counters().allocations;
        world.bench.board.memory().set_page_limit(Some(0));
        for _ in 0..10 {
            world.work(&mut driver).unwrap();
        }
        let after = world.bench.board.memory().counters().allocations;
        assert_eq!(after, before, "{kind:?} over {over:?}");
    }
}

/// D36: ids and lengths of the device were used as indices, which panicked.
#[test]
fn lengths_of_the_device_are_not_used_as_indices() {
    for over in Over::SINCE_1 {
        for kind in Kind::ALL {
            assert_lie_is_found(kind, over, Fault::UsedLenLong);
        }
    }
}

/// A HAL that does not take memory back.
struct Grudging;

// SAFETY: all of it is `MachineHal`'s, which frees what it is given; only the answer is another.
unsafe impl VirtIoHal for Grudging {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        MachineHal::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller's promise.
        let _ = unsafe { MachineHal::dma_dealloc(paddr, vaddr, pages) };
        -1
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: the caller's promise.
        unsafe { MachineHal::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        // SAFETY: the caller's promise.
        unsafe { MachineHal::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        // SAFETY: the caller's promise.
        unsafe { MachineHal::unshare(paddr, buffer, direction) }
    }
}

/// D37: memory that the HAL did not take back was a panic in a drop.
#[test]
fn memory_that_the_hal_does_not_take_back_is_no_panic() {
    for over in Over::ALL {
        let bench = over.plug(numbered_disk());
        drop(VirtIoBlkDev::<Grudging, _>::try_new(bench.transport()).unwrap());
        let bench = over.plug(machine::Nic::new(MAC));
        drop(VirtIoNetDev::<Grudging, _, 4>::try_new(bench.transport()).unwrap());
        let bench = over.plug(machine::Display::new(16, 8));
        drop(VirtIoGpuDev::<Grudging, _>::try_new(bench.transport()).unwrap());
        assert!(
            common::logged()
                .iter()
                .any(|message| message.text.contains("did not take back"))
        );
    }
}

/// D38: probing reset the devices that it had no driver for, while others used them.
#[test]
fn probing_leaves_a_device_that_is_in_use_as_it_is() {
    for over in [Over::Modern, Over::Legacy] {
        let bench = over.plug(Entropy::default());
        let slot = bench.board.mmio_slots()[0];
        // Its own driver has started it.
        let mut owner = slot.transport().unwrap();
        let statuses: &[u32] = if over == Over::Legacy {
            &[1, 3, 7]
        } else {
            &[1, 3, 0xb, 0xf]
        };
        for &status in statuses {
            use virtio_drivers::transport::DeviceStatus;
            owner.set_status(DeviceStatus::from_bits_retain(status));
        }
        let before = bench.device().status();
        let writes = bench.device().counters().writes;
        // SAFETY: the slot of this board.
        assert!(unsafe { probe_mmio_device(slot.pointer(), slot.size) }.is_none());
        assert_eq!(bench.device().status(), before);
        assert_eq!(bench.device().counters().writes, writes);
        std::mem::forget(owner);
    }
    // Nor is one reset that was found and not driven.
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let driver = world.start();
        let status = world.bench.device().status();
        drop(world.bench.transport());
        assert_eq!(
            world.bench.device().status(),
            status,
            "{kind:?} over {over:?}"
        );
        drop(driver);
    }
}

/// D39: a device that refused the features was driven, and waited for, for ever.
#[test]
fn a_device_that_refuses_the_features_is_an_error() {
    for (kind, over) in Kind::everywhere_since_1() {
        let hostile = Hostile::new().always(Fault::FeaturesRefused);
        let world = kind.plug_as(over, |device| device.hostile(hostile));
        let started = world.try_start(impatient());
        assert_eq!(started.err(), Some(DevError::Unsupported));
        assert!(!world.bench.events().iter().any(is_queue_enabled));
        world.bench.assert_clean();
    }
}

/// D40: a reset was not waited for, ACKNOWLEDGE and DRIVER were one step, and FAILED was never set.
#[test]
fn a_start_waits_for_the_reset_and_goes_step_by_step() {
    for (kind, over) in Kind::everywhere() {
        let hostile = Hostile::new().always(Fault::ResetSlow);
        let world = kind.plug_as(over, |device| device.hostile(hostile));
        let _driver = world.start();
        let events = world.bench.events();
        let done = first(&events, "status 0", is_status_read(0));
        assert!(done < first(&events, "ACKNOWLEDGE", common::is_status_write(1)));
        assert_eq!(world.bench.statuses()[..3], [0, 1, 3]);
        world.bench.assert_rules_kept();
    }
}

/// D41: addresses of 64 bits were written in one access.
#[test]
fn no_register_is_accessed_with_64_bits() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let tap = world.bench.tap(|_| None);
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
        drop(driver);
        assert!(tap.take().iter().all(|access| access.width <= 4));
    }
}

/// D42: the address of a NIC was read with 32 and 16 bits.
#[test]
fn the_address_of_a_nic_is_read_byte_by_byte() {
    for over in Over::ALL {
        let bench = over.plug(machine::Nic::new(MAC));
        assert_eq!(bench.nic::<8>().mac_address(), EthernetAddress(MAC));
        let widths = |event: Event| match event {
            Event::ConfigRead { offset, width, .. } if offset < 6 => Some(width),
            _ => None,
        };
        let widths: Vec<u8> = bench.events().into_iter().filter_map(widths).collect();
        assert!(widths.len() >= 6 && widths.iter().all(|width| *width == 1));
    }
}

/// D43: fields that the device did not offer were read, and a short configuration space was refused.
#[test]
fn a_nic_without_address_and_status_works() {
    for over in Over::ALL {
        let nic = machine::Nic::new(MAC).without_mac().without_status();
        let bench =
            over.plug(Device::from(&nic).hostile(Hostile::new().always(Fault::ConfigShort)));
        let mut driver = bench.nic::<8>();
        assert_ne!(driver.mac_address(), EthernetAddress([0; 6]));
        send(&mut driver).unwrap();
        assert_eq!(nic.take_sent().len(), 1);
        bench.assert_rules_kept();
    }
}

/// D44: undefined bits of the interrupt status were acknowledged.
#[test]
fn undefined_causes_of_an_interrupt_are_not_acknowledged() {
    let world = Kind::Disk.plug(Over::Modern);
    let mut driver = world.start();
    let base = world.bench.registers();
    let tap = world
        .bench
        .tap(move |access| access.reads(base + 0x60).then_some(0xffff_ffff));
    driver.acknowledge().unwrap();
    let accesses = tap.take();
    let ack = accesses
        .iter()
        .find(|access| access.writes(base + 0x64))
        .unwrap();
    assert_eq!(ack.value, 3);
    drop(tap);
    world.bench.assert_rules_kept();
}

/// D45: the device id was read before the version was known.
#[test]
fn the_version_is_read_before_the_device_id() {
    let bench = Over::Modern.plug(numbered_disk());
    let base = bench.registers();
    let tap = bench.tap(|_| None);
    drop(bench.transport());
    let offsets: Vec<u64> = tap
        .take()
        .iter()
        .map(|access| access.address - base)
        .collect();
    assert_eq!(offsets[..3], [0, 4, 8]);
    bench.assert_rules_kept();
}

/// D46: ACCESS_PLATFORM and ORDER_PLATFORM were not accepted.
#[test]
fn the_features_of_the_platform_are_accepted() {
    let platform = features::ACCESS_PLATFORM | features::ORDER_PLATFORM;
    for (kind, over) in Kind::everywhere_since_1() {
        let world = kind.plug_as(over, |device| device.offer(platform));
        let mut driver = world.start();
        assert_eq!(
            world.bench.device().accepted_features() & platform,
            platform
        );
        world.work(&mut driver).unwrap();
        world.bench.assert_rules_kept();
    }
}

/// D47: requests beyond the capacity and writes to a read-only disk went to the device.
#[test]
fn the_device_is_not_asked_for_what_it_cannot_do() {
    for over in Over::ALL {
        let disk = numbered_disk().read_only();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        assert!(driver.capabilities().read_only);
        let beyond = driver.read_block(64, &mut [0; 512]);
        assert_eq!(beyond, Err(DevError::InvalidParam));
        assert_eq!(driver.write_block(0, &[0; 512]), Err(DevError::Unsupported));
        assert_eq!((disk.counters().reads, disk.counters().writes), (0, 0));
        bench.assert_rules_kept();
    }
}

/// D48: a device that offers a smaller queue was refused.
#[test]
fn a_small_queue_is_enough() {
    for (kind, over) in Kind::everywhere() {
        for size in [4, 5, 8] {
            let world = kind.plug_as(over, |device| device.queue_size(size));
            let mut driver = world.start();
            world.work(&mut driver).unwrap();
            drop(driver);
            world.bench.assert_clean();
        }
    }
    for size in [1, 2, 3] {
        let world = Kind::Nic.plug_as(Over::Pci, |device| device.queue_size(size));
        let mut driver = world.start();
        world.work(&mut driver).unwrap();
    }
}

/// D49: the first capability of each type was taken, usable or not.
#[test]
fn a_capability_that_cannot_be_used_is_passed_over() {
    let bench = Over::Pci.plug(numbered_disk());
    drop(bench.find_pci());
    let mut capabilities = Capability::honest();
    for capability in Capability::honest() {
        capabilities.insert(
            0,
            Capability {
                bar: 0,
                ..capability
            },
        );
    }
    let mut function = FakeFunction::new(bench.registers(), &capabilities);
    // BAR 0 is of I/O ports.
    function.masks[0] = 0xffff_ff80;
    function.put(0x10, 0x6001);
    let (mut root, _) = FakeRoot::new(function);
    let transport =
        axdriver_virtio::PciTransport::new::<MachineHal, _>(&mut root, FakeRoot::FUNCTION).unwrap();
    let mut block = [0; 512];
    let mut disk = Disk::try_new(transport.into()).unwrap();
    disk.read_block(3, &mut block).unwrap();
    assert_eq!(block, [3; 512]);
}

/// D51: a display that changed its size was not noticed.
#[test]
fn a_display_that_changes_its_size_is_noticed() {
    for over in Over::ALL {
        let display = machine::Display::new(16, 8);
        let bench = over.plug(&display);
        let mut driver = bench.display();
        display.resize(32, 16);
        assert_eq!(driver.configuration_changed(), Ok(true));
        driver.reset().unwrap();
        assert_eq!((driver.info().width, driver.info().height), (32, 16));
        bench.assert_rules_kept();
    }
}

/// D52: no driver looked at changes of the configuration.
#[test]
fn a_disk_that_grows_and_a_link_that_falls_are_noticed() {
    for over in Over::ALL {
        let disk = numbered_disk();
        let bench = over.plug(&disk);
        let mut driver = bench.disk();
        disk.resize(2 * DISK_SIZE);
        assert_eq!(
            driver.acknowledge_interrupt(),
            Ok(InterruptCause::CONFIGURATION)
        );
        assert_eq!(driver.num_blocks(), 128);

        let nic = machine::Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<8>();
        nic.set_link(false);
        assert_eq!(
            driver.acknowledge_interrupt(),
            Ok(InterruptCause::CONFIGURATION)
        );
        assert_eq!(driver.capabilities().link, Some(false));
    }
}

/// D53: an error that never goes away was reported as one that does, and errors of probing were not reported at all.
#[test]
fn errors_say_whether_it_is_worth_to_try_again() {
    for over in Over::ALL {
        for status in [3, 255] {
            let bench = over.plug(numbered_disk());
            let mut disk = bench.disk();
            bench.once(Fault::BlockStatus(status));
            assert_eq!(disk.read_block(0, &mut [0; 512]), Err(DevError::Io));
            // It was this request's fault; the next is another.
            disk.read_block(0, &mut [0; 512]).unwrap();
        }
    }
    assert_eq!(as_dev_err(virtio_drivers::Error::IoError), DevError::Io);
    // A device that cannot be used is not silently no device.
    let hostile = Hostile::new().always(Fault::BarReserved(6));
    let bench = Over::Pci.plug(Device::from(&numbered_disk()).hostile(hostile));
    common::logged();
    assert!(bench.find_pci().is_none());
    let said = common::logged();
    assert!(
        said.iter().any(|message| message.level <= log::Level::Warn),
        "{said:?}"
    );
}

/// D55: the interrupt could be neither acknowledged nor asked for.
#[test]
fn the_line_of_a_device_falls_when_its_interrupt_is_acknowledged() {
    for (kind, over) in Kind::everywhere() {
        let world = kind.plug(over);
        let mut driver = world.start();
        driver.base().enable_interrupts().unwrap();
        world.work(&mut driver).unwrap();
        let line = match over {
            Over::Pci => world.bench.board.pci_functions()[0].line,
            _ => world.bench.board.mmio_slots()[0].line,
        };
        assert!(world.bench.board.interrupt_pending(line));
        assert_eq!(driver.acknowledge(), Ok(InterruptCause::USED_BUFFERS));
        assert!(!world.bench.board.interrupt_pending(line));
    }
}

/// D57: a queue that was dropped with requests in flight kept their memory lent.
#[test]
fn buffers_in_flight_are_taken_back_at_the_end() {
    for over in Over::ALL {
        let bench = over.plug(Device::from(machine::Nic::new(MAC)).answer_later());
        let mut nic = bench.nic::<16>();
        for _ in 0..10 {
            send(&mut nic).unwrap();
        }
        assert!(bench.board.memory().counters().shares_live >= 26);
        drop(nic);
        bench.assert_clean();
    }
}

/// D59: addresses for BARs were calculated without looking at overflow.
#[test]
fn addresses_for_bars_do_not_wrap() {
    let mut window = PciRangeAllocator::new(u64::MAX - 0xffff, u64::MAX);
    assert_eq!(window.alloc(0x8000), Some(u64::MAX - 0xffff));
    assert_eq!(window.alloc(0x8000), None, "its end has no address");
    assert_eq!(window.alloc(0x4000), Some(u64::MAX - 0x7fff));
    assert_eq!(window.alloc(1 << 63), None);
    let mut window = PciRangeAllocator::new(0, u64::MAX);
    assert_eq!(window.alloc(1 << 63), Some(0));
    assert_eq!(window.alloc(1 << 63), None);
}

/// P-3: a notification over PCI was three register accesses.
#[test]
fn a_notification_is_one_register_access() {
    for (kind, over) in [Kind::Disk, Kind::Nic]
        .into_iter()
        .flat_map(|kind| Over::ALL.map(|over| (kind, over)))
    {
        let world = kind.plug(over);
        let mut driver = world.start();
        let tap = world.bench.tap(|_| None);
        match &mut driver {
            Driver::Disk(disk) => disk.read_block(0, &mut [0; 512]).unwrap(),
            Driver::Nic(nic) => send(nic).unwrap(),
            Driver::Display(display) => display.flush().unwrap(),
        }
        let accesses = tap.take();
        assert_eq!(accesses.len(), 1, "{kind:?} over {over:?}: {accesses:x?}");
        assert!(accesses[0].write);
    }
}

/// P-7: a flush of the display was two waits, with a page each way.
#[test]
fn a_flush_of_the_display_is_one_notification() {
    for over in Over::ALL {
        let bench = over.plug(machine::Display::new(16, 8));
        let mut display = bench.display();
        let before = bench.device().counters().kicks[0];
        display.flush().unwrap();
        assert_eq!(bench.device().counters().kicks[0], before + 1);
    }
}

/// The default of a wait is long enough for a slow disk, and an OS can do better.
#[test]
fn waits_are_as_long_as_the_policy_says() {
    let bench = Over::Modern.plug(Device::from(&numbered_disk()).answer_later());
    let policy = WaitPolicy::new().with_relax(|polls| polls < 10);
    let mut disk = Disk::try_new_with(bench.transport(), policy).unwrap();
    assert_eq!(disk.read_block(0, &mut [0; 512]), Err(DevError::Io));
    let bench: Bench = Over::Modern.plug(Device::from(&numbered_disk()).answer_later());
    let _running = bench.run_while_waiting();
    let mut disk = Disk::try_new_with(bench.transport(), common::running()).unwrap();
    disk.read_block(0, &mut [0; 512]).unwrap();
}
