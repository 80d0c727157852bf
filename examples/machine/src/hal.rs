//! What an operating system owes a virtio driver, given by the machine of the current thread.
//!
//! The `unsafe` here is the [`Hal`] itself, and the copies to and from buffers that its callers promise to be valid.

use std::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use crate::memory::{Memory, memory_of};
use crate::registers::{Inside, Machine, register_pointer};
use crate::trace::Event;

/// The [`Hal`] of the machine that is installed on the current thread.
///
/// * Pages come from its [`Memory`].
/// * A buffer inside that memory is lent as it is; of any other buffer a copy is lent, and copied back when it is taken back.
/// * Register addresses are numbers, virtual equal to physical.
///
/// Without a machine on the thread there are no pages to be had, and what is lent has address 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineHal;

// SAFETY: `dma_alloc` returns pages of `Memory`, which are page-aligned, filled with 0, given to nobody else while live, and
// mapped for as long as they are live. The pointers of `mmio_phys_to_virt` are never dereferenced: with `custom-mmio` they
// are numbers that a `RegisterBus` looks up.
unsafe impl Hal for MachineHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let _inside = Inside::enter();
        Machine::current()
            .and_then(|machine| machine.memory().allocate(pages))
            .unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        let _inside = Inside::enter();
        // The driver may be dropped on a thread without its machine, so the address says whose the pages are.
        let Some(memory) = memory_of(vaddr) else {
            return -1;
        };
        // SAFETY: the caller promises that the pages come from `dma_alloc`, which took them from `allocate`, and are in
        // use no more.
        if unsafe { memory.free(paddr, pages) } {
            0
        } else {
            -1
        }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        let _inside = Inside::enter();
        if let Some(machine) = Machine::current() {
            machine.memory().trace().push(Event::Mapped {
                address: paddr,
                size,
            });
            machine.bus().mapped(paddr, size);
        }
        NonNull::new(register_pointer(paddr)).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let _inside = Inside::enter();
        let Some(machine) = Machine::current() else {
            return 0;
        };
        let memory = machine.memory();
        let len = buffer.len();
        if let Some(address) = memory.translate(buffer.cast(), len) {
            memory.count_share(address, len, false);
            return address;
        }
        let Some(address) = memory.take_bounce(len) else {
            log::error!("no memory left to lend a buffer of {len} bytes");
            return 0;
        };
        if direction != BufferDirection::DeviceToDriver
            && let Some(copy) = memory.host_address(address, len)
        {
            // SAFETY: `copy` points to pages that this share alone holds, `len` bytes or more; the caller promises that
            // `buffer` is valid and nobody else touches it; one lies in the memory and the other does not.
            unsafe { copy.copy_from_nonoverlapping(buffer.cast::<u8>(), len) };
            memory.count_copy(len);
        }
        memory.count_share(address, len, true);
        address
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let _inside = Inside::enter();
        let len = buffer.len();
        let Some(memory) = Machine::current()
            .map(|machine| machine.memory().clone())
            .or_else(|| memory_of(buffer.cast()))
        else {
            return;
        };
        let Some(copied) = memory.bounce_len(paddr) else {
            if memory.translate(buffer.cast(), len) == Some(paddr) {
                memory.count_unshare(paddr, len, false);
            }
            return;
        };
        memory.count_unshare(paddr, copied, true);
        if direction != BufferDirection::DriverToDevice {
            copy_back(&memory, paddr, copied.min(len), buffer.cast());
        }
        memory.free_bounce(paddr);
    }
}

/// Copies what a device left at `address` to a buffer of the driver.
fn copy_back(memory: &Memory, address: u64, len: usize, buffer: NonNull<u8>) {
    if let Some(copy) = memory.host_address(address, len) {
        // SAFETY: only `unshare` calls this, whose caller promises that `buffer` is valid and nobody else touches it; it
        // is outside of the memory, `copy` inside, and both have `len` bytes.
        unsafe { buffer.copy_from_nonoverlapping(copy, len) };
        memory.count_copy(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{DEFAULT_BASE, POISON};
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    fn machine() -> Machine {
        let memory = Memory::anonymous(DEFAULT_BASE, 1 << 20).unwrap();
        Machine::new(memory, Arc::new(()))
    }

    #[test]
    fn a_foreign_buffer_is_copied_there_and_back() {
        let machine = machine();
        let _installed = machine.install();
        let memory = machine.memory();
        let mut bytes = *b"to the device";
        let buffer = NonNull::from(&mut bytes[..]);
        // SAFETY: `buffer` is a valid slice of this function.
        let address = unsafe { MachineHal::share(buffer, BufferDirection::Both) };
        let mut seen = [0; 13];
        memory
            .guest()
            .read_slice(&mut seen, GuestAddress(address))
            .unwrap();
        assert_eq!(&seen, b"to the device");
        memory
            .guest()
            .write_slice(b"from", GuestAddress(address))
            .unwrap();
        assert_eq!(memory.counters().bounces_live, 1);
        // SAFETY: as above, and `address` comes from `share`.
        unsafe { MachineHal::unshare(address, buffer, BufferDirection::Both) };
        assert_eq!(&bytes, b"fromhe device");
        assert_eq!(memory.counters().bounces_live, 0);
        assert_eq!(memory.counters().bytes_copied, 26);
    }

    #[test]
    fn what_the_device_did_not_write_comes_back_as_poison() {
        let machine = machine();
        let _installed = machine.install();
        let mut bytes = [0; 2];
        let buffer = NonNull::from(&mut bytes[..]);
        // SAFETY: `buffer` is a valid slice of this function.
        let address = unsafe { MachineHal::share(buffer, BufferDirection::DeviceToDriver) };
        // SAFETY: as above, and `address` comes from `share`.
        unsafe { MachineHal::unshare(address, buffer, BufferDirection::DeviceToDriver) };
        assert_eq!(bytes, [POISON; 2]);
    }

    #[test]
    fn a_buffer_in_the_memory_is_lent_without_a_copy() {
        let machine = machine();
        let _installed = machine.install();
        let mut inside = machine.memory().buffer(100).unwrap();
        let buffer = NonNull::from(&mut inside[..]);
        // SAFETY: `buffer` is a valid slice of this function.
        let address = unsafe { MachineHal::share(buffer, BufferDirection::Both) };
        assert_eq!(address, inside.address());
        assert_eq!(machine.memory().counters().bounces, 0);
        assert_eq!(machine.memory().counters().shares_live, 1);
        // SAFETY: as above, and `address` comes from `share`.
        unsafe { MachineHal::unshare(address, buffer, BufferDirection::Both) };
        assert_eq!(machine.memory().counters().shares_live, 0);
    }

    #[test]
    fn without_a_machine_there_is_no_memory() {
        assert_eq!(MachineHal::dma_alloc(1, BufferDirection::Both).0, 0);
    }
}
