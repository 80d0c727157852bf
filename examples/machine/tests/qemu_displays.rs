//! Displays of QEMU's whose heads change their size or are switched on, as a display front end tells them to.
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

use axdriver_base::{DevError, InterruptCause};
use axdriver_display::DisplayDriverOps;
use axdriver_virtio::{
    MmioTransport, PciRangeAllocator, PciTransport, Transport, VirtIoGpuDev, probe_mmio_device,
    probe_pci_buses,
};
use machine::MachineHal;
use machine::qemu::{Bus, Display, QemuBoard, QemuMachine, QemuOptions};
use support::{BUSES, LONG, draw, drawn, patiently, skip};

const VIRT: QemuMachine = QemuMachine::Aarch64Virt;

/// Leaves the test, with a line that says so, where QEMU is missing.
macro_rules! need {
    ($machine:expr) => {
        if let Some(why) = QemuBoard::missing($machine) {
            skip(&why);
            return;
        }
    };
}

type Driver<T> = VirtIoGpuDev<MachineHal, T>;

/// Starts the driver of the only display, in the first slot.
fn on_mmio(board: &QemuBoard) -> Driver<MmioTransport<'static>> {
    let slot = board.mmio_slots()[0];
    // SAFETY: the registers are those of the board, and nobody else uses the slot.
    let (_, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }.unwrap();
    Driver::try_new_with(transport, patiently()).unwrap()
}

/// Starts the driver of the only display, on PCI.
fn on_pci(board: &QemuBoard) -> Driver<PciTransport> {
    let window = board.pci_window();
    let mut window = PciRangeAllocator::new(window.start, window.end - window.start);
    let mut root = board.pci();
    let mut found = probe_pci_buses::<MachineHal, _>(&mut root, BUSES, Some(&mut window));
    let (.., transport) = found.next().unwrap();
    Driver::try_new_with(transport, patiently()).unwrap()
}

fn show(display: &mut dyn DisplayDriverOps, shade: u32) {
    draw(display, shade);
    display.flush().unwrap();
}

fn cause(display: &mut dyn DisplayDriverOps) -> InterruptCause {
    display.acknowledge_interrupt().unwrap()
}

fn a_head_is_resized<T: Transport + Send + Sync>(
    board: &mut QemuBoard,
    line: u32,
    mut display: Driver<T>,
) {
    board.intercept_interrupts().unwrap();
    let mut monitor = board.monitor().unwrap();
    show(&mut display, 1);
    assert!(board.image(0, 0).unwrap() == drawn(1, 160, 100));
    let _ = cause(&mut display);
    let (mut width, mut height) = (160, 100);
    for (shade, (new_width, new_height)) in (2..).zip([(333, 77), (64, 480), (160, 100)]) {
        monitor.resize(new_width, new_height).unwrap();
        assert!(board.wait_for_interrupt(line, LONG).unwrap());
        // Either call takes note of it, whichever comes first.
        if shade != 3 {
            assert!(display.configuration_changed().unwrap());
        }
        assert!(cause(&mut display).contains(InterruptCause::CONFIGURATION));
        assert!(!board.interrupt_line(line).unwrap().asserted);
        assert!(!display.configuration_changed().unwrap());

        // The old picture goes on until the driver takes the new size.
        show(&mut display, 100 + shade);
        assert!(board.image(0, 0).unwrap() == drawn(100 + shade, width, height));
        (width, height) = (new_width.into(), new_height.into());
        display.reset().unwrap();
        assert_eq!(
            (display.info().width, display.info().height),
            (width, height)
        );
        show(&mut display, shade);
        assert!(board.image(0, 0).unwrap() == drawn(shade, width, height));
    }

    // A wish for the size that it has is none.
    let _ = cause(&mut display);
    monitor.resize(160, 100).unwrap();
    assert!(!cause(&mut display).contains(InterruptCause::CONFIGURATION));

    // A head that is switched off shows nothing new, and there is no display to start.
    monitor.resize(0, 0).unwrap();
    assert!(cause(&mut display).contains(InterruptCause::CONFIGURATION));
    show(&mut display, 7);
    assert_eq!(display.reset(), Err(DevError::Unsupported));
    assert_eq!(display.flush(), Err(DevError::BadState));
    monitor.resize(80, 60).unwrap();
    display.reset().unwrap();
    show(&mut display, 8);
    assert!(board.image(0, 0).unwrap() == drawn(8, 80, 60));

    drop(display);
    let counters = board.memory().counters();
    assert_eq!((counters.pages_live, counters.shares_live), (0, 0));
}

#[test]
fn a_head_that_is_resized_says_so_and_has_its_new_size_after_a_reset() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let options = QemuOptions::new(VIRT)
            .display(Display::new(160, 100).on(bus))
            .monitor(0, 0);
        let mut board = QemuBoard::start(&options).unwrap();
        if bus == Bus::Mmio {
            let (line, display) = (board.mmio_slots()[0].line, on_mmio(&board));
            a_head_is_resized(&mut board, line, display);
        } else {
            let (line, display) = (board.pci_functions()[0].line, on_pci(&board));
            a_head_is_resized(&mut board, line, display);
        }
    }
}

#[test]
fn a_second_head_that_is_switched_on_leaves_the_first_alone() {
    need!(VIRT);
    for bus in [Bus::Mmio, Bus::Pci] {
        let display = Display::new(64, 48).on(bus).property("max_outputs", "2");
        let options = QemuOptions::new(VIRT).display(display).monitor(0, 1);
        let mut board = QemuBoard::start(&options).unwrap();
        let mut display: Box<dyn DisplayDriverOps> = match bus {
            Bus::Mmio => Box::new(on_mmio(&board)),
            _ => Box::new(on_pci(&board)),
        };
        show(display.as_mut(), 3);
        let _ = cause(display.as_mut());
        let mut monitor = board.monitor().unwrap();
        // What nobody draws on shows a message of QEMU's, in a size of QEMU's, whatever the monitor wants.
        let message = board.image(0, 1).unwrap();
        assert!(message.rgba.iter().any(|&byte| byte != message.rgba[0]));
        for size in [(320, 200), (100, 30), (0, 0)] {
            monitor.resize(size.0, size.1).unwrap();
            assert!(cause(display.as_mut()).contains(InterruptCause::CONFIGURATION));
            assert!(board.image(0, 0).unwrap() == drawn(3, 64, 48));
            show(display.as_mut(), 4);
            assert!(board.image(0, 0).unwrap() == drawn(4, 64, 48));
            show(display.as_mut(), 3);
            assert_eq!(board.image(0, 1).unwrap(), message);
            // The driver keeps to the first head that is on.
            display.flush().unwrap();
        }
    }
}
