//! The queue at its full depth: as many requests with the disks of other projects as it holds, done in any order.
//!
//! 64 MiB are written in pieces and compared with the image, or as many as `MACHINE_TEST_MIB` says.

#![cfg(feature = "block")]

use std::{
    collections::HashMap, fs::File, io::Write, os::unix::fs::FileExt, path::PathBuf, sync::Arc,
    time::Duration, vec, vec::Vec,
};

use machine::{
    Installed, Machine, MachineHal, Memory, Version,
    memory::{Buffer, DEFAULT_BASE},
    qemu::{Bus, Disk, ImageFormat, QemuBoard, QemuMachine, QemuOptions},
    vhost_user::{StorageDaemon, VhostUserDevice, VhostUserOptions, VhostUserTransport},
};
use virtio_drivers::transport::Transport;

use super::{AddError, Segment, VirtQueue};
use crate::{
    PciRangeAllocator, WaitPolicy,
    lifecycle::{Features, Lifecycle},
    probe_mmio_device, probe_pci_buses,
};

/// The size of the queue.
const N: usize = 256;
const SECTOR: usize = 512;
/// The longest piece, in sectors.
const LONGEST: usize = 32;
/// The size of the disks, in bytes.
const SIZE: usize = 32 << 20;
/// The memory of a machine: for each chain a request of up to 16 KiB, and the rings.
const MEMORY: usize = 64 << 20;

// VirtIO 1.3, 5.2.6.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const FLUSH: Features = Features::bit(9);
const STATUS_NONE: u8 = 0xff;

/// Where the parts of a request lie in its buffer.
const STATUS: usize = 16;
const DATA: usize = SECTOR;

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        // Marsaglia's xorshift64*.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % bound
    }
}

/// A piece of the disk, in sectors.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first: usize,
    count: usize,
}

/// A request with the device.
struct Request {
    kind: u32,
    piece: Piece,
    buffer: Buffer,
}

/// A disk with as many requests as its queue holds.
struct Deep<T: Transport> {
    memory: Arc<Memory>,
    lifecycle: Lifecycle<T>,
    queue: VirtQueue<MachineHal, N>,
    requests: HashMap<u16, Request>,
    idle: Vec<Buffer>,
    /// For each sector, whether a request has it: what two do to one sector at a time is not defined.
    busy: Vec<bool>,
    /// The most requests that were with the device at once.
    deepest: usize,
}

impl<T: Transport> Deep<T> {
    fn start(transport: T, memory: Arc<Memory>) -> Self {
        let mut lifecycle = Lifecycle::new("deep", transport, WaitPolicy::new());
        let mut queue = VirtQueue::new(0).unwrap();
        let features = lifecycle.begin(|_, _| Ok(FLUSH)).unwrap();
        queue.start(lifecycle.transport(), features, 4).unwrap();
        lifecycle.go_live().unwrap();
        Self {
            memory,
            lifecycle,
            queue,
            requests: HashMap::new(),
            idle: Vec::new(),
            busy: vec![false; SIZE / SECTOR],
            deepest: 0,
        }
    }

    /// Chooses a piece that no request has.
    fn choose(&self, numbers: &mut Numbers) -> Piece {
        loop {
            let count = 1 + numbers.below(LONGEST);
            let first = numbers.below(self.busy.len() - count);
            if !self.busy[first..first + count].contains(&true) {
                return Piece { first, count };
            }
        }
    }

    /// Adds a request, without notifying the device. `false`: there is no room, and nothing was added.
    fn add(&mut self, kind: u32, piece: Piece, data: &[u8]) -> bool {
        let buffer = self.idle.pop();
        let buffer = buffer.or_else(|| self.memory.buffer(DATA + LONGEST * SECTOR));
        let mut buffer = buffer.unwrap();
        buffer[..4].copy_from_slice(&kind.to_le_bytes());
        buffer[4..8].fill(0);
        buffer[8..16].copy_from_slice(&(piece.first as u64).to_le_bytes());
        buffer[STATUS] = STATUS_NONE;
        buffer[DATA..DATA + data.len()].copy_from_slice(data);
        let part = |offset: usize, len: usize| Segment {
            paddr: buffer.address() + offset as u64,
            len: u32::try_from(len).unwrap(),
        };
        let (header, status) = (part(0, STATUS), part(STATUS, 1));
        let data = part(DATA, piece.count * SECTOR);
        let (readable, writable): (&[Segment], &[Segment]) = match kind {
            TYPE_IN => (&[header], &[data, status]),
            TYPE_OUT => (&[header, data], &[status]),
            _ => (&[header], &[status]),
        };
        // SAFETY: the buffer is not accessed before the chain comes back, and lives until then: it is in `requests`.
        let added = unsafe { self.queue.add(readable, writable) };
        match added {
            Ok(token) => {
                self.busy[piece.first..piece.first + piece.count].fill(true);
                let request = Request {
                    kind,
                    piece,
                    buffer,
                };
                assert!(self.requests.insert(token, request).is_none());
                self.deepest = self.deepest.max(self.requests.len());
                true
            }
            Err(AddError::Full) => {
                self.idle.push(buffer);
                false
            }
            Err(AddError::Invalid) => panic!("no chain fits"),
        }
    }

    /// Notifies the device, waits until one request is done at least, and takes back all that are.
    fn reap(&mut self, mut done: impl FnMut(Piece, &[u8])) {
        self.queue.submit(self.lifecycle.transport());
        for looks in 0.. {
            if self.queue.has_used() {
                break;
            }
            assert!(looks < 1_000_000, "{} requests hang", self.requests.len());
            if looks > 100 {
                std::thread::sleep(Duration::from_micros(10));
            }
        }
        while let Some(used) = self.queue.pop().unwrap() {
            let Request {
                kind,
                piece,
                buffer,
            } = self.requests.remove(&used.token).unwrap();
            assert_eq!(buffer[STATUS], 0, "{kind} of {piece:?}");
            self.busy[piece.first..piece.first + piece.count].fill(false);
            if kind == TYPE_IN {
                done(piece, &buffer[DATA..DATA + piece.count * SECTOR]);
            }
            self.idle.push(buffer);
        }
    }

    /// Waits for all requests.
    fn drain(&mut self, mut done: impl FnMut(Piece, &[u8])) {
        while !self.requests.is_empty() {
            self.reap(&mut done);
        }
    }

    fn flush(&mut self) {
        let nothing = Piece { first: 0, count: 0 };
        self.drain(|_, _| {});
        assert!(self.add(TYPE_FLUSH, nothing, &[]));
        self.drain(|_, _| {});
    }

    /// Writes `total` bytes in random pieces at full depth, reads half as many, and returns what the disk has to hold.
    fn exercise(&mut self, total: usize) -> Vec<u8> {
        let mut numbers = Numbers(1);
        let mut expected = vec![0; SIZE];
        let noise: Vec<u8> = (0..1 << 20)
            .map(|_| u8::try_from(numbers.below(256)).unwrap())
            .collect();
        let mut written = 0;
        let mut since_flush = 0;
        while written < total {
            loop {
                let piece = self.choose(&mut numbers);
                let len = piece.count * SECTOR;
                let from = numbers.below(noise.len() - len);
                let data = &noise[from..from + len];
                if !self.add(TYPE_OUT, piece, data) {
                    break;
                }
                expected[piece.first * SECTOR..][..len].copy_from_slice(data);
                written += len;
                since_flush += len;
            }
            self.reap(|_, _| {});
            if since_flush > 64 << 20 {
                self.flush();
                since_flush = 0;
            }
        }
        self.drain(|_, _| {});
        let compare = |piece: Piece, data: &[u8]| {
            let held = &expected[piece.first * SECTOR..][..data.len()];
            assert!(held == data, "{piece:?} is not what was written");
        };
        let mut read = 0;
        while read < total / 2 {
            loop {
                let piece = self.choose(&mut numbers);
                if !self.add(TYPE_IN, piece, &[]) {
                    break;
                }
                read += piece.count * SECTOR;
            }
            self.reap(compare);
        }
        self.flush();
        expected
    }
}

impl<T: Transport> Drop for Deep<T> {
    fn drop(&mut self) {
        // Where a test fails, the process ends with its memory.
        let _ = self.lifecycle.stop();
    }
}

/// A file that is removed with its owner.
struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Self {
        let name = std::format!("axdriver-depth-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
        Self(path)
    }

    fn disk(&self) -> Disk {
        Disk::new(&self.0, ImageFormat::Raw)
    }

    fn holds(&self, expected: &[u8]) -> bool {
        let mut held = vec![0; SIZE];
        let file = File::open(&self.0).unwrap();
        file.read_exact_at(&mut held, 0).unwrap();
        held == expected
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Returns how much is written, in bytes.
fn much() -> usize {
    let mib = std::env::var("MACHINE_TEST_MIB").ok();
    mib.and_then(|text| text.parse().ok()).unwrap_or(64_usize) << 20
}

/// Says why a test is skipped, also where it passes.
fn skip(why: &str) {
    let _ = std::writeln!(std::io::stderr(), "{why}");
}

fn at_full_depth_on_qemu(
    name: &str,
    machine: QemuMachine,
    bus: Bus,
    version: Version,
    indirect: bool,
) {
    if let Some(why) = QemuBoard::missing(machine) {
        skip(&why);
        return;
    }
    let image = Image::new(name);
    let disk = image
        .disk()
        .on(bus)
        .property("queue-size", "1024")
        .property("indirect_desc", if indirect { "on" } else { "off" });
    let options = QemuOptions::new(machine)
        .mmio(version)
        .memory_size(MEMORY as u64)
        .disk(disk);
    let board = QemuBoard::start(&options).unwrap();
    let memory = board.memory().clone();
    let (expected, deepest) = match bus {
        Bus::Mmio => {
            let slot = &board.mmio_slots()[0];
            // SAFETY: the registers are those of the board, and nobody else uses the slot.
            let found = unsafe { probe_mmio_device(slot.pointer(), slot.size) };
            let mut deep = Deep::start(found.unwrap().1, memory);
            (deep.exercise(much()), deep.deepest)
        }
        _ => {
            let window = board.pci_window();
            let mut window = PciRangeAllocator::new(window.start, window.end - window.start);
            let mut root = board.pci();
            let found =
                probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window)).next();
            let mut deep = Deep::start(found.unwrap().2, memory);
            (deep.exercise(much()), deep.deepest)
        }
    };
    // A chain has three descriptors, and the last ones go through tables where there are such.
    let depth = if indirect { 86..=256 } else { 85..=85 };
    assert!(depth.contains(&deepest), "{deepest} requests at once");
    assert!(image.holds(&expected));
    board.shut_down().unwrap();
    assert!(image.holds(&expected));
}

#[test]
fn at_full_depth_over_modern_mmio_the_image_holds_what_was_written() {
    let (machine, version) = (QemuMachine::Aarch64Virt, Version::Modern);
    at_full_depth_on_qemu("modern", machine, Bus::Mmio, version, true);
}

#[test]
fn at_full_depth_over_legacy_mmio_the_image_holds_what_was_written() {
    let (machine, version) = (QemuMachine::Aarch64Virt, Version::Legacy);
    at_full_depth_on_qemu("legacy", machine, Bus::Mmio, version, false);
}

#[test]
fn at_full_depth_over_pci_the_image_holds_what_was_written() {
    let (machine, version) = (QemuMachine::X86Q35, Version::Modern);
    at_full_depth_on_qemu("pci", machine, Bus::Pci, version, true);
}

#[test]
fn at_full_depth_over_vhost_user_the_image_holds_what_was_written() {
    if let Some(why) = StorageDaemon::missing() {
        skip(&why);
        return;
    }
    let image = Image::new("vhost-user");
    let daemon = StorageDaemon::start(&image.disk(), 1).unwrap();
    let memory = Memory::anonymous(DEFAULT_BASE, MEMORY).unwrap();
    let _installed: Installed = Machine::new(memory.clone(), Arc::new(())).install();
    let options = VhostUserOptions::new(VhostUserDevice::Block).queue_size(256);
    let transport = VhostUserTransport::connect(daemon.socket(), memory.clone(), options).unwrap();
    let mut deep = Deep::start(transport, memory.clone());
    let expected = deep.exercise(much());
    assert!((86..=256).contains(&deep.deepest), "{}", deep.deepest);
    drop(deep);
    assert!(image.holds(&expected));
    assert_eq!(memory.counters().pages_live, 0);
}
