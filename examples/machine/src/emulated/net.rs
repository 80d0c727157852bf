//! A network device (5.1) with one pair of queues, and what is at the other end of its cable.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::device::{Device, Field, Model, features as common};
use super::state::State;
use crate::hostile::{Fault, Occasion};

/// Feature bits of network devices (5.1.3).
pub mod features {
    /// The driver may leave checksums to the device.
    pub const CSUM: u64 = 1 << 0;
    /// `mtu` holds.
    pub const MTU: u64 = 1 << 3;
    /// `mac` holds.
    pub const MAC: u64 = 1 << 5;
    /// Received frames may be spread over several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `status` holds.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
}

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// An Ethernet header, in bytes.
const ETHERNET: usize = 14;
/// Frames that wait for the driver, or for the test.
const MOST: usize = 4096;
/// Frames taken from a peer in one go.
const BURST: usize = 256;

const FIELDS: &[Field] = &[
    Field::new(0, 1, features::MAC).array(6),
    Field::new(6, 2, features::STATUS),
    Field::new(8, 2, 1 << 22),
    Field::new(10, 2, features::MTU),
    Field::new(12, 4, 1 << 63),
    Field::new(16, 1, 1 << 63),
];
const CONFIG_LEN: usize = 20;

/// The other end of a network device's cable.
///
/// It is called while the board is busy, so it must touch neither the board's registers nor its memory.
pub trait Peer: Send {
    /// Takes a frame that the driver sent.
    fn receive(&mut self, frame: &[u8]);

    /// Returns a frame for the driver, if there is one. Called after each frame received and in each run of the board.
    fn transmit(&mut self) -> Option<Vec<u8>>;
}

/// What a network device has seen.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct NicCounters {
    /// Frames that the driver sent.
    pub sent: u64,
    /// Frames that the driver was given.
    pub received: u64,
    /// Frames for the driver that were dropped: too large for its buffer, or too many.
    pub dropped: u64,
}

#[derive(Default)]
enum Other {
    /// Frames stay here until the test takes them.
    #[default]
    Nobody,
    Nic(Weak<Mutex<NicState>>),
    Peer(Arc<Mutex<dyn Peer>>),
}

#[derive(Default)]
struct NicState {
    mac: [u8; 6],
    features: u64,
    mtu: u16,
    link: bool,
    changed: bool,
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
    other: Other,
    counters: NicCounters,
}

impl NicState {
    fn push(&mut self, frame: Vec<u8>) {
        if self.inbox.len() < MOST && self.link {
            self.inbox.push_back(frame);
        } else {
            self.counters.dropped += 1;
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A network device. Clones are handles to the same one.
///
/// It offers MAC and STATUS. Without a cable, what the driver sends waits in [`take_sent`](Self::take_sent).
#[derive(Clone)]
pub struct Nic {
    state: Arc<Mutex<NicState>>,
}

impl std::fmt::Debug for Nic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("Nic")
            .field("mac", &state.mac)
            .field("link", &state.link)
            .field("counters", &state.counters)
            .finish_non_exhaustive()
    }
}

impl Nic {
    /// Returns a device with this address, whose link is up.
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            state: Arc::new(Mutex::new(NicState {
                mac,
                features: features::MAC | features::STATUS,
                link: true,
                ..NicState::default()
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, NicState> {
        lock(&self.state)
    }

    /// Does not offer MAC; the driver has to think of an address.
    #[must_use]
    pub fn without_mac(self) -> Self {
        self.lock().features &= !features::MAC;
        self
    }

    /// Does not offer STATUS.
    #[must_use]
    pub fn without_status(self) -> Self {
        self.lock().features &= !features::STATUS;
        self
    }

    /// Offers MTU: `mtu` bytes in a frame after its Ethernet header.
    #[must_use]
    pub fn mtu(self, mtu: u16) -> Self {
        let mut state = self.lock();
        state.mtu = mtu;
        state.features |= features::MTU;
        drop(state);
        self
    }

    /// Sets the link up or down, and tells the driver.
    pub fn set_link(&self, up: bool) {
        let mut state = self.lock();
        state.changed |= state.link != up;
        state.link = up;
    }

    /// Puts `peer` at the other end of the cable, and returns the handle under which it can be asked.
    pub fn attach<P: Peer + 'static>(&self, peer: P) -> Arc<Mutex<P>> {
        let peer = Arc::new(Mutex::new(peer));
        self.lock().other = Other::Peer(peer.clone());
        peer
    }

    /// Gives the driver a frame, as soon as it has a buffer for it. Takes effect in the next register access or run of the
    /// board.
    pub fn inject(&self, frame: &[u8]) {
        self.lock().push(frame.to_vec());
    }

    /// Returns the frames that the driver sent since the last call, while nobody was at the other end.
    pub fn take_sent(&self) -> Vec<Vec<u8>> {
        self.lock().outbox.drain(..).collect()
    }

    /// Returns what the device has seen.
    pub fn counters(&self) -> NicCounters {
        self.lock().counters
    }

    fn send(&self, frame: Vec<u8>) {
        let mut state = self.lock();
        state.counters.sent += 1;
        if !state.link {
            return;
        }
        match &state.other {
            Other::Nobody => {
                if state.outbox.len() == MOST {
                    state.outbox.pop_front();
                }
                state.outbox.push_back(frame);
            }
            Other::Nic(other) => {
                let other = other.upgrade();
                drop(state);
                if let Some(other) = other {
                    lock(&other).push(frame);
                }
            }
            Other::Peer(peer) => {
                let peer = peer.clone();
                drop(state);
                lock(&peer).receive(&frame);
            }
        }
    }

    /// Takes frames from the peer, if there is one.
    fn pull(&self) {
        let state = self.lock();
        let Other::Peer(peer) = &state.other else {
            return;
        };
        let peer = peer.clone();
        let room = BURST.saturating_sub(state.inbox.len());
        drop(state);
        for _ in 0..room {
            let Some(frame) = lock(&peer).transmit() else {
                break;
            };
            self.lock().push(frame);
        }
    }

    fn deliver(&self, device: &mut State) -> bool {
        let header = header_len(device);
        let mut done = false;
        while device.is_live() && !self.lock().inbox.is_empty() {
            let Some(chain) = device.pop(RECEIVE) else {
                break;
            };
            let room = chain.writable_len();
            self.check_buffer(device, room, header);
            let fault = device.fault(Occasion::Frame);
            let Some(frame) = self.lock().inbox.pop_front() else {
                break;
            };
            let mut bytes = vec![0; header];
            if header == 12 {
                bytes[10] = 1;
            }
            if fault == Some(Fault::NetBuffersWrong) && header == 12 {
                let lie = (device.options.hostile.number() & 0xffff) as u16;
                bytes[10..12].copy_from_slice(&lie.to_le_bytes());
            }
            bytes.extend_from_slice(&frame);
            let memory = device.guest();
            let fits = bytes.len() as u64 <= room;
            let mut state = self.lock();
            if fits {
                chain.write(memory.guest(), 0, &bytes);
                state.counters.received += 1;
            } else {
                state.counters.dropped += 1;
            }
            drop(state);
            let len = match fault {
                Some(Fault::FrameRunt) => device.options.hostile.number() % 10,
                Some(Fault::FrameOversized) => {
                    u32::try_from(room).unwrap_or(u32::MAX).saturating_add(1)
                }
                // Without MRG_RXBUF there is no way to say that a frame did not fit: the buffer comes back empty.
                _ if !fits => {
                    chain.write(memory.guest(), 0, &bytes[..header]);
                    u32::try_from(header).unwrap_or(0)
                }
                _ => u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            };
            device.complete(RECEIVE, chain.head, len);
            done = true;
        }
        done
    }

    fn check_buffer(&self, device: &State, room: u64, header: usize) {
        if device.has(features::MRG_RXBUF) {
            return;
        }
        if device.has(features::MTU) {
            let least = usize::from(self.lock().mtu) + ETHERNET + header;
            if room < least as u64 {
                device.violation("NET-07", format!("a receive buffer of {room} bytes"));
            }
        } else if room < 1514 + header as u64 {
            device.violation("NET-19", format!("a receive buffer of {room} bytes"));
        }
    }

    fn transmit(&self, device: &mut State) {
        let header = header_len(device);
        while let Some(chain) = device.pop(TRANSMIT) {
            let memory = device.guest();
            let len = usize::try_from(chain.readable_len())
                .unwrap_or(0)
                .min(1 << 17);
            let mut bytes = vec![0; len];
            let read = chain.read(memory.guest(), 0, &mut bytes);
            bytes.truncate(read);
            if bytes.len() >= header {
                self.check_header(device, &bytes[..header]);
                let frame = bytes.split_off(header);
                if device.has(features::MTU)
                    && frame.len() > usize::from(self.lock().mtu) + ETHERNET + 4
                {
                    device.violation("NET-08", format!("a frame of {} bytes", frame.len()));
                }
                if frame.len() >= ETHERNET {
                    self.send(frame);
                }
            } else {
                device.violation("NET-12", "a frame shorter than its header");
            }
            device.complete(TRANSMIT, chain.head, 0);
        }
    }

    fn check_header(&self, device: &State, header: &[u8]) {
        let (flags, gso) = (header[0], header[1]);
        if flags & !1 != 0 {
            device.violation("NET-18", format!("flags {flags:#x} of a frame sent"));
        }
        if flags & 1 != 0 && !device.has(features::CSUM) {
            device.violation("NET-12", "NEEDS_CSUM without the feature");
        }
        if gso != 0 {
            device.violation("NET-14", format!("gso_type {gso} without a feature"));
        }
        if header.len() == 12 && header[10..12] != [0, 0] {
            device.violation("NET-11", "num_buffers of a frame sent is not 0");
        }
    }
}

/// `num_buffers` is there since 1.0, and before with MRG_RXBUF (5.1.6.1).
fn header_len(device: &State) -> usize {
    if device.has(common::VERSION_1 | features::MRG_RXBUF) {
        12
    } else {
        10
    }
}

/// Joins network devices. There is nothing to keep: the devices hold the ends.
#[derive(Clone, Copy, Debug)]
pub struct Cable;

impl Cable {
    /// Lets each of two devices receive what the other one sends.
    pub fn join(one: &Nic, other: &Nic) {
        one.lock().other = Other::Nic(Arc::downgrade(&other.state));
        other.lock().other = Other::Nic(Arc::downgrade(&one.state));
    }

    /// Takes the cable, or the peer, off a device.
    pub fn pull(nic: &Nic) {
        nic.lock().other = Other::Nobody;
    }
}

impl From<&Nic> for Device {
    fn from(nic: &Nic) -> Self {
        Device::new(nic.clone())
    }
}

impl From<Nic> for Device {
    fn from(nic: Nic) -> Self {
        Device::new(nic)
    }
}

impl Model for Nic {
    fn kind(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        self.lock().features
    }

    fn queues(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn fields(&self) -> &'static [Field] {
        FIELDS
    }

    fn config(&mut self, _device: &mut State) -> Vec<u8> {
        let state = self.lock();
        let mut config = vec![0; CONFIG_LEN];
        if state.features & features::MAC != 0 {
            config[..6].copy_from_slice(&state.mac);
        }
        config[6] = state.link.into();
        config[8] = 1;
        config[10..12].copy_from_slice(&state.mtu.to_le_bytes());
        config
    }

    fn changed(&mut self) -> bool {
        std::mem::take(&mut self.lock().changed)
    }

    fn negotiated(&mut self, device: &mut State) {
        let offered = self.lock().features & !device.options.withheld;
        for (feature, id, name) in [
            (features::MAC, "NET-03", "MAC"),
            (features::MTU, "NET-06", "MTU"),
        ] {
            if offered & feature != 0 && !device.has(feature) {
                device.violation(id, format!("{name} was offered and not accepted"));
            }
        }
    }

    fn serve(&mut self, queue: u16, device: &mut State) {
        if queue == TRANSMIT {
            self.transmit(device);
        }
        self.pull();
        self.deliver(device);
    }

    fn poll(&mut self, device: &mut State) -> bool {
        self.pull();
        self.deliver(device)
    }

    fn reset(&mut self) {
        self.lock().inbox.clear();
    }
}
