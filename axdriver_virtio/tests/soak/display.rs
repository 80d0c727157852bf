//! A hostile display: what is drawn is what is shown.

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};
use axdriver_display::DisplayDriverOps;
use axdriver_virtio::VirtIoGpuDev;
use machine::{Device, Display, MachineHal, hostile::Hostile};

use crate::{
    bench::{Bench, Watched},
    block::Count,
    choices::Choices,
};

const MEMORY: usize = 1 << 20;

type Driver = VirtIoGpuDev<MachineHal, Watched>;

fn step(
    bench: &Bench,
    display: &Display,
    driver: &mut Driver,
    choices: &mut Choices,
    count: &mut Count,
) -> DevResult {
    bench.scribble(choices);
    match choices.below(8) {
        0 => {
            bench.board().run();
            Ok(())
        }
        1 => driver.acknowledge_interrupt().map(drop),
        2 => driver.enable_interrupts().map(drop),
        3 => driver.disable_interrupts(),
        4 => {
            display.resize(choices.byte().into(), choices.byte().into());
            driver.configuration_changed().map(drop)
        }
        5 => driver.reset(),
        _ => {
            let colour = choices.byte();
            let info = driver.info();
            assert_eq!(info.fb_size, info.width as usize * info.height as usize * 4);
            let mut frame = driver.fb();
            assert_eq!(frame.as_bytes().len(), info.fb_size);
            frame.as_bytes_mut().fill(colour);
            count.done += 1;
            let flushes = display.flushes();
            driver.flush()?;
            count.good += 1;
            if bench.is_believable() {
                assert!(display.flushes() > flushes, "no flush, but Ok");
                let image = display.image();
                // A display that was resized shows as much of the old picture as there is.
                if (image.width, image.height) == (info.width, info.height) {
                    let is_colour = |pixel: &[u8]| pixel[..3] == [colour; 3];
                    assert!(image.rgba.chunks_exact(4).all(is_colour), "another picture");
                }
            }
            assert!(driver.fb().as_bytes().iter().all(|&byte| byte == colour));
            Ok(())
        }
    }
}

/// Drives a hostile display as `choices` say, for at most `steps` steps.
pub fn run(choices: &mut Choices, hostile: Hostile, steps: usize) -> Count {
    let display = Display::new(
        1 + u32::from(choices.byte()) % 100,
        1 + u32::from(choices.byte()) % 100,
    );
    let bench = Bench::new(
        DeviceType::Display,
        Device::from(&display),
        hostile,
        MEMORY,
        choices,
    );
    let mut count = Count::default();
    let driver = bench
        .probe()
        .and_then(|transport| Driver::try_new_with(transport, Bench::wait()).ok());
    if let Some(mut driver) = driver {
        for _ in 0..steps {
            if choices.is_over() || bench.is_worn_out() {
                break;
            }
            let result = step(&bench, &display, &mut driver, choices, &mut count);
            if result == Err(DevError::BadState) {
                count.resets += 1;
                if driver.reset().is_err() && driver.reset().is_err() {
                    break;
                }
            }
        }
    }
    count.faults = bench.faults();
    count.stuck = bench.stuck();
    bench.finish();
    count
}
