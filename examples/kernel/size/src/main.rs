//! The least kernel with one driver or none. It is built to be weighed, not to be run: see `cargo kernel size`.

#![no_std]
#![no_main]

use core::alloc::{GlobalAlloc, Layout};
use core::panic::PanicInfo;

/// Somebody else's memory, behind functions that the compiler cannot see through.
struct Nothing;

// SAFETY: it never gives any memory out.
unsafe impl GlobalAlloc for Nothing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        core::hint::black_box(layout);
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        core::hint::black_box((block, layout));
    }
}

#[global_allocator]
static HEAP: Nothing = Nothing;

#[panic_handler]
fn panic(information: &PanicInfo<'_>) -> ! {
    // What a kernel has that prints its panics.
    core::hint::black_box(format_args!("{information}"));
    loop {
        core::hint::spin_loop();
    }
}

/// Defines a start with one driver, found over virtio-mmio and used through its trait.
#[allow(unused_macros, reason = "there may be no driver to weigh")]
macro_rules! start {
    ($bridge:ident, $driver:ty, $trait:path) => {
        use core::ptr::NonNull;
        use $bridge::{BufferDirection, MmioTransport, PhysAddr, VirtIoHal};

        struct Hal;

        // SAFETY: it has no memory, and is never run.
        unsafe impl VirtIoHal for Hal {
            fn dma_alloc(_: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
                core::hint::black_box((0, NonNull::dangling()))
            }

            unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
                0
            }

            unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
                core::hint::black_box(NonNull::dangling())
            }

            unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
                core::hint::black_box(buffer.addr().get() as PhysAddr)
            }

            unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
        }

        #[unsafe(no_mangle)]
        extern "C" fn _start(registers: *mut u8) {
            #[allow(unused_unsafe, reason = "this was not unsafe in version 0.2.0")]
            // SAFETY: never run.
            let found = unsafe { $bridge::probe_mmio_device(registers, 0x200) };
            if let Some((_, transport)) = found
                && let Ok(mut driver) = <$driver>::try_new(transport)
            {
                let driver: &mut dyn $trait = &mut driver;
                core::hint::black_box(driver);
            }
        }
    };
}

#[cfg(feature = "block")]
start!(
    axdriver_virtio,
    axdriver_virtio::VirtIoBlkDev::<Hal, MmioTransport<'static>>,
    axdriver_block::BlockDriverOps
);
#[cfg(feature = "net")]
start!(
    axdriver_virtio,
    axdriver_virtio::VirtIoNetDev::<Hal, MmioTransport<'static>, 64>,
    axdriver_net::NetDriverOps
);
#[cfg(feature = "gpu")]
start!(
    axdriver_virtio,
    axdriver_virtio::VirtIoGpuDev::<Hal, MmioTransport<'static>>,
    axdriver_display::DisplayDriverOps
);
#[cfg(feature = "published-block")]
start!(
    published_virtio,
    published_virtio::VirtIoBlkDev::<Hal, MmioTransport<'static>>,
    published_block::BlockDriverOps
);
#[cfg(feature = "published-net")]
start!(
    published_virtio,
    published_virtio::VirtIoNetDev::<Hal, MmioTransport<'static>, 64>,
    published_net::NetDriverOps
);
#[cfg(feature = "published-gpu")]
start!(
    published_virtio,
    published_virtio::VirtIoGpuDev::<Hal, MmioTransport<'static>>,
    published_display::DisplayDriverOps
);

#[cfg(not(any(
    feature = "block",
    feature = "net",
    feature = "gpu",
    feature = "published-block",
    feature = "published-net",
    feature = "published-gpu"
)))]
#[unsafe(no_mangle)]
extern "C" fn _start() {}
