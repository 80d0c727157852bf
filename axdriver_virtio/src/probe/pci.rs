//! What is behind this PCI function? The PCI transport's answer (VirtIO 1.3, 4.1.2 to 4.1.4).

use core::ops::RangeInclusive;

use axdriver_base::DeviceType;
use log::{debug, warn};
use virtio_drivers::{
    PhysAddr,
    transport::pci::{
        VIRTIO_VENDOR_ID, VirtioPciError,
        bus::{
            ConfigurationAccess, DeviceFunction, DeviceFunctionInfo, HeaderType, PCI_CAP_ID_VNDR,
            PciRoot,
        },
        virtio_device_type,
    },
};

use super::{
    bars::{BARS, Bar, PciRangeAllocator, Quiet, access, assign_bars, is_ordinary, words},
    bridge::{self, Functions},
};
use crate::{
    PciTransport, VirtIoHal, as_dev_type,
    transport::{CapabilityKind, Region, Structures},
};

const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITIES: u8 = 0x34;
/// Where capabilities can start, and where the space that holds them ends.
const CAPABILITY_SPACE: core::ops::Range<u16> = 0x40..0x100;
/// Each takes 4 bytes at least: a list of more goes in circles.
const MAX_CAPABILITIES: usize = 48;
/// 4.1.2: the ids of virtio devices that are not transitional.
const LAST_DEVICE_ID: u16 = 0x107f;

/// Looks for a virtio device behind the PCI function `bdf`, which `dev_info` describes.
///
/// Returns the type of the device and a transport to make a driver of, if there is a block,
/// network or GPU device whose structures can be used. Else returns `None`, and a message at a
/// fitting level says why.
///
/// The function's BARs must have addresses, and it must answer to them: see [`assign_bars`].
/// Nothing is written but the BARs, to size them, and the command register, and both are as before
/// when this returns; a device of another type is not written to at all. The list of capabilities
/// is the device's word, and is not trusted: nothing outside the BARs is ever mapped.
pub fn probe_pci_device<H: VirtIoHal, C: ConfigurationAccess>(
    root: &mut PciRoot<C>,
    bdf: DeviceFunction,
    dev_info: &DeviceFunctionInfo,
) -> Option<(DeviceType, PciTransport)> {
    let device_type = driven_type(dev_info)?;
    match PciTransport::new::<H, C>(root, bdf) {
        Ok(transport) => Some((device_type, transport)),
        Err(error) => {
            warn!("virtio-pci {bdf}: {error}");
            None
        }
    }
}

/// Returns what [`virtio_device_type`] asks of a function: its ids, and the type of its header.
pub(super) fn info(ids: u32, header_type: HeaderType) -> DeviceFunctionInfo {
    let [vendor_id, device_id] = words(ids);
    DeviceFunctionInfo {
        vendor_id,
        device_id,
        class: 0,
        subclass: 0,
        prog_if: 0,
        revision: 0,
        header_type,
    }
}

/// Returns the type of a function that is a virtio device of a type that has a driver here.
pub(super) fn driven_type(info: &DeviceFunctionInfo) -> Option<DeviceType> {
    if info.device_id > LAST_DEVICE_ID || info.header_type != HeaderType::Standard {
        return None;
    }
    let virtio_type = virtio_device_type(info)?;
    let device_type = as_dev_type(virtio_type);
    if device_type.is_none() {
        debug!("virtio-pci: no driver for device type {virtio_type:?}");
    }
    device_type
}

/// Walks the first of `buses` and those behind its bridges, and yields the devices that
/// [`probe_pci_device`] recognizes, in the order of their buses.
///
/// `buses` are those that the host bridge has, from the `bus-range` of a device tree or the MCFG
/// table of ACPI. **The configuration space of all of them must be there for `C` to access**, 1 MiB
/// for each with ECAM: where a bridge leads is the word of the bridge, and only these bounds are
/// kept. A kernel that has mapped fewer says so here, for example with `0..=0`.
///
/// Without a `window`, nothing is written but what [`probe_pci_device`] writes, and only bridges are
/// followed that firmware has given bus numbers to, which have to be above that of their own bus.
///
/// With a `window`, this function sets up what firmware has left undone, and enables what it finds:
///
/// * Bridges on the first bus without a bus number, and all behind them, get the next free number,
///   and forward the addresses that their own BARs and those of the virtio devices behind them are
///   given, in whole MiB and 1 MiB at least, below 4 GiB. They forward neither I/O ports nor
///   prefetchable memory. A bridge for which there is no number or no room, that does not take
///   them, or that is behind 16 others is left out, and the log says so.
/// * Virtio devices on the first bus get addresses for BARs that have none. Those behind bridges
///   that firmware has numbered do not, because nobody knows which addresses are free there; see
///   [`PciBridge`](crate::PciBridge) for a slot that was empty before.
///
/// Nothing of what is set up may be in use. Other functions are left alone.
///
/// # Examples
///
/// A kernel's whole search, whether there was firmware or not:
///
/// ```
/// use axdriver_virtio::{PciRangeAllocator, VirtIoHal, pci::{ConfigurationAccess, PciRoot}, probe_pci_buses};
///
/// fn find<H: VirtIoHal, C: ConfigurationAccess>(root: &mut PciRoot<C>) -> usize {
///     let mut window = PciRangeAllocator::new(0x1000_0000, 0x2eff_0000);
///     let mut found = 0;
///     for (function, device_type, transport) in
///         probe_pci_buses::<H, C>(root, 0..=255, Some(&mut window))
///     {
///         println!("{function}: {device_type:?}");
///         drop(transport); // make a driver of it instead
///         found += 1;
///     }
///     found
/// }
/// # extern crate machine;
/// ```
pub fn probe_pci_buses<'a, H: VirtIoHal, C: ConfigurationAccess>(
    root: &'a mut PciRoot<C>,
    buses: RangeInclusive<u8>,
    mut window: Option<&'a mut PciRangeAllocator>,
) -> PciBusProbe<'a, H, C> {
    if let Some(window) = &mut window
        && buses.start() < buses.end()
    {
        bridge::number(access(root), &buses, window);
    }
    let (first, last) = (*buses.start(), *buses.end());
    let mut pending = Buses::default();
    if first <= last {
        pending.insert(first);
    }
    PciBusProbe {
        functions: Functions::NONE,
        pending,
        first,
        last,
        root,
        window,
        hal: core::marker::PhantomData,
    }
}

/// A set of bus numbers.
#[derive(Default)]
struct Buses([u32; 8]);

impl Buses {
    fn insert(&mut self, bus: u8) {
        if let Some(word) = self.0.get_mut(usize::from(bus / 32)) {
            *word |= 1 << (bus % 32);
        }
    }

    /// Takes the lowest number out.
    fn pop(&mut self) -> Option<u8> {
        let (word, base) =
            (self.0.iter_mut().zip((0..=224).step_by(32))).find(|(w, _)| **w != 0)?;
        let bit = word.trailing_zeros();
        *word &= *word - 1;
        u8::try_from(bit).ok().map(|bit| base + bit)
    }
}

/// The virtio devices on a bus and behind its bridges, one after another. Made by
/// [`probe_pci_buses`].
pub struct PciBusProbe<'a, H: VirtIoHal, C: ConfigurationAccess> {
    /// What is left of the bus that is walked.
    functions: Functions,
    /// The buses that bridges lead to. All are above the one that is walked, so that each is walked
    /// once at most.
    pending: Buses,
    first: u8,
    last: u8,
    root: &'a mut PciRoot<C>,
    window: Option<&'a mut PciRangeAllocator>,
    hal: core::marker::PhantomData<fn() -> H>,
}

impl<H: VirtIoHal, C: ConfigurationAccess> Iterator for PciBusProbe<'_, H, C> {
    type Item = (DeviceFunction, DeviceType, PciTransport);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((function, info)) = self.functions.next(access(self.root)) else {
                self.functions = Functions::of(self.pending.pop()?);
                continue;
            };
            if info.header_type == HeaderType::PciPciBridge {
                let enable = self.window.is_some();
                match bridge::follow(access(self.root), function, self.last, enable) {
                    Some(bus) => self.pending.insert(bus),
                    None => debug!("PCI {function}: the bridge is not followed"),
                }
                continue;
            }
            if driven_type(&info).is_none() {
                continue;
            }
            if let Some(window) = &mut self.window {
                // What is behind a bridge has its addresses, or gets none.
                let mut none = PciRangeAllocator::new(0, 0);
                let behind = function.bus != self.first;
                let window = if behind { &mut none } else { &mut **window };
                if let Err(error) = assign_bars(self.root, function, window) {
                    warn!("virtio-pci {function}: no addresses for the BARs: {error}");
                    continue;
                }
            }
            if let Some((device_type, transport)) =
                probe_pci_device::<H, C>(self.root, function, &info)
            {
                return Some((function, device_type, transport));
            }
        }
    }
}

/// Finds the structures of the virtio device behind `function`, each the first of its kind that
/// can be used (4.1.4.1).
///
/// # Errors
///
/// See [`PciTransport::new`].
pub(crate) fn find_structures<C: ConfigurationAccess>(
    root: &mut PciRoot<C>,
    function: DeviceFunction,
) -> Result<Structures, VirtioPciError> {
    if !function.valid() {
        return Err(VirtioPciError::InvalidVendorId(u16::MAX));
    }
    let access = access(root);
    let info = info(access.read_word(function, 0), HeaderType::Standard);
    if info.vendor_id != VIRTIO_VENDOR_ID || !is_ordinary(access, function) {
        return Err(VirtioPciError::InvalidVendorId(info.vendor_id));
    }
    let device_type = virtio_device_type(&info)
        .filter(|_| info.device_id <= LAST_DEVICE_ID)
        .ok_or(VirtioPciError::InvalidDeviceId(info.device_id))?;

    // What the capabilities claim, before any BAR is touched.
    let candidates = Candidates::read(access, function);
    let mut bars = Bars::new(Quiet::new(access, function, BARS));
    let mut unassigned = None;
    let mut find = |kind| {
        candidates.of(kind).find_map(|candidate| {
            let region = bars.region(candidate);
            if region.is_none() && bars.is_unassigned(candidate.bar) {
                unassigned = unassigned.or(Some(candidate.bar));
            }
            region.map(|region| (region, candidate.multiplier))
        })
    };
    let [common, notify, isr, device] = CapabilityKind::ALL.map(&mut find);
    let or = |error| match unassigned {
        Some(bar) => VirtioPciError::BarNotAllocated(bar),
        None => error,
    };
    let (notify, notify_off_multiplier) = notify.ok_or(or(VirtioPciError::MissingNotifyConfig))?;
    Ok(Structures {
        device_type,
        common: common.ok_or(or(VirtioPciError::MissingCommonConfig))?.0,
        notify,
        notify_off_multiplier,
        isr: isr.ok_or(or(VirtioPciError::MissingIsrConfig))?.0,
        device: device.map(|(region, _)| region),
    })
}

/// A structure, as a capability claims it (4.1.4).
#[derive(Clone, Copy)]
struct Candidate {
    kind: CapabilityKind,
    bar: u8,
    offset: u32,
    length: u32,
    /// `notify_off_multiplier`, if it is a notify structure.
    multiplier: u32,
}

/// The structures that the capabilities of a function claim, in their order.
struct Candidates {
    list: [Option<Candidate>; MAX_CAPABILITIES],
}

impl Candidates {
    fn read<C: ConfigurationAccess>(access: &C, function: DeviceFunction) -> Self {
        let mut candidates = Self {
            list: [None; MAX_CAPABILITIES],
        };
        let [_, status] = words(access.read_word(function, 0x04));
        if status & STATUS_CAPABILITIES == 0 {
            return candidates;
        }
        let word = |offset: u8| access.read_word(function, offset);
        let [first, ..] = word(CAPABILITIES).to_le_bytes();
        let mut offset = first & !3;
        // A list that is longer than the space for it loops, and ends here.
        for place in &mut candidates.list {
            if !CAPABILITY_SPACE.contains(&offset.into()) {
                break;
            }
            let [id, next, len, cfg_type] = word(offset).to_le_bytes();
            let kind = usize::from(cfg_type)
                .checked_sub(1)
                .and_then(|index| CapabilityKind::ALL.get(index).copied());
            let needed = match kind {
                Some(CapabilityKind::Notify) => 20,
                _ => 16,
            };
            let fits = u16::from(offset) + u16::from(len) <= CAPABILITY_SPACE.end;
            if let Some(kind) = kind
                && id == PCI_CAP_ID_VNDR
                && len >= needed
                && fits
            {
                let [bar, ..] = word(offset + 4).to_le_bytes();
                *place = Some(Candidate {
                    kind,
                    bar,
                    offset: word(offset + 8),
                    length: word(offset + 12),
                    multiplier: if needed == 20 { word(offset + 16) } else { 0 },
                });
            }
            offset = next & !3;
        }
        candidates
    }

    fn of(&self, kind: CapabilityKind) -> impl Iterator<Item = Candidate> {
        self.list
            .iter()
            .flatten()
            .copied()
            .filter(move |candidate| candidate.kind == kind)
    }
}

/// The BARs of a function, each inspected when it is first asked for.
struct Bars<'a, C: ConfigurationAccess> {
    function: Quiet<'a, C>,
    known: [Option<Bar>; BARS as usize],
}

impl<'a, C: ConfigurationAccess> Bars<'a, C> {
    fn new(function: Quiet<'a, C>) -> Self {
        Self {
            function,
            known: [None; BARS as usize],
        }
    }

    fn get(&mut self, bar: u8) -> Bar {
        match self.known.get_mut(usize::from(bar)) {
            Some(known) => *known.get_or_insert_with(|| self.function.inspect(bar)),
            // 4.1.4.1: reserved values are ignored.
            None => Bar::None,
        }
    }

    fn is_unassigned(&mut self, bar: u8) -> bool {
        matches!(self.get(bar), Bar::Memory { address: 0, .. })
    }

    /// Returns where the structure is, if it lies in a memory BAR and can be used.
    fn region(&mut self, candidate: Candidate) -> Option<Region> {
        let (min_len, alignment) = candidate.kind.layout();
        let (address, size) = self.get(candidate.bar).range()?;
        let end = u64::from(candidate.offset) + u64::from(candidate.length);
        let paddr: PhysAddr = address.checked_add(candidate.offset.into())?;
        let usable = end <= size
            && candidate.length >= min_len
            && paddr.is_multiple_of(alignment)
            // 4.1.4.4: the multiplier is even, or 0.
            && candidate.multiplier.is_multiple_of(2);
        usable.then(|| Region {
            paddr,
            len: candidate.length.min(candidate.kind.useful_len()),
        })
    }
}
