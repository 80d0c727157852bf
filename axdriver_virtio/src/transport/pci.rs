//! Virtio over PCI (VirtIO 1.3, 4.1).
//!
//! Unsafe code here guards the registers that the HAL maps, each structure once.

use core::ptr::NonNull;

use safe_mmio::{
    UniqueMmioPointer, field, field_shared,
    fields::{ReadPure, ReadPureWrite, WriteOnly},
};
use virtio_drivers::{
    Error, Hal, PhysAddr,
    transport::{
        DeviceStatus, DeviceType, InterruptStatus, Transport,
        pci::{
            VirtioPciError,
            bus::{ConfigurationAccess, DeviceFunction, PciRoot},
        },
    },
};

use super::mmio::halves;
use crate::{
    InterruptHandle,
    interrupt::{PciInterrupt, status},
    probe::pci::find_structures,
};

/// `struct virtio_pci_common_cfg` (4.1.4.3), with 64-bit fields as the halves that they are
/// accessed in (4.1.3.1).
#[repr(C)]
pub(crate) struct CommonConfig {
    device_feature_select: ReadPureWrite<u32>,
    device_feature: ReadPure<u32>,
    driver_feature_select: ReadPureWrite<u32>,
    driver_feature: ReadPureWrite<u32>,
    config_msix_vector: ReadPureWrite<u16>,
    num_queues: ReadPure<u16>,
    device_status: ReadPureWrite<u8>,
    config_generation: ReadPure<u8>,
    queue_select: ReadPureWrite<u16>,
    queue_size: ReadPureWrite<u16>,
    queue_msix_vector: ReadPureWrite<u16>,
    queue_enable: ReadPureWrite<u16>,
    queue_notify_off: ReadPure<u16>,
    queue_desc: [ReadPureWrite<u32>; 2],
    queue_driver: [ReadPureWrite<u32>; 2],
    queue_device: [ReadPureWrite<u32>; 2],
}

const _: () = assert!(size_of::<CommonConfig>() == 56);

/// The structures that a capability can name (4.1.4), with what this transport needs of each.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum CapabilityKind {
    Common,
    Notify,
    Isr,
    Device,
}

impl CapabilityKind {
    /// All kinds, in the order of their `cfg_type`, which starts at 1.
    pub(crate) const ALL: [Self; 4] = [Self::Common, Self::Notify, Self::Isr, Self::Device];

    /// Returns the least length of the structure that is of use, and its alignment, in bytes.
    pub(crate) const fn layout(self) -> (u32, u64) {
        match self {
            Self::Common => (56, 4),
            Self::Notify => (2, 2),
            Self::Isr => (1, 1),
            Self::Device => (1, 4),
        }
    }

    /// Returns how much of the structure is of use at most, in bytes: no more is mapped (4.1.4.1).
    pub(crate) const fn useful_len(self) -> u32 {
        match self {
            Self::Common => 56,
            // A page for each of 4096 queues.
            Self::Notify => 1 << 24,
            Self::Isr => 1,
            // The largest fields of any device type end well before.
            Self::Device => 0x1_0000,
        }
    }
}

/// A structure of the device, at a bus address that lies in one of its BARs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Region {
    pub(crate) paddr: PhysAddr,
    pub(crate) len: u32,
}

/// Where the structures of a device are, all checked against its BARs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Structures {
    pub(crate) device_type: DeviceType,
    pub(crate) common: Region,
    pub(crate) notify: Region,
    pub(crate) notify_off_multiplier: u32,
    pub(crate) isr: Region,
    pub(crate) device: Option<Region>,
}

/// The number of queues for which the place of the doorbell is remembered.
const DOORBELLS: usize = 16;

/// The most looks at the status in the wait for a reset when the transport is dropped.
const RESET_POLLS: u32 = 1 << 20;

/// A virtio device behind a PCI function (VirtIO 1.3, 4.1).
///
/// A notification is one 16-bit write. Dropping the transport resets the device, unless the last
/// status that it was given through it is a reset already, or it was given none: a device that was
/// only looked at stays as it is.
#[derive(Debug)]
pub struct PciTransport {
    device_type: DeviceType,
    common: UniqueMmioPointer<'static, CommonConfig>,
    notify: UniqueMmioPointer<'static, [WriteOnly<u16>]>,
    notify_off_multiplier: u32,
    /// The element of `notify` that belongs to each queue which was set up.
    doorbells: [Option<usize>; DOORBELLS],
    /// `None` after [`split_interrupt`](Self::split_interrupt).
    interrupt: Option<InterruptHandle<'static>>,
    device: Option<UniqueMmioPointer<'static, [u8]>>,
    /// Whether a status was written, and the last was not that of a reset.
    started: bool,
}

// SAFETY: what `&PciTransport` can do is read registers that have no side effects when read, and
// that may happen on several processors at once.
unsafe impl Sync for PciTransport {}

impl PciTransport {
    /// Makes a transport of the function `device_function`, whose BARs have addresses already
    /// (see [`assign_bars`](crate::assign_bars)).
    ///
    /// Nothing is written but the BARs and the command register, which are restored. Structures
    /// that do not lie in a BAR, or that this transport cannot use, are passed over for the next
    /// of their kind (4.1.4.1).
    ///
    /// # Errors
    ///
    /// * [`VirtioPciError::InvalidVendorId`], [`VirtioPciError::InvalidDeviceId`]: no virtio
    ///   device.
    /// * [`VirtioPciError::BarNotAllocated`]: a BAR that is needed has no address.
    /// * [`VirtioPciError::MissingCommonConfig`], [`VirtioPciError::MissingNotifyConfig`],
    ///   [`VirtioPciError::MissingIsrConfig`]: there is no usable structure of this kind.
    /// * [`VirtioPciError::Misaligned`]: the HAL maps a structure to an address that is not a
    ///   multiple of its alignment.
    pub fn new<H: Hal, C: ConfigurationAccess>(
        root: &mut PciRoot<C>,
        device_function: DeviceFunction,
    ) -> Result<Self, VirtioPciError> {
        let structures = find_structures(root, device_function)?;
        Self::map::<H>(&structures)
    }

    /// Maps the structures.
    fn map<H: Hal>(structures: &Structures) -> Result<Self, VirtioPciError> {
        let common = map::<H>(structures.common, align_of::<CommonConfig>())?;
        let notify = map::<H>(structures.notify, align_of::<u16>())?;
        let isr = map::<H>(structures.isr, 1)?;
        let device = match structures.device {
            Some(region) => Some(map::<H>(region, 4)?),
            None => None,
        };
        let notify = NonNull::slice_from_raw_parts(notify.cast(), notify.len() / 2);
        Ok(Self {
            device_type: structures.device_type,
            // SAFETY: `map` gives valid device memory of the length of the region, which is at
            // least that of the structure, aligned for it, and mapped for this transport alone.
            common: unsafe { UniqueMmioPointer::new(common.cast()) },
            // SAFETY: as above.
            notify: unsafe { UniqueMmioPointer::new(notify) },
            notify_off_multiplier: structures.notify_off_multiplier,
            doorbells: [None; DOORBELLS],
            // SAFETY: as above.
            interrupt: Some(InterruptHandle::pci(unsafe {
                UniqueMmioPointer::new(isr.cast::<PciInterrupt>())
            })),
            // SAFETY: as above.
            device: device.map(|device| unsafe { UniqueMmioPointer::new(device) }),
            started: false,
        })
    }

    /// Takes the interrupt side away, for the handler of the device's interrupt. `None` if it was
    /// taken before.
    pub fn split_interrupt(&mut self) -> Option<InterruptHandle<'static>> {
        self.interrupt.take()
    }

    fn select_queue(&mut self, queue: u16) {
        field!(self.common, queue_select).write(queue);
    }

    /// Returns the element of `notify` for the queue that is selected, if there is one.
    fn find_doorbell(&self) -> Option<usize> {
        let offset = u64::from(field_shared!(self.common, queue_notify_off).read())
            * u64::from(self.notify_off_multiplier);
        usize::try_from(offset / 2)
            .ok()
            .filter(|&element| element < self.notify.len())
    }
}

/// Maps a region of a BAR, all of it.
fn map<H: Hal>(region: Region, alignment: usize) -> Result<NonNull<[u8]>, VirtioPciError> {
    let len = region.len as usize;
    // SAFETY: the region lies in a memory BAR of the device, which is enabled at this address.
    let address = unsafe { H::mmio_phys_to_virt(region.paddr, len) };
    if address.addr().get().is_multiple_of(alignment) {
        Ok(NonNull::slice_from_raw_parts(address, len))
    } else {
        Err(VirtioPciError::Misaligned {
            address: address.addr().get(),
            alignment,
        })
    }
}

impl Transport for PciTransport {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            field!(self.common, device_feature_select).write(half);
            u64::from(field_shared!(self.common, device_feature).read())
        });
        low | high << 32
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        let (low, high) = halves(driver_features);
        for (half, features) in [(0, low), (1, high)] {
            field!(self.common, driver_feature_select).write(half);
            field!(self.common, driver_feature).write(features);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if queue >= field_shared!(self.common, num_queues).read() {
            return 0;
        }
        self.select_queue(queue);
        if self.find_doorbell().is_none() {
            log::error!("virtio-pci: queue {queue} has its doorbell outside the notify structure");
            return 0;
        }
        field_shared!(self.common, queue_size).read().into()
    }

    fn notify(&mut self, queue: u16) {
        let known = self.doorbells.get(usize::from(queue)).copied().flatten();
        let doorbell = known.or_else(|| {
            self.select_queue(queue);
            self.find_doorbell()
        });
        // A queue without a doorbell was never enabled, see `queue_set`.
        if let Some(mut register) = doorbell.and_then(|element| self.notify.get(element)) {
            register.write(queue);
        }
    }

    fn get_status(&self) -> DeviceStatus {
        let status = field_shared!(self.common, device_status).read();
        DeviceStatus::from_bits_retain(status.into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.started = !status.is_empty();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "over PCI the status has 8 bits"
        )]
        field!(self.common, device_status).write(status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
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
        let doorbell = self.find_doorbell();
        let size = u16::try_from(size).ok();
        let (Some(doorbell), Some(size)) = (doorbell, size) else {
            // Such a queue has no size, see `max_queue_size`; it stays disabled.
            return;
        };
        if let Some(known) = self.doorbells.get_mut(usize::from(queue)) {
            *known = Some(doorbell);
        }
        field!(self.common, queue_size).write(size);
        write_halves(field!(self.common, queue_desc), descriptors);
        write_halves(field!(self.common, queue_driver), driver_area);
        write_halves(field!(self.common, queue_device), device_area);
        field!(self.common, queue_enable).write(1);
    }

    fn queue_unset(&mut self, _queue: u16) {
        // 4.1.4.3.2: a driver does not write 0 to queue_enable; the reset disables all queues.
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.select_queue(queue);
        field_shared!(self.common, queue_enable).read() == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        match &self.interrupt {
            Some(interrupt) => status(interrupt.acknowledge()),
            None => InterruptStatus::empty(),
        }
    }

    fn read_config_generation(&self) -> u32 {
        field_shared!(self.common, config_generation).read().into()
    }

    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        offset: usize,
    ) -> Result<T, Error> {
        let space = self.device.as_ref().ok_or(Error::ConfigSpaceMissing)?;
        super::read_config(space, offset)
    }

    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        let space = self.device.as_mut().ok_or(Error::ConfigSpaceMissing)?;
        super::write_config(space, offset, value)
    }
}

/// Writes an address to a 64-bit field, as two 32-bit accesses (4.1.3.1).
fn write_halves(field: UniqueMmioPointer<'_, [ReadPureWrite<u32>; 2]>, address: PhysAddr) {
    let [mut low, mut high] = field.split();
    let (low_half, high_half) = halves(address);
    low.write(low_half);
    high.write(high_half);
}

impl Drop for PciTransport {
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
        log::error!("virtio-pci: the device does not reset");
    }
}
