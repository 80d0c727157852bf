//! Which interrupt came, and sleeping until one comes.
//!
//! The handler acknowledges at the device and counts; the driver, which sleeps meanwhile, then
//! looks. Nothing looks at a device because a clock ticked, so a lost interrupt is a request that
//! never ends: the wait is over at a deadline, and the run fails.

use alloc::{collections::BTreeSet, vec::Vec};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use core::time::Duration;

use axdriver_base::InterruptCause;
use axdriver_virtio::InterruptHandle;
use spin::Mutex;

use crate::arch::{Arch, Architecture, TICKS_PER_SECOND};

/// How long a request may take. Then its interrupt, or its device, counts as lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// How long an interrupt may stay behind what it announces.
pub(crate) const GRACE: Duration = Duration::from_millis(300);

/// How many interrupts in a row may be nobody's before their line is masked: for good, or for a
/// second if somebody serves it.
const MAX_STRAY: u32 = 1000;

struct Source {
    line: u32,
    /// `None`: nobody serves it.
    handle: Option<InterruptHandle<'static>>,
    /// How many interrupts were this device's.
    count: u32,
    /// Whether the line is masked, because too many interrupts in a row were nobody's.
    masked: bool,
    /// Whether the device has said that its configuration has changed, and nobody has asked yet.
    changed: bool,
}

/// Locked in the handler, and elsewhere only with interrupts masked.
static SOURCES: Mutex<Vec<Source>> = Mutex::new(Vec::new());

/// The source whose interrupts are waited for. Those of others wake nobody, or they would hide the
/// loss of one.
static WATCHED: AtomicUsize = AtomicUsize::new(usize::MAX);
/// How many interrupts of the watched source there were, and of all that were watched before.
static COUNT: AtomicU32 = AtomicU32::new(0);
/// How many interrupts of devices there were.
static TOTAL: AtomicU32 = AtomicU32::new(0);
/// `COUNT` when a sleeping driver was woken last.
static SEEN: AtomicU32 = AtomicU32::new(0);
/// How many interrupts were nobody's.
static STRAY: AtomicU32 = AtomicU32::new(0);
/// How many of the last interrupts were nobody's.
static IN_A_ROW: AtomicU32 = AtomicU32::new(0);
static TICKS: AtomicU32 = AtomicU32::new(0);

/// Runs `operation` with interrupts masked.
fn masked<R>(operation: impl FnOnce() -> R) -> R {
    let unmasked = Arch::mask_interrupts();
    let result = operation();
    if unmasked {
        Arch::unmask_interrupts();
    }
    result
}

/// Serves the interrupts of a device from now on. Returns the number to ask [`count_of`] with.
pub(crate) fn add_source(line: u32, handle: Option<InterruptHandle<'static>>) -> usize {
    masked(|| {
        let mut sources = SOURCES.lock();
        sources.push(Source {
            line,
            handle,
            count: 0,
            masked: false,
            changed: false,
        });
        Arch::set_line(line, true);
        sources.len() - 1
    })
}

/// Serves the interrupts of a device no more, which has gone.
pub(crate) fn remove_source(source: usize) {
    masked(|| {
        let mut sources = SOURCES.lock();
        let Some(source) = sources.get_mut(source) else {
            return;
        };
        let line = source.line;
        source.handle = None;
        source.masked = false;
        // The line may be shared.
        if sources
            .iter()
            .all(|source| source.line != line || source.handle.is_none())
        {
            Arch::set_line(line, false);
        }
    });
}

/// Masks all lines for ever, so that every interrupt is lost; for a test.
pub(crate) fn lose_all() {
    masked(|| {
        for source in SOURCES.lock().iter() {
            Arch::set_line(source.line, false);
        }
    });
}

/// Serves an interrupt of a line. Called by the trap entry, with interrupts masked.
pub(crate) fn handle(line: u32) {
    let mut served = false;
    // A line may be shared: everybody on it is asked.
    let mut sources = SOURCES.lock();
    let on_line = sources
        .iter_mut()
        .enumerate()
        .filter(|(_, source)| source.line == line);
    for (index, source) in on_line {
        let Some(handle) = &source.handle else {
            continue;
        };
        let cause = handle.acknowledge();
        if !cause.is_empty() {
            source.count += 1;
            if index == WATCHED.load(Ordering::Relaxed) {
                COUNT.fetch_add(1, Ordering::Relaxed);
            }
            source.changed |= cause.contains(InterruptCause::CONFIGURATION);
            served = true;
        }
    }
    if served {
        TOTAL.fetch_add(1, Ordering::Relaxed);
        IN_A_ROW.store(0, Ordering::Relaxed);
        return;
    }
    STRAY.fetch_add(1, Ordering::Relaxed);
    if IN_A_ROW.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_STRAY {
        // Somebody unknown holds the line. Without this, nothing but this handler would run.
        Arch::set_line(line, false);
        for source in sources.iter_mut().filter(|source| source.line == line) {
            source.masked = source.handle.is_some();
        }
        IN_A_ROW.store(0, Ordering::Relaxed);
        log::warn!("line {line} is masked: {MAX_STRAY} interrupts in a row were nobody's");
    }
}

/// Serves a tick of the clock. Called by the trap entry, with interrupts masked.
pub(crate) fn tick() {
    let ticks = TICKS.fetch_add(1, Ordering::Relaxed) + 1;
    if u64::from(ticks).is_multiple_of(TICKS_PER_SECOND) {
        // What was masked gets another chance, so that a storm that has passed does no harm.
        let mut sources = SOURCES.lock();
        for source in sources.iter_mut().filter(|source| source.masked) {
            source.masked = false;
            Arch::set_line(source.line, true);
        }
    }
}

/// Waits for interrupts of this source from now on.
pub(crate) fn watch(source: usize) {
    WATCHED.store(source, Ordering::Relaxed);
}

/// Returns how many interrupts of devices there were that were waited for.
pub(crate) fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}

/// Sleeps until [`count`] is other than `seen`, or until `deadline`; returns
/// whether there were.
pub(crate) fn sleep_until(seen: u32, deadline: Duration) -> bool {
    loop {
        Arch::mask_interrupts();
        let changed = count() != seen;
        if changed || Arch::now() >= deadline {
            Arch::unmask_interrupts();
            return changed;
        }
        Arch::sleep();
    }
}

/// Sleeps until the watched device has interrupted since the last call, and returns `true`; or `false` if
/// none does in [`PATIENCE`]. Fit for a driver to call between two looks at its queue.
pub(crate) fn sleep_between_looks(_looks: u64) -> bool {
    let seen = SEEN.load(Ordering::Relaxed);
    let interrupted = sleep_until(seen, Arch::now() + PATIENCE);
    SEEN.store(count(), Ordering::Relaxed);
    interrupted
}

/// Returns how many interrupts of a source there were.
pub(crate) fn count_of(source: usize) -> u32 {
    masked(|| SOURCES.lock().get(source).map_or(0, |source| source.count))
}

/// Returns the lines of devices.
pub(crate) fn lines() -> BTreeSet<u32> {
    masked(|| SOURCES.lock().iter().map(|source| source.line).collect())
}

/// Returns whether a line that somebody serves is masked, to get another chance.
pub(crate) fn any_masked() -> bool {
    masked(|| SOURCES.lock().iter().any(|source| source.masked))
}

/// Waits a little for a source to have other than `seen` interrupts, and returns whether it has.
pub(crate) fn comes(source: usize, seen: u32) -> bool {
    let deadline = Arch::now() + GRACE;
    while count_of(source) == seen && Arch::now() < deadline {
        sleep_until(count(), deadline);
    }
    count_of(source) != seen
}

/// Returns whether a source's device has said that its configuration has changed, since the last call.
pub(crate) fn take_changed(source: usize) -> bool {
    masked(|| {
        let mut sources = SOURCES.lock();
        sources
            .get_mut(source)
            .is_some_and(|source| core::mem::take(&mut source.changed))
    })
}

/// Returns how many interrupts of devices there were, how many were nobody's, and how many ticks.
pub(crate) fn totals() -> (u32, u32, u32) {
    (
        TOTAL.load(Ordering::Relaxed),
        STRAY.load(Ordering::Relaxed),
        TICKS.load(Ordering::Relaxed),
    )
}
