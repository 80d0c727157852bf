//! The contract of [`DisplayDriverOps`] as code: every rule is a function, and [`check`] checks them all.
//!
//! Rules that draw put the old contents of the framebuffer back, also when the rule is broken. The screen may flicker.
//!
//! ```
//! use axdriver_display::{conformance, memory::MemoryDisplay};
//!
//! let mut display = MemoryDisplay::new(320, 200)?;
//! conformance::check(&mut display)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use axdriver_base::conformance::{Verdict, Violation};
use axdriver_base::{
    DeviceType,
    conformance::{self as base, ensure, ensure_ok},
};

use crate::{DisplayDriverOps, canvas::Geometry};

/// Checks all rules.
///
/// # Errors
///
/// * [`Violation`]: the first rule that the driver breaks.
pub fn check<D: DisplayDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    base::check(dev, DeviceType::Display)?;
    the_framebuffer_holds_all_pixels(dev)?;
    the_framebuffer_keeps_what_is_written(dev)?;
    flushing_succeeds_and_changes_nothing(dev)
}

/// A display has pixels, and its framebuffer, which is where and as large as the driver says, holds them all.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn the_framebuffer_holds_all_pixels<D: DisplayDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let info = dev.info();
    ensure(
        info.width > 0 && info.height > 0,
        "a display has at least one pixel",
    )?;
    let geometry = ensure_ok(
        Geometry::new(info.width, info.height, &dev.capabilities()),
        "a row is not longer than the stride, and all rows fit into the address space",
    )?;
    ensure(
        geometry.used_len() <= info.fb_size,
        "the framebuffer holds all pixels",
    )?;
    let fb = dev.fb();
    ensure(
        fb.as_bytes().len() == info.fb_size,
        "the framebuffer is as large as the driver says",
    )?;
    ensure(
        fb.as_bytes().as_ptr().addr() == info.fb_base_vaddr,
        "the framebuffer is where the driver says",
    )
}

/// The framebuffer is memory: what is written into it is there the next time, every byte for itself.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn the_framebuffer_keeps_what_is_written<D: DisplayDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const RULE: &str = "the framebuffer keeps what is written";
    // The old contents are not kept elsewhere, but mixed with a mask and mixed with it again.
    let before = digest(dev.fb().as_bytes().iter().copied());
    let expected = digest(masked(dev.fb().as_bytes()));
    mask(dev.fb().as_bytes_mut());
    let found = digest(dev.fb().as_bytes().iter().copied());
    mask(dev.fb().as_bytes_mut());
    let restored = digest(dev.fb().as_bytes().iter().copied());
    ensure(found == expected && restored == before, RULE)
}

/// A flush succeeds, whether it is needed or not, and changes neither the framebuffer nor where it is.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn flushing_succeeds_and_changes_nothing<D: DisplayDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    mask(dev.fb().as_bytes_mut());
    let verdict = flush_once(dev);
    mask(dev.fb().as_bytes_mut());
    // What has been put back is to be seen again.
    verdict.and(flush_once(dev))
}

/// Flushes, and looks whether that has changed anything.
fn flush_once<D: DisplayDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let (info, capabilities) = (dev.info(), dev.capabilities());
    let before = digest(dev.fb().as_bytes().iter().copied());
    ensure_ok(dev.flush(), "a flush succeeds")?;
    let after = digest(dev.fb().as_bytes().iter().copied());
    ensure(before == after, "a flush does not change the framebuffer")?;
    ensure(
        dev.info() == info && dev.capabilities() == capabilities,
        "a flush does not change what the driver says of the display",
    )
}

/// Returns the bytes of an endless mask, none of which is 0, and which does not repeat within a framebuffer.
fn mask_bytes() -> impl Iterator<Item = u8> {
    // A step of Knuth's linear congruential generator for each byte.
    let mut state = 1_u64;
    core::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let [byte, ..] = state.to_be_bytes();
        byte | 1
    })
}

/// Returns `bytes` mixed with the mask.
fn masked(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes
        .iter()
        .zip(mask_bytes())
        .map(|(byte, mask)| byte ^ mask)
}

/// Mixes `bytes` with the mask. Doing it twice does nothing.
fn mask(bytes: &mut [u8]) {
    for (byte, mask) in bytes.iter_mut().zip(mask_bytes()) {
        *byte ^= mask;
    }
}

/// Returns a number that differs between different bytes, but for rare accidents: the 64-bit FNV-1a hash.
fn digest(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(all(test, feature = "memory"))]
mod tests {
    use std::string::{String, ToString};

    use axdriver_base::{BaseDriverOps, DevError, DevResult};

    use super::*;
    use crate::{DisplayCapabilities, DisplayInfo, FrameBuffer, memory::MemoryDisplay};

    /// A way to break the contract.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        HasNoPixels,
        ClaimsMorePixels,
        HasTooShortAStride,
        LendsLess,
        LiesAboutTheAddress,
        ForgetsBetweenCalls,
        FailsToFlush,
        FlushesByClearing,
        ChangesSizeOnFlush,
    }

    /// A display in memory with a fault.
    struct Faulty {
        display: MemoryDisplay,
        fault: Fault,
        flushed: bool,
    }

    impl BaseDriverOps for Faulty {
        fn device_name(&self) -> &str {
            "faulty"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Display
        }
    }

    impl DisplayDriverOps for Faulty {
        fn info(&self) -> DisplayInfo {
            let mut info = self.display.info();
            match self.fault {
                Fault::HasNoPixels => info.height = 0,
                Fault::ClaimsMorePixels => info.height += 1,
                Fault::LiesAboutTheAddress => info.fb_base_vaddr += 4,
                Fault::ChangesSizeOnFlush if self.flushed => info.width -= 1,
                _ => {}
            }
            info
        }

        fn fb(&mut self) -> FrameBuffer<'_> {
            let fb = self.display.fb();
            match self.fault {
                Fault::LendsLess => FrameBuffer::from_slice(&mut fb.into_bytes()[1..]),
                Fault::ForgetsBetweenCalls => {
                    let bytes = fb.into_bytes();
                    bytes[7] = 0;
                    FrameBuffer::from_slice(bytes)
                }
                _ => fb,
            }
        }

        fn need_flush(&self) -> bool {
            self.display.need_flush()
        }

        fn flush(&mut self) -> DevResult {
            self.flushed = true;
            match self.fault {
                Fault::FailsToFlush => Err(DevError::Io),
                Fault::FlushesByClearing => {
                    self.display.fb().as_bytes_mut().fill(0);
                    Ok(())
                }
                _ => self.display.flush(),
            }
        }

        fn capabilities(&self) -> DisplayCapabilities {
            match self.fault {
                Fault::HasTooShortAStride => DisplayCapabilities::new().with_stride(Some(1)),
                _ => self.display.capabilities(),
            }
        }
    }

    fn rule_broken_by(fault: Fault) -> Option<String> {
        let verdict = check(&mut Faulty {
            display: MemoryDisplay::new(20, 10).ok()?,
            fault,
            flushed: false,
        });
        verdict.err().map(|violation| violation.to_string())
    }

    #[test]
    fn a_display_in_memory_conforms_and_keeps_its_contents() {
        for (width, height) in [(1, 1), (3, 2), (320, 200)] {
            let padded = DisplayCapabilities::new().with_stride(Some(1300));
            let mut display = MemoryDisplay::with_capabilities(width, height, padded).unwrap();
            display.fb().as_bytes_mut().fill(7);
            assert_eq!(check(&mut display), Ok(()));
            assert_eq!(check::<dyn DisplayDriverOps>(&mut display), Ok(()));
            assert!(display.fb().as_bytes().iter().all(|byte| *byte == 7));
            assert!(display.screen().iter().all(|byte| *byte == 7));
        }
        assert_eq!(rule_broken_by(Fault::None), None);
    }

    #[test]
    fn every_fault_is_found_and_named() {
        let faults = [
            (Fault::HasNoPixels, "a display has at least one pixel"),
            (Fault::ClaimsMorePixels, "the framebuffer holds all pixels"),
            (
                Fault::HasTooShortAStride,
                "a row is not longer than the stride",
            ),
            (
                Fault::LendsLess,
                "the framebuffer is as large as the driver says",
            ),
            (
                Fault::LiesAboutTheAddress,
                "the framebuffer is where the driver says",
            ),
            (
                Fault::ForgetsBetweenCalls,
                "the framebuffer keeps what is written",
            ),
            (Fault::FailsToFlush, "a flush succeeds"),
            (
                Fault::FlushesByClearing,
                "a flush does not change the framebuffer",
            ),
            (
                Fault::ChangesSizeOnFlush,
                "a flush does not change what the driver says",
            ),
        ];
        for (fault, rule) in faults {
            let found = rule_broken_by(fault).unwrap_or_default();
            assert!(found.starts_with(rule), "{fault:?} broke: {found}");
        }
    }
}
