//! QEMU's monitor: what can be asked of a machine that runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::Result;
use crate::qemu::PATIENCE;

/// QEMU's monitor (QMP): a line of JSON each way.
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody listens at `socket`.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        monitor.execute(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(monitor)
    }

    /// Executes a command and returns the line that answers it.
    ///
    /// # Errors
    ///
    /// QEMU refuses, or is gone.
    pub(crate) fn execute(&mut self, command: &str) -> Result<String> {
        writeln!(self.lines.get_mut(), "{command}")?;
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                return Err("QEMU's monitor is gone".into());
            }
            // Beside answers there are greetings and events.
            if line.starts_with(r#"{"return""#) {
                return Ok(line);
            }
            if line.starts_with(r#"{"error""#) {
                return Err(format!("{command}: {line}").into());
            }
        }
    }

    /// Returns the port of the host that leads to the kernel's echo server.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) fn echo_port(&mut self) -> Result<u16> {
        let answer = self.execute(
            r#"{"execute":"human-monitor-command","arguments":{"command-line":"info usernet"}}"#,
        )?;
        // TCP[HOST_FORWARD]  12  127.0.0.1  43210  10.0.2.15  7  0  0
        let row = answer
            .split("TCP[HOST_FORWARD]")
            .nth(1)
            .ok_or("no forwarded port")?;
        Ok(row
            .split_whitespace()
            .nth(2)
            .ok_or("no forwarded port")?
            .parse()?)
    }
}
