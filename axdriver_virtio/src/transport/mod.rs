//! The two transports: what `virtio-drivers`' traits ask of one, over registers that are only
//! ever accessed as the specification says.
//!
//! Unsafe code here guards accesses to the configuration space, which are checked against its
//! size.

mod mmio;
mod pci;

use safe_mmio::UniqueMmioPointer;
use virtio_drivers::Error;

pub use self::{mmio::MmioTransport, pci::PciTransport};
pub(crate) use self::{
    mmio::{MAGIC, MmioVersionRegisters},
    pci::{CapabilityKind, Region, Structures},
};

/// Returns where a `T` at `offset` of a configuration space ends, if it lies in it and is aligned
/// there.
///
/// # Errors
///
/// * [`Error::ConfigSpaceTooSmall`]: it does not lie in the space.
/// * [`Error::InvalidParam`]: it is not aligned, or wider than the transports guarantee.
fn check_config_access<T>(space: usize, offset: usize) -> Result<(), Error> {
    if align_of::<T>() > 4 || !offset.is_multiple_of(align_of::<T>()) {
        return Err(Error::InvalidParam);
    }
    match offset.checked_add(size_of::<T>()) {
        Some(end) if end <= space => Ok(()),
        _ => Err(Error::ConfigSpaceTooSmall),
    }
}

/// Reads a `T` at `offset` of a configuration space.
fn read_config<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
    space: &UniqueMmioPointer<'_, [u8]>,
    offset: usize,
) -> Result<T, Error> {
    check_config_access::<T>(space.len(), offset)?;
    // SAFETY: the access lies in the space, as was just checked.
    let pointer = unsafe { space.ptr().cast::<T>().byte_add(offset) };
    let pointer = core::ptr::NonNull::new(pointer.cast_mut()).ok_or(Error::InvalidParam)?;
    // SAFETY: `pointer` is aligned and lies in the space that `space` owns.
    let field = unsafe { core::ops::Deref::deref(space).child(pointer) };
    // SAFETY: reading a configuration space has no side effects.
    Ok(unsafe { field.read_unsafe() })
}

/// Writes a `T` at `offset` of a configuration space.
fn write_config<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    space: &mut UniqueMmioPointer<'_, [u8]>,
    offset: usize,
    value: T,
) -> Result<(), Error> {
    check_config_access::<T>(space.len(), offset)?;
    // SAFETY: the access lies in the space, as was just checked.
    let pointer = unsafe { space.ptr_nonnull().cast::<T>().byte_add(offset) };
    // SAFETY: `pointer` is aligned and lies in the space that `space` owns.
    let mut field = unsafe { space.child(pointer) };
    // SAFETY: a configuration space may be written anywhere; the device ignores what it must.
    unsafe { field.write_unsafe(value) };
    Ok(())
}
