//! A hostile disk: what was written is what is read, whenever the driver said `Ok`.

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};
use axdriver_block::BlockDriverOps;
use axdriver_virtio::VirtIoBlkDev;
use machine::{
    Buffer, Device, Disk, MachineHal,
    hostile::{Fault, Hostile},
};

use crate::{
    bench::{Bench, Watched},
    choices::Choices,
};

/// What was done, and how often.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Requests made, or frames sent and received, with or without success.
    pub done: u64,
    /// Those that went well.
    pub good: u64,
    /// Resets of a driver in place.
    pub resets: u64,
    /// Faults that the device committed.
    pub faults: u64,
    /// Devices that did not reset.
    pub stuck: u64,
}

impl Count {
    /// Adds another account.
    pub fn add(&mut self, other: Self) {
        self.done += other.done;
        self.good += other.good;
        self.resets += other.resets;
        self.faults += other.faults;
        self.stuck += other.stuck;
    }
}

const SECTOR: usize = 512;
const SECTORS: usize = 512;
/// The most bytes in a call.
const MOST: usize = 64 * SECTOR;
const MEMORY: usize = 2 << 20;
/// What lies around a caller's buffer.
const CANARY: u8 = 0x3c;
const MARGIN: usize = 64;

/// Returns the bytes of a sector that was written in the write of this number.
fn contents(sector: usize, write: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = write << 24 ^ (sector as u64) << 8 ^ index as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// A caller's memory, on the heap or where the device can reach it itself.
enum Memory {
    Heap(Vec<u8>),
    Reachable(Buffer),
}

impl Memory {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Reachable(bytes) => bytes,
        }
    }
}

struct Run {
    bench: Bench,
    disk: Disk,
    /// The number of the write that each sector is known to hold.
    known: Vec<Option<u64>>,
    writes: u64,
    count: Count,
}

impl Run {
    fn driver(&self) -> Option<VirtIoBlkDev<MachineHal, Watched>> {
        VirtIoBlkDev::try_new_with(self.bench.probe()?, Bench::wait()).ok()
    }

    /// Reads or writes `len` bytes at `block`, in memory between two margins that stay as they are.
    fn transfer(
        &mut self,
        driver: &mut VirtIoBlkDev<MachineHal, Watched>,
        block: u64,
        len: usize,
        is_write: bool,
        memory: &mut Memory,
    ) -> DevResult {
        let bytes = memory.bytes();
        bytes.fill(CANARY);
        let (before, rest) = bytes.split_at_mut(MARGIN);
        let (data, after) = rest.split_at_mut(len);
        let block_size = driver.block_size();
        let first = usize::try_from(block * (block_size / SECTOR) as u64).unwrap_or(usize::MAX);
        let sectors = || (first..).take(len / SECTOR);
        let result = if is_write {
            self.writes += 1;
            for (sector, bytes) in sectors().zip(data.chunks_exact_mut(SECTOR)) {
                bytes.copy_from_slice(&contents(sector, self.writes));
            }
            driver.write_block(block, data)
        } else {
            driver.read_block(block, data)
        };
        self.count.done += 1;
        if is_write && result != Err(DevError::InvalidParam) {
            for sector in sectors() {
                if let Some(known) = self.known.get_mut(sector) {
                    *known = result.is_ok().then_some(self.writes);
                }
            }
        }
        if result.is_ok() {
            self.count.good += 1;
            assert!(
                first + len / SECTOR <= SECTORS,
                "a request beyond the end was done"
            );
            for (sector, bytes) in sectors().zip(data.chunks_exact(SECTOR)) {
                if let Some(write) = self.known[sector] {
                    assert!(
                        bytes == contents(sector, write),
                        "sector {sector} is another one"
                    );
                }
            }
        }
        let margins = before.iter().chain(after.iter());
        assert!(
            margins.copied().all(|byte| byte == CANARY),
            "a margin was written to"
        );
        result
    }

    /// Makes one decision, and does what it says.
    fn step(
        &mut self,
        driver: &mut VirtIoBlkDev<MachineHal, Watched>,
        choices: &mut Choices,
    ) -> DevResult {
        self.bench.scribble(choices);
        match choices.below(16) {
            0 => {
                let result = driver.flush();
                // A device that forgets about FLUSH between two resets cannot be flushed.
                if result.is_ok() && !self.bench.has_happened(&[Fault::RegisterGarbage]) {
                    let left = self.disk.unflushed_sectors();
                    assert_eq!(left, 0, "a flush left something behind");
                }
                result
            }
            1 => {
                self.bench.board().run();
                Ok(())
            }
            2 => driver.acknowledge_interrupt().map(drop),
            3 => driver.enable_interrupts().map(drop),
            4 => driver.disable_interrupts(),
            5 => {
                // Empty, ragged, or beyond the end.
                let len = [0, 1, SECTOR - 1, SECTOR + 1, SECTOR][choices.below(5)];
                let block = driver.num_blocks();
                let mut bytes = vec![0; len];
                let result = driver.read_block(block, &mut bytes);
                assert_eq!(result, Err(DevError::InvalidParam));
                Ok(())
            }
            choice => {
                let block_size = driver.block_size();
                let most = (MOST / block_size).max(1);
                let count = 1 + choices.below(most).min(choices.below(most));
                let len = count * block_size;
                let blocks = SECTORS * SECTOR / block_size;
                let block = choices.below(blocks.max(1)) as u64;
                let total = len + 2 * MARGIN;
                let reachable = if choices.one_in(2) {
                    self.bench.board().memory().buffer(total)
                } else {
                    None
                };
                let mut memory =
                    reachable.map_or_else(|| Memory::Heap(vec![0; total]), Memory::Reachable);
                let stuck = self.bench.stuck();
                let result = self.transfer(driver, block, len, choice % 2 == 0, &mut memory);
                if self.bench.stuck() > stuck {
                    // The one thing that no driver can protect is what the device reaches itself.
                    std::mem::forget(memory);
                } else if result.is_err() && !self.bench.scribbles {
                    // What the device does later does not reach the caller.
                    let now = memory.bytes().to_vec();
                    self.bench.board().run();
                    assert!(
                        now == memory.bytes(),
                        "the device still writes to a caller's memory"
                    );
                }
                result
            }
        }
    }
}

/// Drives a hostile disk as `choices` say, for at most `steps` steps.
pub fn run(choices: &mut Choices, hostile: Hostile, steps: usize) -> Count {
    let mut disk = Disk::memory(SECTORS * SECTOR);
    if choices.one_in(4) {
        disk = disk.block_size(4096);
    }
    if choices.one_in(4) {
        disk = disk.size_max([512, 4096, 6000, 100][choices.below(4)]);
    }
    if choices.one_in(4) {
        disk = disk.without_flush();
    }
    if choices.one_in(16) {
        disk = disk.read_only();
    }
    let bench = Bench::new(
        DeviceType::Block,
        Device::from(&disk),
        hostile,
        MEMORY,
        choices,
    );
    let mut run = Run {
        bench,
        disk,
        known: vec![None; SECTORS],
        writes: 0,
        count: Count::default(),
    };
    if let Some(mut driver) = run.driver() {
        for _ in 0..steps {
            if choices.is_over() || run.bench.is_worn_out() {
                break;
            }
            if run.step(&mut driver, choices) == Err(DevError::BadState) {
                run.count.resets += 1;
                if driver.reset().is_err() && driver.reset().is_err() {
                    break;
                }
            }
        }
    }
    run.count.faults = run.bench.faults();
    run.count.stuck = run.bench.stuck();
    run.bench.finish();
    run.count
}
