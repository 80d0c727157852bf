//! What the tests share: an emulated board with one device, a look at every register access, a look at what is in the
//! rings when the doorbell rings, and what is to be true when all is over.

#![allow(
    dead_code,
    unused_imports,
    reason = "each file of tests uses some of this"
)]

mod config_space;
mod log;
mod rings;
mod tap;
mod transport;
#[cfg(all(feature = "block", feature = "net", feature = "gpu"))]
mod world;

use std::cell::RefCell;
use std::rc::Rc;

#[cfg(feature = "block")]
use axdriver_virtio::WaitPolicy;
use axdriver_virtio::{PciRangeAllocator, probe_mmio_device, probe_pci_buses};
use machine::hostile::{Fault, Hostile};
use machine::{Board, Device, DeviceHandle, Event, MachineHal, Version};

pub(crate) use config_space::{Capability, FakeFunction, FakeRoot};
pub(crate) use log::{Logged, logged};
pub(crate) use rings::{Chain, Part, Rings, Tapped};
pub(crate) use tap::{Access, Tap};
pub(crate) use transport::AnyTransport;
#[cfg(all(feature = "block", feature = "net", feature = "gpu"))]
pub(crate) use world::{Driver, Kind, World};

#[cfg(feature = "block")]
pub(crate) type Disk = axdriver_virtio::VirtIoBlkDev<MachineHal, AnyTransport>;
#[cfg(feature = "gpu")]
pub(crate) type Display = axdriver_virtio::VirtIoGpuDev<MachineHal, AnyTransport>;
#[cfg(feature = "net")]
pub(crate) type Nic<const QS: usize = 8> =
    axdriver_virtio::VirtIoNetDev<MachineHal, AnyTransport, QS>;

/// The address of the emulated NICs.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Size of the emulated disks, in bytes.
pub(crate) const DISK_SIZE: usize = 64 * 512;

/// The statuses of a device that is started: ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
pub(crate) const STARTED: [u32; 4] = [0x1, 0x3, 0xb, 0xf];
/// The same of a legacy device, which knows no FEATURES_OK.
pub(crate) const STARTED_LEGACY: [u32; 3] = [0x1, 0x3, 0x7];

/// The transport that a device is behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Over {
    Modern,
    Legacy,
    Pci,
}

impl Over {
    pub(crate) const ALL: [Self; 3] = [Self::Modern, Self::Legacy, Self::Pci];
    /// Those of the specification since 1.0.
    pub(crate) const SINCE_1: [Self; 2] = [Self::Modern, Self::Pci];

    /// Returns a board with this device alone.
    pub(crate) fn plug(self, device: impl Into<Device>) -> Bench {
        log::install();
        let board = Board::emulated().memory(32 << 20);
        let board = match self {
            Self::Modern => board.mmio(Version::Modern, device),
            Self::Legacy => board.mmio_legacy(device),
            Self::Pci => board.pci(device),
        };
        Bench {
            board: Rc::new(board.build().unwrap()),
            over: self,
        }
    }
}

/// An emulated disk of [`DISK_SIZE`] bytes, each block full of the low byte of its number.
pub(crate) fn numbered_disk() -> machine::Disk {
    let disk = machine::Disk::memory(DISK_SIZE);
    for block in 0..DISK_SIZE / 512 {
        disk.fill((block * 512) as u64, &[u8::try_from(block).unwrap(); 512])
            .unwrap();
    }
    disk
}

#[cfg(feature = "block")]
/// A policy whose waits are short, for devices that never answer.
pub(crate) fn impatient() -> WaitPolicy {
    WaitPolicy::new().with_max_polls(100)
}

thread_local! {
    /// The board that [`running`] waits with.
    static RUNNING: RefCell<Option<Rc<Board>>> = const { RefCell::new(None) };
}

#[cfg(feature = "block")]
/// A policy that lets the board of [`Bench::run_while_waiting`] go on between two looks.
pub(crate) fn running() -> WaitPolicy {
    WaitPolicy::new().with_max_polls(100).with_relax(|_| {
        let board = RUNNING.with_borrow(Clone::clone);
        if let Some(board) = board {
            board.run();
        }
        true
    })
}

/// Lets the board go on in waits until it is dropped.
pub(crate) struct RunsWhileWaiting(());

impl Drop for RunsWhileWaiting {
    fn drop(&mut self) {
        RUNNING.with_borrow_mut(|running| *running = None);
    }
}

/// A board with one device.
pub(crate) struct Bench {
    pub(crate) board: Rc<Board>,
    pub(crate) over: Over,
}

impl Bench {
    pub(crate) fn device(&self) -> DeviceHandle {
        self.board.device(0)
    }

    /// Finds the device as an OS does.
    pub(crate) fn transport(&self) -> AnyTransport {
        self.find().expect("the device is found")
    }

    /// Finds the device as an OS does, if it is fit for use.
    pub(crate) fn find(&self) -> Option<AnyTransport> {
        match self.over {
            Over::Modern | Over::Legacy => {
                let slot = self.board.mmio_slots()[0];
                // SAFETY: the slot of this board, whose transport of before is not used any more.
                let found = unsafe { probe_mmio_device(slot.pointer(), slot.size) };
                found.map(|(_, transport)| transport.into())
            }
            Over::Pci => self.find_pci().map(Into::into),
        }
    }

    /// Finds the device on the PCI bus, if it is fit for use.
    pub(crate) fn find_pci(&self) -> Option<axdriver_virtio::PciTransport> {
        let range = self.board.pci_window();
        let mut window = PciRangeAllocator::new(range.start, range.end - range.start);
        let mut root = self.board.pci();
        let found = probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window)).next();
        found.map(|(.., transport)| transport)
    }

    #[cfg(feature = "block")]
    pub(crate) fn disk(&self) -> Disk {
        Disk::try_new(self.transport()).unwrap()
    }

    #[cfg(feature = "net")]
    pub(crate) fn nic<const QS: usize>(&self) -> Nic<QS> {
        Nic::try_new(self.transport()).unwrap()
    }

    #[cfg(feature = "gpu")]
    pub(crate) fn display(&self) -> Display {
        Display::try_new(self.transport()).unwrap()
    }

    /// Lets the board go on in the waits of [`running`].
    pub(crate) fn run_while_waiting(&self) -> RunsWhileWaiting {
        RUNNING.with_borrow_mut(|running| *running = Some(self.board.clone()));
        RunsWhileWaiting(())
    }

    pub(crate) fn misbehave(&self, hostile: Hostile) {
        self.device().misbehave(hostile);
    }

    /// Lets the device misbehave once at the next occasion.
    pub(crate) fn once(&self, fault: Fault) {
        self.misbehave(Hostile::new().once(fault));
    }

    /// Lets the device behave from now on.
    pub(crate) fn behave(&self) {
        self.misbehave(Hostile::new());
    }

    /// Looks at every register access from now on, and changes some; see [`Tap`].
    pub(crate) fn tap(&self, hook: impl FnMut(&Access) -> Option<u64> + Send + 'static) -> Tap {
        Tap::install(&self.board, hook)
    }

    /// Looks into the rings at every doorbell from now on. The device must be behind modern MMIO.
    pub(crate) fn watch_rings(&self) -> Rings {
        assert_eq!(self.over, Over::Modern);
        Rings::install(&self.board)
    }

    /// The address of the first register of the device, or of its BAR.
    pub(crate) fn registers(&self) -> u64 {
        match self.over {
            Over::Modern | Over::Legacy => self.board.mmio_slots()[0].base as u64,
            Over::Pci => self.board.pci_window().start,
        }
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        let records = self.board.events();
        records.into_iter().map(|record| record.event).collect()
    }

    /// The statuses that the driver has written, with 0 for resets.
    pub(crate) fn statuses(&self) -> Vec<u32> {
        let status = |event| match event {
            Event::StatusWrite { value, .. } => Some(value),
            Event::Reset { .. } => Some(0),
            _ => None,
        };
        self.events().into_iter().filter_map(status).collect()
    }

    /// The ids of the rules that the driver has broken, as far as the devices could see.
    pub(crate) fn broken_rules(&self) -> Vec<String> {
        let violations = self.board.violations();
        violations.iter().map(ToString::to_string).collect()
    }

    /// Expects that no rule was broken.
    #[track_caller]
    pub(crate) fn assert_rules_kept(&self) {
        assert_eq!(self.broken_rules(), [""; 0]);
    }

    /// Expects that no memory is with the device any more, and none was written after it was freed.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        let memory = self.board.memory();
        let counters = memory.counters();
        assert_eq!(counters.pages_live, 0, "pages are still allocated");
        assert_eq!(counters.shares_live, 0, "buffers are still shared");
        assert_eq!(counters.bounces_live, 0, "copies are still lent");
        assert_eq!(memory.overwritten_free_pages(), [0; 0]);
    }

    /// Expects both that no rule was broken and that nothing is left.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        self.assert_rules_kept();
        self.assert_nothing_left();
    }
}

/// Where the first event of a kind is.
#[track_caller]
pub(crate) fn first(events: &[Event], what: &str, is: impl Fn(&Event) -> bool) -> usize {
    let found = events.iter().position(is);
    found.unwrap_or_else(|| panic!("no event: {what}"))
}

/// Where the last event of a kind is.
#[track_caller]
pub(crate) fn last(events: &[Event], what: &str, is: impl Fn(&Event) -> bool) -> usize {
    let found = events.iter().rposition(is);
    found.unwrap_or_else(|| panic!("no event: {what}"))
}

pub(crate) fn is_reset(event: &Event) -> bool {
    matches!(event, Event::Reset { .. })
}

pub(crate) fn is_status_write(value: u32) -> impl Fn(&Event) -> bool {
    move |event| matches!(event, Event::StatusWrite { value: written, .. } if *written == value)
}

pub(crate) fn is_status_read(value: u32) -> impl Fn(&Event) -> bool {
    move |event| matches!(event, Event::StatusRead { value: read, .. } if *read == value)
}

pub(crate) fn is_features_write(event: &Event) -> bool {
    matches!(event, Event::FeaturesWrite { .. })
}

pub(crate) fn is_queue_enabled(event: &Event) -> bool {
    matches!(event, Event::QueueEnabled { .. })
}

pub(crate) fn is_kick(event: &Event) -> bool {
    matches!(event, Event::Kick { .. })
}

/// Whether memory left the driver's hands for good or came back from the device.
pub(crate) fn is_release(event: &Event) -> bool {
    matches!(event, Event::PagesFreed { .. } | Event::Unshared { .. })
}
