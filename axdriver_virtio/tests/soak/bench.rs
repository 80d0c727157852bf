//! A board with one hostile device, a driver's transport to it that is watched, and the account of
//! memory at the end.

use std::{
    cell::RefCell,
    ptr::NonNull,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use axdriver_base::DeviceType;
use axdriver_virtio::{
    BufferDirection, MmioTransport, PciRangeAllocator, PciTransport, PhysAddr, Transport,
    VirtIoHal, WaitPolicy, probe_mmio_device, probe_pci_buses,
};
use machine::{
    Board, Device, Event, MachineHal, Memory, Version,
    emulated::features,
    hostile::{Fault, Hostile},
    memory::PAGE_SIZE,
};
use virtio_drivers::{
    Error,
    transport::{DeviceStatus, DeviceType as VirtIoDeviceType, InterruptStatus},
};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::choices::Choices;

/// Faults whose traces in the data a driver cannot see: lengths and ids that might be true.
pub const BELIEVABLE: &[Fault] = &[
    Fault::RegisterGarbage,
    Fault::UsedGarbage,
    Fault::UsedIdWrong,
    Fault::UsedIdRepeated,
    Fault::UsedIdForeign,
    Fault::UsedLenShort,
    Fault::UsedLenZero,
    Fault::UsedIndexBack,
    Fault::UsedIndexJump,
    Fault::CompleteTwice,
    Fault::FrameRunt,
    Fault::NetBuffersWrong,
];

/// A number of looks that lets an emulated device answer, and ends soon where it does not.
const POLLS: u64 = 70;
/// The look after which the board may do what it put off.
const RUN_AT: u64 = 5;

/// Events that are kept, more than one call of a driver brings.
const TRACE: usize = 8192;

thread_local! {
    /// What happens while the driver on this thread waits.
    static MEANWHILE: RefCell<Option<Meanwhile>> = const { RefCell::new(None) };
}

/// What happens while a driver waits.
struct Meanwhile {
    board: Rc<Board>,
    /// Whether the board gets to do what it put off.
    runs: bool,
    rings: Rings,
    /// What is written to the used rings.
    scribbles: Choices,
    /// Once in so many looks something is; 0: never.
    scribbles_one_in: usize,
}

/// The used ring of each queue: its address and its number of entries.
type Rings = Arc<std::sync::Mutex<Vec<Option<(PhysAddr, u32)>>>>;

/// Something else that a device writes to a used ring, whenever it likes.
fn scribble(memory: &Memory, rings: &Rings, choices: &mut Choices) {
    let rings = rings.lock().unwrap();
    if rings.is_empty() {
        return;
    }
    let Some((used, size)) = rings[choices.below(rings.len())] else {
        return;
    };
    let size = u64::from(size);
    let at = match choices.below(4) {
        // The index, an entry, the flags, the event index.
        0 => used + 2,
        1 => used + 4 + u64::from(choices.word()) % (8 * size),
        2 => used,
        _ => used + 4 + 8 * size,
    };
    let value = choices.word();
    let value = if choices.one_in(2) { value } else { value % 8 };
    let _ = memory
        .guest()
        .write_slice(&value.to_le_bytes(), GuestAddress(at));
}

/// What a driver does between two looks.
fn relax(polls: u64) -> bool {
    MEANWHILE.with_borrow_mut(|meanwhile| {
        if let Some(meanwhile) = meanwhile {
            if meanwhile.runs && polls == RUN_AT {
                meanwhile.board.run();
            }
            let one_in = meanwhile.scribbles_one_in;
            if one_in != 0 && !meanwhile.scribbles.is_over() && meanwhile.scribbles.one_in(one_in) {
                scribble(
                    meanwhile.board.memory(),
                    &meanwhile.rings,
                    &mut meanwhile.scribbles,
                );
            }
        }
    });
    true
}

/// What is known of a device's resets from the outside.
#[derive(Debug, Default)]
struct Resets {
    /// A reset was written, and 0 has not been read since.
    pending: AtomicBool,
    /// How many resets were given up.
    abandoned: AtomicU32,
}

enum Either {
    Mmio(Box<MmioTransport<'static>>),
    Pci(Box<PciTransport>),
}

macro_rules! with {
    ($self:expr, $transport:ident => $do:expr) => {
        match $self {
            Either::Mmio($transport) => $do,
            Either::Pci($transport) => $do,
        }
    };
}

/// A transport that notes resets which do not happen, and where used rings are.
pub struct Watched {
    inner: Either,
    resets: Arc<Resets>,
    rings: Rings,
}

impl Transport for Watched {
    fn device_type(&self) -> VirtIoDeviceType {
        with!(&self.inner, t => t.device_type())
    }

    fn read_device_features(&mut self) -> u64 {
        with!(&mut self.inner, t => t.read_device_features())
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        with!(&mut self.inner, t => t.write_driver_features(driver_features));
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        with!(&mut self.inner, t => t.max_queue_size(queue))
    }

    fn notify(&mut self, queue: u16) {
        with!(&mut self.inner, t => t.notify(queue));
    }

    fn get_status(&self) -> DeviceStatus {
        let status = with!(&self.inner, t => t.get_status());
        if status.is_empty() {
            self.resets.pending.store(false, Ordering::Relaxed);
        }
        status
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if self.resets.pending.load(Ordering::Relaxed) {
            // It goes on although the last reset was never seen to end.
            self.resets.abandoned.fetch_add(1, Ordering::Relaxed);
        }
        if status.is_empty() {
            self.resets.pending.store(true, Ordering::Relaxed);
            self.rings.lock().unwrap().clear();
        }
        with!(&mut self.inner, t => t.set_status(status));
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        with!(&mut self.inner, t => t.set_guest_page_size(guest_page_size));
    }

    fn requires_legacy_layout(&self) -> bool {
        with!(&self.inner, t => t.requires_legacy_layout())
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let mut rings = self.rings.lock().unwrap();
        let index = usize::from(queue);
        if rings.len() <= index {
            rings.resize(index + 1, None);
        }
        rings[index] = Some((device_area, size));
        drop(rings);
        with!(&mut self.inner, t => t.queue_set(queue, size, descriptors, driver_area, device_area));
    }

    fn queue_unset(&mut self, queue: u16) {
        with!(&mut self.inner, t => t.queue_unset(queue));
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        with!(&mut self.inner, t => t.queue_used(queue))
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        with!(&mut self.inner, t => t.ack_interrupt())
    }

    fn read_config_generation(&self) -> u32 {
        with!(&self.inner, t => t.read_config_generation())
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        with!(&self.inner, t => t.read_config_space(offset))
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        with!(&mut self.inner, t => t.write_config_space(offset, value))
    }
}

/// A board with one hostile device, and everything that is known about it from the outside.
pub struct Bench {
    board: Rc<Board>,
    kind: DeviceType,
    resets: Arc<Resets>,
    rings: Rings,
    /// Whether used rings are written to for no reason.
    pub scribbles: bool,
    /// How many faults there were at the last look, and which.
    seen: RefCell<(u64, Vec<Fault>)>,
}

impl Bench {
    /// Plugs in a device of type `kind` whose options and place `choices` decide on.
    pub fn new(
        kind: DeviceType,
        device: Device,
        hostile: Hostile,
        memory: usize,
        choices: &mut Choices,
    ) -> Self {
        let mut device = device.hostile(hostile);
        if choices.one_in(3) {
            device = device.withhold(features::RING_EVENT_IDX);
        }
        if choices.one_in(3) {
            device = device.withhold(features::RING_INDIRECT_DESC);
        }
        if choices.one_in(4) {
            device = device.offer(features::ACCESS_PLATFORM | features::ORDER_PLATFORM);
        }
        if choices.one_in(4) {
            device = device.queue_size(1 << choices.below(9));
        }
        let later = choices.one_in(6);
        if later {
            device = device.answer_later();
        }
        let board = Board::emulated().memory(memory);
        let board = match choices.below(3) {
            0 => board.mmio(Version::Modern, device),
            1 => board.mmio_legacy(device),
            _ => board.pci(device),
        };
        let board = Rc::new(board.build().unwrap());
        board.memory().trace().set_limit(TRACE);
        let rings = Rings::default();
        let scribbles = choices.one_in(4);
        let meanwhile = Meanwhile {
            board: board.clone(),
            runs: later || !choices.one_in(3),
            rings: rings.clone(),
            scribbles: match choices {
                Choices::Seed(state) => Choices::Seed(crate::choices::next(state)),
                Choices::Bytes { rest } => Choices::Bytes {
                    rest: rest.split_off(rest.len() / 2),
                },
            },
            scribbles_one_in: if scribbles { 8 } else { 0 },
        };
        MEANWHILE.set(Some(meanwhile));
        Self {
            board,
            kind,
            resets: Arc::default(),
            rings,
            scribbles,
            seen: RefCell::default(),
        }
    }

    /// Returns the board.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Returns a policy whose waits end soon, and let the board do what it put off meanwhile.
    pub fn wait() -> WaitPolicy {
        WaitPolicy::new().with_max_polls(POLLS).with_relax(relax)
    }

    /// Finds the device, unless it hides too well.
    pub fn probe(&self) -> Option<Watched> {
        let slot = self.board.mmio_slots()[0];
        let inner = if slot.device.is_some() {
            // SAFETY: the registers of a slot of the board, which nobody else uses.
            let (kind, transport) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }?;
            (kind == self.kind).then(|| Either::Mmio(Box::new(transport)))
        } else {
            let window = self.board.pci_window();
            let size = window.end - window.start;
            let mut window = PciRangeAllocator::new(window.start, size);
            let mut root = self.board.pci();
            probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window))
                .find(|(_, kind, _)| *kind == self.kind)
                .map(|(_, _, transport)| Either::Pci(Box::new(transport)))
        };
        Some(Watched {
            inner: inner?,
            resets: self.resets.clone(),
            rings: self.rings.clone(),
        })
    }

    /// Lets the device write something else to a used ring, if it is of that kind.
    pub fn scribble(&self, choices: &mut Choices) {
        if self.scribbles && choices.one_in(4) {
            scribble(self.board.memory(), &self.rings, choices);
        }
    }

    /// Returns whether all that the driver believes is true: no lie was told that it cannot see.
    pub fn is_believable(&self) -> bool {
        // What a legacy device says of lengths is not to be relied on (2.7.8.3).
        let is_legacy = self.board.mmio_slots()[0].version == Version::Legacy;
        let lengths = [Fault::FrameOversized, Fault::UsedLenLong];
        let is_lie = self.scribbles
            || self.has_happened(BELIEVABLE)
            || is_legacy && self.has_happened(&lengths);
        !is_lie
    }

    /// Returns whether one of these faults has happened.
    pub fn has_happened(&self, faults: &[Fault]) -> bool {
        let mut seen = self.seen.borrow_mut();
        let count = self.faults();
        if seen.0 != count {
            seen.0 = count;
            for record in self.board.events() {
                if let Event::Fault { fault, .. } = record.event
                    && !seen.1.contains(&fault)
                {
                    seen.1.push(fault);
                }
            }
            self.board.memory().trace().clear();
        }
        faults.iter().any(|fault| seen.1.contains(fault))
    }

    /// Returns how often the device did not reset when it was told to, and may have kept memory.
    pub fn stuck(&self) -> u64 {
        let abandoned = self.resets.abandoned.load(Ordering::Relaxed);
        u64::from(abandoned) + u64::from(self.resets.pending.load(Ordering::Relaxed))
    }

    /// Returns whether the device may have kept memory.
    pub fn may_keep(&self) -> bool {
        self.stuck() > 0
    }

    /// Returns whether so much memory is gone that nothing can be learned any more.
    pub fn is_worn_out(&self) -> bool {
        self.stuck() > 8
    }

    /// Returns how many faults the device committed.
    pub fn faults(&self) -> u64 {
        self.board.device(0).counters().faults
    }

    /// Settles the account of memory when the driver is gone.
    pub fn finish(self) {
        // What the device still wants to do, it does now.
        self.board.run();
        let memory = self.board.memory();
        let counters = memory.counters();
        if !self.may_keep() {
            assert_eq!(
                (
                    counters.pages_live,
                    counters.shares_live,
                    counters.bounces_live
                ),
                (0, 0, 0),
                "pages, buffers or copies were not given back"
            );
        }
        // A device may say that a reset is done which is not, or that it is done with a buffer which
        // it writes to later: nobody can know. A disk has done what it is asked before it says so.
        let may_write = self.has_happened(&[Fault::RegisterGarbage])
            || (self.kind == DeviceType::Net || self.scribbles) && !self.is_believable();
        assert!(
            may_write || memory.overwritten_free_pages().is_empty(),
            "the device wrote to memory that was free"
        );
        let mut broken = self.board.violations();
        broken.retain(|violation| match violation.id {
            "GEN-31" | "PCI-09" => true,
            "GEN-27" => self.is_believable(),
            _ => false,
        });
        assert!(broken.is_empty(), "{broken:#?}\n{:?}", self.seen);
        release(memory);
        MEANWHILE.set(None);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let events = self.board.events();
            for record in events.iter().rev().take(60).rev() {
                eprintln!("{:?}", record.event);
            }
            eprintln!("faults: {:?}", self.seen);
        }
    }
}

/// Gives back what drivers kept for devices that did not reset, so that the memory can go.
pub fn release(memory: &Memory) {
    let counters = memory.counters();
    if (counters.pages_live, counters.bounces_live) == (0, 0) {
        return;
    }
    for page in (0..memory.size()).step_by(PAGE_SIZE) {
        let address = memory.base() + page as u64;
        let nothing = NonNull::slice_from_raw_parts(NonNull::dangling(), 0);
        // SAFETY: copies no byte: the buffer is empty; and the device is gone.
        unsafe { MachineHal::unshare(address, nothing, BufferDirection::DriverToDevice) };
        // SAFETY: the driver and the device are gone, so nobody uses the page. If it is not live,
        // nothing happens.
        unsafe { memory.free(address, 1) };
    }
}
