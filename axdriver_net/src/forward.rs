//! A borrowed or boxed network driver is a network driver: every method is forwarded to what stands behind the pointer.

// A method with a default that is not forwarded would answer for the pointer, not for the driver.
#![deny(clippy::missing_trait_methods)]

#[cfg(feature = "alloc")]
use alloc::boxed::Box;

use crate::{DevResult, EthernetAddress, NetBufPtr, NetCapabilities, NetDriverOps};

impl<T: NetDriverOps + ?Sized> NetDriverOps for &mut T {
    fn mac_address(&self) -> EthernetAddress {
        T::mac_address(self)
    }

    fn can_transmit(&self) -> bool {
        T::can_transmit(self)
    }

    fn can_receive(&self) -> bool {
        T::can_receive(self)
    }

    fn rx_queue_size(&self) -> usize {
        T::rx_queue_size(self)
    }

    fn tx_queue_size(&self) -> usize {
        T::tx_queue_size(self)
    }

    fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult {
        T::recycle_rx_buffer(self, rx_buf)
    }

    fn recycle_tx_buffers(&mut self) -> DevResult {
        T::recycle_tx_buffers(self)
    }

    fn transmit(&mut self, tx_buf: NetBufPtr) -> DevResult {
        T::transmit(self, tx_buf)
    }

    fn receive(&mut self) -> DevResult<NetBufPtr> {
        T::receive(self)
    }

    fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr> {
        T::alloc_tx_buffer(self, size)
    }

    fn capabilities(&self) -> NetCapabilities {
        T::capabilities(self)
    }
}

#[cfg(feature = "alloc")]
impl<T: NetDriverOps + ?Sized> NetDriverOps for Box<T> {
    fn mac_address(&self) -> EthernetAddress {
        T::mac_address(self)
    }

    fn can_transmit(&self) -> bool {
        T::can_transmit(self)
    }

    fn can_receive(&self) -> bool {
        T::can_receive(self)
    }

    fn rx_queue_size(&self) -> usize {
        T::rx_queue_size(self)
    }

    fn tx_queue_size(&self) -> usize {
        T::tx_queue_size(self)
    }

    fn recycle_rx_buffer(&mut self, rx_buf: NetBufPtr) -> DevResult {
        T::recycle_rx_buffer(self, rx_buf)
    }

    fn recycle_tx_buffers(&mut self) -> DevResult {
        T::recycle_tx_buffers(self)
    }

    fn transmit(&mut self, tx_buf: NetBufPtr) -> DevResult {
        T::transmit(self, tx_buf)
    }

    fn receive(&mut self) -> DevResult<NetBufPtr> {
        T::receive(self)
    }

    fn alloc_tx_buffer(&mut self, size: usize) -> DevResult<NetBufPtr> {
        T::alloc_tx_buffer(self, size)
    }

    fn capabilities(&self) -> NetCapabilities {
        T::capabilities(self)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "makes a buffer of no bytes")]
mod tests {
    use axdriver_base::{BaseDriverOps, DevError, DeviceType};

    use super::*;

    /// A network card none of whose answers is a default, and each of whose errors is another.
    struct Nic;

    #[expect(
        clippy::missing_trait_methods,
        reason = "forwarding of these is tested where they are"
    )]
    impl BaseDriverOps for Nic {
        fn device_name(&self) -> &str {
            "nic"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Net
        }
    }

    impl NetDriverOps for Nic {
        fn mac_address(&self) -> EthernetAddress {
            EthernetAddress([2, 0, 0, 0, 0, 9])
        }

        fn can_transmit(&self) -> bool {
            true
        }

        fn can_receive(&self) -> bool {
            false
        }

        fn rx_queue_size(&self) -> usize {
            3
        }

        fn tx_queue_size(&self) -> usize {
            4
        }

        fn recycle_rx_buffer(&mut self, _rx_buf: NetBufPtr) -> DevResult {
            Err(DevError::AlreadyExists)
        }

        fn recycle_tx_buffers(&mut self) -> DevResult {
            Err(DevError::BadState)
        }

        fn transmit(&mut self, _tx_buf: NetBufPtr) -> DevResult {
            Err(DevError::ResourceBusy)
        }

        fn receive(&mut self) -> DevResult<NetBufPtr> {
            Err(DevError::Io)
        }

        fn alloc_tx_buffer(&mut self, _size: usize) -> DevResult<NetBufPtr> {
            Err(DevError::Unsupported)
        }

        fn capabilities(&self) -> NetCapabilities {
            NetCapabilities::new().with_link(Some(false))
        }
    }

    fn empty_buffer() -> NetBufPtr {
        let nothing = core::ptr::NonNull::dangling();
        // SAFETY: there are no bytes to access.
        unsafe { NetBufPtr::new(nothing, nothing, 0) }
    }

    fn answers_as_the_card<D: NetDriverOps>(mut driver: D) {
        assert_eq!(driver.device_name(), "nic");
        assert_eq!(driver.mac_address().0[5], 9);
        assert!(driver.can_transmit() && !driver.can_receive());
        assert_eq!((driver.rx_queue_size(), driver.tx_queue_size()), (3, 4));
        assert_eq!(
            driver.recycle_rx_buffer(empty_buffer()),
            Err(DevError::AlreadyExists)
        );
        assert_eq!(driver.recycle_tx_buffers(), Err(DevError::BadState));
        assert_eq!(driver.transmit(empty_buffer()), Err(DevError::ResourceBusy));
        assert_eq!(driver.receive().err(), Some(DevError::Io));
        assert_eq!(
            driver.alloc_tx_buffer(60).err(),
            Some(DevError::Unsupported)
        );
        assert_eq!(driver.capabilities().link, Some(false));
    }

    #[test]
    fn a_borrowed_driver_answers_as_the_driver() {
        answers_as_the_card(&mut Nic);
        answers_as_the_card::<&mut dyn NetDriverOps>(&mut Nic);
    }

    #[cfg(feature = "alloc")]
    #[test]
    fn a_boxed_driver_answers_as_the_driver() {
        answers_as_the_card(Box::new(Nic));
        answers_as_the_card::<Box<dyn NetDriverOps>>(Box::new(Nic));
    }
}
