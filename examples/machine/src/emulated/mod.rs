//! The emulated board: virtio devices that answer in the driver's own thread, inside the register access.

mod blk;
mod device;
mod entropy;
mod gpu;
mod lifecycle;
mod mmio;
mod net;
mod pci;
mod queue;
mod state;
mod watch;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_drivers::transport::mmio::{MmioError, MmioTransport};
use virtio_drivers::transport::pci::bus::{DeviceFunction, MmioCam, PciRoot};

pub use blk::{Disk, DiskCounters, features as block_features};
pub use device::{Device, DeviceCounters, features, status};
pub use entropy::Entropy;
pub use gpu::{Cursor, Display, Image, features as gpu_features};
pub use mmio::Version;
pub use net::{Cable, Nic, NicCounters, Peer, features as net_features};
pub use watch::Violation;

use lifecycle::Core;
use mmio::MmioSlot;
use pci::{Bridge, Kind, PciFunction};
use state::Transport;
use watch::Violations;

use crate::hostile::Hostile;
use crate::memory::{DEFAULT_BASE, Memory, MemoryWatch};
use crate::registers::{Installed, Machine, RegisterBus, mmio_transport, pci_root};
use crate::trace::Record;

/// Size of the memory of a board that is not told otherwise, in bytes.
const MEMORY: usize = 64 << 20;
/// Records that a board keeps in its trace.
const RECORDS: usize = 1 << 16;
/// Rounds in which devices may wake one another, before it has to wait for the next access.
const ROUNDS: usize = 64;
/// The interrupt lines of PCI follow those of the virtio-mmio slots.
const PCI_LINES: u32 = 32;

/// A place for virtio-mmio registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Slot {
    /// Address of the first register.
    pub base: usize,
    /// Bytes of registers and configuration space.
    pub size: usize,
    /// Its interrupt line.
    pub line: u32,
    /// Which registers it has.
    pub version: Version,
    /// The device in it; empty slots have DeviceID 0.
    pub device: Option<usize>,
}

impl Slot {
    /// Returns the pointer that drivers use for the registers. It must not be dereferenced.
    pub fn pointer(&self) -> *mut u8 {
        crate::registers::register_pointer(self.base as u64)
    }

    /// Returns virtio-drivers' transport for the slot.
    ///
    /// # Errors
    ///
    /// As [`MmioTransport::new`]; the slot may be empty.
    pub fn transport(&self) -> Result<MmioTransport<'static>, MmioError> {
        mmio_transport(self.base as u64, self.size)
    }
}

/// A function on bus 0 with a virtio device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Function {
    /// Bus, device and function number.
    pub address: DeviceFunction,
    /// Its interrupt line, which it shares with every fourth device.
    pub line: u32,
    /// The device behind it.
    pub device: usize,
}

struct Inner {
    cores: Vec<Core>,
    slots: Vec<MmioSlot>,
    functions: Vec<PciFunction>,
    window: Range<u64>,
    violations: Violations,
}

/// The registers of an emulated board.
struct Emulated {
    inner: Mutex<Inner>,
}

impl Emulated {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a register address leads to.
enum Place {
    Slot(usize, u64),
    Config(usize, u64),
    Bar(usize, u64),
    Nothing,
}

impl Inner {
    fn place(&self, address: u64) -> Place {
        if let Some(offset) = address.checked_sub(mmio::BASE)
            && let Ok(index) = usize::try_from(offset / mmio::STRIDE)
            && index < self.slots.len()
        {
            return Place::Slot(index, offset % mmio::STRIDE);
        }
        if let Some(offset) = address.checked_sub(pci::ECAM)
            && offset < pci::ECAM_SIZE
        {
            let (bus, slot, function) = (offset >> 20, (offset >> 15) & 31, (offset >> 12) & 7);
            return match pci::find(&self.functions, bus, slot) {
                Some(index) if function == 0 => Place::Config(index, offset & 0xfff),
                _ => Place::Nothing,
            };
        }
        match pci::decode(&self.functions, address, &self.window) {
            Some((index, offset)) => Place::Bar(index, offset),
            None => Place::Nothing,
        }
    }

    fn read(&mut self, address: u64, width: u8) -> u64 {
        let place = self.place(address);
        let Self {
            cores,
            slots,
            functions,
            violations,
            ..
        } = self;
        match place {
            Place::Slot(index, offset) => {
                let slot = &mut slots[index];
                match slot.device {
                    Some(device) => slot.read(&mut cores[device], offset, width),
                    None => slot.read_empty(offset, violations).into(),
                }
            }
            Place::Config(index, offset) => {
                let function = &mut functions[index];
                let core = match function.kind {
                    Kind::Virtio(device) => cores.get_mut(device),
                    Kind::Host | Kind::Bridge(_) => None,
                };
                function.read_config(core, offset, width)
            }
            Place::Bar(index, offset) => {
                let function = &mut functions[index];
                match function.kind {
                    Kind::Virtio(device) => function.read_bar(&mut cores[device], offset, width),
                    Kind::Host | Kind::Bridge(_) => u64::MAX,
                }
            }
            Place::Nothing => u64::MAX,
        }
    }

    fn write(&mut self, address: u64, width: u8, value: u64) {
        let place = self.place(address);
        let Self {
            cores,
            slots,
            functions,
            violations,
            ..
        } = self;
        match place {
            Place::Slot(index, offset) => {
                let slot = &mut slots[index];
                match slot.device {
                    Some(device) => slot.write(&mut cores[device], offset, width, value),
                    None => slot.write_empty(offset, violations),
                }
            }
            Place::Config(index, offset) => {
                let function = &mut functions[index];
                let core = match function.kind {
                    Kind::Virtio(device) => cores.get_mut(device),
                    Kind::Host | Kind::Bridge(_) => None,
                };
                function.write_config(core, offset, width, value);
                for function in functions.iter() {
                    if let Kind::Virtio(device) = function.kind {
                        cores[device].state.may_master = pci::may_master(functions, function);
                    }
                }
            }
            Place::Bar(index, offset) => {
                let function = &mut functions[index];
                if let Kind::Virtio(device) = function.kind {
                    function.write_bar(&mut cores[device], offset, width, value);
                }
            }
            Place::Nothing => {}
        }
        self.settle();
    }

    /// Lets devices that woke one another go on until all rest.
    fn settle(&mut self) {
        for _ in 0..ROUNDS {
            let mut busy = false;
            for core in &mut self.cores {
                busy |= core.poll();
            }
            if !busy {
                break;
            }
        }
    }

    fn pending(&mut self, line: u32) -> bool {
        for core in &mut self.cores {
            core.note_change();
        }
        let asserted = |device: usize| {
            self.cores
                .get(device)
                .is_some_and(|core| core.state.interrupt != 0 && !core.state.gone)
        };
        if let Some(slot) = usize::try_from(line)
            .ok()
            .and_then(|line| self.slots.get(line))
        {
            return slot.device.is_some_and(asserted);
        }
        self.functions.iter().any(|function| match function.kind {
            Kind::Virtio(device) => {
                PCI_LINES + pci::line(&self.functions, function) == line
                    && function.may_interrupt()
                    && asserted(device)
            }
            Kind::Host | Kind::Bridge(_) => false,
        })
    }
}

/// What is plugged into a PCI bus.
#[derive(Debug)]
enum Plugged {
    Device(Box<Device>),
    Bridge(PciBus),
}

/// What is behind a PCI-to-PCI bridge.
#[derive(Debug, Default)]
pub struct PciBus {
    plugged: Vec<Plugged>,
}

impl PciBus {
    /// Returns a bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plugs a device into the bus.
    #[must_use]
    pub fn pci(mut self, device: impl Into<Device>) -> Self {
        self.plugged.push(Plugged::Device(Box::new(device.into())));
        self
    }

    /// Plugs a bridge to another bus into the bus.
    #[must_use]
    pub fn bridge(mut self, behind: PciBus) -> Self {
        self.plugged.push(Plugged::Bridge(behind));
        self
    }

    /// Makes the functions of the bus, each before those behind it, with device numbers from `first`.
    fn plug(
        self,
        functions: &mut Vec<PciFunction>,
        parent: Option<usize>,
        first: u8,
        add: &mut impl FnMut(Device) -> usize,
    ) {
        for (plugged, number) in self.plugged.into_iter().zip(first..) {
            match plugged {
                Plugged::Device(device) => {
                    let kind = Kind::Virtio(add(*device));
                    functions.push(PciFunction::new(kind, parent, number));
                }
                Plugged::Bridge(behind) => {
                    let index = functions.len();
                    let kind = Kind::Bridge(Bridge::new());
                    functions.push(PciFunction::new(kind, parent, number));
                    behind.plug(functions, Some(index), 0, add);
                }
            }
        }
    }

    /// Whether there is a place for everything on the bus and behind it, with device numbers from `first`.
    fn fits(&self, first: usize) -> bool {
        self.plugged.len() + first <= 32
            && self.plugged.iter().all(|plugged| match plugged {
                Plugged::Device(_) => true,
                Plugged::Bridge(behind) => behind.fits(0),
            })
    }
}

impl RegisterBus for Emulated {
    fn read(&self, address: u64, width: u8) -> u64 {
        self.lock().read(address, width)
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        self.lock().write(address, width, value);
    }

    fn mapped(&self, address: u64, size: usize) {
        let inner = self.lock();
        let inside_a_bar = inner
            .functions
            .iter()
            .any(|function| function.holds(address, size));
        let slots = mmio::BASE..mmio::BASE + mmio::STRIDE * mmio::SLOTS as u64;
        if !inside_a_bar && !slots.contains(&address) {
            inner.violations.push(Violation {
                id: "PCI-09",
                device: usize::MAX,
                what: format!("{size} bytes at {address:#x} were mapped, outside of any BAR"),
            });
        }
    }
}

impl MemoryWatch for Emulated {
    fn leaving(&self, address: u64, len: usize) {
        for core in &mut self.lock().cores {
            core.leaving((address, len as u64));
        }
    }
}

/// Puts an emulated board together.
#[derive(Debug)]
pub struct Builder {
    memory: usize,
    slots: Vec<(Version, Option<Device>)>,
    bus: PciBus,
    watching: bool,
    window: Range<u64>,
}

impl Builder {
    /// Gives the board `size` bytes of memory; 64 MiB if this is not called.
    #[must_use]
    pub fn memory(mut self, size: usize) -> Self {
        self.memory = size;
        self
    }

    /// Plugs a device into the next virtio-mmio slot.
    #[must_use]
    pub fn mmio(mut self, version: Version, device: impl Into<Device>) -> Self {
        self.slots.push((version, Some(device.into())));
        self
    }

    /// Plugs a device into the next virtio-mmio slot, with version 1 registers.
    #[must_use]
    pub fn mmio_legacy(self, device: impl Into<Device>) -> Self {
        self.mmio(Version::Legacy, device)
    }

    /// Leaves the next virtio-mmio slot empty.
    #[must_use]
    pub fn mmio_empty(mut self) -> Self {
        self.slots.push((Version::Modern, None));
        self
    }

    /// Plugs a device into PCI bus 0.
    #[must_use]
    pub fn pci(mut self, device: impl Into<Device>) -> Self {
        self.bus = self.bus.pci(device);
        self
    }

    /// Plugs a bridge to another bus into PCI bus 0. It has no bus number yet, and forwards nothing.
    #[must_use]
    pub fn pci_bridge(mut self, behind: PciBus) -> Self {
        self.bus = self.bus.bridge(behind);
        self
    }

    /// Does not look for violations, for tests of speed.
    #[must_use]
    pub fn without_watch(mut self) -> Self {
        self.watching = false;
        self
    }

    /// Lets BARs be at other addresses.
    #[must_use]
    pub fn pci_window(mut self, window: Range<u64>) -> Self {
        self.window = window;
        self
    }

    /// Makes the board, and installs it on the current thread until it is dropped. While it is, it hides boards that were
    /// installed before.
    ///
    /// # Errors
    ///
    /// * `InvalidInput`: more than 32 virtio-mmio devices, more PCI devices than a bus has places for (bus 0 has 31), or a size of memory that is not a whole number
    ///   of pages.
    /// * Whatever the host says when it maps the memory.
    pub fn build(self) -> io::Result<Board> {
        if self.slots.len() > mmio::SLOTS || !self.bus.fits(1) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let memory = Memory::anonymous(DEFAULT_BASE, self.memory)?;
        memory.trace().set_limit(RECORDS);
        let violations = Violations::default();
        let mut cores = Vec::new();
        let mut add = |device: Device, transport: Transport| {
            let index = cores.len();
            cores.push(Core::new(
                index,
                device,
                transport,
                memory.clone(),
                violations.clone(),
                self.watching,
            ));
            index
        };
        let mut slots = Vec::new();
        for (version, device) in self.slots {
            let transport = match version {
                Version::Legacy => Transport::LegacyMmio,
                Version::Modern => Transport::Mmio,
            };
            let device = device.map(|device| add(device, transport));
            slots.push(MmioSlot::new(version, device));
        }
        while slots.len() < mmio::SLOTS {
            slots.push(MmioSlot::new(Version::Modern, None));
        }
        let mut functions = vec![PciFunction::new(Kind::Host, None, 0)];
        let mut add = |device| add(device, Transport::Pci);
        self.bus.plug(&mut functions, None, 1, &mut add);
        let mmio_slots = slots
            .iter()
            .zip(0_u32..)
            .map(|(slot, line)| Slot {
                base: usize::try_from(mmio::BASE + mmio::STRIDE * u64::from(line)).unwrap_or(0),
                size: 0x200,
                line,
                version: slot.version,
                device: slot.device,
            })
            .collect();
        let pci_functions = functions
            .iter()
            .filter(|function| function.parent.is_none())
            .filter_map(|function| match function.kind {
                Kind::Virtio(device) => Some(Function {
                    address: DeviceFunction {
                        bus: 0,
                        device: function.device,
                        function: 0,
                    },
                    line: PCI_LINES + pci::line(&functions, function),
                    device,
                }),
                Kind::Host | Kind::Bridge(_) => None,
            })
            .collect();
        let bus = Arc::new(Emulated {
            inner: Mutex::new(Inner {
                cores,
                slots,
                functions,
                window: self.window.clone(),
                violations: violations.clone(),
            }),
        });
        let watch: Arc<dyn MemoryWatch> = bus.clone();
        memory.set_watch(Arc::downgrade(&watch));
        let machine = Machine::new(memory, bus.clone());
        let installed = machine.install();
        Ok(Board {
            machine,
            bus,
            violations,
            mmio_slots,
            pci_functions,
            window: self.window,
            _installed: installed,
        })
    }
}

/// An emulated board, installed on the thread that built it.
///
/// Devices answer inside the doorbell, so whatever a driver waits for has happened when its register access returns; unless
/// they are told to [answer later](Device::answer_later), in [`run`](Self::run).
pub struct Board {
    machine: Machine,
    bus: Arc<Emulated>,
    violations: Violations,
    mmio_slots: Vec<Slot>,
    pci_functions: Vec<Function>,
    window: Range<u64>,
    _installed: Installed,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board")
            .field("machine", &self.machine)
            .field("functions", &self.pci_functions)
            .finish_non_exhaustive()
    }
}

impl Board {
    /// Starts to put an emulated board together.
    pub fn emulated() -> Builder {
        Builder {
            memory: MEMORY,
            slots: Vec::new(),
            bus: PciBus::new(),
            watching: true,
            window: pci::WINDOW,
        }
    }

    /// Returns the memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.machine.memory()
    }

    /// Returns the machine, which can be installed on other threads too.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Returns the 32 virtio-mmio slots, devices first in the order in which they were plugged in.
    pub fn mmio_slots(&self) -> &[Slot] {
        &self.mmio_slots
    }

    /// Returns the PCI root, with virtio-drivers' memory-mapped access to configuration space. The BARs have no addresses yet.
    pub fn pci(&self) -> PciRoot<MmioCam<'static>> {
        pci_root(pci::ECAM)
    }

    /// Returns the address of the memory-mapped configuration space (ECAM).
    pub fn ecam(&self) -> u64 {
        pci::ECAM
    }

    /// Returns the addresses that BARs may be given.
    pub fn pci_window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Returns the functions on bus 0 with a virtio device. There is a host bridge too, at 00:00.0.
    pub fn pci_functions(&self) -> &[Function] {
        &self.pci_functions
    }

    /// Returns the device of this number; devices are numbered first by slot, then by function, those behind a bridge
    /// where the bridge is.
    pub fn device(&self, index: usize) -> DeviceHandle {
        DeviceHandle {
            bus: self.bus.clone(),
            index,
        }
    }

    /// Returns the number of devices.
    pub fn devices(&self) -> usize {
        self.bus.lock().cores.len()
    }

    /// Lets devices do what they put off, and what came in without a kick. Returns the interrupt lines that are raised now.
    pub fn run(&self) -> Vec<u32> {
        let mut inner = self.bus.lock();
        for core in &mut inner.cores {
            core.run();
        }
        inner.settle();
        (0..PCI_LINES + 4)
            .filter(|line| inner.pending(*line))
            .collect()
    }

    /// Returns whether an interrupt line is raised.
    pub fn interrupt_pending(&self, line: u32) -> bool {
        self.bus.lock().pending(line)
    }

    /// Returns what the driver did against the rules, in order.
    pub fn violations(&self) -> Vec<Violation> {
        self.violations.all()
    }

    /// Returns what the driver did against the rules since the last call.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.violations.take()
    }

    /// Returns what happened, in order: the newest 65536 events of devices and memory.
    pub fn events(&self) -> Vec<Record> {
        self.memory().trace().records()
    }
}

/// A device on an emulated board, from the outside.
#[derive(Clone)]
pub struct DeviceHandle {
    bus: Arc<Emulated>,
    index: usize,
}

impl std::fmt::Debug for DeviceHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DeviceHandle").field(&self.index).finish()
    }
}

impl DeviceHandle {
    /// Returns what `ask` says of the device, or the default where the board has no such device.
    fn with<R: Default>(&self, ask: impl FnOnce(&mut Core) -> R) -> R {
        self.bus
            .lock()
            .cores
            .get_mut(self.index)
            .map(ask)
            .unwrap_or_default()
    }

    /// Returns the number of the device.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns the virtio device ID: 1 network, 2 block, 16 GPU.
    pub fn kind(&self) -> u32 {
        self.with(|core| core.model.kind())
    }

    /// Returns what the device has counted.
    pub fn counters(&self) -> DeviceCounters {
        self.with(|core| core.state.counters.clone())
    }

    /// Returns the device status.
    pub fn status(&self) -> u32 {
        self.with(|core| core.state.status)
    }

    /// Returns the features that the device offers.
    pub fn offered_features(&self) -> u64 {
        self.with(|core| core.offered())
    }

    /// Returns the features that the driver accepted.
    pub fn accepted_features(&self) -> u64 {
        self.with(|core| core.state.driver_features)
    }

    /// Returns the size of a queue that is in use; 0 where it is not.
    pub fn queue_size(&self, queue: usize) -> u32 {
        self.with(|core| {
            core.state
                .queues
                .get(queue)
                .filter(|queue| queue.enabled)
                .map_or(0, |queue| queue.size)
        })
    }

    /// Returns how many chains the driver has made available, by queue, of which the device was not told although it wants
    /// to be.
    pub fn unkicked(&self) -> Vec<u16> {
        self.with(|core| core.unkicked())
    }

    /// Returns whether the device has raised its interrupt.
    pub fn interrupt_pending(&self) -> bool {
        self.with(|core| {
            core.note_change();
            core.state.interrupt != 0
        })
    }

    /// Answers in [`Board::run`], or inside the doorbell.
    pub fn answer_later(&self, later: bool) {
        self.with(|core| core.state.options.later = later);
    }

    /// Misbehaves from now on. What a device decides before its driver starts takes effect at the next reset.
    pub fn misbehave(&self, hostile: Hostile) {
        self.with(|core| core.state.options.hostile = hostile);
    }

    /// Vanishes: all registers read as all ones.
    pub fn vanish(&self) {
        self.with(|core| core.state.gone = true);
    }

    /// Sets DEVICE_NEEDS_RESET, and raises the interrupt.
    pub fn needs_reset(&self) {
        self.with(|core| core.state.needs_reset());
    }

    /// Raises the interrupt for no reason that the driver can find: no buffer was used, nothing has changed.
    pub fn spurious_interrupt(&self, cause: u8) {
        self.with(|core| core.state.raise(cause & 3));
    }
}
