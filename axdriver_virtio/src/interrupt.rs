//! The interrupt side of a device, split off from its driver.
//!
//! Unsafe code here guards the registers that only the handle, or its transport, accesses.

use core::{marker::PhantomData, ptr::NonNull};

use axdriver_base::InterruptCause;
use safe_mmio::{
    UniqueMmioPointer, field, field_shared,
    fields::{ReadOnly, ReadPure, WriteOnly},
};
use virtio_drivers::transport::InterruptStatus;

/// `InterruptStatus` and `InterruptACK` of the MMIO transport (4.2.2).
#[repr(C)]
pub(crate) struct MmioInterrupt {
    status: ReadPure<u32>,
    acknowledge: WriteOnly<u32>,
}

/// The ISR status of the PCI transport (4.1.4.5).
pub(crate) type PciInterrupt = ReadOnly<u8>;

/// The registers that say why a device interrupted, and that silence the line.
#[derive(Clone, Copy, Debug)]
enum Registers {
    Mmio(NonNull<MmioInterrupt>),
    Pci(NonNull<PciInterrupt>),
}

/// Says why a device interrupted and silences its line, without a lock on the driver.
///
/// It is split off from a transport, before a driver is made of that, with
/// [`MmioTransport::split_interrupt`](crate::MmioTransport::split_interrupt) or
/// [`PciTransport::split_interrupt`](crate::PciTransport::split_interrupt), and then belongs in
/// the handler of the device's interrupt. From then on the driver itself has nothing left to
/// acknowledge: its `acknowledge_interrupt` returns an empty set, and what the handle returned is
/// acted upon by the OS:
///
/// * [`InterruptCause::USED_BUFFERS`]: the driver has work; take the lock and look.
/// * [`InterruptCause::CONFIGURATION`]: call the driver's `configuration_changed`, not in the
///   handler but where its lock may be taken. It also notices a device that needs a reset.
/// * Both at once is one interrupt. Empty: the interrupt was another device's on the same line.
#[derive(Debug)]
pub struct InterruptHandle<'a> {
    /// Valid for `'a`, and accessed through this handle alone.
    registers: Registers,
    lifetime: PhantomData<&'a ()>,
}

// SAFETY: registers may be accessed from any processor.
unsafe impl Send for InterruptHandle<'_> {}

// SAFETY: `acknowledge` makes one read, and one write of what it read. Two processors that do so
// at the same time each learn of some of the causes, and no cause is lost or acknowledged unseen.
unsafe impl Sync for InterruptHandle<'_> {}

impl<'a> InterruptHandle<'a> {
    pub(crate) fn mmio(mut registers: UniqueMmioPointer<'a, MmioInterrupt>) -> Self {
        Self {
            registers: Registers::Mmio(registers.ptr_nonnull()),
            lifetime: PhantomData,
        }
    }

    pub(crate) fn pci(mut register: UniqueMmioPointer<'a, PciInterrupt>) -> Self {
        Self {
            registers: Registers::Pci(register.ptr_nonnull()),
            lifetime: PhantomData,
        }
    }

    /// Returns why the device interrupted, and acknowledges exactly that.
    ///
    /// Costs one register access, or two over MMIO if there was a cause (4.1.4.5, 4.2.3.4.1).
    pub fn acknowledge(&self) -> InterruptCause {
        let status = match self.registers {
            Registers::Mmio(registers) => {
                // SAFETY: valid for `'a`, and no other pointer to these registers is in use but
                // those that this function makes, which access each register once.
                let mut registers = unsafe { UniqueMmioPointer::new(registers) };
                let status = field_shared!(registers, status).read() & DEFINED;
                if status != 0 {
                    field!(registers, acknowledge).write(status);
                }
                status
            }
            Registers::Pci(register) => {
                // SAFETY: as above.
                let mut register = unsafe { UniqueMmioPointer::new(register) };
                u32::from(register.read()) & DEFINED
            }
        };
        cause(InterruptStatus::from_bits_truncate(status))
    }
}

/// The bits with a meaning; the others are ignored, and never written (4.2.2.2).
const DEFINED: u32 = InterruptStatus::all().bits();

/// Returns what an interrupt status says.
pub(crate) fn cause(status: InterruptStatus) -> InterruptCause {
    let mut cause = InterruptCause::empty();
    cause.set(
        InterruptCause::USED_BUFFERS,
        status.contains(InterruptStatus::QUEUE_INTERRUPT),
    );
    cause.set(
        InterruptCause::CONFIGURATION,
        status.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT),
    );
    cause
}

/// Returns the interrupt status that `cause` stands for.
pub(crate) fn status(cause: InterruptCause) -> InterruptStatus {
    let mut status = InterruptStatus::empty();
    status.set(
        InterruptStatus::QUEUE_INTERRUPT,
        cause.contains(InterruptCause::USED_BUFFERS),
    );
    status.set(
        InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT,
        cause.contains(InterruptCause::CONFIGURATION),
    );
    status
}
