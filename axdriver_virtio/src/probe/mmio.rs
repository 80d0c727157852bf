//! What is behind these registers? The MMIO transport's answer (VirtIO 1.3, 4.2.3.1).
//!
//! Unsafe code here guards the register address that the OS hands over.

use core::ptr::NonNull;

use axdriver_base::DeviceType;
use log::{debug, warn};
use safe_mmio::{SharedMmioPointer, UniqueMmioPointer, field_shared};
use virtio_drivers::transport::{
    DeviceType as VirtIoDeviceType,
    mmio::{MmioVersion, VirtIOHeader},
};

use crate::{
    MmioTransport, as_dev_type,
    transport::{MAGIC, MmioVersionRegisters},
};

/// The least size of the register region: all registers, and no configuration space.
const MIN_SIZE: usize = 0x100;

/// Looks for a virtio device behind the `reg_size` bytes of registers at `reg_base`.
///
/// Returns the type of the device and a transport to make a driver of, if there is a block,
/// network or GPU device. Else returns `None`, and a message at a fitting level says why: the
/// region is null, not aligned to 4 bytes or shorter than 256 bytes; the magic value or the version
/// is unknown; the slot is empty; the device is of another type.
///
/// Whatever is returned, no register has been written: a device that another driver uses goes on.
///
/// # Safety
///
/// If `reg_base` is not null and `reg_size` is at least 256, then `reg_base` must point to the
/// registers of a virtio MMIO device, or of an empty slot for one, which are mapped as device
/// memory for ever. If a transport is returned, nothing else may access the registers while it, or
/// the [`InterruptHandle`](crate::InterruptHandle) split off from it, lives.
///
/// # Examples
///
/// ```
/// # extern crate machine;
/// // SAFETY: a null pointer is never followed.
/// assert!(unsafe { axdriver_virtio::probe_mmio_device(core::ptr::null_mut(), 0x200) }.is_none());
/// ```
pub unsafe fn probe_mmio_device(
    reg_base: *mut u8,
    reg_size: usize,
) -> Option<(DeviceType, MmioTransport<'static>)> {
    let Some(header) = NonNull::new(reg_base.cast::<VirtIOHeader>()) else {
        warn!("virtio-mmio: the register address is null");
        return None;
    };
    if !header.is_aligned() || reg_size < MIN_SIZE {
        warn!("virtio-mmio: {reg_size} bytes at {header:p} cannot be the registers of a device");
        return None;
    }

    // SAFETY: the caller promises valid registers, which nothing else accesses meanwhile; these
    // are the first of them.
    let identity = unsafe { UniqueMmioPointer::new(header.cast::<MmioVersionRegisters>()) };
    let device_type = identify(&identity, header)?;

    // SAFETY: the caller promises valid registers for ever, which nothing else accesses while the
    // transport lives; `identity` is not used any more.
    match unsafe { MmioTransport::new(header, reg_size) } {
        Ok(transport) => Some((device_type, transport)),
        Err(error) => {
            warn!("virtio-mmio at {header:p}: {error}");
            None
        }
    }
}

/// Reads what kind of device it is, no further than the first register that is wrong (4.2.3.1.1).
fn identify(
    identity: &SharedMmioPointer<'_, MmioVersionRegisters>,
    address: NonNull<VirtIOHeader>,
) -> Option<DeviceType> {
    let magic = field_shared!(identity, magic).read();
    if magic != MAGIC {
        warn!("virtio-mmio at {address:p}: no device, the magic value is {magic:#010x}");
        return None;
    }
    let version = field_shared!(identity, version).read();
    if MmioVersion::try_from(version).is_err() {
        warn!("virtio-mmio at {address:p}: unknown version {version}");
        return None;
    }
    let id = field_shared!(identity, device_id).read();
    if id == 0 {
        // 4.2.2.2: an empty slot, which is not an error.
        debug!("virtio-mmio at {address:p}: empty");
        return None;
    }
    let device_type = VirtIoDeviceType::try_from(id).ok().and_then(as_dev_type);
    if device_type.is_none() {
        debug!("virtio-mmio at {address:p}: no driver for device type {id}");
    }
    device_type
}
