//! What is behind a PCI-to-PCI bridge, how to let it forward that, and where interrupts come out.
//!
//! PCI-to-PCI Bridge Architecture Specification 1.2, 3.2.5 and 9.1. The topology is the word of the
//! bridges: what is followed goes to higher bus numbers only, so that every search ends.

use core::ops::RangeInclusive;

use axdriver_base::{DevError, DevResult};
use log::{debug, warn};
use virtio_drivers::transport::pci::bus::{
    Command, ConfigurationAccess, DeviceFunction, DeviceFunctionInfo, HeaderType,
};

use super::{
    bars::{COMMAND, DECODE, PciRangeAllocator, Quiet, assign_bars_of, words},
    pci::{driven_type, info},
};

const HEADER_TYPE: u8 = 0x0c;
/// Primary, secondary and subordinate bus number.
const BUS_NUMBERS: u8 = 0x18;
/// Base and limit of the memory that is forwarded.
const MEMORY: u8 = 0x20;
/// The same of prefetchable memory, and the upper halves of both.
const PREFETCHABLE: [u8; 3] = [0x24, 0x28, 0x2c];
/// A base that is greater than its limit: nothing is forwarded.
const CLOSED: u32 = 0x0000_fff0;
const INTERRUPT: u8 = 0x3c;

/// The bits of [`BUS_NUMBERS`] that are bus numbers.
const NUMBERS: u32 = 0x00ff_ffff;
/// What a bridge forwards is a multiple of this, and below 4 GiB.
const GRANULE: u64 = 1 << 20;
const BELOW_4_GIB: u64 = 1 << 32;
/// The number of BARs of a bridge.
const BARS: u8 = 2;
/// The most bridges between the first bus and one that is numbered here.
const MAX_DEPTH: usize = 16;

/// The functions on a bus, one after another.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    bus: u8,
    /// Device and function number of the next, as in the address of a function.
    next: u16,
}

impl Functions {
    pub(super) const NONE: Self = Self { bus: 0, next: 256 };

    pub(super) const fn of(bus: u8) -> Self {
        Self { bus, next: 0 }
    }

    /// Returns the next function that is there. A device without function 0 is none, and only one
    /// that says so has more functions than that (PCI Local Bus Specification 3.0, 3.2.2.3.4).
    pub(super) fn next<C: ConfigurationAccess>(
        &mut self,
        access: &C,
    ) -> Option<(DeviceFunction, DeviceFunctionInfo)> {
        loop {
            let [next, 0] = self.next.to_le_bytes() else {
                return None;
            };
            let function = DeviceFunction {
                bus: self.bus,
                device: next >> 3,
                function: next & 7,
            };
            let ids = access.read_word(function, 0);
            if ids == u32::MAX {
                self.next += if function.function == 0 { 8 } else { 1 };
                continue;
            }
            let [.., header_type, _] = access.read_word(function, HEADER_TYPE).to_le_bytes();
            let alone = function.function == 0 && header_type & 0x80 == 0;
            self.next += if alone { 8 } else { 1 };
            return Some((function, info(ids, HeaderType::from(header_type & 0x7f))));
        }
    }
}

/// What a PCI-to-PCI bridge forwards, as its registers have it.
///
/// # Examples
///
/// A device was plugged into the slot of the port `port`, in which there was none:
///
/// ```
/// use axdriver_virtio::{PciBridge, VirtIoHal, probe_pci_buses};
/// use axdriver_virtio::pci::{ConfigurationAccess, DeviceFunction, PciRoot};
///
/// fn plugged<H: VirtIoHal, C: ConfigurationAccess>(access: C, port: DeviceFunction) {
///     let Some(PciBridge { buses, mut window, .. }) = PciBridge::read(&access, port) else {
///         return; // no bridge, or nobody numbered it
///     };
///     let mut root = PciRoot::new(access);
///     for (function, device_type, transport) in
///         probe_pci_buses::<H, C>(&mut root, buses, Some(&mut window))
///     {
///         println!("{function}: {device_type:?}");
///         drop(transport); // make a driver of it instead
///     }
/// }
/// # extern crate machine;
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PciBridge {
    /// The buses behind it: the first is the one that it leads to.
    pub buses: RangeInclusive<u8>,
    /// The addresses of memory that it forwards, all taken to be free. Prefetchable memory is not
    /// among them.
    pub window: PciRangeAllocator,
}

impl PciBridge {
    /// Reads what the bridge `function` forwards.
    ///
    /// Returns `None` if there is no bridge, or one without bus numbers that are above its own and
    /// in order.
    pub fn read<C: ConfigurationAccess>(access: &C, function: DeviceFunction) -> Option<Self> {
        if !function.valid() || access.read_word(function, 0) == u32::MAX {
            return None;
        }
        let [.., header_type, _] = access.read_word(function, HEADER_TYPE).to_le_bytes();
        if HeaderType::from(header_type & 0x7f) != HeaderType::PciPciBridge {
            return None;
        }
        let [base, limit] = words(access.read_word(function, MEMORY)).map(|half| {
            // The lower 4 bits are no part of the address, whose upper 12 bits these are.
            u64::from(half & 0xfff0) << 16
        });
        let size = (limit + GRANULE).checked_sub(base).filter(|_| base != 0);
        Some(Self {
            buses: buses(access, function)?,
            window: PciRangeAllocator::new(base, size.unwrap_or(0)),
        })
    }
}

/// Returns the buses behind a bridge, if they have numbers above its own.
fn buses<C: ConfigurationAccess>(access: &C, bridge: DeviceFunction) -> Option<RangeInclusive<u8>> {
    let [_, secondary, subordinate, _] = access.read_word(bridge, BUS_NUMBERS).to_le_bytes();
    (secondary > bridge.bus && secondary <= subordinate).then_some(secondary..=subordinate)
}

/// Returns where the interrupt pin of a function comes out on the bus `root_bus`: the function on
/// that bus, which is the bridge that it is behind or the function itself, and the pin of it that
/// the interrupt is like one of (1 is INTA#).
///
/// Behind a bridge the pins rotate with the number of the device. A kernel looks up what this
/// returns in the `interrupt-map` of a device tree or the `_PRT` of ACPI, which know the first bus
/// only. Where firmware has routed interrupts, their lines are also in the function's own Interrupt
/// Line register.
///
/// Returns `None` if the function has no interrupt pin, or no bridge leads to it.
pub fn route_pci_interrupt<C: ConfigurationAccess>(
    access: &C,
    root_bus: u8,
    function: DeviceFunction,
) -> Option<(DeviceFunction, u8)> {
    if !function.valid() {
        return None;
    }
    let [_, pin, ..] = access.read_word(function, INTERRUPT).to_le_bytes();
    if !(1..=4).contains(&pin) {
        return None;
    }
    let (mut bus, mut outermost, mut rotation) = (root_bus, None, pin - 1);
    // Each bus has a higher number than the one before, so this ends.
    while bus != function.bus {
        let mut functions = Functions::of(bus);
        let (bridge, secondary) = loop {
            let (bridge, info) = functions.next(access)?;
            if info.header_type == HeaderType::PciPciBridge
                && let Some(buses) = buses(access, bridge)
                && buses.contains(&function.bus)
            {
                break (bridge, *buses.start());
            }
        };
        match outermost {
            None => outermost = Some(bridge),
            Some(_) => rotation += bridge.device % 4,
        }
        rotation %= 4;
        bus = secondary;
    }
    Some(match outermost {
        None => (function, pin),
        Some(bridge) => (bridge, (rotation + function.device) % 4 + 1),
    })
}

/// Returns the number of the bus that a bridge leads to, if it is one up to `last` that a search may
/// follow, and lets the bridge pass on what devices behind it read and write if `enable` says so.
pub(super) fn follow<C: ConfigurationAccess>(
    access: &mut C,
    bridge: DeviceFunction,
    last: u8,
    enable: bool,
) -> Option<u8> {
    let secondary = *buses(access, bridge)?.start();
    if secondary > last {
        debug!("PCI {bridge}: bus {secondary} behind it is not looked at");
        return None;
    }
    let [command, _] = words(access.read_word(bridge, COMMAND));
    let master = Command::BUS_MASTER.bits();
    if enable && command & master == 0 {
        access.write_word(bridge, COMMAND, (command | master).into());
    }
    Some(secondary)
}

/// A bridge that was given a number, while what is behind it is.
#[derive(Clone, Copy)]
struct Open {
    bridge: DeviceFunction,
    secondary: u8,
    /// The first address that it is to forward.
    start: u64,
    /// What comes behind it on its bus.
    rest: Functions,
}

/// Gives numbers to buses, and addresses to what is on them.
struct Numbering<'a, C: ConfigurationAccess> {
    access: &'a mut C,
    /// The highest number that is in use.
    highest: u8,
    /// The highest number that may be used.
    last: u8,
    /// The addresses that bridges can forward. The end is a multiple of [`GRANULE`].
    window: PciRangeAllocator,
}

/// Gives numbers to the bridges on the first of `buses` that have none, and to the bridges behind
/// them, and addresses from `window` to these bridges and the virtio devices behind them.
pub(super) fn number<C: ConfigurationAccess>(
    access: &mut C,
    buses: &RangeInclusive<u8>,
    window: &mut PciRangeAllocator,
) {
    let mut numbering = Numbering {
        access,
        highest: *buses.start(),
        last: *buses.end(),
        window: PciRangeAllocator {
            next: window.next,
            end: window.end.min(BELOW_4_GIB) & !(GRANULE - 1),
        },
    };
    numbering.skip_numbered();
    numbering.walk(*buses.start());
    window.next = numbering.window.next;
}

impl<C: ConfigurationAccess> Numbering<'_, C> {
    /// Leaves out the numbers of the bridges on the first bus that have some.
    fn skip_numbered(&mut self) {
        let mut functions = Functions::of(self.highest);
        while let Some((function, info)) = functions.next(self.access) {
            if info.header_type == HeaderType::PciPciBridge && self.is_numbered(function) {
                let [_, secondary, subordinate, _] = self.numbers(function).to_le_bytes();
                // One that leads beyond the last number leaves all of these free.
                if secondary <= self.last {
                    self.highest = self.highest.max(secondary).max(subordinate);
                }
            }
        }
    }

    fn numbers(&self, bridge: DeviceFunction) -> u32 {
        self.access.read_word(bridge, BUS_NUMBERS)
    }

    fn is_numbered(&self, bridge: DeviceFunction) -> bool {
        let [_, secondary, ..] = self.numbers(bridge).to_le_bytes();
        secondary != 0
    }

    /// Goes through the bridges on `first` that have no numbers, and through all that is behind
    /// them, depth first. A bus is entered only with a number that none had before.
    fn walk(&mut self, first: u8) {
        let mut path: [Option<Open>; MAX_DEPTH] = [None; MAX_DEPTH];
        let mut depth = 0_usize;
        let mut functions = Functions::of(first);
        loop {
            let Some((function, info)) = functions.next(self.access) else {
                // The bus is done: back to the one that its bridge is on.
                let above = depth.checked_sub(1);
                let Some(open) = above.and_then(|above| *path.get(above)?) else {
                    return;
                };
                depth -= 1;
                self.close(&open);
                functions = open.rest;
                continue;
            };
            match info.header_type {
                // What is behind a bridge that had no number has none either, whatever it says.
                HeaderType::PciPciBridge if depth > 0 || !self.is_numbered(function) => {
                    let entered = match path.get_mut(depth) {
                        Some(place) => self.open(function, functions).map(|open| {
                            functions = Functions::of(open.secondary);
                            *place = Some(open);
                            depth += 1;
                        }),
                        None => Err(DevError::Unsupported),
                    };
                    if let Err(error) = entered {
                        warn!("PCI {function}: what is behind the bridge is left alone: {error}");
                    }
                }
                HeaderType::Standard if depth > 0 && driven_type(&info).is_some() => {
                    // What went wrong is in the log, and the function is not enabled.
                    let _ = assign_bars_of(self.access, function, &mut self.window);
                }
                _ => {}
            }
        }
    }

    fn write_numbers(&mut self, bridge: DeviceFunction, secondary: u8, subordinate: u8) {
        let others = self.numbers(bridge) & !NUMBERS;
        let primary = if secondary == 0 { 0 } else { bridge.bus };
        let numbers = u32::from_le_bytes([primary, secondary, subordinate, 0]);
        self.access
            .write_word(bridge, BUS_NUMBERS, others | numbers);
    }

    /// Gives a bridge the next number, and lets it pass on configuration accesses to all above.
    ///
    /// # Errors
    ///
    /// * [`DevError::NoMemory`]: there is no number left, or no room in the window. Nothing is
    ///   behind the bridge.
    /// * [`DevError::Io`]: the bridge does not take the numbers, or a BAR of it no address.
    fn open(&mut self, bridge: DeviceFunction, rest: Functions) -> DevResult<Open> {
        if self.highest >= self.last {
            return Err(DevError::NoMemory);
        }
        let secondary = self.highest + 1;
        let mut quiet = Quiet::new(self.access, bridge, BARS);
        quiet.command &= !DECODE;
        quiet.assign_all(&mut self.window)?;
        drop(quiet);
        let start = self.window.next.checked_next_multiple_of(GRANULE);
        let start = start
            .filter(|start| self.window.end.checked_sub(*start) >= Some(GRANULE))
            .ok_or(DevError::NoMemory)?;

        self.write_numbers(bridge, secondary, self.last);
        if self.numbers(bridge).to_le_bytes()[..3] != [bridge.bus, secondary, self.last] {
            self.write_numbers(bridge, 0, 0);
            return Err(DevError::Io);
        }
        self.highest = secondary;
        self.window.next = start;
        Ok(Open {
            bridge,
            secondary,
            start,
            rest,
        })
    }

    /// Lets a bridge forward what is behind it and no more, and one granule at least, for what is
    /// plugged in there later.
    fn close(&mut self, open: &Open) {
        let Open {
            bridge,
            secondary,
            start,
            ..
        } = *open;
        // It cannot overflow: the end of the window is a multiple of the granule, and there was
        // room for one.
        let end = self.window.next.max(start + 1).next_multiple_of(GRANULE);
        self.window.next = end;
        self.write_numbers(bridge, secondary, self.highest);

        #[expect(clippy::cast_possible_truncation, reason = "all is below 4 GiB")]
        let memory = (start >> 16) as u32 | (end - GRANULE) as u32;
        self.access.write_word(bridge, MEMORY, memory);
        for (register, value) in PREFETCHABLE.into_iter().zip([CLOSED, 0, 0]) {
            self.access.write_word(bridge, register, value);
        }
        if self.access.read_word(bridge, MEMORY) & 0xfff0_fff0 != memory {
            warn!("PCI {bridge}: the bridge does not forward {start:#x}..{end:#x}");
            self.write_numbers(bridge, 0, 0);
            return;
        }
        let [command, _] = words(self.access.read_word(bridge, COMMAND));
        let enabled = command | (Command::MEMORY_SPACE | Command::BUS_MASTER).bits();
        self.access.write_word(bridge, COMMAND, enabled.into());
        debug!(
            "PCI {bridge}: buses {secondary} to {} and {start:#x}..{end:#x} behind it",
            self.highest
        );
    }
}
