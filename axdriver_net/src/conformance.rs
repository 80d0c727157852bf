//! The contract of [`NetDriverOps`] as code: every rule is a function, and [`check`] checks them all.
//!
//! Rules about traffic need somebody at the other end of the cable, a [`Peer`]. For a device that receives what it
//! transmits, that is the device itself, by way of the [`Mirror`]. The rules send frames of the local experimental
//! EtherType `0x88b5` and look at no others, so other traffic may go on. What has come in beforehand is thrown away.
//!
//! ```
//! use axdriver_net::{EthernetAddress, conformance, loopback::LoopbackNic};
//!
//! let mut nic = LoopbackNic::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 16)?;
//! conformance::check(&mut nic, &mut conformance::Mirror)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use alloc::vec::Vec;

pub use axdriver_base::conformance::{Verdict, Violation};
use axdriver_base::{
    DevError, DevResult, DeviceType,
    conformance::{self as base, ensure, ensure_ok, ensure_refused},
};

use crate::{EthernetAddress, NetBufPool, NetBufPtr, NetDriverOps};

/// The EtherType of the frames that the rules send: IEEE 802, local experimental 1.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// The length of the shortest Ethernet frame, in bytes, without the frame check sequence. Shorter ones may be padded.
const MIN_FRAME_LEN: usize = 60;

/// How many frames or buffers a rule handles at most, whatever a device says of its queues.
const MANY: usize = 100_000;

/// How many frames of others are passed over until the expected one.
const STRANGERS: u32 = 100_000;

/// The other end of the cable: a peer of ours, a socket, another network card.
///
/// `dev` is the device under test, for peers that have to move it along. A peer holds at least as many frames as the
/// transmit queue of the device, in order, and lets frames with any contents through.
pub trait Peer<D: ?Sized> {
    /// Sends a frame to the device. It may be lost only if the device has no room for it.
    ///
    /// # Errors
    ///
    /// * Any: the peer is broken, and with it the check.
    fn send(&mut self, dev: &mut D, frame: &[u8]) -> DevResult;

    /// Copies the next frame from the device to the start of `frame`, cut off at its end, and returns its whole length.
    ///
    /// # Errors
    ///
    /// * [`DevError::Again`]: none has arrived. It is asked again after [`wait`](Self::wait).
    /// * Others: the peer is broken, and with it the check.
    fn receive(&mut self, dev: &mut D, frame: &mut [u8]) -> DevResult<usize>;

    /// Lets the device, the cable and time go on a bit, while a frame is waited for in either direction.
    ///
    /// `attempts` counts the calls for one frame, from 0. On `false` it is given up. The default waits for nothing and
    /// gives up after 1000 calls, which is right for a device that is done when a call returns.
    fn wait(&mut self, dev: &mut D, attempts: u32) -> bool {
        let _ = dev;
        attempts < 1000
    }
}

/// The other end of a device that receives what it transmits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mirror;

impl<D: NetDriverOps + ?Sized> Peer<D> for Mirror {
    fn send(&mut self, dev: &mut D, frame: &[u8]) -> DevResult {
        dev.recycle_tx_buffers()?;
        let mut buf = dev.alloc_tx_buffer(frame.len())?;
        copy(frame, buf.packet_mut());
        dev.transmit(buf)
    }

    fn receive(&mut self, dev: &mut D, frame: &mut [u8]) -> DevResult<usize> {
        let buf = dev.receive()?;
        copy(buf.packet(), frame);
        let len = buf.packet_len();
        dev.recycle_rx_buffer(buf)?;
        Ok(len)
    }
}

/// Checks all rules.
///
/// # Errors
///
/// * [`Violation`]: the first rule that the driver breaks.
pub fn check<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    base::check(dev, DeviceType::Net)?;
    the_device_says_what_can_be(dev)?;
    nothing_to_receive_is_again(dev)?;
    impossible_sizes_use_up_no_buffer(dev)?;
    dropped_transmit_buffers_can_be_allocated_again(dev)?;
    running_out_of_buffers_is_no_memory(dev)?;
    foreign_buffers_go_back_to_their_owner(dev)?;
    frames_leave_whole_and_in_order(dev, peer)?;
    frames_come_in_whole_and_in_order(dev, peer)?;
    there_is_room_when_the_driver_says_so(dev, peer)?;
    received_frames_keep_their_contents(dev, peer)?;
    dropped_receive_buffers_are_used_again(dev, peer)
}

/// The address is that of one station, the queues hold at least one frame, and full-sized frames can be sent.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn the_device_says_what_can_be<D: NetDriverOps + ?Sized>(dev: &D) -> Verdict {
    let address = dev.mac_address();
    ensure(
        !address.is_multicast() && address.0 != [0; 6],
        "the address of a device is that of one station",
    )?;
    ensure(dev.mac_address() == address, "the address stays the same")?;
    ensure(
        dev.rx_queue_size() > 0 && dev.tx_queue_size() > 0,
        "a queue holds at least one frame",
    )?;
    ensure(
        dev.capabilities().max_frame_len >= MIN_FRAME_LEN,
        "a frame can be as long as the shortest that Ethernet has",
    )
}

/// When no frame has come in, receiving returns [`DevError::Again`].
///
/// What has come in is thrown away first.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn nothing_to_receive_is_again<D: NetDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    for _ in 0..MANY {
        match dev.receive() {
            Ok(buf) => recycle(dev, buf)?,
            result => {
                return ensure_refused(
                    result,
                    DevError::Again,
                    "without a frame, receive is Again",
                );
            }
        }
    }
    Err(Violation::new("a silent cable brings no frames"))
}

/// A buffer for no bytes, or for more than the longest frame, is an invalid parameter, and none is used up.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn impossible_sizes_use_up_no_buffer<D: NetDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let longest = dev.capabilities().max_frame_len;
    for _ in 0..twice(dev.tx_queue_size()) {
        for size in [0, longest.saturating_add(1), usize::MAX] {
            ensure_refused(
                dev.alloc_tx_buffer(size),
                DevError::InvalidParam,
                "a buffer of an impossible size is an invalid parameter",
            )?;
        }
    }
    let buf = dev.alloc_tx_buffer(longest);
    ensure_ok(buf, "requests of an impossible size use up no buffer").map(drop)
}

/// A transmit buffer has the size that was asked for, and one that is dropped can be allocated again.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn dropped_transmit_buffers_can_be_allocated_again<D: NetDriverOps + ?Sized>(
    dev: &mut D,
) -> Verdict {
    for size in each_size(dev, twice(dev.tx_queue_size())) {
        let mut buf = ensure_ok(
            dev.alloc_tx_buffer(size),
            "a transmit buffer that is dropped can be allocated again",
        )?;
        ensure(
            buf.packet_len() == size && buf.packet_mut().len() == size,
            "a transmit buffer has the size that was asked for",
        )?;
        buf.packet_mut().fill(0xa5);
    }
    Ok(())
}

/// When there is no transmit buffer left, allocating returns [`DevError::NoMemory`], until one is given back.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn running_out_of_buffers_is_no_memory<D: NetDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    let most = twice(dev.tx_queue_size());
    let mut held = Vec::new();
    ensure_ok(
        held.try_reserve_exact(most).map_err(|_| DevError::NoMemory),
        "there is memory for the checks themselves",
    )?;
    while held.len() < most {
        match dev.alloc_tx_buffer(MIN_FRAME_LEN) {
            Ok(buf) => held.push(buf),
            refused => {
                let rule = "without a transmit buffer left, allocating is NoMemory";
                ensure_refused(refused, DevError::NoMemory, rule)?;
                break;
            }
        }
    }
    drop(held);
    ensure_ok(
        dev.alloc_tx_buffer(MIN_FRAME_LEN),
        "a transmit buffer that is dropped can be allocated again",
    )
    .map(drop)
}

/// A buffer of somebody else is an invalid parameter, and goes back to its owner.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn foreign_buffers_go_back_to_their_owner<D: NetDriverOps + ?Sized>(dev: &mut D) -> Verdict {
    const REFUSED: &str = "a buffer of somebody else is an invalid parameter";
    const RETURNED: &str = "a buffer of somebody else goes back to its owner";
    let pool = NetBufPool::new(1, 1526);
    let pool = ensure_ok(pool, "there is memory for the checks themselves")?;
    for recycles in [false, true] {
        let mut foreign = pool.alloc_boxed().ok_or(Violation::new(RETURNED))?;
        foreign.set_packet_len(MIN_FRAME_LEN);
        foreign.packet_mut().fill(0);
        let foreign = foreign.into_buf_ptr();
        let refused = if recycles {
            dev.recycle_rx_buffer(foreign)
        } else {
            dev.transmit(foreign)
        };
        ensure_refused(refused, DevError::InvalidParam, REFUSED)?;
        ensure(pool.available() == 1, RETURNED)?;
    }
    Ok(())
}

/// Frames arrive at the other end as they were written, in the order in which they were transmitted.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn frames_leave_whole_and_in_order<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    let frames = twice(dev.tx_queue_size());
    let mut traffic = Traffic::new(dev, peer, 1)?;
    for size in each_size(traffic.dev, frames) {
        traffic.wait_for_room()?;
        traffic.transmit(size)?;
        traffic.arrives(size)?;
    }
    Ok(())
}

/// Frames come in as the other end has sent them, in that order, and the driver announces them.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn frames_come_in_whole_and_in_order<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    let frames = twice(dev.rx_queue_size());
    let mut traffic = Traffic::new(dev, peer, 2)?;
    for size in each_size(traffic.dev, frames) {
        traffic.send(size)?;
        let buf = traffic.comes_in(size)?;
        recycle(traffic.dev, buf)?;
    }
    Ok(())
}

/// Transmitting works when the driver says that there is room, and is [`DevError::Again`] when there is none. Nothing
/// is lost, however often the queue has been full.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn there_is_room_when_the_driver_says_so<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    const FULL: &str = "without room, transmit is Again or allocating is NoMemory";
    let burst = dev.tx_queue_size().min(MANY);
    let mut traffic = Traffic::new(dev, peer, 3)?;
    for _ in 0..3 {
        traffic.wait_for_room()?;
        let mut sent = 0;
        while sent < burst && traffic.dev.can_transmit() {
            traffic.transmit(MIN_FRAME_LEN)?;
            sent += 1;
        }
        if !traffic.dev.can_transmit() {
            match traffic.dev.alloc_tx_buffer(MIN_FRAME_LEN) {
                Ok(mut buf) => {
                    traffic.write(buf.packet_mut(), EthernetAddress::BROADCAST, traffic.sent);
                    match traffic.dev.transmit(buf) {
                        // Room has been made meanwhile.
                        Ok(()) => {
                            traffic.sent += 1;
                            sent += 1;
                        }
                        refused => ensure_refused(refused, DevError::Again, FULL)?,
                    }
                }
                refused => ensure_refused(refused, DevError::NoMemory, FULL)?,
            }
        }
        for _ in 0..sent {
            traffic.arrives(MIN_FRAME_LEN)?;
        }
    }
    Ok(())
}

/// A frame that has been received stays as it is while others come in, until it is recycled.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn received_frames_keep_their_contents<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    const RULE: &str = "a received frame keeps its contents until it is recycled";
    // With a single receive buffer, nothing else comes in while it is held.
    if dev.rx_queue_size() < 2 {
        return Ok(());
    }
    let mut traffic = Traffic::new(dev, peer, 4)?;
    traffic.send(MIN_FRAME_LEN)?;
    let held = traffic.comes_in(MIN_FRAME_LEN)?;
    traffic.send(MIN_FRAME_LEN)?;
    let other = traffic.comes_in(MIN_FRAME_LEN)?;
    let kept = held.packet().get(..MIN_FRAME_LEN) == Some(traffic.expected(0, MIN_FRAME_LEN));
    recycle(traffic.dev, other)?;
    recycle(traffic.dev, held)?;
    ensure(kept, RULE)
}

/// A received buffer that is dropped, not recycled, is used for receiving again.
///
/// # Errors
///
/// * [`Violation`]: the rule is broken.
pub fn dropped_receive_buffers_are_used_again<D, P>(dev: &mut D, peer: &mut P) -> Verdict
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    let frames = twice(dev.rx_queue_size());
    let mut traffic = Traffic::new(dev, peer, 5)?;
    for _ in 0..frames {
        traffic.send(MIN_FRAME_LEN)?;
        drop(traffic.comes_in(MIN_FRAME_LEN)?);
        // At the latest now it is used again, also where there is no other.
        nothing_to_receive_is_again(traffic.dev)?;
    }
    Ok(())
}

/// The frames of one rule, which are numbered from 0 in each direction.
struct Traffic<'a, D: ?Sized, P: ?Sized> {
    dev: &'a mut D,
    peer: &'a mut P,
    /// Marks the frames of this rule.
    rule: u8,
    /// How many frames have been sent, in either direction.
    sent: u32,
    /// How many frames have been found at the other end.
    found: u32,
    /// What is found.
    frame: Vec<u8>,
    /// What is expected.
    pattern: Vec<u8>,
}

impl<'a, D, P> Traffic<'a, D, P>
where
    D: NetDriverOps + ?Sized,
    P: Peer<D> + ?Sized,
{
    /// Clears the cable of earlier frames.
    fn new(dev: &'a mut D, peer: &'a mut P, rule: u8) -> Verdict<Self> {
        let longest = dev.capabilities().max_frame_len;
        let buffer = || {
            let mut bytes = Vec::new();
            let reserved = bytes
                .try_reserve_exact(longest)
                .map_err(|_| DevError::NoMemory);
            ensure_ok(reserved, "there is memory for the checks themselves")?;
            bytes.resize(longest, 0);
            Ok(bytes)
        };
        let mut traffic = Self {
            dev,
            peer,
            rule,
            sent: 0,
            found: 0,
            frame: buffer()?,
            pattern: buffer()?,
        };
        for _ in 0..MANY {
            let received = traffic.peer.receive(traffic.dev, &mut traffic.frame);
            if received.is_err() {
                break;
            }
        }
        nothing_to_receive_is_again(traffic.dev)?;
        Ok(traffic)
    }

    /// Writes frame `number` of this rule.
    fn write(&self, frame: &mut [u8], destination: EthernetAddress, number: u32) {
        let [a, b, c, d] = number.to_be_bytes();
        let header = destination
            .0
            .into_iter()
            .chain(self.dev.mac_address().0)
            .chain(ETHER_TYPE)
            .chain([self.rule, a, b, c, d]);
        // A step of Knuth's linear congruential generator for each byte after the header.
        let mut state = number.rotate_left(8) ^ u32::from(self.rule);
        let contents = core::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [byte, ..] = state.to_be_bytes();
            byte
        });
        for (to, from) in frame.iter_mut().zip(header.chain(contents)) {
            *to = from;
        }
    }

    /// Returns what frame `number` looks like from the EtherType on, whatever its destination was.
    fn expected(&mut self, number: u32, len: usize) -> &[u8] {
        let mut pattern = core::mem::take(&mut self.pattern);
        self.write(&mut pattern, self.dev.mac_address(), number);
        self.pattern = pattern;
        self.pattern.get(..len).unwrap_or_default()
    }

    /// Transmits the next frame.
    fn transmit(&mut self, len: usize) -> Verdict {
        const RULE: &str = "there is room to transmit when the driver says so";
        let mut buf = ensure_ok(self.dev.alloc_tx_buffer(len), RULE)?;
        self.write(buf.packet_mut(), EthernetAddress::BROADCAST, self.sent);
        ensure_ok(self.dev.transmit(buf), RULE)?;
        self.sent += 1;
        Ok(())
    }

    /// Lets the peer send the next frame.
    fn send(&mut self, len: usize) -> Verdict {
        let mut frame = core::mem::take(&mut self.frame);
        self.write(&mut frame, self.dev.mac_address(), self.sent);
        let frame_to_send = frame.get(..len).unwrap_or_default();
        let sent = self.peer.send(self.dev, frame_to_send);
        self.frame = frame;
        self.sent += 1;
        ensure_ok(sent, "the peer can send")
    }

    /// Waits until the driver has room.
    fn wait_for_room(&mut self) -> Verdict {
        for attempts in 0.. {
            ensure_ok(
                self.dev.recycle_tx_buffers(),
                "buffers of frames that have been sent can be taken back",
            )?;
            if self.dev.can_transmit() {
                break;
            }
            ensure(
                self.peer.wait(self.dev, attempts),
                "there is room to transmit after a while",
            )?;
        }
        Ok(())
    }

    /// Expects the next frame at the peer.
    fn arrives(&mut self, len: usize) -> Verdict {
        const RULE: &str = "a transmitted frame arrives whole and in order";
        let (mut attempts, mut strangers) = (0, 0);
        loop {
            match self.peer.receive(self.dev, &mut self.frame) {
                Ok(found) if self.is_ours(self.frame.get(..found)) => {
                    let frame = core::mem::take(&mut self.frame);
                    let right = self.is_next(frame.get(..found), len);
                    self.frame = frame;
                    return ensure(right, RULE);
                }
                Ok(_) => {
                    strangers += 1;
                    ensure(strangers < STRANGERS, RULE)?;
                }
                Err(DevError::Again) => {
                    ensure_ok(
                        self.dev.recycle_tx_buffers(),
                        "buffers of frames that have been sent can be taken back",
                    )?;
                    ensure(self.peer.wait(self.dev, attempts), RULE)?;
                    attempts += 1;
                }
                Err(error) => return Err(Violation::with_error("the peer can receive", error)),
            }
        }
    }

    /// Expects the next frame at the device.
    fn comes_in(&mut self, len: usize) -> Verdict<NetBufPtr> {
        const ANNOUNCED: &str = "a frame that has come in is announced and can be received";
        const RULE: &str = "a received frame is whole and in order";
        let (mut attempts, mut strangers) = (0, 0);
        loop {
            if !self.dev.can_receive() {
                ensure(self.peer.wait(self.dev, attempts), ANNOUNCED)?;
                attempts += 1;
                continue;
            }
            let buf = ensure_ok(self.dev.receive(), ANNOUNCED)?;
            if self.is_ours(Some(buf.packet())) {
                ensure(self.is_next(Some(buf.packet()), len), RULE)?;
                return Ok(buf);
            }
            recycle(self.dev, buf)?;
            strangers += 1;
            ensure(strangers < STRANGERS, ANNOUNCED)?;
        }
    }

    /// Returns whether this is a frame of this rule.
    fn is_ours(&self, frame: Option<&[u8]>) -> bool {
        let [a, b] = ETHER_TYPE;
        frame.and_then(|frame| frame.get(12..15)) == Some(&[a, b, self.rule])
    }

    /// Returns whether this is the next frame, of `len` bytes, and goes on to the one after it.
    fn is_next(&mut self, frame: Option<&[u8]>, len: usize) -> bool {
        let number = self.found;
        self.found += 1;
        let Some(frame) = frame else { return false };
        let expected = self.expected(number, len);
        // The destination is not the same in both directions.
        frame.len() == len && frame.get(6..) == expected.get(6..)
    }
}

/// Gives back a frame that was received.
fn recycle<D: NetDriverOps + ?Sized>(dev: &mut D, buf: NetBufPtr) -> Verdict {
    ensure_ok(
        dev.recycle_rx_buffer(buf),
        "a received buffer can be recycled",
    )
}

/// Returns a bit more than twice the size of a queue, which uses up whatever is lost on the way.
fn twice(queue_size: usize) -> usize {
    queue_size.saturating_mul(2).saturating_add(1).min(MANY)
}

/// Returns lengths of `count` frames or more, in bytes: every one that is worth a try, again and again.
fn each_size<D: NetDriverOps + ?Sized>(
    dev: &D,
    count: usize,
) -> impl Iterator<Item = usize> + use<D> {
    const SIZES: [usize; 13] = [
        60, 61, 62, 63, 64, 127, 128, 511, 512, 1024, 1513, 1514, 4096,
    ];
    let longest = dev.capabilities().max_frame_len;
    SIZES
        .into_iter()
        .filter(move |size| *size < longest)
        .chain([longest])
        .cycle()
        .take(count.max(SIZES.len()))
}

/// Copies as much as there is, and as fits.
fn copy(from: &[u8], to: &mut [u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

#[cfg(all(test, feature = "loopback"))]
mod tests {
    use std::string::{String, ToString};

    use axdriver_base::BaseDriverOps;

    use super::*;
    use crate::{NetCapabilities, loopback::LoopbackNic};

    const ADDRESS: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    /// A way to break the contract.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        HasAGroupAddress,
        HasNoQueue,
        SaysIoWithoutAFrame,
        UsesUpBuffersOnLargeRequests,
        AllocatesTheWrongSize,
        RunsOutWithAgain,
        AcceptsForeignBuffers,
        KeepsForeignBuffers,
        KeepsForeignReceiveBuffers,
        LosesSentBuffers,
        LosesFrames,
        CutsFrames,
        ChangesFrames,
        AnnouncesNothing,
        AlwaysHasRoom,
        IsFullWithBadState,
        LosesDroppedBuffers,
        CannotRecycle,
    }

    /// A loopback with a fault.
    struct Faulty {
        nic: LoopbackNic,
        fault: Fault,
        lost: Vec<NetBufPtr>,
        received: usize,
        calls: usize,
    }

    impl Faulty {
        #[expect(clippy::unwrap_used, reason = "a helper of tests")]
        fn new(fault: Fault) -> Self {
            Self {
                nic: LoopbackNic::new(ADDRESS, 8).unwrap(),
                fault,
                lost: Vec::new(),
                received: 0,
                calls: 0,
            }
        }

        fn is_foreign(&self, buf: &NetBufPtr) -> bool {
            !self.nic.pool.owns(buf)
        }
    }

    impl BaseDriverOps for Faulty {
        fn device_name(&self) -> &str {
            "faulty"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Net
        }
    }

    impl NetDriverOps for Faulty {
        fn mac_address(&self) -> EthernetAddress {
            match self.fault {
                Fault::HasAGroupAddress => EthernetAddress([1, 0, 0, 0, 0, 1]),
                _ => self.nic.mac_address(),
            }
        }

        fn can_transmit(&self) -> bool {
            self.fault == Fault::AlwaysHasRoom || self.nic.can_transmit()
        }

        fn can_receive(&self) -> bool {
            self.fault != Fault::AnnouncesNothing && self.nic.can_receive()
        }

        fn rx_queue_size(&self) -> usize {
            match self.fault {
                Fault::HasNoQueue => 0,
                _ => self.nic.rx_queue_size(),
            }
        }

        fn tx_queue_size(&self) -> usize {
            // More than there is, so that saying that there is room can be wrong.
            match self.fault {
                Fault::AlwaysHasRoom => 9,
                _ => self.nic.tx_queue_size(),
            }
        }

        fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult {
            match self.fault {
                Fault::KeepsForeignReceiveBuffers if self.is_foreign(&rx_buf) => {
                    self.lost.push(rx_buf);
                    Err(DevError::InvalidParam)
                }
                Fault::CannotRecycle => Err(DevError::BadState),
                _ => {
                    self.received = self.received.saturating_sub(1);
                    self.nic.recycle_rx_buffer(rx_buf)
                }
            }
        }

        fn recycle_tx_buffers(&mut self) -> DevResult {
            self.nic.recycle_tx_buffers()
        }

        fn transmit(&mut self, mut tx_buf: NetBufPtr) -> DevResult {
            let foreign = self.is_foreign(&tx_buf);
            self.calls += 1;
            match self.fault {
                Fault::AcceptsForeignBuffers if foreign => Ok(()),
                Fault::KeepsForeignBuffers if foreign => {
                    self.lost.push(tx_buf);
                    Err(DevError::InvalidParam)
                }
                Fault::LosesSentBuffers if !foreign => {
                    self.lost.extend(self.nic.alloc_tx_buffer(60));
                    self.nic.transmit(tx_buf)
                }
                Fault::LosesFrames if self.calls.is_multiple_of(4) => Ok(()),
                Fault::ChangesFrames if !foreign => {
                    if let Some(last) = tx_buf.packet_mut().last_mut() {
                        *last = last.wrapping_add(1);
                    }
                    self.nic.transmit(tx_buf)
                }
                Fault::CutsFrames if !foreign => {
                    let mut cut = self.nic.alloc_tx_buffer(tx_buf.packet_len() - 1)?;
                    copy(tx_buf.packet(), cut.packet_mut());
                    self.nic.transmit(cut)
                }
                Fault::IsFullWithBadState => {
                    self.nic.transmit(tx_buf).map_err(|error| match error {
                        DevError::Again => DevError::BadState,
                        error => error,
                    })
                }
                _ => self.nic.transmit(tx_buf),
            }
        }

        fn receive(&mut self) -> DevResult<NetBufPtr> {
            if self.fault == Fault::LosesDroppedBuffers && self.received >= 8 {
                return Err(DevError::Again);
            }
            let received = self.nic.receive();
            self.received += usize::from(received.is_ok());
            match self.fault {
                Fault::SaysIoWithoutAFrame => received.map_err(|_| DevError::Io),
                _ => received,
            }
        }

        fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr> {
            let buf = self.nic.alloc_tx_buffer(size);
            match (self.fault, &buf) {
                (Fault::UsesUpBuffersOnLargeRequests, Err(DevError::InvalidParam)) => {
                    self.lost.extend(self.nic.alloc_tx_buffer(60));
                    buf
                }
                (Fault::AllocatesTheWrongSize, Ok(_)) => self.nic.alloc_tx_buffer(60),
                (Fault::RunsOutWithAgain, Err(DevError::NoMemory)) => Err(DevError::Again),
                _ => buf,
            }
        }

        fn capabilities(&self) -> NetCapabilities {
            self.nic.capabilities()
        }
    }

    fn rule_broken_by(fault: Fault) -> Option<String> {
        let verdict = check(&mut Faulty::new(fault), &mut Mirror);
        verdict.err().map(|violation| violation.to_string())
    }

    #[test]
    fn a_loopback_conforms_whatever_its_size() {
        for queue_size in [1, 2, 3, 16, 256] {
            let mut nic = LoopbackNic::new(ADDRESS, queue_size).unwrap();
            assert_eq!(check(&mut nic, &mut Mirror), Ok(()), "{queue_size}");
        }
        assert_eq!(rule_broken_by(Fault::None), None);
    }

    #[test]
    fn a_driver_behind_a_pointer_conforms() {
        let mut nic = LoopbackNic::new(ADDRESS, 4).unwrap();
        assert_eq!(check::<dyn NetDriverOps, _>(&mut nic, &mut Mirror), Ok(()));
        let mut boxed = std::boxed::Box::new(nic);
        assert_eq!(check(&mut boxed, &mut Mirror), Ok(()));
    }

    #[test]
    fn every_fault_is_found_and_named() {
        let faults = [
            (
                Fault::HasAGroupAddress,
                "the address of a device is that of one station",
            ),
            (Fault::HasNoQueue, "a queue holds at least one frame"),
            (
                Fault::SaysIoWithoutAFrame,
                "without a frame, receive is Again",
            ),
            (
                Fault::UsesUpBuffersOnLargeRequests,
                "requests of an impossible size use up no buffer",
            ),
            (
                Fault::AllocatesTheWrongSize,
                "a transmit buffer has the size that was asked for",
            ),
            (
                Fault::RunsOutWithAgain,
                "without a transmit buffer left, allocating is NoMemory",
            ),
            (
                Fault::AcceptsForeignBuffers,
                "a buffer of somebody else is an invalid parameter",
            ),
            (
                Fault::KeepsForeignBuffers,
                "a buffer of somebody else goes back to its owner",
            ),
            (
                Fault::KeepsForeignReceiveBuffers,
                "a buffer of somebody else goes back to its owner",
            ),
            (Fault::LosesSentBuffers, "the peer can send"),
            (
                Fault::LosesFrames,
                "a transmitted frame arrives whole and in order",
            ),
            (
                Fault::CutsFrames,
                "a transmitted frame arrives whole and in order",
            ),
            (
                Fault::ChangesFrames,
                "a transmitted frame arrives whole and in order",
            ),
            (
                Fault::AnnouncesNothing,
                "a frame that has come in is announced",
            ),
            (
                Fault::AlwaysHasRoom,
                "there is room to transmit when the driver says so",
            ),
            (Fault::IsFullWithBadState, "without room, transmit is Again"),
            (
                Fault::LosesDroppedBuffers,
                "a frame that has come in is announced and can be received",
            ),
            (
                Fault::CannotRecycle,
                "a buffer of somebody else is an invalid parameter",
            ),
        ];
        for (fault, rule) in faults {
            let found = rule_broken_by(fault).unwrap_or_default();
            assert!(found.starts_with(rule), "{fault:?} broke: {found}");
        }
    }
}
