//! What the fuzz targets do with their bytes, which are always what a device says.
//!
//! * `start_mmio` and `start_pci`: a device whose every register, configuration word, used entry and
//!   response the bytes choose. See [`start`] and [`raw`].
//! * `pci_buses`: buses of functions whose configuration spaces the bytes choose. See [`buses`].
//! * `block`, `net` and `gpu`: the scenarios of the soak test, on emulated devices that misbehave as
//!   the bytes say. See [`block`], [`net`] and [`display`].
//!
//! A run fails if something panics or does not end, if memory is leaked though the device was reset,
//! if the device can write to memory that was given back, or if data is wrong though the driver said
//! `Ok`.

#[path = "../../tests/soak/bench.rs"]
pub mod bench;
#[path = "../../tests/soak/block.rs"]
pub mod block;
pub mod buses;
#[path = "../../tests/soak/choices.rs"]
pub mod choices;
#[path = "../../tests/soak/display.rs"]
pub mod display;
#[path = "../../tests/soak/net.rs"]
pub mod net;
pub mod raw;
pub mod start;

use machine::hostile::Hostile;

use self::{block::Count, choices::Choices};

/// The most steps of a scenario.
const STEPS: usize = 64;

/// Lets a scenario run whose decisions are the first part of `bytes`, and the device's misdeeds the
/// second; the first byte says where the one ends.
pub fn scenario(bytes: &[u8], run: fn(&mut Choices, Hostile, usize) -> Count) {
    let Some((&share, rest)) = bytes.split_first() else {
        return;
    };
    let (decisions, misdeeds) = rest.split_at(rest.len() * usize::from(share) / 256);
    run(
        &mut Choices::bytes(decisions),
        Hostile::bytes(misdeeds),
        STEPS,
    );
}

/// Tells the address sanitizer not to look for leaks: what a device that does not reset may still
/// reach is never freed, on purpose, and each run has an account of its own.
// SAFETY: the sanitizer asks the program for a function of this name and signature.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_default_options() -> *const std::ffi::c_char {
    c"detect_leaks=0".as_ptr()
}
