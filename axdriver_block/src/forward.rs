//! A borrowed or boxed disk driver is a disk driver: every method is forwarded to what stands behind the pointer.

// A method with a default that is not forwarded would answer for the pointer, not for the driver.
#![deny(clippy::missing_trait_methods)]

#[cfg(feature = "alloc")]
use alloc::boxed::Box;

use crate::{BlockCapabilities, BlockDriverOps, DevResult};

impl<T: BlockDriverOps + ?Sized> BlockDriverOps for &mut T {
    fn num_blocks(&self) -> u64 {
        T::num_blocks(self)
    }

    fn block_size(&self) -> usize {
        T::block_size(self)
    }

    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
        T::read_block(self, block_id, buf)
    }

    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
        T::write_block(self, block_id, buf)
    }

    fn flush(&mut self) -> DevResult {
        T::flush(self)
    }

    fn capabilities(&self) -> BlockCapabilities {
        T::capabilities(self)
    }
}

#[cfg(feature = "alloc")]
impl<T: BlockDriverOps + ?Sized> BlockDriverOps for Box<T> {
    fn num_blocks(&self) -> u64 {
        T::num_blocks(self)
    }

    fn block_size(&self) -> usize {
        T::block_size(self)
    }

    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
        T::read_block(self, block_id, buf)
    }

    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
        T::write_block(self, block_id, buf)
    }

    fn flush(&mut self) -> DevResult {
        T::flush(self)
    }

    fn capabilities(&self) -> BlockCapabilities {
        T::capabilities(self)
    }
}
