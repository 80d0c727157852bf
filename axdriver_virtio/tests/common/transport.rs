//! Either of the two transports, so that a test can be run over both.

use axdriver_virtio::{InterruptHandle, MmioTransport, PciTransport, PhysAddr, Transport};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus};
use zerocopy::{FromBytes, Immutable, IntoBytes};

#[expect(clippy::large_enum_variant, reason = "there is one of it at a time")]
pub(crate) enum AnyTransport {
    Mmio(MmioTransport<'static>),
    Pci(PciTransport),
}

impl From<MmioTransport<'static>> for AnyTransport {
    fn from(transport: MmioTransport<'static>) -> Self {
        Self::Mmio(transport)
    }
}

impl From<PciTransport> for AnyTransport {
    fn from(transport: PciTransport) -> Self {
        Self::Pci(transport)
    }
}

impl AnyTransport {
    pub(crate) fn split_interrupt(&mut self) -> Option<InterruptHandle<'static>> {
        match self {
            Self::Mmio(transport) => transport.split_interrupt(),
            Self::Pci(transport) => transport.split_interrupt(),
        }
    }
}

/// Calls a method of whichever transport it is.
macro_rules! either {
    ($self:ident, $method:ident($($argument:expr),*)) => {
        match $self {
            AnyTransport::Mmio(transport) => transport.$method($($argument),*),
            AnyTransport::Pci(transport) => transport.$method($($argument),*),
        }
    };
}

impl Transport for AnyTransport {
    fn device_type(&self) -> DeviceType {
        either!(self, device_type())
    }

    fn read_device_features(&mut self) -> u64 {
        either!(self, read_device_features())
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        either!(self, write_driver_features(driver_features));
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        either!(self, max_queue_size(queue))
    }

    fn notify(&mut self, queue: u16) {
        either!(self, notify(queue));
    }

    fn get_status(&self) -> DeviceStatus {
        either!(self, get_status())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        either!(self, set_status(status));
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        either!(self, set_guest_page_size(guest_page_size));
    }

    fn requires_legacy_layout(&self) -> bool {
        either!(self, requires_legacy_layout())
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        either!(
            self,
            queue_set(queue, size, descriptors, driver_area, device_area)
        );
    }

    fn queue_unset(&mut self, queue: u16) {
        either!(self, queue_unset(queue));
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        either!(self, queue_used(queue))
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        either!(self, ack_interrupt())
    }

    fn read_config_generation(&self) -> u32 {
        either!(self, read_config_generation())
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        either!(self, read_config_space(offset))
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        either!(self, write_config_space(offset, value))
    }
}
