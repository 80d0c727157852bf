//! VirtIO 1.3, 5.7: GPU devices. Each test is a row of `CONFORMANCE.md`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{BaseDriverOps, DevError, InterruptCause};
use axdriver_display::DisplayDriverOps;
use common::{Chain, Over, impatient};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Display, Event};

/// Types of commands (5.7.6.7).
const CREATE_2D: u32 = 0x101;
const SET_SCANOUT: u32 = 0x103;
const FLUSH: u32 = 0x104;
const TRANSFER: u32 = 0x105;
const ATTACH: u32 = 0x106;

fn word(chain: &Chain, index: usize) -> u32 {
    let bytes = chain.readable();
    u32::from_le_bytes(bytes[index * 4..index * 4 + 4].try_into().unwrap())
}

/// The commands of a start and a flush.
fn commands() -> Vec<Chain> {
    let bench = Over::Modern.plug(Display::new(20, 10));
    let rings = bench.watch_rings();
    bench.display().flush().unwrap();
    bench.assert_rules_kept();
    rings.take()
}

/// Where the one command of a type is.
fn position(commands: &[Chain], kind: u32) -> usize {
    let found = commands.iter().position(|chain| word(chain, 0) == kind);
    found.expect("the command is sent")
}

#[test]
fn gpu_01_only_events_clear_is_written() {
    for over in Over::ALL {
        let display = Display::new(20, 10);
        let bench = over.plug(&display);
        let mut driver = bench.display();
        display.resize(30, 20);
        driver.acknowledge_interrupt().unwrap();
        let written = |event: &Event| match event {
            Event::ConfigWrite { offset, value, .. } => Some((*offset, *value)),
            _ => None,
        };
        let events = bench.events();
        let writes: Vec<_> = events.iter().filter_map(written).collect();
        assert_eq!(writes, [(4, 1)], "events_clear, EVENT_DISPLAY");
        bench.assert_rules_kept();
    }
}

#[test]
fn gpu_02_a_changed_display_is_noticed_asked_and_adopted_by_a_reset() {
    for over in Over::ALL {
        let display = Display::new(20, 10);
        let bench = over.plug(&display);
        let mut driver = bench.display();
        assert_eq!(driver.configuration_changed(), Ok(false));
        display.resize(30, 20);
        assert!(bench.device().interrupt_pending());
        assert_eq!(driver.configuration_changed(), Ok(true));
        assert_eq!(
            driver.configuration_changed(),
            Ok(false),
            "the event is cleared"
        );
        // Until it is reset, the old framebuffer goes on.
        assert_eq!((driver.info().width, driver.info().height), (20, 10));
        driver.flush().unwrap();
        driver.reset().unwrap();
        assert_eq!((driver.info().width, driver.info().height), (30, 20));
        driver.fb().as_bytes_mut().fill(0x99);
        driver.flush().unwrap();
        assert_eq!(display.image().pixel(29, 19), Some([0x99, 0x99, 0x99, 255]));
        assert_eq!(display.image().width, 30);
        let cause = driver.acknowledge_interrupt();
        assert_eq!(
            cause,
            Ok(InterruptCause::empty()),
            "the reset took the interrupt away"
        );
        drop(driver);
        bench.assert_clean();
    }
}

#[test]
fn gpu_03_memory_is_attached_before_it_is_transferred_and_freed_after_the_reset() {
    let commands = commands();
    let (create, attach) = (position(&commands, CREATE_2D), position(&commands, ATTACH));
    assert!(create < attach && attach < position(&commands, TRANSFER));
    for over in Over::ALL {
        let bench = over.plug(Display::new(20, 10));
        let mut driver = bench.display();
        driver.flush().unwrap();
        drop(driver);
        bench.assert_clean();
    }
}

#[test]
fn gpu_03_memory_of_a_start_that_fails_is_freed_after_the_reset() {
    for over in Over::ALL {
        for command in 0..4 {
            let hostile = Hostile::new().after(command, Fault::GpuResponseType);
            let bench = over.plug(Device::from(Display::new(20, 10)).hostile(hostile));
            let started = common::Display::try_new_with(bench.transport(), impatient());
            assert_eq!(started.err(), Some(DevError::Io), "command {command}");
            bench.assert_clean();
        }
    }
}

#[test]
fn gpu_07_the_scanout_is_the_whole_resource() {
    let commands = commands();
    let create = &commands[position(&commands, CREATE_2D)];
    let scanout = &commands[position(&commands, SET_SCANOUT)];
    let (width, height) = (word(create, 8), word(create, 9));
    assert_eq!((width, height), (20, 10));
    let rectangle = [6, 7, 8, 9].map(|index| word(scanout, index));
    assert_eq!(rectangle, [0, 0, width, height]);
    assert_eq!(word(scanout, 11), word(create, 6), "of the same resource");
    let flush = &commands[position(&commands, FLUSH)];
    assert_eq!([6, 7, 8, 9].map(|index| word(flush, index)), rectangle);
}

#[test]
fn gpu_08_the_format_is_one_of_the_specification() {
    let commands = commands();
    let format = word(&commands[position(&commands, CREATE_2D)], 7);
    assert!([1, 2, 3, 4, 67, 68, 121, 134].contains(&format));
    // It is what the driver says of its pixels: blue, green, red, unused.
    let display = Display::new(4, 4);
    let bench = Over::Modern.plug(&display);
    let mut driver = bench.display();
    driver.fb().as_bytes_mut()[..4].copy_from_slice(&[0x10, 0x20, 0x30, 0]);
    driver.flush().unwrap();
    assert_eq!(display.image().pixel(0, 0), Some([0x30, 0x20, 0x10, 255]));
    assert_eq!(
        driver.capabilities().format,
        axdriver_display::PixelFormat::Bgrx8888
    );
}

#[test]
fn gpu_11_a_response_is_believed_as_far_as_it_was_written_and_of_the_right_type() {
    for over in Over::ALL {
        for fault in [
            Fault::GpuResponseShort,
            Fault::GpuResponseType,
            Fault::UsedLenZero,
        ] {
            if over == Over::Legacy && fault == Fault::UsedLenZero {
                // 2.7.8.2: a legacy device's length is not to be relied on.
                continue;
            }
            let bench = over.plug(Display::new(20, 10));
            let mut driver = bench.display();
            driver.flush().unwrap();
            bench.once(fault);
            let flushed = driver.flush();
            if over == Over::Legacy && fault == Fault::GpuResponseShort {
                // The type is all that it says, and that is right.
                assert_eq!(flushed, Ok(()));
            } else {
                assert_eq!(flushed, Err(DevError::Io), "{fault} over {over:?}");
            }
            driver.reset().unwrap();
            driver.flush().unwrap();
            bench.assert_rules_kept();
        }
    }
}

#[test]
fn gpu_11_the_response_of_before_is_not_taken_for_the_next() {
    // The device completes without having written anything.
    let bench = Over::Modern.plug(Device::from(Display::new(20, 10)).answer_later());
    let _running = bench.run_while_waiting();
    let mut driver = common::Display::try_new_with(bench.transport(), common::running()).unwrap();
    driver.flush().unwrap();
    let rings = bench.watch_rings();
    drop(rings);
    bench.misbehave(Hostile::new().always(Fault::GpuResponseShort));
    assert_eq!(driver.flush(), Err(DevError::Io));
}
