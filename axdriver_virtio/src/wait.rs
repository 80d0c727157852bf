//! How long a driver waits for its device, and what it does meanwhile.

/// How long a blocking call waits for the device, and what the processor does between two looks.
///
/// A wait is a series of looks at the device's answer. After each look that finds nothing, the
/// driver calls `relax` with the number of looks so far, counted from 1 in each wait. The wait is
/// over, and the device is reset, when `relax` returns `false` or after `max_polls` looks.
///
/// The default spins for 2<sup>27</sup> looks, which is some seconds on today's processors: enough
/// for a slow disk. An OS that has a clock sets a deadline with it, and one that takes interrupts
/// sleeps in `relax` until one arrives:
///
/// ```
/// use axdriver_virtio::WaitPolicy;
/// # mod kernel { pub fn sleep_until_interrupt() -> bool { true } }
///
/// let policy = WaitPolicy::new()
///     .with_max_polls(u64::MAX)
///     .with_relax(|_polls| kernel::sleep_until_interrupt());
/// assert_eq!(policy.max_polls(), u64::MAX);
/// # extern crate machine;
/// ```
///
/// Waiting for a reset reads a register at each look, which is far slower than memory, and ends
/// after at most 2<sup>20</sup> looks.
#[derive(Clone, Copy, Debug)]
pub struct WaitPolicy {
    max_polls: u64,
    relax: fn(u64) -> bool,
}

/// The most looks at the status register in the wait for a reset.
const MAX_RESET_POLLS: u64 = 1 << 20;

impl WaitPolicy {
    /// Returns the default policy: spin for 2<sup>27</sup> looks.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            max_polls: 1 << 27,
            relax: spin,
        }
    }

    /// Sets the number of looks after which a wait is over, at least 1.
    #[must_use]
    pub const fn with_max_polls(mut self, max_polls: u64) -> Self {
        self.max_polls = max_polls;
        self
    }

    /// Sets what is done between two looks; it returns whether to go on waiting.
    ///
    /// It is called on the processor that waits, with the driver borrowed: it must not call the
    /// driver.
    #[must_use]
    pub const fn with_relax(mut self, relax: fn(u64) -> bool) -> Self {
        self.relax = relax;
        self
    }

    /// Returns the number of looks after which a wait is over.
    #[must_use]
    pub const fn max_polls(&self) -> u64 {
        self.max_polls
    }

    /// Looks until `look` finds something, or returns `None` when the wait is over.
    #[cfg(any(feature = "block", feature = "gpu"))]
    pub(crate) fn until<R>(&self, look: impl FnMut(u64) -> Option<R>) -> Option<R> {
        self.until_at_most(self.max_polls, look)
    }

    /// As [`until`](Self::until), for a look that reads a register.
    pub(crate) fn until_reset<R>(&self, look: impl FnMut(u64) -> Option<R>) -> Option<R> {
        self.until_at_most(self.max_polls.min(MAX_RESET_POLLS), look)
    }

    fn until_at_most<R>(
        &self,
        max_polls: u64,
        mut look: impl FnMut(u64) -> Option<R>,
    ) -> Option<R> {
        let mut polls = 1;
        loop {
            if let Some(found) = look(polls) {
                return Some(found);
            }
            if polls >= max_polls || !(self.relax)(polls) {
                return None;
            }
            polls += 1;
        }
    }
}

impl Default for WaitPolicy {
    fn default() -> Self {
        Self::new()
    }
}

fn spin(_polls: u64) -> bool {
    core::hint::spin_loop();
    true
}

#[cfg(all(test, any(feature = "block", feature = "gpu")))]
mod tests {
    use super::WaitPolicy;

    #[test]
    fn a_wait_looks_at_least_once_and_at_most_max_polls_times() {
        for (max_polls, looks) in [(0, 1), (1, 1), (7, 7)] {
            let mut count = 0;
            let policy = WaitPolicy::new().with_max_polls(max_polls);
            let found: Option<()> = policy.until(|_| {
                count += 1;
                None
            });
            assert_eq!((found, count), (None, looks));
        }
    }

    #[test]
    fn a_wait_ends_when_relax_says_so() {
        let policy = WaitPolicy::new().with_relax(|polls| polls < 3);
        let mut last = 0;
        let found: Option<()> = policy.until(|polls| {
            last = polls;
            None
        });
        assert_eq!((found, last), (None, 3));
    }
}
