//! Probing on both transports, and the drivers that the features ask for.

use core::{hint::black_box, ptr::NonNull};

use axdriver_base::{DevResult, DeviceType};
#[cfg(feature = "virtio_block")]
use axdriver_virtio::VirtIoBlkDev;
#[cfg(feature = "virtio_gpu")]
use axdriver_virtio::VirtIoGpuDev;
#[cfg(feature = "virtio_net")]
use axdriver_virtio::VirtIoNetDev;
use axdriver_virtio::{
    BufferDirection, PciRangeAllocator, PhysAddr, Transport, VirtIoHal,
    pci::{Cam, MmioCam, PciRoot},
    probe_mmio_device, probe_pci_buses,
};

/// Memory that is not there: the program is linked, not run.
struct NoMemory;

// SAFETY: it hands out no memory, which `virtio-drivers` is told by the physical address 0.
unsafe impl VirtIoHal for NoMemory {
    fn dma_alloc(_: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        (0, NonNull::dangling())
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        -1
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::dangling()
    }

    unsafe fn share(_: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        0
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

fn start<T: Transport + Send + Sync + 'static>(found: DeviceType, transport: T) -> DevResult {
    match found {
        #[cfg(feature = "virtio_block")]
        DeviceType::Block => {
            use axdriver_block::BlockDriverOps;

            let mut disk = VirtIoBlkDev::<NoMemory, _>::try_new(transport)?;
            black_box(&mut disk as &mut dyn BlockDriverOps);
        }
        #[cfg(feature = "virtio_gpu")]
        DeviceType::Display => {
            use axdriver_display::DisplayDriverOps;

            let mut display = VirtIoGpuDev::<NoMemory, _>::try_new(transport)?;
            black_box(&mut display as &mut dyn DisplayDriverOps);
        }
        #[cfg(feature = "virtio_net")]
        DeviceType::Net => {
            use axdriver_net::NetDriverOps;

            let mut nic = VirtIoNetDev::<NoMemory, _, 64>::try_new(transport)?;
            black_box(&mut nic as &mut dyn NetDriverOps);
        }
        _ => drop(transport),
    }
    Ok(())
}

/// Reaches everything in the bridge that the features ask for.
pub(crate) fn link() -> DevResult {
    // SAFETY: never run.
    let found = unsafe { probe_mmio_device(black_box(core::ptr::null_mut()), 0x200) };
    if let Some((device_type, transport)) = found {
        start(device_type, transport)?;
    }
    // SAFETY: never run.
    let access = unsafe { MmioCam::new(black_box(core::ptr::null_mut()), Cam::Ecam) };
    let mut root = PciRoot::new(access);
    let mut window = PciRangeAllocator::new(0x1000_0000, 0x1000_0000);
    for (_, device_type, transport) in
        probe_pci_buses::<NoMemory, _>(&mut root, 0..=0, Some(&mut window))
    {
        start(device_type, transport)?;
    }
    Ok(())
}
