//! Virtio over MMIO (VirtIO 1.3, 4.2), modern and legacy.
//!
//! Unsafe code here guards the registers that the caller of `new` promises, each part once.

use core::ptr::NonNull;

use safe_mmio::{
    UniqueMmioPointer, field, field_shared,
    fields::{ReadPure, ReadPureWrite, WriteOnly},
    split_fields,
};
use virtio_drivers::{
    Error, PAGE_SIZE, PhysAddr,
    transport::{
        DeviceStatus, DeviceType, InterruptStatus, Transport,
        mmio::{MmioError, MmioVersion, VirtIOHeader},
    },
};

use crate::{
    InterruptHandle,
    interrupt::{MmioInterrupt, status},
};

/// "virt", little-endian.
pub(crate) const MAGIC: u32 = 0x7472_6976;

/// The registers that say what kind of device this is (4.2.2), in the order in which they are to
/// be read (4.2.3.1.1).
#[repr(C)]
pub(crate) struct MmioVersionRegisters {
    pub(crate) magic: ReadPure<u32>,
    pub(crate) version: ReadPure<u32>,
    pub(crate) device_id: ReadPure<u32>,
    pub(crate) vendor_id: ReadPure<u32>,
}

/// The registers that set a device up and drive it (4.2.2 and, for those of the legacy interface,
/// 4.2.4).
#[repr(C)]
struct SetupRegisters {
    device_features: ReadPure<u32>,
    device_features_sel: WriteOnly<u32>,
    _reserved_018: [u32; 2],
    driver_features: WriteOnly<u32>,
    driver_features_sel: WriteOnly<u32>,
    legacy_guest_page_size: WriteOnly<u32>,
    _reserved_02c: u32,
    queue_sel: WriteOnly<u32>,
    queue_size_max: ReadPure<u32>,
    queue_size: WriteOnly<u32>,
    legacy_queue_align: WriteOnly<u32>,
    legacy_queue_pfn: ReadPureWrite<u32>,
    queue_ready: ReadPureWrite<u32>,
    _reserved_048: [u32; 2],
    queue_notify: WriteOnly<u32>,
    _reserved_054: [u32; 3],
}

/// The registers behind those of the interrupt.
#[repr(C)]
struct StatusRegisters {
    status: ReadPureWrite<u32>,
    _reserved_074: [u32; 3],
    queue_desc_low: WriteOnly<u32>,
    queue_desc_high: WriteOnly<u32>,
    _reserved_088: [u32; 2],
    queue_driver_low: WriteOnly<u32>,
    queue_driver_high: WriteOnly<u32>,
    _reserved_098: [u32; 2],
    queue_device_low: WriteOnly<u32>,
    queue_device_high: WriteOnly<u32>,
    _reserved_0a8: [u32; 21],
    config_generation: ReadPure<u32>,
}

/// All registers of a device, but for the configuration space behind them.
#[repr(C)]
struct Registers {
    identity: MmioVersionRegisters,
    setup: SetupRegisters,
    interrupt: MmioInterrupt,
    _reserved_068: [u32; 2],
    status: StatusRegisters,
}

const _: () = assert!(size_of::<Registers>() == CONFIG_SPACE);
const _: () = assert!(core::mem::offset_of!(Registers, interrupt) == 0x60);
const _: () = assert!(core::mem::offset_of!(Registers, status) == 0x70);

/// Where the configuration space starts.
const CONFIG_SPACE: usize = 0x100;

/// The most looks at a register in the wait for a reset when the transport is dropped.
const RESET_POLLS: u32 = 1 << 20;

/// A virtio device behind memory-mapped registers (VirtIO 1.3, 4.2).
///
/// Dropping it resets the device, unless the last status that it was given through this transport
/// is a reset already, or it was given none: a device that was only looked at stays as it is.
#[derive(Debug)]
pub struct MmioTransport<'a> {
    setup: UniqueMmioPointer<'a, SetupRegisters>,
    /// `None` after [`split_interrupt`](Self::split_interrupt).
    interrupt: Option<InterruptHandle<'a>>,
    status: UniqueMmioPointer<'a, StatusRegisters>,
    config_space: UniqueMmioPointer<'a, [u8]>,
    version: MmioVersion,
    device_type: DeviceType,
    vendor_id: u32,
    /// Whether a status was written, and the last was not that of a reset.
    started: bool,
}

// SAFETY: what `&MmioTransport` can do is read registers that have no side effects when read, and
// that may happen on several processors at once.
unsafe impl Sync for MmioTransport<'_> {}

impl<'a> MmioTransport<'a> {
    /// Makes a transport of the `mmio_size` bytes of registers at `header`.
    ///
    /// Reads the magic value, the version and the device id, in this order and no further than the
    /// first that is wrong, and writes nothing.
    ///
    /// # Errors
    ///
    /// * [`MmioError::MmioRegionTooSmall`]: less than 256 bytes.
    /// * [`MmioError::BadMagic`], [`MmioError::UnsupportedVersion`],
    ///   [`MmioError::InvalidDeviceID`]: no virtio device, none that is known, or an empty slot.
    ///
    /// # Safety
    ///
    /// `header` must point to the registers of a virtio MMIO device or of an empty slot, aligned
    /// to 4 bytes and mapped as device memory for `'a`, and nothing else may access them meanwhile.
    pub unsafe fn new(header: NonNull<VirtIOHeader>, mmio_size: usize) -> Result<Self, MmioError> {
        let Some(config_len) = mmio_size.checked_sub(CONFIG_SPACE) else {
            return Err(MmioError::MmioRegionTooSmall);
        };
        // SAFETY: the caller promises that the region is valid, and it is at least this large.
        let config = unsafe { header.cast::<u8>().byte_add(CONFIG_SPACE) };
        let config = NonNull::slice_from_raw_parts(config, config_len);
        // SAFETY: the caller promises that the region is valid, and that nothing else accesses it.
        let config_space = unsafe { UniqueMmioPointer::new(config) };
        // SAFETY: as above; the two parts do not overlap.
        let registers = unsafe { UniqueMmioPointer::new(header.cast::<Registers>()) };
        // SAFETY: each field is taken once, and `registers` is not used any more.
        let (identity, setup, interrupt, status) =
            unsafe { split_fields!(registers, identity, setup, interrupt, status) };

        let magic = field_shared!(identity, magic).read();
        if magic != MAGIC {
            return Err(MmioError::BadMagic(magic));
        }
        let version = MmioVersion::try_from(field_shared!(identity, version).read())?;
        let device_id = field_shared!(identity, device_id).read();
        let device_type = DeviceType::try_from(device_id).map_err(MmioError::InvalidDeviceID)?;
        let vendor_id = field_shared!(identity, vendor_id).read();
        Ok(Self {
            setup,
            interrupt: Some(InterruptHandle::mmio(interrupt)),
            status,
            config_space,
            version,
            device_type,
            vendor_id,
            started: false,
        })
    }

    /// Returns the version of the register layout.
    #[must_use]
    pub fn version(&self) -> MmioVersion {
        self.version
    }

    /// Returns the vendor id, as it was when the transport was made.
    #[must_use]
    pub fn vendor_id(&self) -> u32 {
        self.vendor_id
    }

    /// Takes the interrupt side away, for the handler of the device's interrupt. `None` if it was
    /// taken before.
    pub fn split_interrupt(&mut self) -> Option<InterruptHandle<'a>> {
        self.interrupt.take()
    }

    fn select_queue(&mut self, queue: u16) {
        field!(self.setup, queue_sel).write(queue.into());
    }
}

/// Returns the low and the high half of an address.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of the address"
)]
pub(super) fn halves(address: PhysAddr) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

impl Transport for MmioTransport<'_> {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            field!(self.setup, device_features_sel).write(half);
            u64::from(field_shared!(self.setup, device_features).read())
        });
        low | high << 32
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        let (low, high) = halves(driver_features);
        for (half, features) in [(0, low), (1, high)] {
            field!(self.setup, driver_features_sel).write(half);
            field!(self.setup, driver_features).write(features);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.select_queue(queue);
        field_shared!(self.setup, queue_size_max).read()
    }

    fn notify(&mut self, queue: u16) {
        field!(self.setup, queue_notify).write(queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(field_shared!(self.status, status).read())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.started = !status.is_empty();
        field!(self.status, status).write(status.bits());
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        match self.version {
            MmioVersion::Legacy => {
                field!(self.setup, legacy_guest_page_size).write(guest_page_size);
            }
            MmioVersion::Modern => {}
        }
    }

    fn requires_legacy_layout(&self) -> bool {
        self.version == MmioVersion::Legacy
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.select_queue(queue);
        field!(self.setup, queue_size).write(size);
        match self.version {
            MmioVersion::Legacy => {
                // 4.2.4: the page number of the first area; the others follow from it. An address
                // that is out of reach leaves the queue unused.
                #[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
                let page_size = PAGE_SIZE as u32;
                let page = descriptors / PhysAddr::from(page_size);
                field!(self.setup, legacy_queue_align).write(page_size);
                field!(self.setup, legacy_queue_pfn).write(u32::try_from(page).unwrap_or(0));
            }
            MmioVersion::Modern => {
                let (low, high) = halves(descriptors);
                field!(self.status, queue_desc_low).write(low);
                field!(self.status, queue_desc_high).write(high);
                let (low, high) = halves(driver_area);
                field!(self.status, queue_driver_low).write(low);
                field!(self.status, queue_driver_high).write(high);
                let (low, high) = halves(device_area);
                field!(self.status, queue_device_low).write(low);
                field!(self.status, queue_device_high).write(high);
                field!(self.setup, queue_ready).write(1);
            }
        }
    }

    fn queue_unset(&mut self, queue: u16) {
        self.select_queue(queue);
        match self.version {
            MmioVersion::Legacy => field!(self.setup, legacy_queue_pfn).write(0),
            MmioVersion::Modern => {
                field!(self.setup, queue_ready).write(0);
                // 4.2.2.2: the queue has stopped when the register reads 0.
                for _ in 0..RESET_POLLS {
                    if field_shared!(self.setup, queue_ready).read() == 0 {
                        break;
                    }
                    core::hint::spin_loop();
                }
            }
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.select_queue(queue);
        match self.version {
            MmioVersion::Legacy => field_shared!(self.setup, legacy_queue_pfn).read() != 0,
            MmioVersion::Modern => field_shared!(self.setup, queue_ready).read() != 0,
        }
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        match &self.interrupt {
            Some(interrupt) => status(interrupt.acknowledge()),
            None => InterruptStatus::empty(),
        }
    }

    fn read_config_generation(&self) -> u32 {
        match self.version {
            // 4.2.4: the legacy interface has no such register.
            MmioVersion::Legacy => 0,
            MmioVersion::Modern => field_shared!(self.status, config_generation).read(),
        }
    }

    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        offset: usize,
    ) -> Result<T, Error> {
        super::read_config(&self.config_space, offset)
    }

    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        super::write_config(&mut self.config_space, offset, value)
    }
}

impl Drop for MmioTransport<'_> {
    fn drop(&mut self) {
        if !self.started || self.get_status().is_empty() {
            return;
        }
        self.set_status(DeviceStatus::empty());
        for _ in 0..RESET_POLLS {
            if self.get_status().is_empty() {
                return;
            }
            core::hint::spin_loop();
        }
        log::error!("virtio-mmio: the device does not reset");
    }
}
