//! The drivers of this crate and those of `virtio-drivers`, doing the same on the same board.
//!
//! Each job is done by both in turns, and the median of the ratios is what counts: it does not
//! depend on the computer much. `README.md` in this folder has figures.
//!
//! `side_by_side JOB ours|theirs COUNT` does one job so many times and nothing else, for callgrind.

#![expect(clippy::unwrap_used, reason = "a program that measures fails this way")]

use std::{hint::black_box, time::Instant};

use axdriver_block::BlockDriverOps;
use axdriver_net::NetDriverOps;
use axdriver_virtio::{MmioTransport, VirtIoBlkDev, VirtIoNetDev, probe_mmio_device};
use machine::{Board, Disk, MachineHal, Nic, Version};
use virtio_drivers::{
    device::{blk::VirtIOBlk, net::VirtIONetRaw},
    transport::mmio,
};

/// Frames in the queues of both.
const QUEUE: usize = 64;
/// Frames in a batch.
const BATCH: u64 = 32;
const FRAME: usize = 1514;
const HEADER: usize = 12;
/// The devices of one side: a disk and a NIC, in this order.
const OURS: usize = 0;
const THEIRS: usize = 2;

type TheirTransport = mmio::MmioTransport<'static>;
type TheirNic = VirtIONetRaw<MachineHal, TheirTransport, QUEUE>;

fn board(nics: [&Nic; 2]) -> Board {
    let board = nics.into_iter().fold(Board::emulated(), |board, nic| {
        board
            .mmio(Version::Modern, Disk::memory(1 << 20))
            .mmio(Version::Modern, nic)
    });
    let board = board.without_watch().build().unwrap();
    board.memory().trace().set_limit(0);
    board
}

fn ours(board: &Board, slot: usize) -> MmioTransport<'static> {
    let slot = board.mmio_slots()[slot];
    // SAFETY: the registers of a slot of the board, which nobody else uses.
    unsafe { probe_mmio_device(slot.pointer(), slot.size) }
        .unwrap()
        .1
}

fn theirs(board: &Board, slot: usize) -> TheirTransport {
    board.mmio_slots()[slot].transport().unwrap()
}

/// A job, done so many times by the one and by the other.
struct Job<'a> {
    name: &'static str,
    ours: Box<dyn FnMut(u64) + 'a>,
    theirs: Box<dyn FnMut(u64) + 'a>,
}

fn block_jobs<'a>(board: &'a Board, name: &'static str, len: usize, write: bool) -> Job<'a> {
    let mut disk = VirtIoBlkDev::<MachineHal, _>::try_new(ours(board, OURS)).unwrap();
    let mut bytes = board.memory().buffer(len).unwrap();
    let our_side = move |count| {
        for block in 0..count {
            let block = block % 1024;
            if write {
                disk.write_block(block, &bytes).unwrap();
            } else {
                disk.read_block(block, &mut bytes).unwrap();
            }
        }
    };
    let mut disk = VirtIOBlk::<MachineHal, _>::new(theirs(board, THEIRS)).unwrap();
    let mut bytes = board.memory().buffer(len).unwrap();
    let their_side = move |count| {
        for block in 0..count {
            let block = usize::try_from(block % 1024).unwrap();
            if write {
                disk.write_blocks(block, &bytes).unwrap();
            } else {
                disk.read_blocks(block, &mut bytes).unwrap();
            }
        }
    };
    Job {
        name,
        ours: Box::new(our_side),
        theirs: Box::new(their_side),
    }
}

fn send<'a>(board: &'a Board) -> Job<'a> {
    let mut nic = VirtIoNetDev::<MachineHal, _, QUEUE>::try_new(ours(board, OURS + 1)).unwrap();
    let our_side = move |count| {
        for _ in 0..count {
            let mut buf = nic.alloc_tx_buffer(FRAME).unwrap();
            buf.packet_mut().fill(2);
            nic.transmit(buf).unwrap();
        }
    };
    let mut nic = TheirNic::new(theirs(board, THEIRS + 1)).unwrap();
    let mut bytes = [0; HEADER + FRAME];
    let their_side = move |count| {
        for _ in 0..count {
            let header = nic.fill_buffer_header(&mut bytes).unwrap();
            bytes[header..].fill(2);
            // SAFETY: the buffer stays as it is until the transmission is complete.
            let token = unsafe { nic.transmit_begin(&bytes) }.unwrap();
            assert_eq!(nic.poll_transmit(), Some(token));
            // SAFETY: it is the buffer that belongs to the token.
            unsafe { nic.transmit_complete(token, &bytes) }.unwrap();
        }
    };
    Job {
        name: "send",
        ours: Box::new(our_side),
        theirs: Box::new(their_side),
    }
}

fn receive<'a>(board: &'a Board, nics: [&'a Nic; 2]) -> Job<'a> {
    let [our_card, their_card] = nics;
    let arrive = move |card: &Nic| {
        for _ in 0..BATCH {
            card.inject(&[2; FRAME]);
        }
        board.run();
    };
    let mut nic = VirtIoNetDev::<MachineHal, _, QUEUE>::try_new(ours(board, OURS + 1)).unwrap();
    let our_side = move |count| {
        for _ in 0..count / BATCH {
            arrive(our_card);
            for _ in 0..BATCH {
                let buf = nic.receive().unwrap();
                assert_eq!(black_box(buf.packet()).len(), FRAME);
                nic.recycle_rx_buffer(buf).unwrap();
            }
        }
    };
    let mut nic = TheirNic::new(theirs(board, THEIRS + 1)).unwrap();
    let mut buffers = vec![vec![0; 2048]; QUEUE];
    for (buffer, index) in buffers.iter_mut().zip(0..) {
        // SAFETY: the buffer is not touched until it is received into.
        assert_eq!(unsafe { nic.receive_begin(buffer) }, Ok(index));
    }
    let their_side = move |count| {
        for _ in 0..count / BATCH {
            arrive(their_card);
            for _ in 0..BATCH {
                let token = nic.poll_receive().unwrap();
                let buffer = &mut buffers[usize::from(token)];
                // SAFETY: the buffer was given to the queue under this token.
                let (header, len) = unsafe { nic.receive_complete(token, buffer) }.unwrap();
                assert_eq!(black_box(&buffer[header..header + len]).len(), FRAME);
                // SAFETY: as above.
                assert_eq!(unsafe { nic.receive_begin(buffer) }, Ok(token));
            }
        }
    };
    Job {
        name: "receive",
        ours: Box::new(our_side),
        theirs: Box::new(their_side),
    }
}

/// Runs `with` with each job, on a board of its own.
fn each_job(mut with: impl FnMut(Job<'_>)) {
    for (name, len, write) in [
        ("read-512", 512, false),
        ("read-4096", 4096, false),
        ("write-4096", 4096, true),
    ] {
        let cards = [Nic::new([2; 6]), Nic::new([4; 6])];
        let board = board([&cards[0], &cards[1]]);
        with(block_jobs(&board, name, len, write));
    }
    for job in [true, false] {
        let cards = [Nic::new([2; 6]), Nic::new([4; 6])];
        let cards = [&cards[0], &cards[1]];
        let board = board(cards);
        with(if job {
            send(&board)
        } else {
            receive(&board, cards)
        });
    }
}

/// Returns the seconds that one of `count` takes.
fn seconds(count: u32, work: &mut dyn FnMut(u64)) -> f64 {
    let started = Instant::now();
    work(count.into());
    started.elapsed().as_secs_f64() / f64::from(count)
}

fn compare(mut job: Job<'_>) {
    let (rounds, count) = if cfg!(debug_assertions) {
        (3, 320)
    } else {
        (31, 16_000)
    };
    let mut rows: Vec<[f64; 3]> = (0..rounds)
        .map(|_| {
            let ours = seconds(count, &mut job.ours);
            let theirs = seconds(count, &mut job.theirs);
            [theirs / ours, 1e-3 / ours, 1e-3 / theirs]
        })
        .collect();
    rows.sort_by(|one, other| one[0].total_cmp(&other[0]));
    let [ratio, ours, theirs] = rows[rows.len() / 2];
    println!(
        "{:12} ours {ours:8.1} k/s   virtio-drivers {theirs:8.1} k/s   ratio {ratio:.2} \
         ({:.2} to {:.2})",
        job.name,
        rows[0][0],
        rows[rows.len() - 1][0]
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [name, side, count] = arguments.as_slice() {
        let count = count.parse().unwrap();
        each_job(|mut job| {
            if job.name == name {
                let work = if side == "ours" {
                    &mut job.ours
                } else {
                    &mut job.theirs
                };
                work(count);
            }
        });
    } else {
        each_job(compare);
    }
}
