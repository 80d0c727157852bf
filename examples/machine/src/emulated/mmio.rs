//! The registers of virtio-mmio, version 1 (4.2.4) and version 2 (4.2.2).

use std::collections::BTreeSet;

use super::lifecycle::Core;
use super::state::Transport;
use super::watch::{Violation, Violations};

/// Where the first slot is.
pub(crate) const BASE: u64 = 0x0a00_0000;
/// Bytes from one slot to the next.
pub(crate) const STRIDE: u64 = 0x200;
/// Number of slots.
pub(crate) const SLOTS: usize = 32;

const CONFIG: u64 = 0x100;
const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = 0x554d_4551;

/// Which registers a slot has.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Version {
    /// Version 1, from before 1.0: page numbers, and rings in one piece.
    Legacy = 1,
    /// Version 2.
    Modern = 2,
}

/// Registers that the driver has selected, and the order in which it read the first ones.
#[derive(Debug, Default)]
pub(crate) struct Selects {
    device_features: Option<u32>,
    driver_features: Option<u32>,
    queue: u32,
    magic_read: bool,
    version_read: bool,
    id_read: bool,
    /// Queues of which QueueReady was read since the reset.
    ready_read: BTreeSet<u32>,
    /// Queues of which QueueNumMax was read since the reset.
    max_read: BTreeSet<u32>,
    /// QueueReady was written 0 and not read since.
    stopping: bool,
}

/// A slot, empty or with a device.
#[derive(Debug)]
pub(crate) struct MmioSlot {
    pub(crate) version: Version,
    pub(crate) device: Option<usize>,
    selects: Selects,
}

impl MmioSlot {
    pub(crate) fn new(version: Version, device: Option<usize>) -> Self {
        Self {
            version,
            device,
            selects: Selects::default(),
        }
    }

    /// Answers for a slot without a device: DeviceID 0 (4.2.3.1).
    pub(crate) fn read_empty(&mut self, offset: u64, violations: &Violations) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => self.version as u32,
            0x008 => 0,
            _ => {
                touched_empty(offset, violations);
                0
            }
        }
    }

    pub(crate) fn write_empty(&self, offset: u64, violations: &Violations) {
        touched_empty(offset, violations);
    }

    pub(crate) fn read(&mut self, core: &mut Core, offset: u64, width: u8) -> u64 {
        core.state.counters.reads += 1;
        if let Some(lie) = core.disturb() {
            return lie.into();
        }
        if offset >= CONFIG {
            return core.read_config(offset - CONFIG, width);
        }
        if width != 4 || !offset.is_multiple_of(4) {
            core.state.violation(
                "MMIO-02",
                format!("register {offset:#x} read with {width} bytes"),
            );
            return u64::MAX;
        }
        self.register(core, offset).into()
    }

    fn register(&mut self, core: &mut Core, offset: u64) -> u32 {
        let modern = self.version == Version::Modern;
        if offset != 0x44 {
            self.stopped(core, offset);
        }
        let selects = &mut self.selects;
        match offset {
            0x000 => {
                selects.magic_read = true;
                MAGIC
            }
            0x004 => {
                selects.version_read = true;
                self.version as u32
            }
            0x008 => {
                if !(selects.id_read || selects.magic_read && selects.version_read) {
                    core.state
                        .violation("MMIO-15", "DeviceID read before MagicValue and Version");
                }
                selects.id_read = true;
                core.model.kind()
            }
            0x00c => VENDOR,
            0x010 => {
                if selects.device_features.is_none() {
                    core.state
                        .violation("MMIO-07", "DeviceFeatures read before DeviceFeaturesSel");
                }
                core.features(selects.device_features.unwrap_or(0))
            }
            0x034 => {
                selects.max_read.insert(selects.queue);
                core.queue_max(selects.queue)
            }
            0x040 if !modern => {
                selects.ready_read.insert(selects.queue);
                self.queue(core)
                    .map_or(0, |queue| core.state.queues[queue].page)
            }
            0x044 if modern => {
                selects.ready_read.insert(selects.queue);
                selects.stopping = false;
                self.queue(core)
                    .map_or(0, |queue| core.state.queues[queue].enabled.into())
            }
            0x060 => core.read_interrupt().into(),
            0x070 => core.read_status(),
            0x0b0..=0x0bc if modern => {
                core.state
                    .violation("MMIO-16", "shared memory registers of a device without any");
                u32::MAX
            }
            0x0fc if modern => core.read_generation(),
            _ => {
                core.state
                    .violation("MMIO-01", format!("register {offset:#x} read"));
                0
            }
        }
    }

    /// Returns the selected queue, if the device has it.
    fn queue(&self, core: &Core) -> Option<usize> {
        usize::try_from(self.selects.queue)
            .ok()
            .filter(|queue| *queue < core.state.queues.len())
    }

    fn stopped(&mut self, core: &mut Core, offset: u64) {
        if std::mem::take(&mut self.selects.stopping) {
            core.state.violation(
                "MMIO-11",
                format!("register {offset:#x} accessed before QueueReady was read back as 0"),
            );
        }
    }

    pub(crate) fn write(&mut self, core: &mut Core, offset: u64, width: u8, value: u64) {
        core.state.counters.writes += 1;
        if core.vanishes() {
            return;
        }
        if offset >= CONFIG {
            core.write_config(offset - CONFIG, width, value);
            return;
        }
        if width != 4 || !offset.is_multiple_of(4) {
            core.state.violation(
                "MMIO-02",
                format!("register {offset:#x} written with {width} bytes"),
            );
            return;
        }
        self.set_register(core, offset, (value & 0xffff_ffff) as u32);
    }

    fn set_register(&mut self, core: &mut Core, offset: u64, value: u32) {
        let modern = self.version == Version::Modern;
        self.stopped(core, offset);
        match offset {
            0x014 => self.selects.device_features = Some(value),
            0x020 => {
                if self.selects.driver_features.is_none() {
                    core.state
                        .violation("MMIO-08", "DriverFeatures written before DriverFeaturesSel");
                }
                core.write_features(self.selects.driver_features.unwrap_or(0), value);
            }
            0x024 => self.selects.driver_features = Some(value),
            0x028 if !modern => core.state.page_size = value,
            0x030 => self.selects.queue = value,
            0x038 => self.set_queue_size(core, value),
            0x03c if !modern => {
                if let Some(queue) = self.queue(core) {
                    core.state.queues[queue].align = value;
                }
            }
            0x040 if !modern => self.set_page(core, value),
            0x044 if modern => self.set_ready(core, value),
            0x050 => core.notify(value),
            0x064 => {
                if value & !3 != 0 {
                    core.state.violation(
                        "MMIO-13",
                        format!("undefined bits in InterruptACK: {value:#x}"),
                    );
                }
                core.acknowledge(value);
            }
            0x070 => {
                if value == 0 {
                    let Selects {
                        magic_read,
                        version_read,
                        id_read,
                        ..
                    } = self.selects;
                    self.selects = Selects {
                        magic_read,
                        version_read,
                        id_read,
                        ..Selects::default()
                    };
                }
                core.write_status(value);
            }
            0x080 | 0x084 | 0x090 | 0x094 | 0x0a0 | 0x0a4 if modern => {
                self.set_address(core, offset, value);
            }
            0x0ac if modern => core
                .state
                .violation("MMIO-16", "shared memory registers of a device without any"),
            _ => core
                .state
                .violation("MMIO-01", format!("register {offset:#x} written")),
        }
    }

    /// Returns the selected queue, if it may be changed now.
    fn idle_queue(&self, core: &mut Core, what: &str) -> Option<usize> {
        let queue = self.queue(core)?;
        if core.state.queues[queue].enabled {
            core.state.violation(
                "MMIO-10",
                format!("{what} of queue {queue} written while it is in use"),
            );
            return None;
        }
        Some(queue)
    }

    fn set_queue_size(&mut self, core: &mut Core, value: u32) {
        // A legacy driver takes a queue back by writing 0 to its registers, the page number last.
        if value == 0 && core.state.transport == Transport::LegacyMmio {
            return;
        }
        let max = core.queue_max(self.selects.queue);
        if let Some(queue) = self.idle_queue(core, "QueueNum") {
            if value > max {
                core.state.violation(
                    "MMIO-09",
                    format!("QueueNum {value} is more than QueueNumMax {max}"),
                );
            }
            core.state.queues[queue].size = value;
        }
    }

    fn set_page(&mut self, core: &mut Core, value: u32) {
        let Some(queue) = self.queue(core) else {
            return;
        };
        if value == 0 {
            core.disable_queue(queue);
            return;
        }
        let page_size = core.state.page_size;
        if page_size == 0 {
            core.state
                .violation("MMIO-17", "QueuePFN written before GuestPageSize");
        }
        let device_queue = &mut core.state.queues[queue];
        device_queue.page = value;
        device_queue.place_legacy(page_size);
        core.enable_queue(queue);
    }

    fn set_ready(&mut self, core: &mut Core, value: u32) {
        let Some(queue) = self.queue(core) else {
            return;
        };
        if value & 1 == 0 {
            core.disable_queue(queue);
            self.selects.stopping = true;
            return;
        }
        let selected = self.selects.queue;
        if !(self.selects.ready_read.contains(&selected)
            && self.selects.max_read.contains(&selected))
        {
            core.state.violation(
                "MMIO-17",
                format!("queue {queue} enabled without reading QueueReady and QueueNumMax"),
            );
        }
        if core.state.queues[queue].enabled {
            core.state
                .violation("MMIO-10", format!("queue {queue} enabled twice"));
        } else {
            core.enable_queue(queue);
        }
    }

    fn set_address(&mut self, core: &mut Core, offset: u64, value: u32) {
        // A driver that has stopped a queue may clear its addresses.
        let Some(queue) = self.idle_queue(core, "an address") else {
            return;
        };
        let layout = &mut core.state.queues[queue].layout;
        let address = match offset & !7 {
            0x080 => &mut layout.descriptors,
            0x090 => &mut layout.driver,
            _ => &mut layout.device,
        };
        set_half(address, offset & 4 != 0, value);
    }
}

fn touched_empty(offset: u64, violations: &Violations) {
    violations.push(Violation {
        id: "MMIO-15",
        device: usize::MAX,
        what: format!("register {offset:#x} of an empty slot accessed"),
    });
}

/// Sets the high or the low half of a 64-bit register.
pub(crate) fn set_half(register: &mut u64, high: bool, value: u32) {
    *register = if high {
        *register & 0xffff_ffff | u64::from(value) << 32
    } else {
        *register & !0xffff_ffff | u64::from(value)
    };
}
