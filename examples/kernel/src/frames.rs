//! Which frames of physical memory are free.
//!
//! Frames for pages come from the upper half of memory, each far from the one before, so that what
//! is contiguous to the processor never is to a device. Runs of frames, which a device is given as
//! one piece, come from the lower half.

use core::ops::Range;

use spin::Mutex;

use crate::arch::{Arch, PageTables};

/// The size of a frame of memory, which is that of a page, in bytes.
pub(crate) const FRAME: usize = 1 << Arch::PAGE_BITS;

/// The most frames that are put to use: at least 1 GiB.
const MAX_FRAMES: usize = 1 << 18;

/// How far from one page's frame to the next one's, in frames: odd, so that steps of it modulo a
/// power of two visit them all; a prime far above the ones used, so that other counts work too.
const STRIDE: usize = 7919;

static FRAMES: Mutex<Frames> = Mutex::new(Frames {
    base: 0,
    count: 0,
    used: [0; MAX_FRAMES / 64],
    next: 0,
    free: 0,
});

struct Frames {
    /// The physical address of the first frame.
    base: u64,
    /// The number of frames, at most `MAX_FRAMES`.
    count: usize,
    /// One bit for each frame that is not free.
    used: [u64; MAX_FRAMES / 64],
    /// Where the next search for a page begins, below `count - count / 2`.
    next: usize,
    /// The number of bits in `used`, below `count`, that are 0.
    free: usize,
}

impl Frames {
    fn is_used(&self, frame: usize) -> bool {
        self.used[frame / 64] & (1 << (frame % 64)) != 0
    }

    fn set_used(&mut self, frames: Range<usize>, used: bool) {
        for frame in frames {
            let bit = 1 << (frame % 64);
            if self.is_used(frame) == used {
                continue;
            }
            if used {
                self.used[frame / 64] |= bit;
                self.free -= 1;
            } else {
                self.used[frame / 64] &= !bit;
                self.free += 1;
            }
        }
    }

    fn address(&self, frame: usize) -> u64 {
        self.base + (frame * FRAME) as u64
    }

    fn index(&self, address: u64) -> usize {
        usize::try_from(address.saturating_sub(self.base))
            .map_or(usize::MAX, |offset| offset / FRAME)
            .min(self.count)
    }

    fn allocate_page(&mut self) -> Option<u64> {
        let lower = self.count / 2;
        let upper = self.count - lower;
        for _ in 0..upper {
            let frame = lower + self.next;
            self.next = (self.next + STRIDE) % upper;
            if !self.is_used(frame) {
                self.set_used(frame..frame + 1, true);
                return Some(self.address(frame));
            }
        }
        // The stride may share a factor with the count and so leave frames out.
        let frame = (lower..self.count).find(|&frame| !self.is_used(frame))?;
        self.set_used(frame..frame + 1, true);
        Some(self.address(frame))
    }

    fn allocate_run(&mut self, count: usize) -> Option<u64> {
        let mut length = 0;
        for frame in 0..self.count / 2 {
            length = if self.is_used(frame) { 0 } else { length + 1 };
            if length == count {
                let first = frame + 1 - count;
                self.set_used(first..first + count, true);
                return Some(self.address(first));
            }
        }
        None
    }
}

/// Puts `memory` to use, except for `reserved`, up to the most that can be kept track of.
pub(crate) fn add_memory(memory: Range<u64>, reserved: &[Range<u64>]) {
    let size = FRAME as u64;
    let mut frames = FRAMES.lock();
    let first = memory.start.div_ceil(size);
    let count = (memory.end / size).saturating_sub(first);
    frames.base = first * size;
    frames.count = usize::try_from(count).unwrap_or(MAX_FRAMES).min(MAX_FRAMES);
    frames.free = frames.count;
    for range in reserved {
        let first = frames.index(range.start);
        let end = frames.index(range.end.saturating_add(size - 1));
        frames.set_used(first..end, true);
    }
}

/// Takes a frame for a page, far from the last one. What it holds is unspecified.
pub(crate) fn allocate_page() -> Option<u64> {
    FRAMES.lock().allocate_page()
}

/// Takes `count` frames in one piece. What they hold is unspecified.
pub(crate) fn allocate_run(count: usize) -> Option<u64> {
    FRAMES.lock().allocate_run(count)
}

/// Gives `count` frames from `address` on back, which nothing may use any more.
pub(crate) fn free(address: u64, count: usize) {
    let mut frames = FRAMES.lock();
    let first = frames.index(address);
    let end = first.saturating_add(count).min(frames.count);
    frames.set_used(first..end, false);
}

/// Returns how many frames are free.
pub(crate) fn free_count() -> usize {
    FRAMES.lock().free
}
