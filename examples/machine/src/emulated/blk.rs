//! A block device (5.2) over memory or a file, with a write-back cache that a power cut empties.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use super::device::{Device, Field, Model};
use super::queue::Chain;
use super::state::State;
use crate::hostile::{Fault, Occasion};

/// Feature bits of block devices (5.2.3).
pub mod features {
    /// `size_max` holds.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` holds.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` holds.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The device has a flush command.
    pub const FLUSH: u64 = 1 << 9;
    /// The device's cache can be switched between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
}

const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;

const FIELDS: &[Field] = &[
    Field::new(0, 8, 0),
    Field::new(8, 4, features::SIZE_MAX),
    Field::new(12, 4, features::SEG_MAX),
    Field::new(16, 2, 1 << 4),
    Field::new(18, 1, 1 << 4),
    Field::new(19, 1, 1 << 4),
    Field::new(20, 4, features::BLK_SIZE),
    Field::new(24, 1, 1 << 10),
    Field::new(25, 1, 1 << 10),
    Field::new(26, 2, 1 << 10),
    Field::new(28, 4, 1 << 10),
    Field::new(32, 1, features::CONFIG_WCE).writable(),
    Field::new(34, 2, 1 << 12),
    Field::new(36, 4, 1 << 13),
    Field::new(40, 4, 1 << 13),
    Field::new(44, 4, 1 << 13),
    Field::new(48, 4, 1 << 14),
    Field::new(52, 4, 1 << 14),
    Field::new(56, 1, 1 << 14),
];
const CONFIG_LEN: usize = 60;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// What a disk was asked to do.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct DiskCounters {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// All other requests.
    pub others: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<u8>),
    File(File),
}

impl Storage {
    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(all) => {
                let part = usize::try_from(at)
                    .ok()
                    .and_then(|at| all.get(at..at.checked_add(bytes.len())?))
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                bytes.copy_from_slice(part);
                Ok(())
            }
            Self::File(file) => file.read_exact_at(bytes, at),
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(all) => {
                let part = usize::try_from(at)
                    .ok()
                    .and_then(|at| all.get_mut(at..at.checked_add(bytes.len())?))
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                part.copy_from_slice(bytes);
                Ok(())
            }
            Self::File(file) => file.write_all_at(bytes, at),
        }
    }
}

#[derive(Debug)]
struct DiskState {
    storage: Storage,
    /// Size in sectors.
    sectors: u64,
    /// Sectors written and not flushed.
    cache: HashMap<u64, [u8; SECTOR_LEN]>,
    features: u64,
    block_size: u32,
    seg_max: u32,
    size_max: u32,
    /// Whether the cache is write-back, as CONFIG_WCE has set it.
    write_back: bool,
    /// Whether writes stay in the cache: the driver can flush, and the cache is write-back.
    caching: bool,
    changed: bool,
    counters: DiskCounters,
}

/// A disk. Clones are handles to the same one.
///
/// It offers FLUSH and has a write-back cache: where the driver accepts FLUSH, what it wrote and did not flush is lost in a
/// [`power_cut`](Self::power_cut).
#[derive(Clone, Debug)]
pub struct Disk {
    state: Arc<Mutex<DiskState>>,
}

impl Disk {
    /// Returns a disk of `size` bytes, all 0, that lives in memory. Only whole sectors of 512 bytes count.
    pub fn memory(size: usize) -> Self {
        let sectors = size as u64 / SECTOR;
        Self::new(Storage::Memory(vec![0; size]), sectors, 0)
    }

    /// Returns a disk that is the file at `path`. What is flushed is written to it.
    ///
    /// # Errors
    ///
    /// * [`io::ErrorKind::ResourceBusy`]: another program has locked the file or a part of it, as QEMU does.
    /// * Whatever else the host says when it opens the file for reading and writing.
    pub fn file(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let locked = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
        // Some file systems have no locks.
        if let Err(Errno::AGAIN | Errno::ACCESS) = locked {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "in use by another program, which has to close it first (or use a copy)",
            ));
        }
        let sectors = file.metadata()?.len() / SECTOR;
        Ok(Self::new(Storage::File(file), sectors, 0))
    }

    /// Returns a read-only disk that is the file at `path`.
    ///
    /// # Errors
    ///
    /// Whatever the host says when it opens the file for reading.
    pub fn file_read_only(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        let sectors = file.metadata()?.len() / SECTOR;
        Ok(Self::new(Storage::File(file), sectors, features::RO))
    }

    fn new(storage: Storage, sectors: u64, extra: u64) -> Self {
        Self {
            state: Arc::new(Mutex::new(DiskState {
                storage,
                sectors,
                cache: HashMap::new(),
                features: features::FLUSH | features::SEG_MAX | features::BLK_SIZE | extra,
                block_size: 512,
                seg_max: 126,
                size_max: u32::MAX,
                write_back: true,
                caching: false,
                changed: false,
                counters: DiskCounters::default(),
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(self, change: impl FnOnce(&mut DiskState)) -> Self {
        change(&mut self.lock());
        self
    }

    /// Offers RO, and refuses writes.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.with(|state| state.features |= features::RO)
    }

    /// Does not offer FLUSH; writes go through.
    #[must_use]
    pub fn without_flush(self) -> Self {
        self.with(|state| state.features &= !features::FLUSH)
    }

    /// Offers CONFIG_WCE.
    #[must_use]
    pub fn with_cache_control(self) -> Self {
        self.with(|state| state.features |= features::CONFIG_WCE)
    }

    /// Says that its blocks have `size` bytes. Requests stay in sectors of 512 bytes.
    #[must_use]
    pub fn block_size(self, size: u32) -> Self {
        self.with(|state| state.block_size = size)
    }

    /// Takes at most `count` data segments in a request.
    #[must_use]
    pub fn seg_max(self, count: u32) -> Self {
        self.with(|state| state.seg_max = count)
    }

    /// Offers SIZE_MAX: a data segment has at most `size` bytes.
    #[must_use]
    pub fn size_max(self, size: u32) -> Self {
        self.with(|state| {
            state.size_max = size;
            state.features |= features::SIZE_MAX;
        })
    }

    /// Returns what a driver would read.
    ///
    /// # Errors
    ///
    /// Whatever the host says when it reads the file; nothing for a disk in memory.
    pub fn contents(&self) -> io::Result<Vec<u8>> {
        let state = self.lock();
        let mut all = state.stable()?;
        for (sector, bytes) in &state.cache {
            if let Some(place) = usize::try_from(sector * SECTOR)
                .ok()
                .and_then(|at| all.get_mut(at..at + SECTOR_LEN))
            {
                place.copy_from_slice(bytes);
            }
        }
        Ok(all)
    }

    /// Returns what would be left after a power cut.
    ///
    /// # Errors
    ///
    /// As [`contents`](Self::contents).
    pub fn stable(&self) -> io::Result<Vec<u8>> {
        self.lock().stable()
    }

    /// Writes `bytes` at byte `at`, past the cache.
    ///
    /// # Errors
    ///
    /// * `UnexpectedEof`: they do not fit.
    /// * Whatever the host says when it writes the file.
    pub fn fill(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.lock().storage.write(at, bytes)
    }

    /// Loses what is in the cache.
    pub fn power_cut(&self) {
        self.lock().cache.clear();
    }

    /// Returns how many sectors are in the cache.
    pub fn unflushed_sectors(&self) -> usize {
        self.lock().cache.len()
    }

    /// Changes the size that the driver is told, in bytes, and tells it. A disk in memory grows with it.
    pub fn resize(&self, size: usize) {
        let mut state = self.lock();
        if let Storage::Memory(all) = &mut state.storage {
            all.resize(size, 0);
        }
        state.sectors = size as u64 / SECTOR;
        state.changed = true;
    }

    /// Returns what the disk was asked to do.
    pub fn counters(&self) -> DiskCounters {
        self.lock().counters
    }
}

impl From<&Disk> for Device {
    fn from(disk: &Disk) -> Self {
        Device::new(disk.clone())
    }
}

impl From<Disk> for Device {
    fn from(disk: Disk) -> Self {
        Device::new(disk)
    }
}

impl DiskState {
    fn stable(&self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.sectors * SECTOR).map_err(io::Error::other)?;
        let mut all = vec![0; len];
        self.storage.read(0, &mut all)?;
        Ok(all)
    }

    fn flush(&mut self) -> io::Result<()> {
        for (sector, bytes) in std::mem::take(&mut self.cache) {
            self.storage.write(sector * SECTOR, &bytes)?;
        }
        if let Storage::File(file) = &self.storage {
            file.sync_data()?;
        }
        Ok(())
    }

    fn read(&self, sector: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.storage.read(sector * SECTOR, bytes)?;
        if !self.cache.is_empty() {
            for (index, part) in bytes.chunks_mut(SECTOR_LEN).enumerate() {
                if let Some(cached) = self.cache.get(&(sector + index as u64)) {
                    part.copy_from_slice(cached);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.caching {
            return self.storage.write(sector * SECTOR, bytes);
        }
        for (index, part) in bytes.chunks_exact(SECTOR_LEN).enumerate() {
            let cached = self
                .cache
                .entry(sector + index as u64)
                .or_insert([0; SECTOR_LEN]);
            cached.copy_from_slice(part);
        }
        Ok(())
    }

    /// Returns whether a transfer is of whole sectors, and on the disk.
    fn check(&self, sector: u64, len: u64, device: &State) -> bool {
        if len == 0 || !len.is_multiple_of(SECTOR) {
            device.violation("BLK-11", format!("a transfer of {len} bytes"));
            return false;
        }
        let fits = sector
            .checked_add(len / SECTOR)
            .is_some_and(|end| end <= self.sectors);
        if !fits {
            device.violation(
                "BLK-07",
                format!("{len} bytes at sector {sector} of {}", self.sectors),
            );
        }
        fits
    }

    /// Does a request. Returns its status and how many bytes were written before the status byte.
    fn handle(&mut self, device: &State, chain: &Chain, kind: u32, sector: u64) -> (u8, u64) {
        let memory = device.guest();
        let guest = memory.guest();
        let data_out = chain.readable_len().saturating_sub(16);
        let data_in = chain.writable_len().saturating_sub(1);
        match kind {
            IN => {
                self.counters.reads += 1;
                if !self.check(sector, data_in, device) {
                    return (IOERR, 0);
                }
                let Ok(len) = usize::try_from(data_in) else {
                    return (IOERR, 0);
                };
                let mut bytes = vec![0; len];
                if self.read(sector, &mut bytes).is_err() || chain.write(guest, 0, &bytes) != len {
                    return (IOERR, 0);
                }
                (OK, data_in)
            }
            OUT => {
                self.counters.writes += 1;
                if self.features & features::RO != 0 {
                    device.violation("BLK-08", "a write to a read-only disk");
                    return (IOERR, 0);
                }
                if !self.check(sector, data_out, device) {
                    return (IOERR, 0);
                }
                let Ok(len) = usize::try_from(data_out) else {
                    return (IOERR, 0);
                };
                let mut bytes = vec![0; len];
                if chain.read(guest, 16, &mut bytes) != len || self.write(sector, &bytes).is_err() {
                    return (IOERR, 0);
                }
                (OK, 0)
            }
            FLUSH => {
                self.counters.flushes += 1;
                if sector != 0 {
                    device.violation("BLK-09", format!("a flush of sector {sector}"));
                }
                if data_out != 0 || data_in != 0 {
                    device.violation("BLK-10", "a flush with data");
                }
                if !device.has(features::FLUSH) {
                    return (UNSUPP, 0);
                }
                if self.flush().is_err() {
                    return (IOERR, 0);
                }
                (OK, 0)
            }
            GET_ID => {
                self.counters.others += 1;
                if data_in != 20 {
                    device.violation("BLK-13", format!("a buffer of {data_in} bytes for the ID"));
                }
                let written = chain.write(guest, 0, b"machine-disk\0\0\0\0\0\0\0\0");
                (OK, written as u64)
            }
            _ => {
                self.counters.others += 1;
                (UNSUPP, 0)
            }
        }
    }
}

impl Disk {
    fn request(&self, chain: &Chain, device: &mut State) -> u32 {
        let memory = device.guest();
        let guest = memory.guest();
        let mut header = [0; 16];
        let writable = chain.writable_len();
        if chain.read(guest, 0, &mut header) != header.len() || writable == 0 {
            device.violation("BLK-11", "a request without a header or a status byte");
            return 0;
        }
        let [a, b, c, d, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let fault = device.fault(Occasion::Block);
        let mut state = self.lock();
        state.check_segments(chain, device);
        if fault == Some(Fault::BlockStatusUnwritten) {
            state.counters.errors += 1;
            return u32::try_from(writable - 1).unwrap_or(u32::MAX);
        }
        let (mut status, written) = state.handle(device, chain, kind, sector);
        if let Some(Fault::BlockStatus(lie)) = fault {
            status = lie;
        }
        if status != OK {
            state.counters.errors += 1;
        }
        // What a failed request left unwritten is written too, so that the length may count the status byte (2.7.8.2).
        let rest = usize::try_from(writable - 1 - written).unwrap_or(0);
        chain.write(guest, written, &vec![0; rest.min(1 << 24)]);
        chain.write(guest, writable - 1, &[status]);
        u32::try_from(writable).unwrap_or(u32::MAX)
    }
}

impl DiskState {
    fn check_segments(&self, chain: &Chain, device: &State) {
        let out = chain.readable.len().saturating_sub(1);
        let data = out.max(chain.writable.len().saturating_sub(1));
        if device.has(features::SEG_MAX) && data as u64 > u64::from(self.seg_max) {
            device.violation(
                "BLK-21",
                format!("{data} data segments, of {} at most", self.seg_max),
            );
        }
        if device.has(features::SIZE_MAX)
            && chain
                .readable
                .iter()
                .chain(&chain.writable)
                .any(|piece| piece.len > self.size_max)
        {
            device.violation(
                "BLK-21",
                format!("a segment of more than {} bytes", self.size_max),
            );
        }
    }
}

impl Model for Disk {
    fn kind(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        self.lock().features
    }

    fn queues(&self) -> &'static [u16] {
        &[128]
    }

    fn fields(&self) -> &'static [Field] {
        FIELDS
    }

    fn config(&mut self, _device: &mut State) -> Vec<u8> {
        let state = self.lock();
        let mut config = vec![0; CONFIG_LEN];
        config[0..8].copy_from_slice(&state.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&state.size_max.to_le_bytes());
        config[12..16].copy_from_slice(&state.seg_max.to_le_bytes());
        config[20..24].copy_from_slice(&state.block_size.to_le_bytes());
        config[32] = state.write_back.into();
        config
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        let mut state = self.lock();
        if offset == 32
            && state.features & features::CONFIG_WCE != 0
            && let [value] = bytes
        {
            state.write_back = *value != 0;
            state.caching = state.write_back;
            if !state.caching {
                // A cache that is switched off is written back; what fails now fails again at the next request.
                let _ = state.flush();
            }
        }
    }

    fn changed(&mut self) -> bool {
        std::mem::take(&mut self.lock().changed)
    }

    fn negotiated(&mut self, device: &mut State) {
        let mut state = self.lock();
        let offered = state.features & !device.options.withheld;
        if offered & features::RO != 0 && !device.has(features::RO) {
            device.violation("BLK-08", "RO was offered and not accepted");
        }
        // Without FLUSH the driver could not empty a cache, so there is none (5.2.5.2).
        state.caching = device.has(features::FLUSH) && state.write_back;
    }

    fn serve(&mut self, queue: u16, device: &mut State) {
        while let Some(chain) = device.pop(queue) {
            let len = self.request(&chain, device);
            device.complete(queue, chain.head, len);
        }
    }

    fn reset(&mut self) {
        let mut state = self.lock();
        state.write_back = true;
        state.caching = false;
    }
}
