//! Register accesses of the drivers, handed to the machine that is installed on their thread.
//!
//! `safe-mmio` asks the final binary for its accesses (feature `custom-mmio`); linking this crate provides them. A register
//! address is only a number here: it is looked up on a [`RegisterBus`] and never dereferenced.
//!
//! Two kinds of `unsafe` live here: the functions that `safe-mmio` asks for, and making its pointers out of such numbers.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use safe_mmio::{MmioOps, set_mmio_ops};
use virtio_drivers::transport::mmio::{MmioError, MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::bus::{Cam, MmioCam, PciRoot};

use crate::memory::Memory;

/// Answers register accesses, at physical addresses.
///
/// What no register claims reads as all ones, and ignores writes.
pub trait RegisterBus: Send + Sync {
    /// Reads `width` bytes (1, 2, 4 or 8) at `address`. Bits above `width` are ignored.
    fn read(&self, address: u64, width: u8) -> u64;

    /// Writes `width` bytes (1, 2, 4 or 8) at `address`.
    fn write(&self, address: u64, width: u8, value: u64);

    /// The driver asked to map `size` bytes of registers at `address`.
    fn mapped(&self, _address: u64, _size: usize) {}
}

/// A bus without registers.
impl RegisterBus for () {
    fn read(&self, _address: u64, _width: u8) -> u64 {
        u64::MAX
    }

    fn write(&self, _address: u64, _width: u8, _value: u64) {}
}

/// Numbers of register accesses that a machine has seen.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Accesses {
    /// How often a register was read.
    pub reads: u64,
    /// How often a register was written.
    pub writes: u64,
}

struct Inner {
    memory: Arc<Memory>,
    bus: Arc<dyn RegisterBus>,
    reads: AtomicU64,
    writes: AtomicU64,
}

/// Memory and registers: what a driver finds under it when the machine is installed on its thread.
///
/// It is a handle: clones are the same machine, and can be sent to other threads and installed there too.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

impl Machine {
    /// Returns a machine of this memory and these registers.
    pub fn new(memory: Arc<Memory>, bus: Arc<dyn RegisterBus>) -> Self {
        Self {
            inner: Arc::new(Inner {
                memory,
                bus,
                reads: AtomicU64::new(0),
                writes: AtomicU64::new(0),
            }),
        }
    }

    /// Makes this the current thread's machine until the guard is dropped. Where several are installed, the newest counts.
    #[must_use = "the machine is gone from the thread as soon as this is dropped"]
    pub fn install(&self) -> Installed {
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        CURRENT.with_borrow_mut(|machines| machines.push((number, self.clone())));
        Installed {
            number,
            _not_send: PhantomData,
        }
    }

    /// Returns the machine that is installed on the current thread.
    pub fn current() -> Option<Self> {
        CURRENT
            .try_with(|machines| machines.borrow().last().map(|(_, machine)| machine.clone()))
            .ok()
            .flatten()
    }

    /// Returns the memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.inner.memory
    }

    /// Returns the registers.
    pub fn bus(&self) -> &Arc<dyn RegisterBus> {
        &self.inner.bus
    }

    /// Returns how often registers were accessed.
    pub fn accesses(&self) -> Accesses {
        Accesses {
            reads: self.inner.reads.load(Ordering::Relaxed),
            writes: self.inner.writes.load(Ordering::Relaxed),
        }
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("memory", &self.inner.memory)
            .field("accesses", &self.accesses())
            .finish_non_exhaustive()
    }
}

static NUMBERS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The machines installed on this thread, newest last.
    static CURRENT: RefCell<Vec<(u64, Machine)>> = const { RefCell::new(Vec::new()) };
    /// How deep this thread is in the machine's own code.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// Returns how deep this thread is in the machine's own code: 0 while the driver or the test runs, more inside a register
/// access or a call of the HAL. A counting allocator can tell by it whose allocations it sees.
pub fn inside() -> u32 {
    INSIDE.try_with(Cell::get).unwrap_or(0)
}

/// Marks its thread as in the machine's own code.
pub(crate) struct Inside(());

impl Inside {
    pub(crate) fn enter() -> Self {
        let _ = INSIDE.try_with(|depth| depth.set(depth.get() + 1));
        Self(())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|depth| depth.set(depth.get() - 1));
    }
}

/// Keeps a machine installed on its thread.
#[derive(Debug)]
pub struct Installed {
    number: u64,
    /// It belongs to the thread that it was made on.
    _not_send: PhantomData<*mut ()>,
}

impl Drop for Installed {
    fn drop(&mut self) {
        // The machine is dropped after the borrow has ended: its own drop may look for the current machine.
        let removed = CURRENT.try_with(|machines| {
            let mut machines = machines.borrow_mut();
            let index = machines
                .iter()
                .position(|(number, _)| *number == self.number)?;
            Some(machines.remove(index))
        });
        drop(removed);
    }
}

fn read(address: usize, width: u8) -> u64 {
    let _inside = Inside::enter();
    let Some(machine) = Machine::current() else {
        return u64::MAX;
    };
    machine.inner.reads.fetch_add(1, Ordering::Relaxed);
    machine.inner.bus.read(address as u64, width)
}

fn write(address: usize, width: u8, value: u64) {
    let _inside = Inside::enter();
    if let Some(machine) = Machine::current() {
        machine.inner.writes.fetch_add(1, Ordering::Relaxed);
        machine.inner.bus.write(address as u64, width, value);
    }
}

/// The accesses of `safe-mmio`, for the whole binary.
struct Registers;

impl MmioOps for Registers {
    unsafe fn read_u8(src: *const u8) -> u8 {
        (read(src.addr(), 1) & 0xff) as u8
    }

    unsafe fn read_u16(src: *const u16) -> u16 {
        (read(src.addr(), 2) & 0xffff) as u16
    }

    unsafe fn read_u32(src: *const u32) -> u32 {
        (read(src.addr(), 4) & 0xffff_ffff) as u32
    }

    unsafe fn read_u64(src: *const u64) -> u64 {
        read(src.addr(), 8)
    }

    unsafe fn write_u8(dst: *mut u8, value: u8) {
        write(dst.addr(), 1, value.into());
    }

    unsafe fn write_u16(dst: *mut u16, value: u16) {
        write(dst.addr(), 2, value.into());
    }

    unsafe fn write_u32(dst: *mut u32, value: u32) {
        write(dst.addr(), 4, value.into());
    }

    unsafe fn write_u64(dst: *mut u64, value: u64) {
        write(dst.addr(), 8, value);
    }
}

set_mmio_ops!(Registers);

/// Returns the pointer that drivers use for the registers at a physical address. It must not be dereferenced.
pub fn register_pointer(address: u64) -> *mut u8 {
    usize::try_from(address).map_or(std::ptr::null_mut(), std::ptr::without_provenance_mut)
}

/// Returns the transport of the virtio-mmio registers at `base`, `size` bytes of them.
///
/// # Errors
///
/// As [`MmioTransport::new`]; also `MmioRegionTooSmall` for a `base` of 0.
pub fn mmio_transport(base: u64, size: usize) -> Result<MmioTransport<'static>, MmioError> {
    let header = NonNull::new(register_pointer(base).cast::<VirtIOHeader>())
        .ok_or(MmioError::MmioRegionTooSmall)?;
    // SAFETY: register addresses are numbers that are looked up on the current thread's bus, which answers any of them at
    // any time; nothing is dereferenced.
    unsafe { MmioTransport::new(header, size) }
}

/// Returns the PCI root whose configuration space is memory-mapped (ECAM, 256 MiB) at `base`.
///
/// # Panics
///
/// If `base` is 0 or not a multiple of 4, as [`MmioCam::new`] does.
pub fn pci_root(base: u64) -> PciRoot<MmioCam<'static>> {
    // SAFETY: as for `mmio_transport`: the address is only a number.
    PciRoot::new(unsafe { MmioCam::new(register_pointer(base), Cam::Ecam) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::DEFAULT_BASE;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u8, u64)>>);

    impl RegisterBus for Recorder {
        fn read(&self, address: u64, _width: u8) -> u64 {
            address
        }

        fn write(&self, address: u64, width: u8, value: u64) {
            self.0.lock().unwrap().push((address, width, value));
        }
    }

    fn machine(bus: Arc<dyn RegisterBus>) -> Machine {
        Machine::new(Memory::anonymous(DEFAULT_BASE, 4096).unwrap(), bus)
    }

    #[test]
    fn a_thread_without_a_machine_reads_all_ones() {
        assert!(Machine::current().is_none());
        assert_eq!(read(0x1000, 4), u64::MAX);
        write(0x1000, 4, 0);
    }

    #[test]
    fn accesses_reach_the_newest_machine_and_are_counted() {
        let recorder = Arc::new(Recorder::default());
        let outer = machine(recorder.clone());
        let _outer = outer.install();
        {
            let inner = machine(Arc::new(()));
            let _inner = inner.install();
            write(4, 4, 1);
            assert_eq!(inner.accesses().writes, 1);
        }
        write(8, 2, 2);
        assert_eq!(read(12, 1), 12);
        assert_eq!(*recorder.0.lock().unwrap(), [(8, 2, 2)]);
        assert_eq!(
            outer.accesses(),
            Accesses {
                reads: 1,
                writes: 1
            }
        );
    }

    #[test]
    fn machines_may_be_removed_in_any_order() {
        let first = machine(Arc::new(()));
        let second = machine(Arc::new(Recorder::default()));
        let first_installed = first.install();
        let second_installed = second.install();
        drop(first_installed);
        assert_eq!(read(5, 4), 5);
        drop(second_installed);
        assert!(Machine::current().is_none());
    }

    #[test]
    fn a_thread_is_inside_the_machine_during_an_access_only() {
        struct Depth;
        impl RegisterBus for Depth {
            fn read(&self, _address: u64, _width: u8) -> u64 {
                inside().into()
            }
            fn write(&self, _address: u64, _width: u8, _value: u64) {}
        }
        let machine = machine(Arc::new(Depth));
        let _installed = machine.install();
        assert_eq!((read(0, 4), inside()), (1, 0));
    }

    #[test]
    fn a_machine_can_be_installed_on_another_thread() {
        let machine = machine(Arc::new(Recorder::default()));
        let elsewhere = machine.clone();
        std::thread::spawn(move || {
            let _installed = elsewhere.install();
            assert_eq!(read(9, 1), 9);
        })
        .join()
        .unwrap();
        assert_eq!(machine.accesses().reads, 1);
    }
}
