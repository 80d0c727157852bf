//! Clocks for network stacks: one that is moved by hand, and the host's.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration as RealDuration,
};

use smoltcp::time::{Duration, Instant};

/// Says what time it is, and lets time pass.
pub trait Time {
    /// Returns the time since some fixed moment.
    fn now(&self) -> Instant;

    /// Lets time pass while nothing is to be done: until `until` (for ever, if `None`) or something may have come in.
    fn pass(&mut self, until: Option<Instant>);
}

impl<T: Time + ?Sized> Time for Box<T> {
    fn now(&self) -> Instant {
        (**self).now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        (**self).pass(until);
    }
}

/// A clock that stands still until somebody moves it. Clones show the same time.
///
/// With devices that answer at once, a program that waits on this clock never sleeps, and does the same in each run.
#[derive(Debug, Clone, Default)]
pub struct SimulatedClock {
    /// In microseconds.
    now: Arc<AtomicI64>,
}

impl SimulatedClock {
    /// The clock is not moved further than this at once, so that both ends of a cable get their turn.
    const STEP: Duration = Duration::from_millis(10);

    /// Makes a clock that shows 0.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves the clock to `now`, if that is ahead.
    pub fn set(&self, now: Instant) {
        self.now.fetch_max(now.total_micros(), Ordering::Relaxed);
    }

    /// Moves the clock to `until`, if that is ahead, and a step at most.
    pub fn advance(&self, until: Option<Instant>) {
        let now = self.now();
        let until = until.map_or(now + Self::STEP, |until| {
            until.clamp(now + Duration::from_micros(1), now + Self::STEP)
        });
        self.now.store(until.total_micros(), Ordering::Relaxed);
    }
}

impl Time for SimulatedClock {
    fn now(&self) -> Instant {
        Instant::from_micros(self.now.load(Ordering::Relaxed))
    }

    fn pass(&mut self, until: Option<Instant>) {
        self.advance(until);
    }
}

/// The host's clock, for devices that answer in their own time.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostClock;

impl HostClock {
    /// The longest sleep: something may have come in.
    const NAP: RealDuration = RealDuration::from_micros(200);
}

impl Time for HostClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn pass(&mut self, until: Option<Instant>) {
        let left = until.map_or(Self::NAP, |until| (until - self.now().min(until)).into());
        std::thread::sleep(left.min(Self::NAP));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_clock_goes_forward_in_bounded_steps() {
        let mut clock = SimulatedClock::new();
        let other = clock.clone();
        clock.pass(Some(Instant::from_millis(3)));
        assert_eq!(other.now(), Instant::from_millis(3));
        clock.pass(Some(Instant::from_millis(1)));
        assert!(other.now() > Instant::from_millis(3));
        clock.pass(Some(Instant::from_secs(1000)));
        clock.pass(None);
        assert!(other.now() <= Instant::from_millis(24));
    }
}
