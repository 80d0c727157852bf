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
