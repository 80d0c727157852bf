//! A device's life from reset to reset (VirtIO 1.3, 3.1 and 3.3): the order of the status bits,
//! the features, the configuration space, and what is done when any of it goes wrong.

use axdriver_base::{DevError, DevResult};
use log::{debug, error, warn};
#[cfg(any(feature = "block", feature = "gpu"))]
use virtio_drivers::Hal;
use virtio_drivers::{
    Error, PAGE_SIZE,
    transport::{DeviceStatus, Transport},
};

#[cfg(any(feature = "block", feature = "gpu"))]
use crate::queue::{Lie, Used, VirtQueue};
use crate::{WaitPolicy, convert::as_dev_err};

/// A set of feature bits (6 and, for the device types, 5.1.3, 5.2.3 and 5.7.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Features(u64);

impl Features {
    /// Only offered by legacy devices: a chain may be cut into descriptors anywhere.
    pub(crate) const ANY_LAYOUT: Self = Self(1 << 27);
    pub(crate) const RING_INDIRECT_DESC: Self = Self(1 << 28);
    pub(crate) const RING_EVENT_IDX: Self = Self(1 << 29);
    pub(crate) const VERSION_1: Self = Self(1 << 32);
    pub(crate) const ACCESS_PLATFORM: Self = Self(1 << 33);
    pub(crate) const ORDER_PLATFORM: Self = Self(1 << 36);

    /// What the queue and the lifecycle can do for every device type.
    const COMMON: Self = Self::RING_INDIRECT_DESC
        .union(Self::RING_EVENT_IDX)
        .union(Self::ANY_LAYOUT)
        .union(Self::VERSION_1)
        .union(Self::ACCESS_PLATFORM)
        .union(Self::ORDER_PLATFORM);

    pub(crate) const fn empty() -> Self {
        Self(0)
    }

    /// Returns the set of the one feature `bit`.
    #[cfg(any(feature = "block", feature = "net"))]
    pub(crate) const fn bit(bit: u32) -> Self {
        Self(1 << bit)
    }

    pub(crate) const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    #[cfg(feature = "net")]
    pub(crate) const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What the device may do to memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// It has been reset, or never been started: nothing.
    Idle,
    /// It is live, or on its way there: everything that it was told of.
    Live,
    /// It was told to reset and did not: nobody knows.
    Stuck,
}

/// A transport, and where its device is in its life.
pub(crate) struct Lifecycle<T: Transport> {
    transport: T,
    state: State,
    features: Features,
    name: &'static str,
    pub(crate) wait: WaitPolicy,
}

/// Why a device is failed that asks for it.
const NEEDS_RESET: &str = "it says that it needs a reset, or it is gone";

/// The status of a device that has gone: no device sets all of these.
const ALL_ONES: DeviceStatus = DeviceStatus::from_bits_retain(0xff);
/// The looks at such a status after which a device counts as gone.
const GONE_LOOKS: u64 = 16;

/// How often the configuration space is read in the hope that it stays the same meanwhile.
const CONFIG_TRIES: u32 = 32;

impl<T: Transport> Lifecycle<T> {
    pub(crate) fn new(name: &'static str, transport: T, wait: WaitPolicy) -> Self {
        Self {
            transport,
            state: State::Idle,
            features: Features::empty(),
            name,
            wait,
        }
    }

    /// Starts the device over, up to FEATURES_OK (3.1.1, steps 1 to 6). `choose` gets the features
    /// that the device offers and returns those of its device type to accept.
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device did not reset.
    /// * [`DevError::Unsupported`]: the device refused the features.
    ///
    /// The caller [fails](Self::fail) the device on any error.
    pub(crate) fn begin(
        &mut self,
        choose: impl FnOnce(&mut Self, Features) -> DevResult<Features>,
    ) -> DevResult<Features> {
        self.reset()?;
        self.state = State::Live;
        let mut status = DeviceStatus::ACKNOWLEDGE;
        self.transport.set_status(status);
        status |= DeviceStatus::DRIVER;
        self.transport.set_status(status);

        let offered = Features(self.transport.read_device_features());
        let accepted = choose(self, offered)?
            .union(Features::COMMON)
            .intersection(offered);
        debug!(
            "{}: features {:#x} offered, {:#x} accepted",
            self.name, offered.0, accepted.0
        );
        self.transport.write_driver_features(accepted.0);
        if self.is_legacy() {
            // 4.2.4: before any queue is used.
            #[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
            self.transport.set_guest_page_size(PAGE_SIZE as u32);
        } else {
            status |= DeviceStatus::FEATURES_OK;
            self.transport.set_status(status);
            if !self.transport.get_status().contains(status) {
                error!(
                    "{}: the device refuses features {:#x}",
                    self.name, accepted.0
                );
                return Err(DevError::Unsupported);
            }
            if !accepted.contains(Features::VERSION_1) {
                warn!(
                    "{}: the device does not offer VIRTIO_F_VERSION_1",
                    self.name
                );
            }
        }
        self.features = accepted;
        Ok(accepted)
    }

    /// Takes the device live (3.1.1, step 8). From here on it may be notified.
    ///
    /// # Errors
    ///
    /// [`DevError::Io`]: the device needs a reset already.
    pub(crate) fn go_live(&mut self) -> DevResult {
        let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::DRIVER_OK;
        if !self.is_legacy() {
            status |= DeviceStatus::FEATURES_OK;
        }
        self.transport.set_status(status);
        if self.needs_reset() {
            error!(
                "{}: the device needs a reset before its first request",
                self.name
            );
            return Err(DevError::Io);
        }
        Ok(())
    }

    /// Gives up on a device that is [live](Self::begin): FAILED, then reset (2.1.1, 3.1.1).
    pub(crate) fn fail(&mut self, why: &str) {
        error!("{}: {why}; the device is reset", self.name);
        if self.state == State::Live {
            // Of a device that is gone, all bits are read as ones.
            let status = self.transport.get_status() & DeviceStatus::all();
            self.transport.set_status(status | DeviceStatus::FAILED);
            // The failure is in the log, with the step that failed, and in `state`.
            let _ = self.reset();
        }
    }

    /// Resets the device, and waits until it says so (2.4.2).
    ///
    /// # Errors
    ///
    /// [`DevError::Io`]: it does not. What it was told of may not be freed or reused.
    pub(crate) fn reset(&mut self) -> DevResult {
        self.transport.set_status(DeviceStatus::empty());
        let transport = &self.transport;
        // A device that has gone reads as all ones, and will not come back within the wait.
        let reset = self.wait.until_reset(|looks| {
            let status = transport.get_status();
            if status.is_empty() {
                return Some(true);
            }
            (looks >= GONE_LOOKS && status.contains(ALL_ONES)).then_some(false)
        });
        match reset {
            Some(true) => {
                self.state = State::Idle;
                Ok(())
            }
            Some(false) | None => {
                error!(
                    "{}: the device does not reset; its memory is kept",
                    self.name
                );
                // A device that was never started was told of nothing.
                if self.state == State::Live {
                    self.state = State::Stuck;
                }
                Err(DevError::Io)
            }
        }
    }

    /// Resets a device that is live, for good.
    ///
    /// # Errors
    ///
    /// [`DevError::Io`]: it does not reset. What it was told of must be kept for ever.
    pub(crate) fn stop(&mut self) -> DevResult {
        match self.state {
            State::Idle => Ok(()),
            State::Live => self.reset(),
            State::Stuck => Err(DevError::Io),
        }
    }

    /// Returns the transport of a device that is live.
    ///
    /// # Errors
    ///
    /// [`DevError::BadState`]: it failed, and was not started anew since.
    pub(crate) fn live(&mut self) -> DevResult<&mut T> {
        match self.state {
            State::Live => Ok(&mut self.transport),
            State::Idle | State::Stuck => Err(DevError::BadState),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Returns whether the device may still use memory that it was told of, though it was told to
    /// reset.
    #[cfg(any(feature = "block", feature = "net"))]
    pub(crate) fn is_stuck(&self) -> bool {
        self.state == State::Stuck
    }

    /// Returns the transport, whatever the state.
    pub(crate) fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    pub(crate) fn is_legacy(&self) -> bool {
        self.transport.requires_legacy_layout()
    }

    #[cfg(any(feature = "block", feature = "net"))]
    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Returns whether the device says that it needs a reset (2.1.2), or has gone: all ones.
    pub(crate) fn needs_reset(&self) -> bool {
        self.transport
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    }

    /// Waits until the device has used a chain of `queue`.
    ///
    /// # Errors
    ///
    /// [`DevError::Io`]: it lied, needs a reset, or did not answer in time. It has been reset, or
    /// is [stuck](Self::is_stuck). So it has, or is, if the wait unwinds.
    #[cfg(any(feature = "block", feature = "gpu"))]
    pub(crate) fn complete<H: Hal, const N: usize>(
        &mut self,
        queue: &mut VirtQueue<H, N>,
    ) -> DevResult<Used> {
        /// Fails the device when dropped: the caller's memory must not be left with it.
        struct Unwinding<'a, T: Transport>(&'a mut Lifecycle<T>);

        impl<T: Transport> Drop for Unwinding<'_, T> {
            fn drop(&mut self) {
                self.0.fail("the wait for it was unwound");
            }
        }

        let guard = Unwinding(self);
        let wait = guard.0.wait;
        let used = wait.until(|looks| match queue.pop() {
            Ok(Some(used)) => Some(Ok(used)),
            // Who sleeps until an interrupt looks seldom, and each time for a reason.
            Ok(None) => guard.0.check_sometimes(looks, queue.is_listening()),
            Err(Lie) => Some(Err("its queue is broken")),
        });
        core::mem::forget(guard);
        match used {
            Some(Ok(used)) => return Ok(used),
            Some(Err(why)) => self.fail(why),
            None => self.fail("it has not answered in time"),
        }
        Err(DevError::Io)
    }

    /// Looks after the device at some of the looks of a wait, and says why it must be failed.
    ///
    /// Reading the status is slow, so it is done at looks 64, 128, 256 and so on, or `often`: at
    /// all but the first.
    fn check_sometimes<R>(&self, looks: u64, often: bool) -> Option<Result<R, &'static str>> {
        let due = (looks >= 64 && looks.is_power_of_two()) || (often && looks > 1);
        (due && self.needs_reset()).then_some(Err(NEEDS_RESET))
    }

    /// Looks after a device in which the `looks`th look in a row found nothing to do.
    ///
    /// # Errors
    ///
    /// [`DevError::Io`]: it needed a reset.
    #[cfg(feature = "net")]
    pub(crate) fn check_idle(&mut self, looks: u64) -> DevResult {
        match self.check_sometimes::<()>(looks, false) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(why)) => {
                self.fail(why);
                Err(DevError::Io)
            }
        }
    }

    /// Fails the device when it needs a reset.
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: it needed a reset.
    /// * [`DevError::BadState`]: it failed before.
    pub(crate) fn check(&mut self) -> DevResult {
        self.live()?;
        if self.needs_reset() {
            self.fail(NEEDS_RESET);
            return Err(DevError::Io);
        }
        Ok(())
    }

    /// Reads something from the configuration space, such that it did not change meanwhile
    /// (2.5.1).
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: it never stays the same.
    /// * [`DevError::BadState`]: the space is too small, or missing.
    pub(crate) fn read_config<R: PartialEq>(
        &self,
        read: impl Fn(&T) -> Result<R, Error>,
    ) -> DevResult<R> {
        if self.is_legacy() {
            // There is no generation: what is read twice is taken for true.
            let mut last = read(&self.transport).map_err(as_dev_err)?;
            for _ in 0..CONFIG_TRIES {
                let value = read(&self.transport).map_err(as_dev_err)?;
                if value == last {
                    return Ok(value);
                }
                last = value;
            }
        } else {
            for _ in 0..CONFIG_TRIES {
                let before = self.transport.read_config_generation();
                let value = read(&self.transport).map_err(as_dev_err)?;
                if self.transport.read_config_generation() == before {
                    return Ok(value);
                }
            }
        }
        error!("{}: the configuration space does not settle", self.name);
        Err(DevError::Io)
    }
}
