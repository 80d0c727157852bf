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

#[cfg(test)]
mod tests {
    use axdriver_base::{BaseDriverOps, DevError, DeviceType};

    use super::*;

    /// A disk none of whose answers is a default, and each of whose errors is another.
    struct Disk;

    #[expect(
        clippy::missing_trait_methods,
        reason = "forwarding of these is tested where they are"
    )]
    impl BaseDriverOps for Disk {
        fn device_name(&self) -> &str {
            "disk"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Block
        }
    }

    impl BlockDriverOps for Disk {
        fn num_blocks(&self) -> u64 {
            1 << 40
        }

        fn block_size(&self) -> usize {
            4096
        }

        fn read_block(&mut self, _block_id: u64, buf: &mut [u8]) -> DevResult {
            buf.fill(7);
            Ok(())
        }

        fn write_block(&mut self, _block_id: u64, _buf: &[u8]) -> DevResult {
            Err(DevError::Io)
        }

        fn flush(&mut self) -> DevResult {
            Err(DevError::Again)
        }

        fn capabilities(&self) -> BlockCapabilities {
            BlockCapabilities::new().with_volatile_write_cache(false)
        }
    }

    fn answers_as_the_disk<D: BlockDriverOps>(mut driver: D) {
        let mut buf = [0];
        assert_eq!(driver.device_name(), "disk");
        assert_eq!(driver.num_blocks(), 1 << 40);
        assert_eq!(driver.block_size(), 4096);
        assert_eq!(driver.read_block(0, &mut buf), Ok(()));
        assert_eq!(buf, [7]);
        assert_eq!(driver.write_block(0, &buf), Err(DevError::Io));
        assert_eq!(driver.flush(), Err(DevError::Again));
        assert!(!driver.capabilities().volatile_write_cache);
    }

    #[test]
    fn a_borrowed_driver_answers_as_the_driver() {
        answers_as_the_disk(&mut Disk);
        answers_as_the_disk::<&mut dyn BlockDriverOps>(&mut Disk);
    }

    #[cfg(feature = "alloc")]
    #[test]
    fn a_boxed_driver_answers_as_the_driver() {
        answers_as_the_disk(Box::new(Disk));
        answers_as_the_disk::<Box<dyn BlockDriverOps>>(Box::new(Disk));
    }
}
