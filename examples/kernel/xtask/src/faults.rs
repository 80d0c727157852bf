//! What is done to a machine while the kernel runs on it, which the kernel must survive.

use crate::Result;
use crate::monitor::Monitor;
use crate::qemu::Qemu;

/// A fault of a machine's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// The disk does not answer a request.
    UnansweredRequest,
}

impl Fault {
    /// All of them.
    pub(crate) const ALL: &[Self] = &[Self::UnansweredRequest];

    /// What a test with this fault is called.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::UnansweredRequest => "unanswered request",
        }
    }

    /// The kernel's command line, which has it ask for the fault.
    pub(crate) const fn command_line(self) -> &'static str {
        match self {
            Self::UnansweredRequest => "unanswered-request",
        }
    }

    /// Does to the machine what the kernel asks for.
    ///
    /// # Errors
    ///
    /// It does not ask, or QEMU refuses.
    pub(crate) fn inflict(self, qemu: &mut Qemu, monitor: &mut Monitor) -> Result {
        match self {
            Self::UnansweredRequest => {
                // A byte in a second. The first request is still answered at once.
                qemu.wait_for("answer it no more")?;
                throttle(monitor, 1)?;
                qemu.wait_for("answer it again")?;
                throttle(monitor, 0)
            }
        }
    }

    /// Checks what the kernel has said, which has come to its end.
    ///
    /// # Errors
    ///
    /// It is not what it should be.
    pub(crate) fn check(self, qemu: &Qemu) -> Result {
        match self {
            Self::UnansweredRequest => qemu.expect("lost, and what was written before is there"),
        }
    }
}

/// Lets the disk move so many bytes in a second, or as many as it can for 0.
fn throttle(monitor: &mut Monitor, bytes: u32) -> Result {
    monitor.execute(&format!(
        r#"{{"execute":"block_set_io_throttle","arguments":{{"device":"disk0","bps":{bytes},"bps_rd":0,"bps_wr":0,"iops":0,"iops_rd":0,"iops_wr":0}}}}"#
    ))?;
    Ok(())
}
