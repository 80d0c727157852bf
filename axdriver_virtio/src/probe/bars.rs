//! The base address registers of a PCI function: how large they are, and giving them addresses.
//!
//! PCI Local Bus Specification 3.0, 6.2.5: a BAR is sized by writing ones and reading back which
//! bits stay 0, while the function does not decode addresses.
//!
//! Unsafe code here guards one step: from a `PciRoot` to the configuration access inside it.

use axdriver_base::{DevError, DevResult};
use log::{debug, error, warn};
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};

/// The number of BARs of an ordinary function.
pub(crate) const BARS: u8 = 6;

pub(super) const COMMAND: u8 = 0x04;
const HEADER_TYPE: u8 = 0x0c;
const BAR0: u8 = 0x10;

/// The bits of the command register that make a function answer to addresses.
pub(super) const DECODE: u16 = Command::IO_SPACE.bits() | Command::MEMORY_SPACE.bits();

/// Returns the configuration access of `root`, which `virtio-drivers` keeps to itself.
pub(crate) fn access<C: ConfigurationAccess>(root: &mut PciRoot<C>) -> &mut C {
    const {
        assert!(size_of::<PciRoot<C>>() == size_of::<C>());
        assert!(align_of::<PciRoot<C>>() == align_of::<C>());
    }
    // SAFETY: `PciRoot<C>` has a field of type `C`, and there is room for nothing else: its size
    // is that of `C`, so the field starts where the root does. The root has no invariant about
    // its field, which its user handed over, and is borrowed for as long as the field.
    unsafe { &mut *core::ptr::from_mut(root).cast::<C>() }
}

/// Whether a function has the ordinary layout of the configuration space, with six BARs.
pub(crate) fn is_ordinary<C: ConfigurationAccess>(access: &C, function: DeviceFunction) -> bool {
    (access.read_word(function, HEADER_TYPE) >> 16) & 0x7f == 0
}

/// What a BAR is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Bar {
    /// Not implemented, or the upper half of the one before.
    None,
    /// Of I/O ports, which virtio structures are not used in here.
    Io,
    /// Of memory.
    Memory {
        /// 0: none yet.
        address: u64,
        /// In bytes: a power of two.
        size: u64,
        /// Whether the next BAR is the upper half of the address.
        wide: bool,
    },
}

impl Bar {
    /// Returns the address range, if the BAR is of memory and has one that does not wrap.
    pub(crate) fn range(self) -> Option<(u64, u64)> {
        match self {
            Self::Memory { address, size, .. } if address != 0 => {
                address.checked_add(size - 1).map(|_| (address, size))
            }
            _ => None,
        }
    }
}

/// A function that decodes no addresses until this is dropped, so that its BARs may be sized.
pub(crate) struct Quiet<'a, C: ConfigurationAccess> {
    pub(super) access: &'a mut C,
    function: DeviceFunction,
    /// How many BARs the function has, at most [`BARS`].
    bars: u8,
    /// What the command register is to be.
    pub(super) command: u16,
}

impl<'a, C: ConfigurationAccess> Quiet<'a, C> {
    pub(crate) fn new(access: &'a mut C, function: DeviceFunction, bars: u8) -> Self {
        let [command, _] = words(access.read_word(function, COMMAND));
        let mut quiet = Self {
            access,
            function,
            bars,
            command,
        };
        if command & DECODE != 0 {
            quiet.write_command(command & !DECODE);
        }
        quiet
    }

    /// Writes the command register, and leaves the bits of the status register alone, which are
    /// cleared by writing ones.
    fn write_command(&mut self, command: u16) {
        self.access
            .write_word(self.function, COMMAND, command.into());
    }

    fn register(bar: u8) -> u8 {
        BAR0 + 4 * bar
    }

    /// Finds out what the BAR number `bar` (less than `self.bars`) is, and leaves it as it was.
    pub(crate) fn inspect(&mut self, bar: u8) -> Bar {
        if self.is_upper_half(bar) {
            return Bar::None;
        }
        let low = Self::register(bar);
        let original = self.access.read_word(self.function, low);
        if original & 1 != 0 {
            return Bar::Io;
        }
        let wide = is_wide(original);
        if (original & 0b110 != 0 && !wide) || (wide && bar + 1 >= self.bars) {
            warn!("PCI {}: BAR {bar} is of a reserved type", self.function);
            return Bar::None;
        }
        let mut mask = 0xffff_ffff_0000_0000 | u64::from(self.size_mask(low) & !0xf);
        let mut address = u64::from(original & !0xf);
        if wide {
            let high = Self::register(bar + 1);
            address |= u64::from(self.access.read_word(self.function, high)) << 32;
            mask = mask & 0xffff_ffff | u64::from(self.size_mask(high)) << 32;
        } else if mask & 0xffff_ffff == 0 {
            mask = 0;
        }
        // The size is the lowest bit that can be set; those above must all be settable, and those
        // below are 0.
        let size = mask & mask.wrapping_neg();
        if size == 0 || mask != !(size - 1) || address & !mask != 0 {
            if mask != 0 {
                warn!("PCI {}: BAR {bar} has no valid size", self.function);
            }
            return Bar::None;
        }
        Bar::Memory {
            address,
            size,
            wide,
        }
    }

    /// Returns whether `bar` is the upper half of the address of the one before, and no BAR of its
    /// own whatever its bits look like.
    fn is_upper_half(&self, bar: u8) -> bool {
        let mut first = 0;
        while first < bar {
            let low = self.access.read_word(self.function, Self::register(first));
            first += if is_wide(low) { 2 } else { 1 };
        }
        first != bar
    }

    /// Returns which bits of a register can be set, and restores it.
    fn size_mask(&mut self, register: u8) -> u32 {
        let original = self.access.read_word(self.function, register);
        self.access.write_word(self.function, register, 0xffff_ffff);
        let mask = self.access.read_word(self.function, register);
        self.access.write_word(self.function, register, original);
        mask
    }

    /// Gives a memory BAR an address, and returns whether the function took it.
    fn assign(&mut self, bar: u8, address: u64, wide: bool) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (low, high) = (address as u32, (address >> 32) as u32);
        let register = Self::register(bar);
        self.access.write_word(self.function, register, low);
        let mut taken = self.access.read_word(self.function, register) & !0xf == low;
        if wide {
            let register = Self::register(bar + 1);
            self.access.write_word(self.function, register, high);
            taken &= self.access.read_word(self.function, register) == high;
        }
        taken
    }

    /// Gives every memory BAR without an address one from `window`.
    ///
    /// # Errors
    ///
    /// As of [`assign_bars`], but for `InvalidParam`.
    pub(super) fn assign_all(&mut self, window: &mut PciRangeAllocator) -> DevResult {
        let function = self.function;
        let mut bar = 0;
        while bar < self.bars {
            let Bar::Memory {
                address,
                size,
                wide,
            } = self.inspect(bar)
            else {
                bar += 1;
                continue;
            };
            if address == 0 {
                let mut rest = window.clone();
                let Some(address) = rest
                    .alloc(size)
                    .filter(|address| wide || address + (size - 1) <= u64::from(u32::MAX))
                else {
                    error!("PCI {function}: no room for BAR {bar} of {size:#x} bytes");
                    return Err(DevError::NoMemory);
                };
                if !self.assign(bar, address, wide) {
                    error!("PCI {function}: BAR {bar} does not take the address {address:#x}");
                    return Err(DevError::Io);
                }
                *window = rest;
                debug!("PCI {function}: BAR {bar} of {size:#x} bytes at {address:#x}");
            }
            bar += if wide { 2 } else { 1 };
        }
        Ok(())
    }
}

impl<C: ConfigurationAccess> Drop for Quiet<'_, C> {
    fn drop(&mut self) {
        self.write_command(self.command);
    }
}

/// Whether a BAR register says that it is of memory, with an address of 64 bits.
const fn is_wide(register: u32) -> bool {
    register & 0b111 == 0b100
}

/// Returns the two 16-bit words of a register, the lower first.
pub(crate) fn words(register: u32) -> [u16; 2] {
    let [a, b, c, d] = register.to_le_bytes();
    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
}

/// Hands out addresses of a PCI host bridge's memory window.
///
/// # Examples
///
/// ```
/// # extern crate machine;
/// use axdriver_virtio::PciRangeAllocator;
///
/// let mut window = PciRangeAllocator::new(0x1000_0000, 0x1_0000);
/// assert_eq!(window.alloc(0x4000), Some(0x1000_0000));
/// assert_eq!(window.alloc(0x8000), Some(0x1000_8000));
/// assert_eq!(window.alloc(0x4000), None); // it is full
/// assert_eq!(window.alloc(3), None); // no power of two
/// ```
#[derive(Clone, Debug)]
pub struct PciRangeAllocator {
    /// The first address that is free.
    pub(super) next: u64,
    /// The first address behind the range.
    pub(super) end: u64,
}

impl PciRangeAllocator {
    /// Makes an allocator of the `size` bytes from the bus address `base`. What would lie beyond
    /// the last 64-bit address is left out.
    #[must_use]
    pub const fn new(base: u64, size: u64) -> Self {
        Self {
            next: base,
            end: base.saturating_add(size),
        }
    }

    /// Takes the next `size` bytes, aligned to their size, or returns `None`, with nothing taken,
    /// if `size` is not a power of two or there is no room left.
    pub const fn alloc(&mut self, size: u64) -> Option<u64> {
        if !size.is_power_of_two() {
            return None;
        }
        let Some(start) = self.next.checked_next_multiple_of(size) else {
            return None;
        };
        match start.checked_add(size) {
            Some(end) if end <= self.end => {
                self.next = end;
                Some(start)
            }
            _ => None,
        }
    }
}

/// Gives every memory BAR of a function an address from `window`, unless it has one, and lets the
/// function answer to its addresses and access memory (memory space and bus mastering).
///
/// A BAR of 32 bits gets an address below 4 GiB only. I/O BARs are left alone. The function must
/// not be in use.
///
/// # Errors
///
/// * [`DevError::InvalidParam`]: there is no function, or none with ordinary BARs.
/// * [`DevError::NoMemory`]: `window` has no room. The BARs before have their addresses, and the
///   function is not enabled.
/// * [`DevError::Io`]: a BAR did not take its address. Likewise.
pub fn assign_bars<C: ConfigurationAccess>(
    root: &mut PciRoot<C>,
    function: DeviceFunction,
    window: &mut PciRangeAllocator,
) -> DevResult {
    assign_bars_of(access(root), function, window)
}

/// As [`assign_bars`].
pub(super) fn assign_bars_of<C: ConfigurationAccess>(
    access: &mut C,
    function: DeviceFunction,
    window: &mut PciRangeAllocator,
) -> DevResult {
    if !function.valid() {
        return Err(DevError::InvalidParam);
    }
    if access.read_word(function, 0) == u32::MAX || !is_ordinary(access, function) {
        return Err(DevError::InvalidParam);
    }
    let mut quiet = Quiet::new(access, function, BARS);
    quiet.assign_all(window)?;
    quiet.command |= (Command::MEMORY_SPACE | Command::BUS_MASTER).bits();
    Ok(())
}
