//! QEMU's qtest protocol: register accesses and interrupt lines of a machine whose processor stands still.
//!
//! One line of text a command, `readl 0x1000`, and one line in answer, `OK 0x2a`; lines that tell of
//! an interrupt (`IRQ raise 48`) may come before it. See `qtest.c` of QEMU for the commands.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::QemuError;

/// How long an answer may take. A register access that starts disk I/O comes back before the I/O
/// is done, so this is only met by a QEMU that is stopped or stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// The longest line that is taken for an answer, in bytes.
const MAX_LINE: usize = 4096;

/// A level-triggered interrupt line, as QEMU told of it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct InterruptLine {
    /// Whether the line is asserted.
    pub asserted: bool,
    /// How often it went from not asserted to asserted.
    pub raised: u64,
}

/// A connection to QEMU's qtest server.
#[derive(Debug)]
pub struct Qtest {
    stream: UnixStream,
    /// What was received and is not yet a whole line.
    received: Vec<u8>,
    command: String,
    lines: BTreeMap<u32, InterruptLine>,
    commands: u64,
}

impl Qtest {
    /// Speaks qtest over `stream`.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Host`]: the socket takes no time limit.
    pub fn new(stream: UnixStream) -> Result<Self, QemuError> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self {
            stream,
            received: Vec::new(),
            command: String::new(),
            lines: BTreeMap::new(),
            commands: 0,
        })
    }

    /// Reads `width` bytes (1, 2, 4 or 8) of the guest-physical address space, in little-endian order.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Options`]: `width` is none of these.
    /// * [`QemuError::Gone`], [`QemuError::Silent`], [`QemuError::Protocol`], [`QemuError::Command`]:
    ///   no answer, or none that says a value.
    pub fn read(&mut self, address: u64, width: u8) -> Result<u64, QemuError> {
        let letter = letter_of(width)?;
        self.command(format_args!("read{letter} {address:#x}"))?
            .ok_or_else(|| QemuError::Protocol {
                message: format!("no value at {address:#x}"),
            })
    }

    /// Writes the low `width` bytes (1, 2, 4 or 8) of `value` to the guest-physical address space.
    ///
    /// # Errors
    ///
    /// As those of [`read`](Self::read).
    pub fn write(&mut self, address: u64, width: u8, value: u64) -> Result<(), QemuError> {
        let letter = letter_of(width)?;
        let value = value & (u64::MAX >> (64 - 8 * u32::from(width)));
        self.command(format_args!("write{letter} {address:#x} {value:#x}"))?;
        Ok(())
    }

    /// Writes 4 bytes to an I/O port (x86 only).
    ///
    /// # Errors
    ///
    /// As those of [`read`](Self::read).
    pub fn write_port(&mut self, port: u16, value: u32) -> Result<(), QemuError> {
        self.command(format_args!("outl {port:#x} {value:#x}"))?;
        Ok(())
    }

    /// Asks for news of the interrupt lines that go into the device at `path` of QEMU's object tree.
    ///
    /// From then on the device itself gets no interrupts. One device can be chosen in a machine's life.
    ///
    /// # Errors
    ///
    /// As those of [`read`](Self::read); [`QemuError::Command`] if there is no such device.
    pub fn intercept_interrupts(&mut self, path: &str) -> Result<(), QemuError> {
        self.command(format_args!("irq_intercept_in {path}"))?;
        Ok(())
    }

    /// Returns the state of an interrupt line, by its number at the intercepted device, after
    /// taking in what QEMU has said up to now.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Gone`]: QEMU has ended.
    pub fn interrupt_line(&mut self, number: u32) -> Result<InterruptLine, QemuError> {
        self.take_in()?;
        Ok(self.lines.get(&number).copied().unwrap_or_default())
    }

    /// Returns a handle on which there is something to read when QEMU says something, to wait with.
    pub(super) fn listener(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Returns how many commands were sent.
    pub fn commands(&self) -> u64 {
        self.commands
    }

    /// Sends one command and returns the value of its answer, if it has one.
    fn command(&mut self, command: std::fmt::Arguments<'_>) -> Result<Option<u64>, QemuError> {
        self.command.clear();
        // Formatting into a string fails only if a `Display` does, and those of numbers do not.
        let _ = writeln!(self.command, "{command}");
        self.commands += 1;
        self.stream
            .write_all(self.command.as_bytes())
            .map_err(|error| self.lost(&error))?;
        loop {
            let line = self.next_line()?;
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("IRQ") => self.note_interrupt(&line),
                Some("OK") => return words.next().map(parse_value).transpose(),
                Some("FAIL") | Some("ERR") => {
                    return Err(QemuError::Command {
                        command: self.command.trim_end().to_owned(),
                        message: line,
                    });
                }
                _ => return Err(QemuError::Protocol { message: line }),
            }
        }
    }

    /// Takes in what QEMU has said of interrupts, without waiting for more.
    fn take_in(&mut self) -> Result<(), QemuError> {
        loop {
            while let Some(line) = self.buffered_line() {
                self.note_interrupt(&line);
            }
            if !has_something(&self.stream, Duration::ZERO) {
                return Ok(());
            }
            self.receive()?;
        }
    }

    fn note_interrupt(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let (Some("IRQ"), Some(change), Some(Ok(number))) = (
            words.next(),
            words.next(),
            words.next().map(str::parse::<u32>),
        ) else {
            return;
        };
        let state = self.lines.entry(number).or_default();
        let asserted = change == "raise";
        state.raised += u64::from(asserted && !state.asserted);
        state.asserted = asserted;
    }

    /// Returns the next line, received already or yet to come.
    fn next_line(&mut self) -> Result<String, QemuError> {
        loop {
            if let Some(line) = self.buffered_line() {
                return Ok(line);
            }
            self.receive()?;
        }
    }

    fn buffered_line(&mut self) -> Option<String> {
        let end = self.received.iter().position(|&byte| byte == b'\n')?;
        let line = String::from_utf8_lossy(&self.received[..end])
            .trim_end()
            .to_owned();
        self.received.drain(..=end);
        Some(line)
    }

    /// Waits for more from QEMU.
    fn receive(&mut self) -> Result<(), QemuError> {
        if self.received.len() > MAX_LINE {
            return Err(QemuError::Protocol {
                message: "a line without an end".to_owned(),
            });
        }
        let mut chunk = [0; 512];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(QemuError::Gone {
                message: String::new(),
            }),
            Ok(length) => {
                self.received.extend_from_slice(&chunk[..length]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.lost(&error)),
        }
    }

    fn lost(&self, error: &io::Error) -> QemuError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QemuError::Silent {
                waiting_for: format!("the answer to `{}`", self.command.trim_end()),
                limit: ANSWER_LIMIT,
            },
            _ => QemuError::Gone {
                message: String::new(),
            },
        }
    }
}

/// Waits until there is something to read, or the end of the connection, at most `limit`. Returns whether there is.
pub(super) fn has_something(stream: &UnixStream, limit: Duration) -> bool {
    let timeout = Timespec::try_from(limit).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    let mut files = [PollFd::new(stream, PollFlags::IN)];
    // An interrupted wait has found nothing; whoever waits looks at the time, and waits again.
    poll(&mut files, Some(&timeout)).is_ok_and(|count| count > 0)
}

fn letter_of(width: u8) -> Result<char, QemuError> {
    match width {
        1 => Ok('b'),
        2 => Ok('w'),
        4 => Ok('l'),
        8 => Ok('q'),
        _ => Err(QemuError::Options {
            message: format!("a register access is 1, 2, 4 or 8 bytes wide, not {width}"),
        }),
    }
}

fn parse_value(word: &str) -> Result<u64, QemuError> {
    word.strip_prefix("0x")
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| QemuError::Protocol {
            message: format!("{word} for a value"),
        })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    /// A server that gives `answers` in turn, and returns the commands that it got.
    fn server(answers: &'static [&'static str]) -> (Qtest, thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let handle = thread::spawn(move || {
            let mut commands = Vec::new();
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            for answer in answers {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                commands.push(line.trim_end().to_owned());
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
            commands
        });
        (Qtest::new(ours).unwrap(), handle)
    }

    #[test]
    fn a_register_is_read_and_written_by_its_width() {
        let (mut qtest, handle) = server(&["OK 0x00000000000000ff\n", "OK\n"]);
        assert_eq!(qtest.read(0xa00_0000, 1).unwrap(), 0xff);
        qtest.write(0xa00_0070, 2, 0xffff_1234).unwrap();
        assert_eq!(
            handle.join().unwrap(),
            ["readb 0xa000000", "writew 0xa000070 0x1234"]
        );
    }

    #[test]
    fn interrupts_told_before_an_answer_are_kept() {
        let (mut qtest, handle) =
            server(&["IRQ raise 47\nIRQ raise 47\nOK 0x1\n", "OK\nIRQ lower 47\n"]);
        assert_eq!(qtest.read(0, 4).unwrap(), 1);
        assert_eq!(
            qtest.interrupt_line(47).unwrap(),
            InterruptLine {
                asserted: true,
                raised: 1
            }
        );
        qtest.write(0, 4, 0).unwrap();
        handle.join().unwrap();
        // The server has gone, but what it said before counts, and then the end is an error.
        assert!(matches!(
            qtest.interrupt_line(3),
            Err(QemuError::Gone { .. })
        ));
        assert!(!qtest.lines[&47].asserted);
    }

    #[test]
    fn a_refused_command_names_itself() {
        let (mut qtest, _handle) = server(&["FAIL Unknown command\n"]);
        let error = qtest.read(0x10, 4).unwrap_err();
        assert!(error.to_string().contains("readl 0x10"), "{error}");
    }

    #[test]
    fn a_server_that_goes_away_is_told_from_one_that_is_silent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut qtest = Qtest::new(ours).unwrap();
        assert!(matches!(qtest.read(0, 4), Err(QemuError::Gone { .. })));

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut qtest = Qtest::new(ours).unwrap();
        qtest
            .stream
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        assert!(matches!(qtest.read(0, 4), Err(QemuError::Silent { .. })));
    }
}
