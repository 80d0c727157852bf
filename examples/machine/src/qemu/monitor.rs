//! A monitor on a head of QEMU's display, which tells it what size to have.
//!
//! QEMU takes such wishes from a display front end. This is the least of one: a client of its VNC server, which speaks the
//! Remote Framebuffer Protocol 3.8 (RFC 6143), with the extension ExtendedDesktopSize of the RFB community's wiki.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::QemuError;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// What both sides say first.
const VERSION: &[u8; 12] = b"RFB 003.008\n";
/// The type of security that is none.
const SECURITY_NONE: u8 = 1;
/// Messages of the client.
const SET_ENCODINGS: u8 = 2;
const SET_DESKTOP_SIZE: u8 = 251;
/// A message of the server, and the only encoding in it that is asked for.
const FRAMEBUFFER_UPDATE: u8 = 0;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
/// Whose wish a new size was, in its x: this client's.
const REASON_CLIENT: u16 = 1;
/// What became of a wish, in its y: it was done, or passed on.
const FULFILLED: u16 = 0;
const FORWARDED: u16 = 4;

/// A monitor, plugged into a head of a display until it is dropped.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
}

impl Monitor {
    /// Says hello to the VNC server at the other end of `stream`.
    pub(super) fn new(stream: UnixStream) -> Result<Self, QemuError> {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut monitor = Self { stream };
        if monitor.read::<12>()? != *VERSION {
            return Err(strange("another version"));
        }
        monitor.write(VERSION)?;
        let [count] = monitor.read()?;
        let mut types = vec![0; count.into()];
        monitor.fill(&mut types)?;
        if !types.contains(&SECURITY_NONE) {
            return Err(strange("no way in without a password"));
        }
        monitor.write(&[SECURITY_NONE])?;
        if monitor.read::<4>()? != [0; 4] {
            return Err(strange("a refusal"));
        }
        // ClientInit: others may watch as well. ServerInit: width, height, pixel format, and a name.
        monitor.write(&[1])?;
        monitor.read::<20>()?;
        let length = u32::from_be_bytes(monitor.read()?);
        monitor.skip(u64::from(length))?;
        let mut encodings = vec![SET_ENCODINGS, 0, 0, 1];
        encodings.extend(EXTENDED_DESKTOP_SIZE.to_be_bytes());
        monitor.write(&encodings)?;
        Ok(monitor)
    }

    /// Tells the head to be of this size, in pixels; 0 by 0 switches it off. When this returns, the device knows.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Command`]: the head does not take a size.
    /// * [`QemuError::Gone`], [`QemuError::Silent`], [`QemuError::Protocol`]: no answer, or none that is of the protocol.
    pub fn resize(&mut self, width: u16, height: u16) -> Result<(), QemuError> {
        let [w, h] = [width, height].map(u16::to_be_bytes);
        // One screen, number 0, that covers the whole.
        let mut message = vec![SET_DESKTOP_SIZE, 0, w[0], w[1], h[0], h[1], 1, 0];
        message.extend([0; 8]);
        message.extend([w, h].as_flattened());
        message.extend([0; 4]);
        self.write(&message)?;
        loop {
            let (reason, status) = self.next_size()?;
            match (reason, status) {
                (REASON_CLIENT, FULFILLED | FORWARDED) => return Ok(()),
                (REASON_CLIENT, status) => {
                    return Err(QemuError::Command {
                        command: "SetDesktopSize".to_owned(),
                        message: format!("status {status}"),
                    });
                }
                // News of a size that another one wished for.
                _ => {}
            }
        }
    }

    /// Reads up to the next rectangle that tells a size, and returns whose wish that was and what became of it.
    fn next_size(&mut self) -> Result<(u16, u16), QemuError> {
        let [kind, _, high, low] = self.read()?;
        if (kind, high, low) != (FRAMEBUFFER_UPDATE, 0, 1) {
            return Err(strange("what was not asked for"));
        }
        let [x0, x1, y0, y1, _, _, _, _, e0, e1, e2, e3] = self.read()?;
        if i32::from_be_bytes([e0, e1, e2, e3]) != EXTENDED_DESKTOP_SIZE {
            return Err(strange("an encoding that was not asked for"));
        }
        let [screens, _, _, _] = self.read()?;
        self.skip(16 * u64::from(screens))?;
        Ok((u16::from_be_bytes([x0, x1]), u16::from_be_bytes([y0, y1])))
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N], QemuError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), QemuError> {
        self.stream.read_exact(bytes).map_err(|error| lost(&error))
    }

    fn skip(&mut self, length: u64) -> Result<(), QemuError> {
        let skipped = io::copy(&mut (&self.stream).take(length), &mut io::sink())
            .map_err(|error| lost(&error))?;
        if skipped < length {
            return Err(lost(&io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), QemuError> {
        self.stream.write_all(bytes).map_err(|error| lost(&error))
    }
}

fn strange(what: &str) -> QemuError {
    QemuError::Protocol {
        message: format!("{what} from the VNC server"),
    }
}

fn lost(error: &io::Error) -> QemuError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QemuError::Silent {
            waiting_for: "the VNC server".to_owned(),
            limit: LIMIT,
        },
        _ => QemuError::Gone {
            message: String::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What a server says before it is told anything, in order.
    fn hello() -> Vec<u8> {
        let mut hello = VERSION.to_vec();
        hello.extend([1, SECURITY_NONE]);
        hello.extend([0; 4]);
        hello.extend([0; 20]);
        hello.extend([0, 0, 0, 4]);
        hello.extend(b"QEMU");
        hello
    }

    fn size(reason: u8, status: u8) -> Vec<u8> {
        let mut update = vec![0, 0, 0, 1, 0, reason, 0, status, 0, 9, 0, 9];
        update.extend(EXTENDED_DESKTOP_SIZE.to_be_bytes());
        update.extend([1, 0, 0, 0]);
        update.extend([0; 16]);
        update
    }

    /// A monitor at a server that says this, and what it says itself.
    fn at(said: Vec<u8>) -> (Result<Monitor, QemuError>, thread::JoinHandle<Vec<u8>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            theirs.write_all(&said).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            theirs.read_to_end(&mut heard).unwrap();
            heard
        });
        (Monitor::new(ours), server)
    }

    #[test]
    fn a_wish_for_a_size_is_told_and_its_answer_awaited() {
        let said = [hello(), size(0, 0), size(1, 4), size(1, 3)].concat();
        let (monitor, server) = at(said);
        let mut monitor = monitor.unwrap();
        monitor.resize(0x123, 0x45).unwrap();
        assert!(matches!(
            monitor.resize(1, 1),
            Err(QemuError::Command { .. })
        ));
        assert!(matches!(monitor.resize(1, 1), Err(QemuError::Gone { .. })));
        drop(monitor);
        let heard = server.join().unwrap();
        let hello = [&VERSION[..], &[1, 1, 2, 0, 0, 1, 0xff, 0xff, 0xfe, 0xcc]].concat();
        assert_eq!(heard[..hello.len()], hello);
        assert_eq!(
            heard[hello.len()..][..24],
            [
                251, 0, 1, 0x23, 0, 0x45, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0x23, 0, 0x45, 0, 0, 0,
                0
            ]
        );
    }

    #[test]
    fn a_server_that_is_another_one_is_refused() {
        let password = [&VERSION[..], &[1, 2]].concat();
        let too_much = [hello(), vec![0, 0, 0, 2]].concat();
        for said in [b"RFB 004.000\n".to_vec(), password, VERSION[..5].to_vec()] {
            assert!(at(said).0.is_err());
        }
        let mut monitor = at(too_much).0.unwrap();
        assert!(matches!(
            monitor.resize(1, 1),
            Err(QemuError::Protocol { .. })
        ));
    }
}
