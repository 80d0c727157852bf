//! A program of `core` alone that has the driver crates linked in. It is linked, and never run.
//!
//! Each crate's entry points are reached from `_start` in ways that the compiler cannot see
//! through, and its drivers as trait objects, so that every method of theirs is in the program.

#![no_std]
#![no_main]

#[cfg(feature = "heap")]
mod heap;
#[cfg(feature = "virtio")]
mod virtio;

#[cfg(any(feature = "base", feature = "references"))]
mod base {
    use core::hint::black_box;

    use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};

    struct Nothing;

    impl BaseDriverOps for Nothing {
        fn device_name(&self) -> &str {
            "nothing"
        }

        fn device_type(&self) -> DeviceType {
            DeviceType::Char
        }
    }

    pub(crate) fn link() -> DevResult<InterruptCause> {
        black_box(&mut Nothing as &mut dyn BaseDriverOps);
        black_box(&DevError::Io as &dyn core::error::Error);
        black_box(&mut Nothing).acknowledge_interrupt()
    }
}

#[cfg(any(feature = "block", feature = "references"))]
mod block {
    use core::hint::black_box;

    use axdriver_block::{DevResult, check_request, check_write};

    pub(crate) fn link() -> DevResult<u64> {
        let blocks = check_request(black_box(8), black_box(512), black_box(1), black_box(512))?;
        check_write(blocks, black_box(512), black_box(0), 512, black_box(true))
    }
}

#[cfg(any(feature = "display", feature = "references"))]
mod display {
    use core::hint::black_box;

    use axdriver_display::FrameBuffer;

    pub(crate) fn link() {
        let mut pixels = [0; 64];
        let mut frame = FrameBuffer::from_slice(&mut pixels);
        black_box(frame.as_bytes_mut()).fill(0xff);
        black_box(&frame as &dyn core::fmt::Debug);
    }
}

#[cfg(any(feature = "net", feature = "references"))]
mod net {
    use core::{hint::black_box, ptr::NonNull};

    use axdriver_net::{EthernetAddress, NetBufPtr};

    pub(crate) fn link() {
        black_box(&EthernetAddress([2, 0, 0, 0, 0, 1]) as &dyn core::fmt::Display);
        let mut frame = [0_u8; 64];
        let start = NonNull::from(&mut frame).cast::<u8>();
        // SAFETY: the packet is the array, which outlives the pointer and is not used beside it.
        let mut lent = unsafe { NetBufPtr::new(start, start, 64) };
        black_box(lent.packet_mut()).fill(0xff);
    }
}

#[cfg(feature = "references")]
mod references {
    use alloc::boxed::Box;
    use core::hint::black_box;

    use axdriver_base::DevResult;
    use axdriver_block::{BlockDriverOps, conformance as block_contract, ramdisk::RamDisk};
    use axdriver_display::{
        DisplayDriverOps, conformance as display_contract, memory::MemoryDisplay,
    };
    use axdriver_net::{
        EthernetAddress, NetDriverOps, conformance as net_contract, loopback::LoopbackNic,
        smoltcp::SmoltcpDevice,
    };

    extern crate alloc;

    pub(crate) fn link() -> DevResult {
        let mut disk: Box<dyn BlockDriverOps> = Box::new(RamDisk::new(4096));
        black_box(block_contract::check(&mut disk).is_ok());

        let mut screen: Box<dyn DisplayDriverOps> = Box::new(MemoryDisplay::new(16, 16)?);
        black_box(display_contract::check(&mut screen).is_ok());

        let card = LoopbackNic::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 8)?;
        let mut card: Box<dyn NetDriverOps> = Box::new(card);
        black_box(net_contract::check(&mut card, &mut net_contract::Mirror).is_ok());
        black_box(SmoltcpDevice::new(card).dropped());
        Ok(())
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Where the program would start.
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    use core::hint::black_box;

    #[cfg(any(feature = "base", feature = "references"))]
    black_box(base::link().is_ok());
    #[cfg(any(feature = "block", feature = "references"))]
    black_box(block::link().is_ok());
    #[cfg(any(feature = "display", feature = "references"))]
    display::link();
    #[cfg(any(feature = "net", feature = "references"))]
    net::link();
    #[cfg(feature = "references")]
    black_box(references::link().is_ok());
    #[cfg(feature = "virtio")]
    black_box(virtio::link().is_ok());
    loop {
        black_box(());
    }
}
