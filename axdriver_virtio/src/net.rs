//! The NIC driver: what to say over two virtqueues to a network device (VirtIO 1.3, 5.1).
//!
//! Unsafe code here guards the buffers of frames, while the device has them.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{mem, ptr::NonNull};

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};
use axdriver_net::{
    EthernetAddress, NetBuf, NetBufBox, NetBufPool, NetBufPtr, NetCapabilities, NetDriverOps,
};
use log::{error, info, warn};
use virtio_drivers::{BufferDirection, Hal, transport::Transport};

use crate::{
    WaitPolicy,
    dma::Shared,
    interrupt::cause,
    lifecycle::{Features, Lifecycle},
    queue::{Segment, VirtQueue},
};

/// `receiveq1` and `transmitq1` (5.1.2).
const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
/// A frame is one descriptor.
const MIN_QUEUE_SIZE: u16 = 1;

// 5.1.3: feature bits.
const MTU: Features = Features::bit(3);
const MAC: Features = Features::bit(5);
const STATUS: Features = Features::bit(16);

// 5.1.4: where the fields of the configuration space are.
const CONFIG_MAC: usize = 0;
const CONFIG_STATUS: usize = 6;
const CONFIG_MTU: usize = 10;
/// The bit of `status` that says that the link is up.
const LINK_UP: u16 = 1;

/// The lengths of `struct virtio_net_hdr` (5.1.6), which has no `num_buffers` without VERSION_1.
const HEADER_LEN: usize = 12;
const HEADER_LEN_BEFORE_1: usize = 10;
/// Destination, source, type.
const ETHERNET_HEADER_LEN: usize = 14;
/// What a received frame can have beyond the Ethernet header: a VLAN tag.
const TAG_LEN: usize = 4;
/// The longest packet in a frame, if the device does not say.
const DEFAULT_MTU: u16 = 1500;
/// The packets that every network can carry, and the longest that buffers are made for.
const MTU_RANGE: core::ops::RangeInclusive<u16> = 68..=9216;
/// Two to a page, and more than the 1526 bytes that 5.1.6.3.1 asks for.
const MIN_BUFFER_LEN: usize = 2048;

/// A virtio NIC, with queues of at most `QS` frames each.
///
/// The queues have as many entries as the device offers, a power of two, and at most `QS`:
/// [`rx_queue_size`](NetDriverOps::rx_queue_size) and
/// [`tx_queue_size`](NetDriverOps::tx_queue_size) tell. The buffers, `2 * QS` of them, are
/// allocated once. A received frame may be handed to [`transmit`](NetDriverOps::transmit) as it
/// is.
///
/// When the device does what it must not, or says that it needs a reset, it is reset, the call
/// fails with [`DevError::Io`], and from then on every call fails with [`DevError::BadState`]
/// until [`reset`](Self::reset). Frames that are in the driver's queues then are lost; buffers are
/// not. A device that does not reset keeps the buffers that it was told of for ever.
///
/// A device without an address of its own gets a locally administered one, made of the address of
/// the driver's memory: give it a better one where several machines share a network.
///
/// # Examples
///
/// ```
/// # extern crate machine;
/// use axdriver_net::NetDriverOps;
/// use axdriver_virtio::{Transport, VirtIoHal, VirtIoNetDev};
///
/// fn send<H: VirtIoHal, T: Transport + Send + Sync>(
///     nic: &mut VirtIoNetDev<H, T, 64>,
///     frame: &[u8],
/// ) -> axdriver_base::DevResult {
///     let mut buf = nic.alloc_tx_buffer(frame.len())?;
///     buf.packet_mut().copy_from_slice(frame);
///     nic.transmit(buf)
/// }
/// ```
pub struct VirtIoNetDev<H: Hal, T: Transport, const QS: usize> {
    lifecycle: Lifecycle<T>,
    rx: VirtQueue<H, QS>,
    tx: VirtQueue<H, QS>,
    /// `rx_posted[t]` is `Some` exactly while the device may write to it under the token `t`.
    rx_posted: Box<[Option<Posted<H>>]>,
    /// `tx_posted[t]` is `Some` exactly while the device may read it under the token `t`.
    tx_posted: Box<[Option<Posted<H>>]>,
    /// Buffers that are nobody's. Its capacity is that of the pool, so it never grows.
    free: Vec<NetBufBox>,
    pool: Arc<NetBufPool>,
    header_len: usize,
    mac: [u8; 6],
    mtu: u16,
    link: Option<bool>,
    /// How often in a row nothing was received.
    idle: u64,
}

/// A buffer that the device has.
struct Posted<H: Hal> {
    buf: NetBufBox,
    /// Of `buf`.
    shared: Shared<H>,
}

impl<H: Hal> Posted<H> {
    /// Shares the first `len` bytes of a buffer.
    fn new(mut buf: NetBufBox, len: usize, direction: BufferDirection) -> Self {
        let len = len.min(buf.capacity());
        let bytes = NonNull::from(&mut buf.raw_buf_mut()[..len]);
        // SAFETY: the memory is the buffer's, wherever the box goes; the two stay together, and
        // only `unshare` and `forget` take them apart.
        let shared = unsafe { Shared::new(bytes, direction) };
        Self { buf, shared }
    }

    /// Takes the buffer back.
    ///
    /// # Safety
    ///
    /// The device must be done with the buffer, or have been reset, or never been told of it.
    unsafe fn unshare(self) -> NetBufBox {
        // SAFETY: the caller's promise.
        unsafe { self.shared.unshare() };
        self.buf
    }

    /// Gives the buffer up, to a device that may use it for ever.
    fn forget(self) {
        mem::forget(self.buf);
    }

    fn segment(&self, len: usize) -> Segment {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a buffer of the pool has at most 65535 bytes"
        )]
        Segment {
            paddr: self.shared.paddr(),
            len: len as u32,
        }
    }
}

impl<H: Hal, T: Transport, const QS: usize> VirtIoNetDev<H, T, QS> {
    /// Starts the device, and waits for resets as [`WaitPolicy::new`] says.
    ///
    /// # Errors
    ///
    /// As [`try_new_with`](Self::try_new_with).
    pub fn try_new(transport: T) -> DevResult<Self> {
        Self::try_new_with(transport, WaitPolicy::new())
    }

    /// Starts the device, and waits for resets as `wait` says. Nothing else here waits.
    ///
    /// # Errors
    ///
    /// The device has been reset, and all memory freed, unless it does not reset.
    ///
    /// * [`DevError::InvalidParam`]: `QS` is 0.
    /// * [`DevError::Io`]: the device does not reset, or its configuration does not settle.
    /// * [`DevError::Unsupported`]: the device refuses the features, or offers no queues.
    /// * [`DevError::BadState`]: a queue is in use after the reset, or the configuration space is
    ///   too small.
    /// * [`DevError::NoMemory`]: the HAL or the heap has no memory.
    pub fn try_new_with(transport: T, wait: WaitPolicy) -> DevResult<Self> {
        let capacity = QS.checked_mul(2).ok_or(DevError::InvalidParam)?;
        let mut nic = Self {
            lifecycle: Lifecycle::new("virtio-net", transport, wait),
            rx: VirtQueue::new(RECEIVE_QUEUE)?,
            tx: VirtQueue::new(TRANSMIT_QUEUE)?,
            rx_posted: none_posted(QS)?,
            tx_posted: none_posted(QS)?,
            free: Vec::new(),
            pool: NetBufPool::new(capacity, MIN_BUFFER_LEN)?,
            header_len: HEADER_LEN,
            mac: [0; 6],
            mtu: DEFAULT_MTU,
            link: None,
            idle: 0,
        };
        nic.free
            .try_reserve_exact(capacity)
            .map_err(|_| DevError::NoMemory)?;
        nic.start()?;
        info!(
            "virtio-net: {}, MTU {}, queues of {} and {}",
            EthernetAddress(nic.mac),
            nic.mtu,
            nic.rx.size(),
            nic.tx.size()
        );
        Ok(nic)
    }

    /// Resets the device and starts it again. Frames in the queues are lost. Buffers that the
    /// caller holds stay valid, and are this driver's still, unless the device has a larger MTU now
    /// than any before: then the buffers are new, and the old ones foreign.
    ///
    /// Interrupts are then off, as after [`try_new`](Self::try_new).
    ///
    /// # Errors
    ///
    /// As [`try_new_with`](Self::try_new_with). The driver may be reset again.
    pub fn reset(&mut self) -> DevResult {
        self.start()
    }

    /// Sets how long later resets are waited for.
    pub fn set_wait_policy(&mut self, wait: WaitPolicy) {
        self.lifecycle.wait = wait;
    }

    fn start(&mut self) -> DevResult {
        let result = self.try_start();
        if let Err(error) = result {
            self.fail(match error {
                DevError::NoMemory => "it cannot be started for want of memory",
                _ => "it cannot be started",
            });
        }
        result
    }

    fn try_start(&mut self) -> DevResult {
        // The features depend on the MTU, which is read before they are settled.
        let mut mtu = DEFAULT_MTU;
        let mut has_reset = false;
        let begun = self.lifecycle.begin(|lifecycle, offered| {
            has_reset = true;
            let supported = MAC.union(STATUS).union(MTU);
            if !offered.contains(MTU) {
                return Ok(supported);
            }
            let offered_mtu = read_le16(lifecycle, CONFIG_MTU)?;
            if MTU_RANGE.contains(&offered_mtu) {
                mtu = offered_mtu;
                Ok(supported)
            } else {
                warn!("virtio-net: the MTU of {offered_mtu} is not used");
                Ok(supported.difference(MTU))
            }
        });
        if has_reset {
            self.reclaim();
        }
        let features = begun?;
        self.mtu = mtu;
        let has_num_buffers = features.contains(Features::VERSION_1);
        self.header_len = if has_num_buffers {
            HEADER_LEN
        } else {
            HEADER_LEN_BEFORE_1
        };
        self.read_mac(features)?;
        self.read_link()?;
        self.prepare_pool()?;
        let transport = self.lifecycle.transport();
        self.rx.start(transport, features, MIN_QUEUE_SIZE)?;
        self.tx.start(transport, features, MIN_QUEUE_SIZE)?;
        while self.rx.free() > 0 {
            let Some(buf) = self.take_buffer() else { break };
            self.post(buf)?;
        }
        self.lifecycle.go_live()?;
        self.idle = 0;
        self.rx.submit(self.lifecycle.live()?);
        Ok(())
    }

    /// 5.1.4.2: the device's own address, or a locally administered one.
    fn read_mac(&mut self, features: Features) -> DevResult {
        if features.contains(MAC) {
            // 4.2.2.2, 4.1.3.1: bytes are read as bytes.
            let mac = self.lifecycle.read_config(|transport| {
                let mut mac = [0; 6];
                for (offset, byte) in mac.iter_mut().enumerate() {
                    *byte = transport.read_config_space(CONFIG_MAC + offset)?;
                }
                Ok(mac)
            })?;
            let is_group = mac[0] & 1 != 0;
            if mac != [0; 6] && !is_group {
                self.mac = mac;
                return Ok(());
            }
            warn!(
                "virtio-net: {} is no station's address",
                EthernetAddress(mac)
            );
        }
        if self.mac == [0; 6] {
            let [a, b, c, d, ..] = (self.rx.paddr() >> 12).to_le_bytes();
            self.mac = [0x02, 0x56, d, c, b, a];
        }
        Ok(())
    }

    /// 5.1.4.2: without STATUS, the link is taken to be up, and nobody says so.
    fn read_link(&mut self) -> DevResult {
        self.link = if self.lifecycle.features().contains(STATUS) {
            let status = read_le16(&self.lifecycle, CONFIG_STATUS)?;
            Some(status & LINK_UP != 0)
        } else {
            None
        };
        Ok(())
    }

    /// Makes sure that buffers hold a header and the longest frame (5.1.4.2), and takes them out
    /// of the pool.
    fn prepare_pool(&mut self) -> DevResult {
        let needed = HEADER_LEN + ETHERNET_HEADER_LEN + TAG_LEN + usize::from(self.mtu);
        if self.pool.buffer_len() < needed {
            self.free.clear();
            self.pool = NetBufPool::new(self.pool.capacity(), needed)?;
        }
        while let Some(buf) = self.pool.alloc_boxed() {
            self.keep_buffer(buf);
        }
        Ok(())
    }

    /// Does what a [configuration change](InterruptCause::CONFIGURATION) asks for: reads the state
    /// of the link, and sees whether the device needs a reset.
    ///
    /// Only needed if the interrupt was acknowledged with an
    /// [`InterruptHandle`](crate::InterruptHandle).
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device needs a reset, and has been, or its configuration does not
    ///   settle: the state is what it was.
    /// * [`DevError::BadState`]: the device failed before.
    pub fn configuration_changed(&mut self) -> DevResult {
        let checked = self.lifecycle.check();
        self.settle(checked)?;
        let before = self.link;
        self.read_link()?;
        if self.link != before {
            let state = if self.link == Some(true) {
                "up"
            } else {
                "down"
            };
            info!("virtio-net: the link is {state}");
        }
        Ok(())
    }

    fn max_frame_len(&self) -> usize {
        usize::from(self.mtu) + ETHERNET_HEADER_LEN
    }

    /// Gives up on the device, and takes back what it had.
    fn fail(&mut self, why: &str) {
        self.lifecycle.fail(why);
        self.reclaim();
    }

    /// Takes back what the device had, if it was found to have failed.
    fn settle<R>(&mut self, result: DevResult<R>) -> DevResult<R> {
        if result.is_err() && !self.lifecycle.is_live() {
            self.reclaim();
        }
        result
    }

    /// Fails for a lie of the device.
    fn broken<R>(&mut self) -> DevResult<R> {
        self.fail("a queue is broken");
        Err(DevError::Io)
    }

    /// Takes back what the device had, unless it may still use it.
    fn reclaim(&mut self) {
        if self.lifecycle.is_stuck() {
            return;
        }
        for token in 0..QS {
            let posted = [&mut self.rx_posted, &mut self.tx_posted].map(|all| all[token].take());
            for posted in posted.into_iter().flatten() {
                // SAFETY: the device has been reset.
                let buf = unsafe { posted.unshare() };
                self.keep_buffer(buf);
            }
        }
    }

    /// Takes a buffer that is nobody's.
    fn take_buffer(&mut self) -> Option<NetBufBox> {
        // A buffer that was dropped is in the pool.
        self.free.pop().or_else(|| self.pool.alloc_boxed())
    }

    /// Keeps a buffer that is nobody's any more.
    fn keep_buffer(&mut self, buf: NetBufBox) {
        if self.free.len() < self.free.capacity() {
            self.free.push(buf);
        }
    }

    /// Adds a buffer to the receive queue, which has room for it.
    fn post(&mut self, buf: NetBufBox) -> DevResult {
        let len = buf.capacity();
        let posted = Posted::<H>::new(buf, len, BufferDirection::DeviceToDriver);
        // SAFETY: `posted` is valid and stays untouched in `rx_posted` until the device is done.
        match unsafe { self.rx.add(&[], &[posted.segment(len)]) } {
            Ok(token) => {
                self.rx_posted[usize::from(token)] = Some(posted);
                Ok(())
            }
            Err(error) => {
                // SAFETY: the device was never told of it.
                let buf = unsafe { posted.unshare() };
                self.keep_buffer(buf);
                Err(error.into())
            }
        }
    }

    /// Posts and publishes a buffer.
    fn repost(&mut self, buf: NetBufBox) -> DevResult {
        self.post(buf)?;
        self.rx.submit(self.lifecycle.live()?);
        Ok(())
    }

    /// Posts the buffers that were dropped or sent instead of being recycled, but leaves as many as
    /// the transmit queue has room for.
    fn replenish(&mut self) -> DevResult {
        let mut posted = false;
        while self.rx.free() > 0 {
            let has_surplus = self.free.len() > usize::from(self.tx.free());
            let buf = if has_surplus {
                self.free.pop()
            } else {
                self.pool.alloc_boxed()
            };
            let Some(buf) = buf else { break };
            self.post(buf)?;
            posted = true;
        }
        if posted {
            self.rx.submit(self.lifecycle.live()?);
        }
        Ok(())
    }

    /// Takes the buffers of frames that have been sent back.
    fn reap(&mut self) -> DevResult {
        loop {
            match self.tx.pop() {
                Ok(None) => return Ok(()),
                Ok(Some(used)) => {
                    let posted = self.tx_posted[usize::from(used.token)].take();
                    let Some(posted) = posted else {
                        return self.broken();
                    };
                    // SAFETY: the device has used it.
                    let buf = unsafe { posted.unshare() };
                    self.keep_buffer(buf);
                }
                Err(_) => return self.broken(),
            }
        }
    }

    /// Makes the buffer of this driver out of a pointer, or releases a foreign one to its owner.
    fn own(&self, ptr: NetBufPtr) -> DevResult<NetBufBox> {
        NetBuf::try_from_buf_ptr(ptr, &self.pool).map_err(|foreign| {
            drop(foreign);
            DevError::InvalidParam
        })
    }
}

/// Returns `len` places for buffers that the device has.
fn none_posted<H: Hal>(len: usize) -> DevResult<Box<[Option<Posted<H>>]>> {
    let mut places = Vec::new();
    places
        .try_reserve_exact(len)
        .map_err(|_| DevError::NoMemory)?;
    places.resize_with(len, || None);
    Ok(places.into_boxed_slice())
}

fn read_le16<T: Transport>(lifecycle: &Lifecycle<T>, offset: usize) -> DevResult<u16> {
    lifecycle.read_config(|transport| transport.read_config_space(offset).map(u16::from_le))
}

impl<H: Hal, T: Transport + Send + Sync, const QS: usize> BaseDriverOps for VirtIoNetDev<H, T, QS> {
    fn device_name(&self) -> &str {
        "virtio-net"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        let cause = cause(self.lifecycle.transport().ack_interrupt());
        if cause.contains(InterruptCause::CONFIGURATION) && self.lifecycle.is_live() {
            self.configuration_changed()?;
        }
        Ok(cause)
    }

    fn enable_interrupts(&mut self) -> DevResult<bool> {
        self.lifecycle.live()?;
        let received = self.rx.listen();
        let sent = self.tx.listen();
        Ok(received || sent)
    }

    fn disable_interrupts(&mut self) -> DevResult {
        self.lifecycle.live()?;
        self.rx.silence();
        self.tx.silence();
        Ok(())
    }
}

impl<H: Hal, T: Transport + Send + Sync, const QS: usize> NetDriverOps for VirtIoNetDev<H, T, QS> {
    fn mac_address(&self) -> EthernetAddress {
        EthernetAddress(self.mac)
    }

    fn can_transmit(&self) -> bool {
        // What has been sent and not been taken back makes room for both.
        let sent = self.tx.has_used();
        let room = self.tx.free() > 0 || sent;
        let buffer = !self.free.is_empty() || sent || self.pool.available() > 0;
        self.lifecycle.is_live() && room && buffer
    }

    fn can_receive(&self) -> bool {
        self.lifecycle.is_live() && self.rx.has_used()
    }

    fn rx_queue_size(&self) -> usize {
        self.rx.size().into()
    }

    fn tx_queue_size(&self) -> usize {
        self.tx.size().into()
    }

    fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult {
        let buf = self.own(rx_buf)?;
        self.lifecycle.live()?;
        if self.rx.free() > 0 {
            self.repost(buf)
        } else {
            self.keep_buffer(buf);
            Ok(())
        }
    }

    fn recycle_tx_buffers(&mut self) -> DevResult {
        self.lifecycle.live()?;
        self.reap()
    }

    fn transmit(&mut self, tx_buf: NetBufPtr) -> DevResult {
        let mut buf = self.own(tx_buf)?;
        self.lifecycle.live()?;
        let frame_len = buf.packet_len();
        if frame_len == 0 || frame_len > self.max_frame_len() || buf.header_len() != self.header_len
        {
            self.keep_buffer(buf);
            return Err(DevError::InvalidParam);
        }
        if self.tx.free() == 0 {
            self.reap()?;
        }
        if self.tx.free() == 0 {
            self.keep_buffer(buf);
            return Err(DevError::Again);
        }
        // 5.1.6.2.1: without offloads, all of the header is 0.
        buf.raw_buf_mut()[..self.header_len].fill(0);
        let len = self.header_len + frame_len;
        let posted = Posted::<H>::new(buf, len, BufferDirection::DriverToDevice);
        // SAFETY: `posted` is valid and stays untouched in `tx_posted` until the device is done.
        match unsafe { self.tx.add(&[posted.segment(len)], &[]) } {
            Ok(token) => self.tx_posted[usize::from(token)] = Some(posted),
            Err(error) => {
                // SAFETY: the device was never told of it.
                let buf = unsafe { posted.unshare() };
                self.keep_buffer(buf);
                return Err(error.into());
            }
        }
        self.tx.submit(self.lifecycle.live()?);
        Ok(())
    }

    fn receive(&mut self) -> DevResult<NetBufPtr> {
        self.lifecycle.live()?;
        self.replenish()?;
        let used = match self.rx.pop() {
            Ok(Some(used)) => used,
            Ok(None) => {
                self.idle = self.idle.saturating_add(1);
                let checked = self.lifecycle.check_idle(self.idle);
                self.settle(checked)?;
                return Err(DevError::Again);
            }
            Err(_) => return self.broken(),
        };
        self.idle = 0;
        let Some(posted) = self.rx_posted[usize::from(used.token)].take() else {
            return self.broken();
        };
        // SAFETY: the device has used it.
        let mut buf = unsafe { posted.unshare() };
        let frame_len = (used.len as usize)
            .checked_sub(self.header_len)
            .filter(|&len| len >= ETHERNET_HEADER_LEN);
        let Some(frame_len) = frame_len else {
            error!(
                "virtio-net: {} bytes received, less than the headers",
                used.len
            );
            self.repost(buf)?;
            return Err(DevError::Io);
        };
        buf.try_set_lens(self.header_len, frame_len)?;
        Ok(buf.into_buf_ptr())
    }

    fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr> {
        if size == 0 || size > self.max_frame_len() {
            return Err(DevError::InvalidParam);
        }
        self.lifecycle.live()?;
        if self.free.is_empty() {
            self.reap()?;
        }
        let mut buf = self.take_buffer().ok_or(DevError::NoMemory)?;
        buf.try_set_lens(self.header_len, size)?;
        Ok(buf.into_buf_ptr())
    }

    fn capabilities(&self) -> NetCapabilities {
        NetCapabilities::new()
            .with_max_frame_len(self.max_frame_len())
            .with_link(self.link)
    }
}

impl<H: Hal, T: Transport, const QS: usize> Drop for VirtIoNetDev<H, T, QS> {
    fn drop(&mut self) {
        // 3.3.1: reset first, then free.
        if self.lifecycle.stop().is_ok() {
            self.reclaim();
            return;
        }
        self.rx.keep();
        self.tx.keep();
        for places in [&mut self.rx_posted, &mut self.tx_posted] {
            mem::take(places)
                .into_iter()
                .flatten()
                .for_each(Posted::forget);
        }
    }
}
