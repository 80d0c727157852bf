//! What is done to a machine while the kernel runs on it, which the kernel must survive.

use crate::boards::Board;
use crate::monitor::Monitor;
use crate::qemu::Qemu;
use crate::{Result, image};

/// A fault of a machine's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// The disk does not answer a request.
    UnansweredRequest,
    /// Interrupt lines are high though no device has raised them.
    StrayInterrupts,
    /// A disk is pulled from its slot.
    PulledCard,
    /// Devices do not see the processor's caches, as the device tree has it.
    NotCoherent,
}

impl Fault {
    /// All of them.
    pub(crate) const ALL: &[Self] = &[
        Self::UnansweredRequest,
        Self::StrayInterrupts,
        Self::PulledCard,
        Self::NotCoherent,
    ];

    /// What a test with this fault is called.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::UnansweredRequest => "unanswered request",
            Self::StrayInterrupts => "stray interrupts",
            Self::PulledCard => "pulled card",
            Self::NotCoherent => "no coherent caches",
        }
    }

    /// Whether it can happen to a board.
    pub(crate) const fn befalls(self, board: &Board) -> bool {
        match self {
            Self::UnansweredRequest | Self::StrayInterrupts => true,
            Self::PulledCard => board.pci,
            Self::NotCoherent => board.dma_coherent,
        }
    }

    /// The property that is taken from the device tree.
    pub(crate) fn missing_property(self) -> Option<&'static str> {
        (self == Self::NotCoherent).then_some("dma-coherent")
    }

    /// The kernel's command line, which has it ask for the fault.
    pub(crate) const fn command_line(self) -> &'static str {
        match self {
            Self::UnansweredRequest => "unanswered-request",
            Self::StrayInterrupts => "stray-interrupts",
            Self::PulledCard => "pulled-card",
            Self::NotCoherent => "",
        }
    }

    /// Does to the machine what the kernel asks for.
    ///
    /// # Errors
    ///
    /// It does not ask, or QEMU refuses.
    pub(crate) fn inflict(self, board: &Board, qemu: &mut Qemu, monitor: &mut Monitor) -> Result {
        match self {
            Self::UnansweredRequest => {
                // A byte in a second. The first request is still answered at once.
                qemu.wait_for("answer it no more")?;
                throttle(monitor, 1)?;
                qemu.wait_for("answer it again")?;
                throttle(monitor, 0)
            }
            Self::StrayInterrupts => {
                let mut wires = qemu.wires(board, monitor)?;
                let lines = numbers(&qemu.wait_for("lines: ")?);
                for (line, size) in lines.into_iter().zip((image::SIZE..).step_by(512).skip(1)) {
                    qemu.wait_for(&format!("line {line}: raise it"))?;
                    wires.set_line(line, true)?;
                    qemu.wait_for("stray, lower it")?;
                    // The first is held until it is masked, if it interrupts as long as it is held.
                    if board.level && size == image::SIZE + 512 && qemu.expect(MASKED).is_err() {
                        qemu.wait_for(MASKED)?;
                    }
                    wires.set_line(line, false)?;
                    monitor.resize_disk(size)?;
                }
                Ok(())
            }
            Self::PulledCard => {
                qemu.wait_for("pull it")?;
                monitor.execute(r#"{"execute":"device_del","arguments":{"id":"card"}}"#)?;
                monitor.wait_for_event("DEVICE_DELETED", "card")
            }
            Self::NotCoherent => Ok(()),
        }
    }

    /// Checks what the kernel has said, which has come to its end.
    ///
    /// # Errors
    ///
    /// It is not what it should be.
    pub(crate) fn check(self, board: &Board, qemu: &Qemu) -> Result {
        let numbers_in = |text| {
            let line = qemu.said().iter().rev().find(|line| line.contains(text));
            line.map(|line| numbers(line)).unwrap_or_default()
        };
        match self {
            Self::UnansweredRequest => qemu.expect("lost, and what was written before is there"),
            Self::StrayInterrupts => {
                let raised = numbers_in("lines: ").len();
                let stray = numbers_in(" stray, ")
                    .get(1)
                    .map_or(0, |&stray| stray as usize);
                let expected = if board.level {
                    raised + 999..=usize::MAX
                } else {
                    raised..=raised
                };
                if raised < 2 || !expected.contains(&stray) {
                    return Err(format!("{stray} stray interrupts of {raised} lines").into());
                }
                Ok(())
            }
            Self::PulledCard => qemu.expect("gone, and its driver with it"),
            Self::NotCoherent => {
                let first = |text| numbers_in(text).first().map_or(0, |&count| count);
                let flushes = first("devices do not see the caches");
                // Two for a request that reads, which most do, and one for one that writes.
                if 2 * flushes < 3 * first(" stray, ").max(1) {
                    return Err("the caches were not flushed for each request".into());
                }
                Ok(())
            }
        }
    }
}

/// What the kernel says of a line that has interrupted for nobody all too often.
const MASKED: &str = "1000 interrupts in a row were nobody's";

/// Returns the numbers in a line of the console's.
fn numbers(line: &str) -> Vec<u32> {
    line.split(|character: char| !character.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Lets the disk move so many bytes in a second, or as many as it can for 0.
fn throttle(monitor: &mut Monitor, bytes: u32) -> Result {
    monitor.execute(&format!(
        r#"{{"execute":"block_set_io_throttle","arguments":{{"device":"disk0","bps":{bytes},"bps_rd":0,"bps_wr":0,"iops":0,"iops_rd":0,"iops_wr":0}}}}"#
    ))?;
    Ok(())
}
