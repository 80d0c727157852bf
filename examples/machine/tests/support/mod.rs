//! What tests of several boards share: files that go away, data that tells where it belongs, and a driver for each device.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test program uses a part of it"
)]

use std::fs::File;
use std::io::Write;
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use axdriver_base::{BaseDriverOps, DevError, DeviceType};
use axdriver_block::BlockDriverOps;
use axdriver_display::DisplayDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{
    PciRangeAllocator, Transport, VirtIoBlkDev, VirtIoGpuDev, VirtIoNetDev, WaitPolicy,
    pci::{Cam, MmioCam, PciRoot},
    probe_mmio_device, probe_pci_buses,
};
use machine::qemu::QemuBoard;
use machine::registers::register_pointer;
use machine::{Image, MachineHal, Slot};

/// Far longer than anything here takes.
pub const LONG: Duration = Duration::from_secs(20);

/// The PCI buses that each board has: `virt` has the configuration space of no more.
pub const BUSES: RangeInclusive<u8> = 0..=15;

/// Says why a test is skipped, or a part of it.
///
/// Not by `eprintln!`, which a test that passes does not show.
pub fn skip(why: &str) {
    let _ = writeln!(std::io::stderr(), "{why}");
}

/// A file or directory that is removed with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let name = format!("machine-{}-{name}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    /// An image whose bytes tell where they are.
    pub fn image(name: &str, size: usize) -> Self {
        let scratch = Self::new(name);
        std::fs::write(&scratch.0, pattern(0, size)).unwrap();
        scratch
    }

    /// An image without contents, of which only what is written takes room.
    pub fn sparse(name: &str, size: u64) -> Self {
        let scratch = Self::new(name);
        File::create(&scratch.0).unwrap().set_len(size).unwrap();
        scratch
    }

    /// An empty directory.
    pub fn directory(name: &str) -> Self {
        let scratch = Self::new(name);
        std::fs::create_dir(&scratch.0).unwrap();
        scratch
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let file = File::open(&self.0).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = if self.0.is_dir() {
            std::fs::remove_dir_all(&self.0)
        } else {
            std::fs::remove_file(&self.0)
        };
    }
}

/// Returns the bytes that tell that they begin at `from`.
pub fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length)
        .map(|index| (index / 512 * 7 + index) as u8)
        .collect()
}

/// Numbers that look random and are the same in every run.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Returns a number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Marsaglia's xorshift64*.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % bound
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(4))
            .flat_map(|_| (self.below(1 << 32) as u32).to_le_bytes())
            .take(length)
            .collect()
    }
}

/// A wait that leaves the processor to the device's program, and ends after some ten seconds.
pub fn patiently() -> WaitPolicy {
    WaitPolicy::new()
        .with_max_polls(200_000)
        .with_relax(|polls| {
            if polls > 20_000 {
                std::thread::sleep(Duration::from_micros(20));
            } else if polls > 200 {
                std::thread::yield_now();
            }
            true
        })
}

/// A driver for each device of a board, in the order of its numbers within its kind: MMIO before PCI.
#[derive(Default)]
pub struct Drivers {
    pub disks: Vec<Box<dyn BlockDriverOps>>,
    pub nics: Vec<Box<dyn NetDriverOps>>,
    pub displays: Vec<Box<dyn DisplayDriverOps>>,
}

impl Drivers {
    /// Probes both buses of a board. NICs have queues of at most `QS`.
    pub fn probe<const QS: usize>(board: &QemuBoard) -> Self {
        Self::probe_with::<QS>(board, patiently())
    }

    /// Probes both buses of a board, for drivers that wait as `wait` says.
    pub fn probe_with<const QS: usize>(board: &QemuBoard, wait: WaitPolicy) -> Self {
        Self::find::<QS>(board.mmio_slots(), board.pci(), board.pci_window(), wait)
    }

    /// Probes slots and a PCI root, for drivers that wait as `wait` says.
    pub fn find<const QS: usize>(
        slots: &[Slot],
        mut root: PciRoot<MmioCam<'static>>,
        window: Range<u64>,
        wait: WaitPolicy,
    ) -> Self {
        let mut drivers = Self::default();
        for slot in slots {
            // SAFETY: the registers are those of the board, and nobody else uses the slot.
            if let Some((kind, transport)) = unsafe { probe_mmio_device(slot.pointer(), slot.size) }
            {
                drivers.add::<_, QS>(kind, transport, wait);
            }
        }
        let mut allocator = PciRangeAllocator::new(window.start, window.end - window.start);
        for (_, kind, transport) in
            probe_pci_buses::<MachineHal, _>(&mut root, BUSES, Some(&mut allocator))
        {
            drivers.add::<_, QS>(kind, transport, wait);
        }
        drivers
    }

    fn add<T: Transport + Send + Sync + 'static, const QS: usize>(
        &mut self,
        kind: DeviceType,
        transport: T,
        wait: WaitPolicy,
    ) {
        match kind {
            DeviceType::Block => {
                let disk = VirtIoBlkDev::<MachineHal, T>::try_new_with(transport, wait);
                self.disks.push(Box::new(disk.unwrap()));
            }
            DeviceType::Net => {
                let nic = VirtIoNetDev::<MachineHal, T, QS>::try_new_with(transport, wait);
                self.nics.push(Box::new(nic.unwrap()));
            }
            DeviceType::Display => {
                let display = VirtIoGpuDev::<MachineHal, T>::try_new_with(transport, wait);
                self.displays.push(Box::new(display.unwrap()));
            }
            other => panic!("a driver for {other:?}"),
        }
    }
}

/// Writes `total` bytes to a disk in pieces of random place and length, flushing now and then, and
/// returns what the disk has to hold.
pub fn write_at_random(disk: &mut dyn BlockDriverOps, total: u64, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let size = disk.num_blocks() as usize * disk.block_size();
    let block = disk.block_size();
    let mut expected = vec![0; size];
    // Cut from one piece of noise, which is quicker to have than noise for each.
    let noise = numbers.bytes(1 << 20);
    let mut written = 0;
    let mut round = 0;
    while written < total {
        let blocks = 1 + numbers.below(128) as usize;
        let length = blocks * block;
        let first = numbers.below(disk.num_blocks() - blocks as u64) as usize;
        let from = numbers.below((noise.len() - length) as u64) as usize;
        let data = &noise[from..from + length];
        disk.write_block(first as u64, data).unwrap();
        expected[first * block..][..length].copy_from_slice(data);
        written += length as u64;
        round += 1;
        if round % 64 == 0 {
            disk.flush().unwrap();
        }
    }
    disk.flush().unwrap();
    expected
}

/// Returns how much is written where "much" is meant, in bytes: 64 MiB, or `MACHINE_TEST_MIB`.
pub fn much() -> u64 {
    std::env::var("MACHINE_TEST_MIB")
        .ok()
        .and_then(|text| text.parse::<u64>().ok())
        .unwrap_or(64)
        << 20
}

/// The configuration space of a board, for what is not to go through its PCI root.
pub fn configuration(board: &QemuBoard) -> MmioCam<'static> {
    // SAFETY: on a board, register addresses are numbers that its bus looks up; nothing is dereferenced.
    unsafe { MmioCam::new(register_pointer(board.ecam()), Cam::Ecam) }
}

/// The colour that [`draw`] gives a pixel: red, green, blue.
fn colour(shade: u32, x: u32, y: u32) -> [u8; 3] {
    [(x * shade) as u8, (y * 3 + shade) as u8, (x ^ y) as u8]
}

/// Draws a picture of which no two pixels in a row are alike. It is not flushed.
pub fn draw(display: &mut dyn DisplayDriverOps, shade: u32) {
    let info = display.info();
    let stride = display.capabilities().stride;
    let stride = stride.unwrap_or(info.width as usize * 4);
    let mut framebuffer = display.fb();
    for (y, row) in (0..info.height).zip(framebuffer.as_bytes_mut().chunks_mut(stride)) {
        for (x, pixel) in (0..info.width).zip(row.as_chunks_mut::<4>().0) {
            let [red, green, blue] = colour(shade, x, y);
            *pixel = [blue, green, red, 0];
        }
    }
}

/// Returns what a display of this size then shows.
pub fn drawn(shade: u32, width: u32, height: u32) -> Image {
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let rgba = places.flat_map(|(x, y)| {
        let [red, green, blue] = colour(shade, x, y);
        [red, green, blue, 255]
    });
    Image {
        width,
        height,
        rgba: rgba.collect(),
    }
}
