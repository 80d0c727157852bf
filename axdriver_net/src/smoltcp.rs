//! smoltcp over any driver: [`SmoltcpDevice`] is a [`phy::Device`] on top of a [`NetDriverOps`].

use alloc::vec;

use ::smoltcp::{
    phy::{self, DeviceCapabilities, Medium},
    time::Instant,
};

use crate::{DevError, NetBufPtr, NetDriverOps};

/// A driver as smoltcp wants it. `D` is the driver, a mutable reference to it, or a box of it.
///
/// A frame is read and written where the driver has it, without a copy.
///
/// ```
/// use axdriver_net::{EthernetAddress, loopback::LoopbackNic, smoltcp::SmoltcpDevice};
/// use smoltcp::{
///     phy::{Device, TxToken},
///     time::Instant,
/// };
///
/// let nic = LoopbackNic::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 16)?;
/// let mut device = SmoltcpDevice::new(nic);
/// assert_eq!(device.capabilities().max_transmission_unit, 1514);
/// // Nothing has come in until something was sent.
/// assert!(device.receive(Instant::ZERO).is_none());
/// let token = device.transmit(Instant::ZERO).ok_or("no room")?;
/// token.consume(60, |frame| frame.fill(7));
/// assert!(device.receive(Instant::ZERO).is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SmoltcpDevice<D> {
    driver: D,
    /// The frame that the next receive token is for, which waits for room to answer it.
    waiting: Option<NetBufPtr>,
    /// The frame that the last receive token was for, which goes back to the driver before the next token is made.
    shown: Option<NetBufPtr>,
    dropped: u64,
}

impl<D: NetDriverOps> SmoltcpDevice<D> {
    /// Wraps a driver.
    #[must_use]
    pub const fn new(driver: D) -> Self {
        Self {
            driver,
            waiting: None,
            shown: None,
            dropped: 0,
        }
    }

    /// Returns the driver.
    #[must_use]
    pub const fn driver(&self) -> &D {
        &self.driver
    }

    /// Returns the driver, to be changed.
    #[must_use]
    pub const fn driver_mut(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Gives the driver back. A frame that waits for room to be answered is thrown away.
    #[must_use]
    pub fn into_driver(mut self) -> D {
        self.recycle();
        self.shown = self.waiting.take();
        self.recycle();
        self.driver
    }

    /// Returns how many frames were lost, in either direction, to errors of the driver.
    ///
    /// smoltcp takes no errors from a device; its protocols send a lost frame again, as after a loss on the cable.
    #[must_use]
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Gives all buffers back that are done with.
    fn recycle(&mut self) {
        // What the driver refuses goes back to its owner, and a device that has failed says so again on the next frame.
        if let Some(buf) = self.shown.take() {
            let _ = self.driver.recycle_rx_buffer(buf);
        }
        let _ = self.driver.recycle_tx_buffers();
    }

    /// Takes the next good frame from the driver.
    fn take_frame(&mut self) -> Option<NetBufPtr> {
        // Behind a bad frame there may be a good one, but a device that has only bad ones is not waited for.
        for _ in 0..self.driver.rx_queue_size() {
            match self.driver.receive() {
                Ok(buf) => return Some(buf),
                Err(DevError::Io) => self.dropped = self.dropped.saturating_add(1),
                Err(_) => break,
            }
        }
        None
    }
}

impl<D: NetDriverOps> phy::Device for SmoltcpDevice<D> {
    type RxToken<'a>
        = RxToken<'a>
    where
        D: 'a;
    type TxToken<'a>
        = TxToken<'a, D>
    where
        D: 'a;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        self.recycle();
        let frame = self.waiting.take().or_else(|| self.take_frame())?;
        // A frame is shown only with room for an answer. It is taken before that is asked, since the room that it
        // leaves may be the one that is missing.
        if !self.driver.can_transmit() {
            self.waiting = Some(frame);
            return None;
        }
        let frame = self.shown.insert(frame).packet();
        let answer = TxToken {
            driver: &mut self.driver,
            dropped: &mut self.dropped,
        };
        Some((RxToken { frame }, answer))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Self::TxToken<'_>> {
        self.recycle();
        self.driver.can_transmit().then_some(TxToken {
            driver: &mut self.driver,
            dropped: &mut self.dropped,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.driver.capabilities().max_frame_len;
        let burst = self.driver.rx_queue_size().min(self.driver.tx_queue_size());
        capabilities.max_burst_size = Some(burst);
        capabilities
    }
}

/// A frame that has come in.
#[derive(Debug)]
pub struct RxToken<'a> {
    frame: &'a [u8],
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F>(self, f: F) -> R
    where
        F: FnOnce(&[u8]) -> R,
    {
        f(self.frame)
    }
}

/// Room for a frame to be sent.
#[derive(Debug)]
pub struct TxToken<'a, D> {
    driver: &'a mut D,
    dropped: &'a mut u64,
}

impl<D: NetDriverOps> phy::TxToken for TxToken<'_, D> {
    fn consume<R, F>(self, len: usize, f: F) -> R
    where
        F: FnOnce(&mut [u8]) -> R,
    {
        match self.driver.alloc_tx_buffer(len) {
            Ok(mut buf) if buf.packet_len() == len => {
                let result = f(buf.packet_mut());
                if self.driver.transmit(buf).is_err() {
                    *self.dropped = self.dropped.saturating_add(1);
                }
                result
            }
            // smoltcp wants the frame to be written all the same.
            _ => {
                *self.dropped = self.dropped.saturating_add(1);
                f(&mut vec![0; len])
            }
        }
    }
}

#[cfg(all(test, feature = "loopback"))]
mod tests {
    use ::smoltcp::{
        iface::{Config, Interface, SocketSet, SocketStorage},
        phy::{Device, RxToken as _, TxToken as _},
        socket::udp,
        wire::{IpAddress, IpCidr},
    };

    use super::*;
    use crate::{DevResult, EthernetAddress, loopback::LoopbackNic};

    const ADDRESS: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    #[expect(clippy::unwrap_used, reason = "a helper of tests")]
    fn nic(queue_size: usize) -> LoopbackNic {
        LoopbackNic::new(ADDRESS, queue_size).unwrap()
    }

    #[test]
    fn a_datagram_goes_through_the_stack_and_the_driver() -> DevResult {
        let mut device = SmoltcpDevice::new(nic(4));
        let config = Config::new(::smoltcp::wire::EthernetAddress(ADDRESS.0).into());
        let mut iface = Interface::new(config, &mut device, Instant::ZERO);
        let address = IpAddress::v4(127, 0, 0, 1);
        iface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(address, 8)).unwrap();
        });

        let (mut rx_meta, mut rx_data) = ([udp::PacketMetadata::EMPTY; 4], [0; 4096]);
        let (mut tx_meta, mut tx_data) = ([udp::PacketMetadata::EMPTY; 4], [0; 4096]);
        let mut socket = udp::Socket::new(
            udp::PacketBuffer::new(&mut rx_meta[..], &mut rx_data[..]),
            udp::PacketBuffer::new(&mut tx_meta[..], &mut tx_data[..]),
        );
        socket.bind(7).unwrap();
        let mut storage = [SocketStorage::EMPTY];
        let mut sockets = SocketSet::new(&mut storage[..]);
        let handle = sockets.add(socket);

        for round in 0..100_u8 {
            let socket = sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.send_slice(&[round; 1000], (address, 7)).unwrap();
            let mut polls = 0;
            while !sockets.get_mut::<udp::Socket<'_>>(handle).can_recv() {
                iface.poll(Instant::from_millis(polls), &mut device, &mut sockets);
                polls += 1;
                assert!(polls < 100);
            }
            let socket = sockets.get_mut::<udp::Socket<'_>>(handle);
            assert_eq!(socket.recv().unwrap().0, [round; 1000]);
        }
        assert_eq!(device.dropped(), 0);
        Ok(())
    }

    #[test]
    fn a_frame_that_is_not_consumed_goes_back_to_the_driver() {
        let mut device = SmoltcpDevice::new(nic(1));
        for _ in 0..10 {
            let token = device.transmit(Instant::ZERO).unwrap();
            token.consume(60, |frame| frame.fill(1));
            assert!(device.receive(Instant::ZERO).is_some());
        }
        let mut nic = device.into_driver();
        let all = [nic.alloc_tx_buffer(60), nic.alloc_tx_buffer(60)];
        assert!(all.iter().all(Result::is_ok));
    }

    #[test]
    fn frames_can_be_answered_while_they_are_read() {
        let mut device = SmoltcpDevice::new(nic(2));
        let token = device.transmit(Instant::ZERO).unwrap();
        token.consume(60, |frame| frame.fill(1));
        let (rx, tx) = device.receive(Instant::ZERO).unwrap();
        rx.consume(|question| tx.consume(question.len(), |answer| answer.fill(question[0] + 1)));
        let (rx, _) = device.receive(Instant::ZERO).unwrap();
        rx.consume(|answer| assert_eq!(answer, [2; 60]));
    }

    #[test]
    fn without_room_to_answer_a_frame_waits_and_is_not_lost() {
        let mut device = SmoltcpDevice::new(nic(1));
        let token = device.transmit(Instant::ZERO).unwrap();
        token.consume(60, |frame| frame.fill(1));
        let held = device.driver_mut().alloc_tx_buffer(60).unwrap();
        assert!(device.receive(Instant::ZERO).is_none());
        assert!(device.receive(Instant::ZERO).is_none());
        drop(held);
        let (rx, _) = device.receive(Instant::ZERO).unwrap();
        rx.consume(|frame| assert_eq!(frame, [1; 60]));
    }

    #[test]
    fn a_full_loopback_can_be_received_from() {
        let mut device = SmoltcpDevice::new(nic(1));
        let token = device.transmit(Instant::ZERO).unwrap();
        token.consume(60, |frame| frame.fill(1));
        assert!(device.transmit(Instant::ZERO).is_none());
        assert!(device.receive(Instant::ZERO).is_some());
    }

    #[test]
    fn frames_too_long_for_the_driver_are_dropped_and_counted() {
        let mut device = SmoltcpDevice::new(nic(1));
        let token = device.transmit(Instant::ZERO).unwrap();
        let len = token.consume(1515, |frame| frame.len());
        assert_eq!(len, 1515);
        assert_eq!(device.dropped(), 1);
        assert!(!device.driver().can_receive());
    }

    #[test]
    fn a_stack_on_a_borrowed_or_boxed_driver_can_be_sent() {
        const fn is_send<T: Send>() {}
        is_send::<SmoltcpDevice<LoopbackNic>>();
        is_send::<SmoltcpDevice<&mut dyn NetDriverOps>>();
        is_send::<SmoltcpDevice<alloc::boxed::Box<dyn NetDriverOps>>>();
    }
}
