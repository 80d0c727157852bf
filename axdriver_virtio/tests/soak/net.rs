//! A hostile NIC: what is received was sent, and what is sent arrives as it was.

use std::collections::HashSet;

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType};
use axdriver_net::{NetBufPtr, NetDriverOps};
use axdriver_virtio::VirtIoNetDev;
use machine::{Device, MachineHal, Nic, hostile::Hostile};

use crate::{
    bench::{Bench, Watched},
    block::Count,
    choices::Choices,
};

const MEMORY: usize = 1 << 20;
const HEADER: usize = 14;
/// The number of a frame, and its length.
const TAG: usize = 12;

type Driver<const QUEUE: usize> = VirtIoNetDev<MachineHal, Watched, QUEUE>;

/// Returns the frame of this number, which can be told from its first bytes.
fn frame(number: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![0x02; HEADER];
    frame.extend(number.to_le_bytes());
    frame.extend(u32::try_from(len).unwrap().to_le_bytes());
    let rest = (frame.len()..len).map(|at| (at as u64 ^ number).to_le_bytes()[0]);
    frame.extend(rest);
    frame
}

/// Checks that a frame is one of those that [`frame`] makes, and returns its number.
fn number_of(bytes: &[u8]) -> u64 {
    let number = bytes.get(HEADER..HEADER + 8).expect("a frame is too short");
    let number = u64::from_le_bytes(number.try_into().unwrap());
    assert!(
        bytes == frame(number, bytes.len()),
        "a frame is not as it was sent"
    );
    number
}

struct Run {
    bench: Bench,
    nic: Nic,
    injected: u64,
    /// The numbers of those that were received.
    received: HashSet<u64>,
    transmitted: u64,
    arrived: u64,
    /// Frames that the caller holds.
    held: Vec<NetBufPtr>,
    count: Count,
}

impl Run {
    fn driver<const QUEUE: usize>(&self) -> Option<Driver<QUEUE>> {
        VirtIoNetDev::try_new_with(self.bench.probe()?, Bench::wait()).ok()
    }

    /// Looks at what arrived at the other end.
    fn look(&mut self) {
        let sent = self.nic.take_sent();
        // A buffer that the device said it was done with is used again.
        if sent.is_empty() || !self.bench.is_believable() {
            return;
        }
        for bytes in sent {
            let number = number_of(&bytes);
            // In order, and nothing twice.
            assert!(number >= self.arrived && number < self.transmitted);
            self.arrived = number + 1;
        }
    }

    fn receive<const QUEUE: usize>(
        &mut self,
        driver: &mut Driver<QUEUE>,
        choices: &mut Choices,
    ) -> DevResult {
        let mut buf = match driver.receive() {
            Err(DevError::Again) => return Ok(()),
            result => {
                self.count.done += 1;
                result?
            }
        };
        self.count.good += 1;
        assert!(buf.packet_len() >= HEADER, "a frame without a header");
        if self.bench.is_believable() {
            let number = number_of(buf.packet());
            assert!(number < self.injected && self.received.insert(number));
        }
        match choices.below(8) {
            // Dropped, which gives it back too.
            0 => Ok(()),
            // Held for some time; the caller may write to it.
            1 if self.held.len() < QUEUE => {
                buf.packet_mut().fill(0xee);
                self.held.push(buf);
                Ok(())
            }
            // Sent on.
            2 if self.bench.is_believable() && driver.can_transmit() => {
                let bytes = frame(self.transmitted, buf.packet_len().max(HEADER + TAG));
                let len = buf.packet_len();
                buf.packet_mut().copy_from_slice(&bytes[..len]);
                if len < HEADER + TAG {
                    return driver.recycle_rx_buffer(buf);
                }
                self.send(driver, buf)
            }
            _ => driver.recycle_rx_buffer(buf),
        }
    }

    fn send<const QUEUE: usize>(
        &mut self,
        driver: &mut Driver<QUEUE>,
        buf: NetBufPtr,
    ) -> DevResult {
        // Whether it arrives if this fails is not known: the number is used up.
        self.transmitted += 1;
        self.count.done += 1;
        driver.transmit(buf)?;
        self.count.good += 1;
        Ok(())
    }

    fn transmit<const QUEUE: usize>(
        &mut self,
        driver: &mut Driver<QUEUE>,
        choices: &mut Choices,
    ) -> DevResult {
        let most = driver.capabilities().max_frame_len;
        let len = HEADER + TAG + choices.below(most.saturating_sub(HEADER + TAG).max(1));
        let mut buf = match driver.alloc_tx_buffer(len) {
            Err(DevError::NoMemory) => return Ok(()),
            result => result?,
        };
        buf.packet_mut()
            .copy_from_slice(&frame(self.transmitted, len));
        match self.send(driver, buf) {
            Err(DevError::Again) => Ok(()),
            result => result,
        }
    }

    fn step<const QUEUE: usize>(
        &mut self,
        driver: &mut Driver<QUEUE>,
        choices: &mut Choices,
    ) -> DevResult {
        self.bench.scribble(choices);
        match choices.below(16) {
            0 => {
                self.bench.board().run();
                Ok(())
            }
            1 => driver.acknowledge_interrupt().map(drop),
            2 => driver.enable_interrupts().map(drop),
            3 => driver.disable_interrupts(),
            4 => driver.recycle_tx_buffers(),
            5 => {
                self.nic.set_link(choices.one_in(2));
                self.nic.set_link(true);
                driver.configuration_changed()
            }
            6 => {
                if let Some(buf) = self.held.pop() {
                    assert!(
                        buf.packet().iter().all(|&byte| byte == 0xee),
                        "a frame in the caller's hands was written to"
                    );
                    return driver.recycle_rx_buffer(buf);
                }
                Ok(())
            }
            7..=10 => self.transmit(driver, choices),
            _ => {
                if choices.one_in(2) {
                    let most = driver.capabilities().max_frame_len.min(1514);
                    let len =
                        HEADER + TAG + choices.below(most.saturating_sub(HEADER + TAG).max(1));
                    self.nic.inject(&frame(self.injected, len));
                    self.injected += 1;
                }
                self.receive(driver, choices)
            }
        }
    }
}

/// Drives a hostile NIC with queues of `QUEUE` frames as `choices` say, for at most `steps` steps.
pub fn run<const QUEUE: usize>(choices: &mut Choices, hostile: Hostile, steps: usize) -> Count {
    let mut nic = Nic::new([0x02, 0, 0, 0, 0, 1]);
    if choices.one_in(4) {
        nic = nic.mtu(68 + choices.word() % 9200);
    }
    if choices.one_in(4) {
        nic = nic.without_mac();
    }
    if choices.one_in(4) {
        nic = nic.without_status();
    }
    let bench = Bench::new(
        DeviceType::Net,
        Device::from(&nic),
        hostile,
        MEMORY,
        choices,
    );
    let mut run = Run {
        bench,
        nic,
        injected: 0,
        received: HashSet::new(),
        transmitted: 0,
        arrived: 0,
        held: Vec::new(),
        count: Count::default(),
    };
    if let Some(mut driver) = run.driver::<QUEUE>() {
        for _ in 0..steps {
            if choices.is_over() || run.bench.is_worn_out() {
                break;
            }
            let result = run.step(&mut driver, choices);
            run.look();
            if result == Err(DevError::BadState) {
                run.count.resets += 1;
                if driver.reset().is_err() && driver.reset().is_err() {
                    break;
                }
            }
        }
        // The caller may hold buffers for longer than the driver lives.
        drop(driver);
    }
    run.held.clear();
    run.count.faults = run.bench.faults();
    run.count.stuck = run.bench.stuck();
    run.bench.finish();
    run.count
}
