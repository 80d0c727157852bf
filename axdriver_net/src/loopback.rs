//! A network card that receives what it transmits: the reference implementation, and a fake for tests.

use alloc::{collections::VecDeque, sync::Arc};

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};

use crate::{
    EthernetAddress, NetBuf, NetBufBox, NetBufPool, NetBufPtr, NetCapabilities, NetDriverOps,
};

/// The length of a buffer, in bytes: room for a frame of [`NetCapabilities::max_frame_len`].
const BUFFER_LEN: usize = 1526;

/// A network card whose every frame comes back to it, whomever it is for.
///
/// It holds as many frames as its queues are long, and refuses more until some are received.
///
/// ```
/// use axdriver_net::{DevError, EthernetAddress, NetDriverOps, loopback::LoopbackNic};
///
/// let mut nic = LoopbackNic::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 16)?;
/// let mut sent = nic.alloc_tx_buffer(60)?;
/// sent.packet_mut().fill(7);
/// nic.transmit(sent)?;
///
/// let received = nic.receive()?;
/// assert_eq!(received.packet(), [7; 60]);
/// nic.recycle_rx_buffer(received)?;
/// assert_eq!(nic.receive().err(), Some(DevError::Again));
/// # Ok::<(), DevError>(())
/// ```
#[derive(Debug)]
pub struct LoopbackNic {
    address: EthernetAddress,
    /// The buffers of frames on their way and of frames in the hands of the caller.
    pub(crate) pool: Arc<NetBufPool>,
    /// The frames on their way, the oldest first. It has room for `queue_size` of them, and never more in it.
    frames: VecDeque<NetBufBox>,
    queue_size: usize,
}

impl LoopbackNic {
    /// Makes a network card with this address, which holds up to `queue_size` frames.
    ///
    /// # Errors
    ///
    /// * [`DevError::InvalidParam`]: `address` is all zeros or a group's, or `queue_size` is 0 or beyond reason.
    /// * [`DevError::NoMemory`]: there is not enough for the buffers.
    pub fn new(address: EthernetAddress, queue_size: usize) -> DevResult<Self> {
        if address.is_multicast() || address.0 == [0; 6] {
            return Err(DevError::InvalidParam);
        }
        // A full queue on the way, and as many frames that are being filled or looked at.
        let capacity = queue_size.checked_mul(2).ok_or(DevError::InvalidParam)?;
        let pool = NetBufPool::new(capacity, BUFFER_LEN)?;
        let mut frames = VecDeque::new();
        frames
            .try_reserve_exact(queue_size)
            .map_err(|_| DevError::NoMemory)?;
        Ok(Self {
            address,
            pool,
            frames,
            queue_size,
        })
    }

    /// Returns `buf` as one of this device, or gives it back to its owner.
    fn own(&self, buf: NetBufPtr) -> DevResult<NetBufBox> {
        NetBuf::try_from_buf_ptr(buf, &self.pool).map_err(|_| DevError::InvalidParam)
    }
}

impl BaseDriverOps for LoopbackNic {
    fn device_name(&self) -> &str {
        "loopback"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }
}

impl NetDriverOps for LoopbackNic {
    fn mac_address(&self) -> EthernetAddress {
        self.address
    }

    fn can_transmit(&self) -> bool {
        self.frames.len() < self.queue_size && self.pool.available() > 0
    }

    fn can_receive(&self) -> bool {
        !self.frames.is_empty()
    }

    fn rx_queue_size(&self) -> usize {
        self.queue_size
    }

    fn tx_queue_size(&self) -> usize {
        self.queue_size
    }

    fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult {
        self.own(rx_buf).map(drop)
    }

    fn recycle_tx_buffers(&mut self) -> DevResult {
        // A frame is received in the buffer that it was sent in.
        Ok(())
    }

    fn transmit(&mut self, tx_buf: NetBufPtr) -> DevResult {
        let frame = self.own(tx_buf)?;
        if self.frames.len() >= self.queue_size {
            return Err(DevError::Again);
        }
        self.frames.push_back(frame);
        Ok(())
    }

    fn receive(&mut self) -> DevResult<NetBufPtr> {
        let frame = self.frames.pop_front().ok_or(DevError::Again)?;
        Ok(frame.into_buf_ptr())
    }

    fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr> {
        if size == 0 || size > self.capabilities().max_frame_len {
            return Err(DevError::InvalidParam);
        }
        let mut buf = self.pool.alloc_boxed().ok_or(DevError::NoMemory)?;
        buf.try_set_lens(0, size)?;
        Ok(buf.into_buf_ptr())
    }

    fn capabilities(&self) -> NetCapabilities {
        NetCapabilities::new().with_link(Some(true))
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const ADDRESS: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn send(nic: &mut LoopbackNic, byte: u8) -> DevResult {
        let mut buf = nic.alloc_tx_buffer(60)?;
        buf.packet_mut().fill(byte);
        nic.transmit(buf)
    }

    #[test]
    fn frames_come_back_in_order_until_the_queue_is_full() {
        let mut nic = LoopbackNic::new(ADDRESS, 4).unwrap();
        for round in 0..3 {
            for byte in 0..4 {
                assert!(nic.can_transmit());
                send(&mut nic, round + byte).unwrap();
            }
            assert!(!nic.can_transmit());
            assert_eq!(send(&mut nic, 99), Err(DevError::Again));
            for byte in 0..4 {
                assert!(nic.can_receive());
                assert_eq!(nic.receive().unwrap().packet(), [round + byte; 60]);
            }
            assert!(!nic.can_receive());
            assert_eq!(nic.receive().err(), Some(DevError::Again));
        }
        assert_eq!(nic.pool.available(), nic.pool.capacity());
    }

    #[test]
    fn oversized_requests_do_not_use_up_buffers() {
        let mut nic = LoopbackNic::new(ADDRESS, 2).unwrap();
        for size in [0, 1515, 1526, usize::MAX].repeat(10) {
            let refused = nic.alloc_tx_buffer(size);
            assert_eq!(refused.err(), Some(DevError::InvalidParam));
        }
        assert_eq!(nic.alloc_tx_buffer(1514).unwrap().packet_len(), 1514);
    }

    #[test]
    fn errors_in_transmit_do_not_use_up_buffers() {
        let mut nic = LoopbackNic::new(ADDRESS, 1).unwrap();
        send(&mut nic, 1).unwrap();
        for _ in 0..10 {
            assert_eq!(send(&mut nic, 2), Err(DevError::Again));
        }
        assert_eq!(nic.pool.available(), 1);
    }

    #[test]
    fn buffers_of_another_card_go_back_to_it() {
        let mut nic = LoopbackNic::new(ADDRESS, 1).unwrap();
        let mut other = LoopbackNic::new(ADDRESS, 1).unwrap();
        for _ in 0..10 {
            let foreign = other.alloc_tx_buffer(60).unwrap();
            assert_eq!(nic.transmit(foreign), Err(DevError::InvalidParam));
            let foreign = other.alloc_tx_buffer(60).unwrap();
            assert_eq!(nic.recycle_rx_buffer(foreign), Err(DevError::InvalidParam));
        }
        assert_eq!(other.pool.available(), 2);
        assert!(!nic.can_receive());
    }

    #[test]
    fn running_out_of_buffers_is_no_memory_until_one_is_dropped() {
        let mut nic = LoopbackNic::new(ADDRESS, 2).unwrap();
        let mut held: Vec<_> = (0..4).map(|_| nic.alloc_tx_buffer(60).unwrap()).collect();
        assert!(!nic.can_transmit());
        assert_eq!(nic.alloc_tx_buffer(60).err(), Some(DevError::NoMemory));
        held.pop();
        assert!(nic.alloc_tx_buffer(60).is_ok());
    }

    #[test]
    fn frames_outlive_the_card() {
        let mut nic = LoopbackNic::new(ADDRESS, 1).unwrap();
        send(&mut nic, 5).unwrap();
        let frame = nic.receive().unwrap();
        drop(nic);
        assert_eq!(frame.packet(), [5; 60]);
    }

    #[test]
    fn impossible_cards_are_refused() {
        let refused = |address, queue_size| LoopbackNic::new(address, queue_size).err();
        assert_eq!(refused(ADDRESS, 0), Some(DevError::InvalidParam));
        assert_eq!(refused(ADDRESS, usize::MAX), Some(DevError::InvalidParam));
        assert_eq!(
            refused(EthernetAddress::BROADCAST, 1),
            Some(DevError::InvalidParam)
        );
        assert_eq!(
            refused(EthernetAddress([0; 6]), 1),
            Some(DevError::InvalidParam)
        );
    }
}
