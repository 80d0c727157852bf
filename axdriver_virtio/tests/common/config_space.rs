//! The configuration space of a PCI function that exists nowhere else, and notes what is written to it.

use std::sync::{Arc, Mutex};

use axdriver_virtio::pci::{ConfigurationAccess, DeviceFunction, PciRoot};

/// A virtio capability (4.1.4).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capability {
    pub(crate) id: u8,
    pub(crate) cap_len: u8,
    pub(crate) cfg_type: u8,
    pub(crate) bar: u8,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    /// `notify_off_multiplier`, where it is a notify capability.
    pub(crate) multiplier: u32,
}

impl Capability {
    /// Returns the capability of the structure of type `cfg_type` in BAR 4.
    pub(crate) fn new(cfg_type: u8, offset: u32, length: u32) -> Self {
        Self {
            id: 9,
            cap_len: if cfg_type == 2 { 20 } else { 16 },
            cfg_type,
            bar: 4,
            offset,
            length,
            multiplier: 4,
        }
    }

    /// Returns an honest device's capabilities.
    pub(crate) fn honest() -> Vec<Self> {
        vec![
            Self::new(1, 0, 56),
            Self::new(2, 0x3000, 0x1000),
            Self::new(3, 0x1000, 1),
            Self::new(4, 0x2000, 64),
        ]
    }
}

/// A function with six BARs and a list of capabilities.
#[derive(Clone, Debug)]
pub(crate) struct FakeFunction {
    pub(crate) space: [u8; 256],
    /// The bits of each BAR that can be set.
    pub(crate) masks: [u32; 6],
    /// Whether BARs can be sized, and take no address.
    pub(crate) stubborn: bool,
    /// All writes: register and value.
    pub(crate) writes: Vec<(u8, u32)>,
}

impl FakeFunction {
    /// Returns a virtio block device whose BAR 4 has 64 bits, 16 KiB and this address.
    pub(crate) fn new(address: u64, capabilities: &[Capability]) -> Self {
        let mut function = Self {
            space: [0; 256],
            masks: [0, 0, 0, 0, 0xffff_c000, 0xffff_ffff],
            stubborn: false,
            writes: Vec::new(),
        };
        function.put(0x00, 0x1042_1af4);
        function.put(0x04, 0x0010_0006);
        let low = u32::try_from(address & 0xffff_ffff).unwrap();
        function.put(0x20, low | 0b0100);
        function.put(0x24, u32::try_from(address >> 32).unwrap());
        let mut at: u8 = 0x40;
        function.put(
            0x34,
            if capabilities.is_empty() {
                0
            } else {
                at.into()
            },
        );
        for (index, capability) in capabilities.iter().enumerate() {
            let room = if capability.cap_len > 16 { 20 } else { 16 };
            let next = if index + 1 == capabilities.len() {
                0
            } else {
                at + room
            };
            function.put_capability(at, next, capability);
            at += room;
        }
        function
    }

    pub(crate) fn put_capability(&mut self, at: u8, next: u8, capability: &Capability) {
        let Capability {
            id,
            cap_len,
            cfg_type,
            bar,
            offset,
            length,
            multiplier,
        } = *capability;
        self.put(at, u32::from_le_bytes([id, next, cap_len, cfg_type]));
        self.put(at + 4, bar.into());
        self.put(at + 8, offset);
        self.put(at + 12, length);
        if cap_len > 16 {
            self.put(at + 16, multiplier);
        }
    }

    pub(crate) fn put(&mut self, at: u8, word: u32) {
        let at = usize::from(at);
        self.space[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }

    fn word(&self, at: u8) -> u32 {
        let at = usize::from(at & !3);
        u32::from_le_bytes(self.space[at..at + 4].try_into().unwrap())
    }

    fn write(&mut self, at: u8, word: u32) {
        self.writes.push((at, word));
        match at {
            0x04 => {
                let status = self.word(at) & 0xffff_0000;
                self.put(at, status | word & 0xffff);
            }
            0x10..0x28 => {
                let mask = self.masks[usize::from(at - 0x10) / 4];
                let kind = self.word(at) & 0xf & !mask;
                let taken = if self.stubborn && word != u32::MAX {
                    0
                } else {
                    mask
                };
                self.put(at, word & taken | kind);
            }
            _ => {}
        }
    }
}

/// A bus with one function, 00:01.0.
#[derive(Clone)]
pub(crate) struct FakeRoot(pub(crate) Arc<Mutex<FakeFunction>>);

impl FakeRoot {
    pub(crate) const FUNCTION: DeviceFunction = DeviceFunction {
        bus: 0,
        device: 1,
        function: 0,
    };

    pub(crate) fn new(function: FakeFunction) -> (PciRoot<Self>, Self) {
        let root = Self(Arc::new(Mutex::new(function)));
        (PciRoot::new(root.clone()), root)
    }

    pub(crate) fn writes(&self) -> Vec<(u8, u32)> {
        self.0.lock().unwrap().writes.clone()
    }

    pub(crate) fn space(&self) -> [u8; 256] {
        self.0.lock().unwrap().space
    }
}

impl ConfigurationAccess for FakeRoot {
    fn read_word(&self, device_function: DeviceFunction, register_offset: u8) -> u32 {
        if device_function == Self::FUNCTION {
            self.0.lock().unwrap().word(register_offset)
        } else {
            u32::MAX
        }
    }

    fn write_word(&mut self, device_function: DeviceFunction, register_offset: u8, data: u32) {
        assert_eq!(device_function, Self::FUNCTION);
        self.0.lock().unwrap().write(register_offset, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}
