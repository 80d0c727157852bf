//! QEMU's monitor: what can be asked of a machine that runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::Result;
use crate::boards::Board;
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

    /// Waits for an event that names `what`. One that came while a command was executed is gone.
    ///
    /// # Errors
    ///
    /// It does not come.
    pub(crate) fn wait_for_event(&mut self, event: &str, what: &str) -> Result {
        let (event, what) = (format!(r#""event": "{event}""#), format!(r#""{what}""#));
        let mut line = String::new();
        while !(line.contains(&event) && line.contains(&what)) {
            line.clear();
            if self.lines.read_line(&mut line)? == 0 {
                return Err("QEMU's monitor is gone".into());
            }
        }
        Ok(())
    }

    /// Makes the disk larger, to a size in bytes.
    ///
    /// # Errors
    ///
    /// QEMU refuses.
    pub(crate) fn resize_disk(&mut self, size: u64) -> Result {
        self.execute(&format!(
            r#"{{"execute":"block_resize","arguments":{{"device":"disk0","size":{size}}}}}"#
        ))?;
        Ok(())
    }

    /// Returns the paths of the parts of the machine that are of a type, in the order of their making.
    ///
    /// # Errors
    ///
    /// QEMU refuses.
    pub(crate) fn parts(&mut self, kind: &str) -> Result<Vec<String>> {
        let folder = "/machine/unattached";
        let answer = self.execute(&format!(
            r#"{{"execute":"qom-list","arguments":{{"path":"{folder}"}}}}"#
        ))?;
        // {"name": "device[5]", "type": "child<isa-i8259>"}
        let kind = format!(r#""type": "child<{kind}>""#);
        let mut numbers: Vec<u32> = answer
            .split('}')
            .filter(|row| row.contains(&kind))
            .filter_map(|row| row.split_once("device[")?.1.split_once(']')?.0.parse().ok())
            .collect();
        numbers.sort_unstable();
        let path = |number| format!("{folder}/device[{number}]");
        Ok(numbers.into_iter().map(path).collect())
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

/// QEMU's qtest server: the machine's wires.
pub(crate) struct Wires {
    lines: BufReader<UnixStream>,
    /// The interrupt controllers.
    controllers: Vec<String>,
    /// The line that is the first controller's first input, and how many inputs each has.
    first: u32,
    inputs: u32,
}

impl Wires {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody listens at `socket`.
    pub(crate) fn connect(socket: &Path, board: &Board, monitor: &mut Monitor) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (kind, first, inputs) = board.controllers;
        Ok(Self {
            lines: BufReader::new(stream),
            controllers: monitor.parts(kind)?,
            first,
            inputs,
        })
    }

    /// Sets the level of an interrupt line.
    ///
    /// # Errors
    ///
    /// There is no such line, or QEMU is gone.
    pub(crate) fn set_line(&mut self, line: u32, high: bool) -> Result {
        let input = line.checked_sub(self.first).ok_or("no such line")?;
        let controller = self.controllers.get((input / self.inputs) as usize);
        let controller = controller.ok_or("no such line")?;
        let (input, level) = (input % self.inputs, u8::from(high));
        writeln!(
            self.lines.get_mut(),
            "set_irq_in {controller} unnamed-gpio-in {input} {level}"
        )?;
        let mut answer = String::new();
        self.lines.read_line(&mut answer)?;
        if answer.trim_end() == "OK" {
            Ok(())
        } else {
            Err(format!("line {line}: QEMU says `{}`", answer.trim_end()).into())
        }
    }
}
