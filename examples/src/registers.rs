//! What the registers of a virtio device say, read without taking the device into use.
//!
//! Of all registers, only those that select a queue or a half of the features are written, and on PCI the BARs and the
//! command register where no firmware did. The status register is read only, so a device that a driver uses goes on.

use std::fmt::Write as _;

use anyhow::{Context, ensure};
use axdriver_base::DeviceType;
use axdriver_net::EthernetAddress;
use axdriver_virtio::{Transport, pci::DeviceFunction};
use machine::{Machine, RegisterBus};

use crate::{
    board::{Found, Map, Place, SocketDevice},
    report,
};

/// More queues than this are not looked at.
const MAX_QUEUES: u16 = 64;

/// The most capabilities that the configuration space of a function has room for.
const MAX_CAPABILITIES: usize = 48;

/// Bits of the features that have the same meaning for each type of device (VirtIO 1.3, chapter 6).
const COMMON: &[(u8, &str)] = &[
    (24, "NOTIFY_ON_EMPTY"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];

/// VirtIO 1.3, 5.2.3.
const BLOCK: &[(u8, &str)] = &[
    (0, "BARRIER"),
    (1, "SIZE_MAX"),
    (2, "SEG_MAX"),
    (4, "GEOMETRY"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (7, "SCSI"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (17, "ZONED"),
];

/// VirtIO 1.3, 5.1.3.
const NET: &[(u8, &str)] = &[
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (2, "CTRL_GUEST_OFFLOADS"),
    (3, "MTU"),
    (5, "MAC"),
    (6, "GSO"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (9, "GUEST_ECN"),
    (10, "GUEST_UFO"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (13, "HOST_ECN"),
    (14, "HOST_UFO"),
    (15, "MRG_RXBUF"),
    (16, "STATUS"),
    (17, "CTRL_VQ"),
    (18, "CTRL_RX"),
    (19, "CTRL_VLAN"),
    (20, "CTRL_RX_EXTRA"),
    (21, "GUEST_ANNOUNCE"),
    (22, "MQ"),
    (23, "CTRL_MAC_ADDR"),
    (51, "HASH_TUNNEL"),
    (52, "VQ_NOTF_COAL"),
    (53, "NOTF_COAL"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (57, "HASH_REPORT"),
    (59, "GUEST_HDRLEN"),
    (60, "RSS"),
    (61, "RSC_EXT"),
    (62, "STANDBY"),
    (63, "SPEED_DUPLEX"),
];

/// VirtIO 1.3, 5.7.3.
const GPU: &[(u8, &str)] = &[
    (0, "VIRGL"),
    (1, "EDID"),
    (2, "RESOURCE_UUID"),
    (3, "RESOURCE_BLOB"),
    (4, "CONTEXT_INIT"),
];

/// Returns the names of the features that are set, each with its bit; a bit without a name has its number alone.
#[must_use]
pub fn feature_names(device_type: DeviceType, features: u64) -> Vec<String> {
    let own = match device_type {
        DeviceType::Block => BLOCK,
        DeviceType::Net => NET,
        DeviceType::Display => GPU,
        _ => &[],
    };
    let name = |bit: u8| {
        own.iter()
            .chain(COMMON)
            .find(|(known, _)| *known == bit)
            .map(|(_, name)| *name)
    };
    let set = (0..64).filter(|bit| features >> bit & 1 == 1);
    set.map(|bit| name(bit).map_or_else(|| format!("bit {bit}"), |name| format!("{name} ({bit})")))
        .collect()
}

/// Describes a device in some lines of text.
///
/// # Errors
///
/// * No board is installed on this thread.
/// * The device is gone, or its configuration space does not say where its registers are.
pub fn describe(map: &Map, found: &Found) -> anyhow::Result<String> {
    let machine = Machine::current().context("no board is installed")?;
    let bus = machine.bus().as_ref();
    let mut text = String::new();
    let (features, config) = match &found.place {
        Place::Mmio { base, .. } => describe_mmio(bus, *base, &mut text)?,
        Place::Pci(function) => {
            let ecam = map.pci.as_ref().context("the board has no PCI root")?.ecam;
            describe_pci(bus, ecam, *function, &mut text)?
        }
        Place::Socket(socket) => {
            return describe_socket(map.socket(socket)?, found, text);
        }
    };
    describe_features(found.device_type, features, text, &|offset, width| {
        bus.read(config + offset, width)
    })
}

/// Adds the features, and the configuration that `read` reads.
fn describe_features(
    device_type: DeviceType,
    features: u64,
    mut text: String,
    read: &dyn Fn(u64, u8) -> u64,
) -> anyhow::Result<String> {
    writeln!(
        text,
        "  features  {}",
        feature_names(device_type, features).join(", ")
    )?;
    for line in describe_config(device_type, features, read) {
        writeln!(text, "  config    {line}")?;
    }
    Ok(text)
}

/// Describes a device of another program's, which says over the socket what others say in registers.
fn describe_socket(
    device: &SocketDevice,
    found: &Found,
    mut text: String,
) -> anyhow::Result<String> {
    let mut transport = device.connect()?;
    writeln!(text, "vhost-user {}", found.place)?;
    let status = transport.get_status().bits();
    writeln!(text, "  status    {}", status_names(status.into()))?;
    let queues: Vec<u64> = (0..MAX_QUEUES)
        .map(|queue| transport.max_queue_size(queue).into())
        .take_while(|size| *size != 0)
        .collect();
    writeln!(text, "  queues    {}", queue_sizes(&queues))?;
    let features = transport.read_device_features();
    describe_features(found.device_type, features, text, &|offset, width| {
        let byte = |index: u64| {
            let offset = usize::try_from(offset + index).unwrap_or(usize::MAX);
            let byte = transport.read_config_space::<u8>(offset);
            u64::from(byte.unwrap_or(u8::MAX)) << (8 * index)
        };
        (0..width.into()).map(byte).sum()
    })
}

/// Returns the features and the address of the device's own configuration.
fn describe_mmio(
    bus: &dyn RegisterBus,
    base: u64,
    text: &mut String,
) -> anyhow::Result<(u64, u64)> {
    // VirtIO 1.3, 4.2.2.
    const VERSION: u64 = 0x004;
    const DEVICE_ID: u64 = 0x008;
    const VENDOR_ID: u64 = 0x00c;
    const DEVICE_FEATURES: u64 = 0x010;
    const DEVICE_FEATURES_SEL: u64 = 0x014;
    const QUEUE_SEL: u64 = 0x030;
    const QUEUE_NUM_MAX: u64 = 0x034;
    const STATUS: u64 = 0x070;
    const CONFIG: u64 = 0x100;

    let read = |register: u64| bus.read(base + register, 4) & 0xffff_ffff;
    let version = read(VERSION);
    let kind = if version == 1 { "legacy" } else { "modern" };
    writeln!(text, "MMIO {base:#x}")?;
    writeln!(
        text,
        "  device    type {}, vendor {:#010x}, interface version {version} ({kind})",
        read(DEVICE_ID),
        read(VENDOR_ID)
    )?;
    writeln!(text, "  status    {}", status_names(read(STATUS)))?;
    let features = [0, 1].map(|half| {
        bus.write(base + DEVICE_FEATURES_SEL, 4, half);
        read(DEVICE_FEATURES)
    });
    // A legacy device has 32 bits of features.
    let features = if version == 1 {
        features[0]
    } else {
        features[1] << 32 | features[0]
    };
    bus.write(base + DEVICE_FEATURES_SEL, 4, 0);
    let queues: Vec<u64> = (0..MAX_QUEUES)
        .map(|queue| {
            bus.write(base + QUEUE_SEL, 4, queue.into());
            read(QUEUE_NUM_MAX)
        })
        .take_while(|size| *size != 0)
        .collect();
    bus.write(base + QUEUE_SEL, 4, 0);
    writeln!(text, "  queues    {}", queue_sizes(&queues))?;
    Ok((features, base + CONFIG))
}

/// Returns the features and the address of the device's own configuration.
fn describe_pci(
    bus: &dyn RegisterBus,
    ecam: u64,
    function: DeviceFunction,
    text: &mut String,
) -> anyhow::Result<(u64, u64)> {
    // PCI Local Bus 3.0, 6.1.
    const CAPABILITY_POINTER: u64 = 0x34;
    // VirtIO 1.3, 4.1.4.3.
    const DEVICE_FEATURE_SELECT: u64 = 0x00;
    const DEVICE_FEATURE: u64 = 0x04;
    const NUM_QUEUES: u64 = 0x12;
    const STATUS: u64 = 0x14;
    const QUEUE_SELECT: u64 = 0x16;
    const QUEUE_SIZE: u64 = 0x18;

    let DeviceFunction {
        bus: number,
        device,
        function: sub,
    } = function;
    let space = ecam + (u64::from(number) << 20 | u64::from(device) << 15 | u64::from(sub) << 12);
    let read = |offset: u64, width: u8| {
        let value = bus.read(space + offset, width);
        if width >= 8 {
            value
        } else {
            value & ((1 << (8 * width)) - 1)
        }
    };
    writeln!(text, "PCI {function}")?;
    writeln!(
        text,
        "  function  {:04x}:{:04x}, revision {}, subsystem {:04x}:{:04x}, interrupt pin {}",
        read(0x00, 2),
        read(0x02, 2),
        read(0x08, 1),
        read(0x2c, 2),
        read(0x2e, 2),
        read(0x3d, 1)
    )?;
    let bar = |index: u64| {
        let low = read(0x10 + 4 * index, 4);
        let high = if low & 0b111 == 0b100 {
            read(0x14 + 4 * index, 4)
        } else {
            0
        };
        (low & 1 == 0).then_some(high << 32 | low & !0xf)
    };
    let (mut common, mut config) = (None, None);
    let mut pointer = read(CAPABILITY_POINTER, 1) & !0b11;
    for _ in 0..MAX_CAPABILITIES {
        if pointer < 0x40 {
            break;
        }
        if read(pointer, 1) == 0x09 {
            let (kind, index) = (read(pointer + 3, 1), read(pointer + 4, 1));
            let (offset, length) = (read(pointer + 8, 4), read(pointer + 12, 4));
            let name = capability_name(kind);
            writeln!(
                text,
                "  {name:<9} BAR {index}, {length} bytes at {offset:#x}"
            )?;
            let address = (index < 6)
                .then(|| bar(index))
                .flatten()
                .map(|base| base + offset);
            match kind {
                1 => common = common.or(address),
                4 => config = config.or(address),
                _ => {}
            }
        }
        pointer = read(pointer + 1, 1) & !0b11;
    }
    let common = common.context("no capability says where the registers are")?;
    ensure!(
        common >= 0x1000,
        "the BAR with the registers has no address"
    );
    let read = |offset: u64, width: u8| bus.read(common + offset, width) & ((1 << (8 * width)) - 1);
    writeln!(text, "  status    {}", status_names(read(STATUS, 1)))?;
    let features = [0, 1].map(|half| {
        bus.write(common + DEVICE_FEATURE_SELECT, 4, half);
        read(DEVICE_FEATURE, 4)
    });
    bus.write(common + DEVICE_FEATURE_SELECT, 4, 0);
    let count = u16::try_from(read(NUM_QUEUES, 2))
        .unwrap_or(u16::MAX)
        .min(MAX_QUEUES);
    let queues: Vec<u64> = (0..count)
        .map(|queue| {
            bus.write(common + QUEUE_SELECT, 2, queue.into());
            read(QUEUE_SIZE, 2)
        })
        .collect();
    bus.write(common + QUEUE_SELECT, 2, 0);
    writeln!(text, "  queues    {}", queue_sizes(&queues))?;
    Ok((
        features[1] << 32 | features[0],
        config.context("no capability says where the configuration is")?,
    ))
}

/// VirtIO 1.3, 4.1.4.
fn capability_name(kind: u64) -> String {
    let name = match kind {
        1 => "common",
        2 => "notify",
        3 => "isr",
        4 => "device",
        5 => "pci",
        8 => "shared",
        9 => "vendor",
        _ => return format!("type {kind}"),
    };
    name.to_owned()
}

fn queue_sizes(sizes: &[u64]) -> String {
    let list: Vec<String> = sizes.iter().map(u64::to_string).collect();
    match sizes.len() {
        0 => "none".to_owned(),
        1 => format!("1 of up to {} descriptors", list[0]),
        count => format!("{count} of up to {} descriptors", list.join(", ")),
    }
}

/// VirtIO 1.3, 2.1.
fn status_names(status: u64) -> String {
    const NAMES: [(u64, &str); 6] = [
        (0x01, "ACKNOWLEDGE"),
        (0x02, "DRIVER"),
        (0x08, "FEATURES_OK"),
        (0x04, "DRIVER_OK"),
        (0x40, "NEEDS_RESET"),
        (0x80, "FAILED"),
    ];
    let set: Vec<&str> = NAMES
        .iter()
        .filter(|(bit, _)| status & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    match set.len() {
        0 => format!("{status:#x}, not in use"),
        _ => format!("{status:#x}, {}", set.join(", ")),
    }
}

/// Describes the fields of the device's own configuration that its features say are there.
fn describe_config(
    device_type: DeviceType,
    features: u64,
    read: &dyn Fn(u64, u8) -> u64,
) -> Vec<String> {
    let has = |bit: u8| features >> bit & 1 == 1;
    let mut lines = Vec::new();
    match device_type {
        DeviceType::Block => {
            let sectors = (read(4, 4) & 0xffff_ffff) << 32 | read(0, 4) & 0xffff_ffff;
            lines.push(format!(
                "{sectors} sectors of 512 bytes, {}",
                report::size(sectors.saturating_mul(512))
            ));
            if has(6) {
                lines.push(format!("blocks of {} bytes", read(20, 4) & 0xffff_ffff));
            }
        }
        DeviceType::Net => {
            if has(5) {
                let address = std::array::from_fn(|index| (read(index as u64, 1) & 0xff) as u8);
                lines.push(format!("address {}", EthernetAddress(address)));
            }
            if has(16) {
                lines.push(format!(
                    "link {}",
                    if read(6, 2) & 1 == 1 { "up" } else { "down" }
                ));
            }
            if has(3) {
                lines.push(format!("frames carry up to {} bytes", read(10, 2) & 0xffff));
            }
        }
        DeviceType::Display => {
            lines.push(format!(
                "scanouts: {}, capability sets: {}",
                read(8, 4) & 0xffff_ffff,
                read(12, 4) & 0xffff_ffff
            ));
        }
        _ => {}
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_named_by_the_type_of_the_device() {
        let features = 1 << 5 | 1 << 9 | 1 << 32 | 1 << 50;
        assert_eq!(
            feature_names(DeviceType::Block, features),
            ["RO (5)", "FLUSH (9)", "VERSION_1 (32)", "bit 50"]
        );
        assert_eq!(
            feature_names(DeviceType::Net, 1 << 5 | 1 << 63),
            ["MAC (5)", "SPEED_DUPLEX (63)"]
        );
        assert!(feature_names(DeviceType::Display, 0).is_empty());
    }

    #[test]
    fn a_status_is_spelled_out() {
        assert_eq!(status_names(0), "0x0, not in use");
        assert_eq!(
            status_names(0xf),
            "0xf, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK"
        );
    }
}
