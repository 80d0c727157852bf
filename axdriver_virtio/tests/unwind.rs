//! A wait that unwinds leaves nothing with the device.

#![cfg(all(feature = "block", feature = "gpu"))]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
};

use axdriver_base::DevError;
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_virtio::{VirtIoBlkDev, VirtIoGpuDev, WaitPolicy, probe_mmio_device};
use machine::{
    Board, MachineHal,
    emulated::{Device, Disk, Display, Version},
};

fn panicking() -> WaitPolicy {
    WaitPolicy::new().with_relax(|_| std::panic::resume_unwind(Box::new(())))
}

#[test]
fn a_request_whose_wait_unwinds_does_not_reach_the_buffer_later() {
    let disk = Disk::memory(1 << 20);
    let board = Board::emulated()
        .mmio(Version::Modern, Device::from(&disk).answer_later())
        .build()
        .unwrap();
    let slot = &board.mmio_slots()[0];
    // SAFETY: the slot of the board, which nothing else uses.
    let (_, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }.unwrap();
    let mut driver =
        VirtIoBlkDev::<MachineHal, _>::try_new_with(transport, WaitPolicy::new()).unwrap();

    // Memory of the machine is not bounced: the device would write to it directly.
    let mut buffer = board.memory().buffer(512).unwrap();
    buffer.fill(0x77);
    driver.set_wait_policy(panicking());
    let result = catch_unwind(AssertUnwindSafe(|| driver.read_block(0, &mut buffer)));
    assert!(result.is_err());
    board.run();
    assert!(buffer.iter().all(|&byte| byte == 0x77));
    assert_eq!(driver.read_block(0, &mut buffer), Err(DevError::BadState));

    board.device(0).answer_later(false);
    driver.set_wait_policy(WaitPolicy::new());
    driver.reset().unwrap();
    driver.read_block(0, &mut buffer).unwrap();
    assert!(buffer.iter().all(|&byte| byte == 0));
}

#[test]
fn a_display_whose_wait_unwinds_can_be_reset() {
    static LATER: AtomicU64 = AtomicU64::new(0);
    let display = Display::new(64, 48);
    let board = Board::emulated()
        .mmio(Version::Modern, &display)
        .build()
        .unwrap();
    let slot = &board.mmio_slots()[0];
    // SAFETY: the slot of the board, which nothing else uses.
    let (_, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }.unwrap();
    let mut driver = VirtIoGpuDev::<MachineHal, _>::try_new(transport).unwrap();
    board.device(0).answer_later(true);
    driver.set_wait_policy(WaitPolicy::new().with_relax(|looks| {
        LATER.store(looks, Ordering::Relaxed);
        std::panic::resume_unwind(Box::new(()))
    }));
    assert!(catch_unwind(AssertUnwindSafe(|| driver.flush())).is_err());
    assert_eq!(LATER.load(Ordering::Relaxed), 1);
    board.device(0).answer_later(false);
    assert_eq!(driver.flush(), Err(DevError::BadState));
    driver.set_wait_policy(WaitPolicy::new());
    driver.reset().unwrap();
    driver.fb().as_bytes_mut().fill(0x40);
    driver.flush().unwrap();
    assert_eq!(
        display.image().pixel(63, 47).map(|[r, g, b, _]| [r, g, b]),
        Some([0x40; 3])
    );
}
