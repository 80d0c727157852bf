//! A PCI root: configuration space by ECAM, virtio functions (4.1) whose registers are in a 64-bit memory BAR, and bridges to
//! more buses (PCI-to-PCI Bridge Architecture Specification 1.2).

use std::ops::Range;

use super::lifecycle::Core;
use super::mmio::set_half;
use crate::hostile::{Fault, Occasion};

/// Where the configuration space of bus 0, device 0, function 0 is.
pub(crate) const ECAM: u64 = 0x3000_0000;
/// Size of the configuration space of all buses.
pub(crate) const ECAM_SIZE: u64 = 0x1000_0000;
/// The addresses that BARs may have.
pub(crate) const WINDOW: Range<u64> = 0x1000_0000..0x2000_0000;

const BAR_INDEX: u8 = 4;
const BAR_SIZE: u64 = 0x4000;
/// Number of I/O ports, on functions that have any.
const PORTS: u32 = 32;
const COMMON: u64 = 0x0000;
const COMMON_LEN: u64 = 56;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_LEN: u64 = 0x1000;
const MULTIPLIER: u32 = 4;
/// Notify offsets of the queues go up from here.
const FIRST_NOTIFY: u16 = 0;

const COMMAND_MEMORY: u16 = 2;
const COMMAND_MASTER: u16 = 4;
const COMMAND_NO_INTX: u16 = 1 << 10;

const CAPABILITIES: u8 = 0x40;

/// Registers that the driver has selected.
#[derive(Debug, Default)]
struct Selects {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// What is at a function.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A host bridge: it is there, and no more.
    Host,
    /// A bridge to another bus.
    Bridge(Bridge),
    /// The virtio device of this number.
    Virtio(usize),
}

/// The registers of a bridge that are not those of every function.
#[derive(Debug)]
pub(crate) struct Bridge {
    /// Primary, secondary and subordinate bus number, and the latency timer.
    numbers: u32,
    memory: u32,
    /// What it forwards of prefetchable memory: everything, after a reset that leaves the registers undefined.
    prefetchable: [u32; 3],
}

impl Bridge {
    pub(crate) fn new() -> Self {
        Self {
            numbers: 0,
            memory: 0,
            prefetchable: [0xfff1_0001, 0, u32::MAX],
        }
    }

    /// Returns the numbers of the buses that configuration accesses reach through it.
    fn buses(&self) -> std::ops::RangeInclusive<u64> {
        let [_, secondary, subordinate, _] = self.numbers.to_le_bytes();
        if secondary == 0 {
            return std::ops::RangeInclusive::new(1, 0);
        }
        secondary.into()..=subordinate.into()
    }

    fn forwards(&self, address: u64) -> bool {
        let within = |register: u32, base_high: u32, limit_high: u32| {
            let base = u64::from(register & 0xfff0) << 16 | u64::from(base_high) << 32;
            let limit = u64::from(register & 0xfff0_0000) | u64::from(limit_high) << 32 | 0xf_ffff;
            (base..=limit).contains(&address)
        };
        let [low, base, limit] = self.prefetchable;
        within(self.memory, 0, 0) || within(low, base, limit)
    }

    fn register(&mut self, offset: u64) -> Option<(&mut u32, u32)> {
        Some(match offset {
            0x18 => (&mut self.numbers, 0x00ff_ffff),
            0x20 => (&mut self.memory, 0xfff0_fff0),
            0x24 => (&mut self.prefetchable[0], 0xfff0_fff0),
            0x28 => (&mut self.prefetchable[1], u32::MAX),
            0x2c => (&mut self.prefetchable[2], u32::MAX),
            _ => return None,
        })
    }
}

/// The size of a bridge's own registers, in BAR 0.
const BRIDGE_BAR_SIZE: u64 = 0x1000;

/// Returns the index of the function that a configuration access to device `device` on bus `bus` reaches.
pub(crate) fn find(functions: &[PciFunction], bus: u64, device: u64) -> Option<usize> {
    let mut parent = None;
    if bus != 0 {
        loop {
            // The bus is behind one bridge of each level, or behind none.
            let (index, buses) = functions.iter().enumerate().find_map(|(index, function)| {
                let Kind::Bridge(bridge) = &function.kind else {
                    return None;
                };
                let leads_there = function.parent == parent && bridge.buses().contains(&bus);
                leads_there.then(|| (index, bridge.buses()))
            })?;
            parent = Some(index);
            if *buses.start() == bus {
                break;
            }
        }
    }
    functions
        .iter()
        .position(|function| function.parent == parent && u64::from(function.device) == device)
}

/// Returns the bridges between a function and the root, from the inside to the outside.
fn bridges<'a>(
    functions: &'a [PciFunction],
    function: &'a PciFunction,
) -> impl Iterator<Item = &'a PciFunction> {
    let above = |function: &PciFunction| function.parent.and_then(|parent| functions.get(parent));
    std::iter::successors(above(function), move |bridge| above(bridge))
}

/// Returns the index of the function that decodes `address`, and the offset in its BAR.
pub(crate) fn decode(
    functions: &[PciFunction],
    address: u64,
    window: &Range<u64>,
) -> Option<(usize, u64)> {
    functions.iter().enumerate().find_map(|(index, function)| {
        let offset = function.decode(address, window)?;
        let reached = bridges(functions, function).all(|bridge| match &bridge.kind {
            Kind::Bridge(registers) => {
                bridge.command & COMMAND_MEMORY != 0 && registers.forwards(address)
            }
            _ => false,
        });
        reached.then_some((index, offset))
    })
}

/// Returns whether the memory accesses of a function reach the root.
pub(crate) fn may_master(functions: &[PciFunction], function: &PciFunction) -> bool {
    function.command & COMMAND_MASTER != 0
        && bridges(functions, function).all(|bridge| bridge.command & COMMAND_MASTER != 0)
}

/// Returns which of the four interrupt lines of the root a function's pin is wired to: pins rotate from device to device.
pub(crate) fn line(functions: &[PciFunction], function: &PciFunction) -> u32 {
    let devices = bridges(functions, function).map(|bridge| u32::from(bridge.device));
    (u32::from(function.pin()) - 1 + u32::from(function.device) + devices.sum::<u32>()) % 4
}

/// What a function says of itself for as long as it is there.
#[derive(Debug)]
struct Conduct {
    fault: Option<Fault>,
    /// Configuration space with nothing but the capabilities.
    capabilities: [u8; 256],
}

impl Conduct {
    fn decide(core: &mut Core) -> Self {
        let fault = core.state.fault(Occasion::Capabilities);
        Self {
            fault,
            capabilities: capabilities(core, fault),
        }
    }

    fn bar_size(&self) -> u64 {
        if self.fault == Some(Fault::BarHuge) {
            1 << 63
        } else {
            BAR_SIZE
        }
    }

    fn bar_flags(&self) -> u64 {
        if self.fault == Some(Fault::BarTypeReserved) {
            0b1110
        } else {
            0b1100
        }
    }

    /// Whether BAR 0 is one for I/O ports.
    fn has_ports(&self) -> bool {
        self.fault == Some(Fault::CapabilityDecoys)
    }
}

/// A function of the bus.
#[derive(Debug)]
pub(crate) struct PciFunction {
    pub(crate) kind: Kind,
    /// The bridge that it is behind.
    pub(crate) parent: Option<usize>,
    pub(crate) device: u8,
    command: u16,
    bar: u64,
    /// Address of the I/O BAR, on functions that have one.
    ports: u32,
    line: u8,
    /// How the function lies about its capabilities and BARs, once that is decided.
    conduct: Option<Conduct>,
    selects: Selects,
}

impl PciFunction {
    pub(crate) fn new(kind: Kind, parent: Option<usize>, device: u8) -> Self {
        Self {
            kind,
            parent,
            device,
            command: 0,
            bar: 0,
            ports: 0,
            line: 0,
            conduct: None,
            selects: Selects::default(),
        }
    }

    /// Returns the offset in the BAR that `address` is at, if the function decodes it.
    fn decode(&self, address: u64, window: &Range<u64>) -> Option<u64> {
        let decodes = self.command & COMMAND_MEMORY != 0
            && self.bar != 0
            && window.contains(&self.bar)
            && matches!(self.kind, Kind::Virtio(_));
        address
            .checked_sub(self.bar)
            .filter(|offset| decodes && *offset < BAR_SIZE)
    }

    /// Returns whether `size` bytes at `address` lie in the BAR.
    pub(crate) fn holds(&self, address: u64, size: usize) -> bool {
        self.bar != 0
            && address
                .checked_sub(self.bar)
                .and_then(|offset| offset.checked_add(size as u64))
                .is_some_and(|end| end <= BAR_SIZE)
    }

    pub(crate) fn may_interrupt(&self) -> bool {
        self.command & COMMAND_NO_INTX == 0
    }

    /// Returns the number of the INTx pin: A is 1. All functions here use A.
    pub(crate) fn pin(&self) -> u8 {
        1
    }

    pub(crate) fn read_config(&mut self, core: Option<&mut Core>, offset: u64, width: u8) -> u64 {
        let Some(core) = core else {
            return read_bytes(&self.bridge_space(), offset, width);
        };
        if core.state.gone {
            return u64::MAX;
        }
        let space = self.space(core);
        read_bytes(&space, offset, width)
    }

    /// Puts the configuration space of a bridge together.
    fn bridge_space(&self) -> [u8; 256] {
        let mut space = [0; 256];
        put(&mut space, 0x00, &0x1b36_u16.to_le_bytes());
        put(&mut space, 0x02, &0x0008_u16.to_le_bytes());
        put(&mut space, 0x04, &self.command.to_le_bytes());
        space[0x0b] = 6;
        if let Kind::Bridge(bridge) = &self.kind {
            put(&mut space, 0x02, &0x0001_u16.to_le_bytes());
            space[0x0a] = 4;
            space[0x0e] = 1;
            put(&mut space, 0x10, &self.bar.to_le_bytes()[..4]);
            put(&mut space, 0x18, &bridge.numbers.to_le_bytes());
            put(&mut space, 0x20, &bridge.memory.to_le_bytes());
            for (at, register) in (0x24..).step_by(4).zip(bridge.prefetchable) {
                put(&mut space, at, &register.to_le_bytes());
            }
        }
        space
    }

    /// Writes to the configuration space of a bridge.
    fn write_bridge(&mut self, offset: u64, value: u64) {
        let word = (value & 0xffff_ffff) as u32;
        match (offset, &mut self.kind) {
            (4, _) => self.command = (value & 0x6) as u16,
            (0x10, Kind::Bridge(_)) => self.bar = u64::from(word) & !(BRIDGE_BAR_SIZE - 1),
            (_, Kind::Bridge(bridge)) => {
                if let Some((register, writable)) = bridge.register(offset) {
                    *register = *register & !writable | word & writable;
                }
            }
            _ => {}
        }
    }

    /// Puts the configuration space of a virtio function together.
    fn space(&mut self, core: &mut Core) -> [u8; 256] {
        let conduct = self.conduct.get_or_insert_with(|| Conduct::decide(core));
        let mut space = conduct.capabilities;
        let flags = conduct.bar_flags();
        if conduct.has_ports() {
            put(&mut space, 0x10, &(self.ports | 1).to_le_bytes());
        }
        let kind = u16::try_from(core.model.kind()).unwrap_or(0);
        let transitional = match kind {
            1 => Some(0x1000),
            2 => Some(0x1001),
            4 => Some(0x1005),
            _ => None,
        }
        .filter(|_| core.state.options.transitional);
        put(&mut space, 0x00, &0x1af4_u16.to_le_bytes());
        put(
            &mut space,
            0x02,
            &transitional.unwrap_or(0x1040 + kind).to_le_bytes(),
        );
        put(&mut space, 0x04, &self.command.to_le_bytes());
        let interrupt = u16::from(core.state.interrupt != 0) << 3;
        put(&mut space, 0x06, &(0x10 | interrupt).to_le_bytes());
        let (class, subclass) = match kind {
            1 => (2, 0),
            2 => (1, 0),
            16 => (3, 0x80),
            _ => (0, 0xff),
        };
        space[0x08] = u8::from(transitional.is_none());
        space[0x0a] = subclass;
        space[0x0b] = class;
        let bar = (self.bar | flags).to_le_bytes();
        put(&mut space, 0x10 + 4 * usize::from(BAR_INDEX), &bar);
        put(&mut space, 0x2c, &0x1af4_u16.to_le_bytes());
        put(&mut space, 0x2e, &0x1100_u16.to_le_bytes());
        space[0x34] = CAPABILITIES;
        space[0x3c] = self.line;
        space[0x3d] = self.pin();
        space
    }

    pub(crate) fn write_config(
        &mut self,
        core: Option<&mut Core>,
        offset: u64,
        width: u8,
        value: u64,
    ) {
        let Some(core) = core else {
            self.write_bridge(offset, value);
            return;
        };
        if core.state.gone {
            return;
        }
        let word = (value & 0xffff_ffff) as u32;
        let bar = 0x10 + 4 * u64::from(BAR_INDEX);
        match (offset, width) {
            (4, 2 | 4) => {
                self.command =
                    (value & 0xffff) as u16 & (COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX);
            }
            (offset, 4) if offset == bar || offset == bar + 4 => {
                if self.command & COMMAND_MEMORY != 0 {
                    core.state.violation(
                        "PCI-10",
                        "a BAR was written while memory decoding was enabled",
                    );
                }
                let conduct = self.conduct.get_or_insert_with(|| Conduct::decide(core));
                set_half(&mut self.bar, offset != bar, word);
                self.bar &= !(conduct.bar_size() - 1);
            }
            (0x10, 4) if self.conduct.as_ref().is_some_and(Conduct::has_ports) => {
                self.ports = word & !(PORTS - 1);
            }
            (0x10..0x28 | 0x30, 4) => {}
            (0x3c, 1 | 4) => self.line = (value & 0xff) as u8,
            _ => core.state.violation(
                "PCI-10",
                format!("configuration space written at {offset:#x} with {width} bytes"),
            ),
        }
    }

    pub(crate) fn read_bar(&mut self, core: &mut Core, offset: u64, width: u8) -> u64 {
        core.state.counters.reads += 1;
        if let Some(lie) = core.disturb() {
            return lie.into();
        }
        match offset {
            COMMON..COMMON_LEN => self.read_common(core, offset, width),
            ISR => {
                if width != 1 {
                    core.state
                        .violation("PCI-04", format!("ISR status read with {width} bytes"));
                }
                let cause = core.read_interrupt();
                core.acknowledge(cause.into());
                cause.into()
            }
            CONFIG..NOTIFY => core.read_config(offset - CONFIG, width),
            _ => {
                core.state
                    .violation("PCI-09", format!("BAR read at {offset:#x}"));
                u64::MAX
            }
        }
    }

    fn queue(&self, core: &Core) -> Option<usize> {
        let queue = usize::from(self.selects.queue);
        (queue < core.state.queues.len()).then_some(queue)
    }

    fn read_common(&mut self, core: &mut Core, offset: u64, width: u8) -> u64 {
        let Some((start, size)) = common_field(offset) else {
            return u64::MAX;
        };
        if offset != start && size != 8
            || width != size.min(4)
            || !(offset - start).is_multiple_of(4)
        {
            core.state.violation(
                "PCI-04",
                format!("common configuration read at {offset:#x} with {width} bytes"),
            );
        }
        let high = |value: u64| value >> (8 * (offset - start));
        let queue = self.queue(core);
        match start {
            0x00 => self.selects.device_features.into(),
            0x04 => core.features(self.selects.device_features).into(),
            0x08 => self.selects.driver_features.into(),
            0x0c => match self.selects.driver_features {
                0 => core.state.driver_features & 0xffff_ffff,
                1 => core.state.driver_features >> 32,
                _ => 0,
            },
            // No MSI-X: the vectors read as VIRTIO_MSI_NO_VECTOR.
            0x10 | 0x1a => 0xffff,
            0x12 => core.state.queues.len() as u64,
            0x14 => core.read_status().into(),
            0x15 => u64::from(core.read_generation()) & 0xff,
            0x16 => self.selects.queue.into(),
            0x18 => {
                let chosen = queue.map_or(0, |queue| core.state.queues[queue].size);
                if chosen == 0 {
                    core.queue_max(self.selects.queue.into()).into()
                } else {
                    chosen.into()
                }
            }
            0x1c => queue.map_or(0, |queue| core.state.queues[queue].enabled.into()),
            0x1e => {
                if core.state.fault(Occasion::NotifyOffset).is_some() {
                    0x7fff
                } else {
                    u64::from(FIRST_NOTIFY + self.selects.queue)
                }
            }
            0x20 => queue.map_or(0, |queue| high(core.state.queues[queue].layout.descriptors)),
            0x28 => queue.map_or(0, |queue| high(core.state.queues[queue].layout.driver)),
            _ => queue.map_or(0, |queue| high(core.state.queues[queue].layout.device)),
        }
    }

    pub(crate) fn write_bar(&mut self, core: &mut Core, offset: u64, width: u8, value: u64) {
        core.state.counters.writes += 1;
        if core.vanishes() {
            return;
        }
        match offset {
            COMMON..COMMON_LEN => self.write_common(core, offset, width, value),
            CONFIG..NOTIFY => core.write_config(offset - CONFIG, width, value),
            NOTIFY..BAR_SIZE => {
                let place = (offset - NOTIFY) / u64::from(MULTIPLIER);
                let wanted = u64::from(FIRST_NOTIFY) + (value & 0xffff);
                if width != 2
                    || !(offset - NOTIFY).is_multiple_of(u64::from(MULTIPLIER))
                    || place != wanted
                {
                    core.state.violation(
                        "PCI-21",
                        format!("{value:#x} written with {width} bytes to notify offset {place}"),
                    );
                }
                core.notify((value & 0xffff) as u32);
            }
            _ => core
                .state
                .violation("PCI-09", format!("BAR written at {offset:#x}")),
        }
    }

    fn write_common(&mut self, core: &mut Core, offset: u64, width: u8, value: u64) {
        let Some((start, size)) = common_field(offset) else {
            return;
        };
        if size == 8 && width == 8 && offset == start {
            core.state.violation(
                "PCI-04",
                format!("common configuration written at {offset:#x} with 8 bytes"),
            );
            self.write_common_field(core, start, start, value & 0xffff_ffff);
            self.write_common_field(core, start, start + 4, value >> 32);
            return;
        }
        if offset != start && size != 8
            || width != size.min(4)
            || !(offset - start).is_multiple_of(4)
        {
            core.state.violation(
                "PCI-04",
                format!("common configuration written at {offset:#x} with {width} bytes"),
            );
        }
        self.write_common_field(core, start, offset, value);
    }

    fn write_common_field(&mut self, core: &mut Core, start: u64, offset: u64, value: u64) {
        let word = (value & 0xffff_ffff) as u32;
        let half = (value & 0xffff) as u16;
        match start {
            0x00 => self.selects.device_features = word,
            0x08 => self.selects.driver_features = word,
            0x0c => core.write_features(self.selects.driver_features, word),
            0x10 | 0x1a => {}
            0x14 => {
                if value & 0xff == 0 {
                    self.selects = Selects::default();
                }
                core.write_status(word & 0xff);
            }
            0x16 => self.selects.queue = half,
            0x18 | 0x1c | 0x20 | 0x28 | 0x30 => {
                let Some(queue) = self.queue(core) else {
                    return;
                };
                if core.state.queues[queue].enabled {
                    let id = if start == 0x1c && half == 0 {
                        "PCI-15"
                    } else {
                        "PCI-13"
                    };
                    core.state.violation(
                        id,
                        format!("register {start:#x} of queue {queue} written while it is enabled"),
                    );
                    return;
                }
                let max = core.queue_max(self.selects.queue.into());
                let device_queue = &mut core.state.queues[queue];
                match start {
                    0x18 => {
                        device_queue.size = half.into();
                        if !half.is_power_of_two() || u32::from(half) > max {
                            core.state.violation(
                                "PCI-12",
                                format!("queue size {half}, of {max} at most"),
                            );
                        }
                    }
                    0x1c if half == 0 => {
                        core.state.violation("PCI-15", "0 written to queue_enable")
                    }
                    0x1c => {
                        if device_queue.size == 0 {
                            device_queue.size = max;
                        }
                        core.enable_queue(queue);
                    }
                    _ => {
                        let address = match start {
                            0x20 => &mut device_queue.layout.descriptors,
                            0x28 => &mut device_queue.layout.driver,
                            _ => &mut device_queue.layout.device,
                        };
                        set_half(address, offset != start, word);
                    }
                }
            }
            _ => core
                .state
                .violation("PCI-11", format!("read-only register {start:#x} written")),
        }
    }
}

/// Returns start and width of the field of the common configuration (4.1.4.3) that `offset` is in.
fn common_field(offset: u64) -> Option<(u64, u8)> {
    let (start, size) = match offset {
        0x00..0x10 => (offset & !3, 4),
        0x10..0x14 | 0x16..0x20 => (offset & !1, 2),
        0x14 | 0x15 => (offset, 1),
        0x20..0x38 => (offset & !7, 8),
        _ => return None,
    };
    Some((start, size))
}

fn put(space: &mut [u8; 256], at: usize, bytes: &[u8]) {
    if let Some(place) = space.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn read_bytes(space: &[u8; 256], offset: u64, width: u8) -> u64 {
    let mut bytes = [0; 8];
    for (index, byte) in bytes.iter_mut().take(width.into()).enumerate() {
        if let Ok(at) = usize::try_from(offset + index as u64) {
            // Extended configuration space is empty.
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }
    u64::from_le_bytes(bytes)
}

/// Puts the list of capabilities together (4.1.4), as honest as the device is.
fn capabilities(core: &mut Core, fault: Option<Fault>) -> [u8; 256] {
    let number = if fault.is_some() {
        core.state.options.hostile.number()
    } else {
        0
    };
    let config_len = core.config_len();
    let mut space = [0; 256];
    let mut at = CAPABILITIES;
    let mut list = vec![
        (1, COMMON, COMMON_LEN, 16_u8, BAR_INDEX),
        (2, NOTIFY, NOTIFY_LEN, 20, BAR_INDEX),
        (3, ISR, 1, 16, BAR_INDEX),
    ];
    if config_len > 0 {
        list.push((4, CONFIG, config_len, 16, BAR_INDEX));
    }
    if fault == Some(Fault::CapabilityDecoys) {
        // 4.1.4.1: a reserved type, reserved BARs, and a structure longer than its capability needs.
        list.insert(0, (9, 0, 64, 16, BAR_INDEX));
        list.insert(1, (1, 0, 64, 16, 7));
        list.insert(2, (2, 0, 64, 24, 6));
        list.insert(3, (3, 0, 1, 16, 0));
    }
    let count = list.len();
    for (index, (kind, offset, length, len, bar)) in list.into_iter().enumerate() {
        let next = at + len;
        let last = index + 1 == count;
        let mut bar = bar;
        let (mut offset, mut length) =
            ((offset & 0xffff_ffff) as u32, (length & 0xffff_ffff) as u32);
        match fault {
            Some(Fault::BarReserved(reserved)) => bar = reserved,
            Some(Fault::OffsetWraps) => {
                offset = 0xffff_f000;
                length = 0x2000;
            }
            Some(Fault::OffsetBeyondBar) => offset = (BAR_SIZE & 0xffff) as u32 + (number & 0xffff),
            _ => {}
        }
        let following = match fault {
            Some(Fault::CapabilityLoop) if last => CAPABILITIES,
            Some(Fault::CapabilityOffEnd) if last => 0xfc,
            _ if last => 0,
            _ => next,
        };
        let start = usize::from(at);
        put(&mut space, start, &[0x09, following, len, kind, bar]);
        put(&mut space, start + 8, &offset.to_le_bytes());
        put(&mut space, start + 12, &length.to_le_bytes());
        if kind == 2 {
            let multiplier = if fault == Some(Fault::NotifyMultiplierOdd) {
                MULTIPLIER + 1
            } else {
                MULTIPLIER
            };
            put(&mut space, start + 16, &multiplier.to_le_bytes());
        }
        at = next;
    }
    if fault == Some(Fault::CapabilityOffEnd) {
        put(&mut space, 0xfc, &[0x09, 0, 20, 2]);
    }
    space
}
