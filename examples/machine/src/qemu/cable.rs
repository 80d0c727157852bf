//! The other end of a NIC's cable: chosen Ethernet frames into QEMU's NIC, and those that it sends.
//!
//! This is QEMU's `-netdev socket` over a stream: each frame after its length, 4 bytes in network
//! order, and no frame check sequence.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The longest frame that QEMU sends or takes, in bytes (`NET_BUFSIZE` in QEMU).
pub const MAX_FRAME: usize = 4096 + 65536;

/// The length before each frame, in bytes.
const PREFIX: usize = 4;

/// The far end of a cable to a NIC in QEMU.
///
/// Nothing here waits unless it says so: a NIC that takes no frames makes
/// [`try_send`](Self::try_send) say that there is no room, and nothing is lost on the way.
#[derive(Debug)]
pub struct Cable {
    stream: UnixStream,
    /// The rest of a frame that the socket has taken a part of.
    outgoing: Vec<u8>,
    /// What has come and is not yet a whole frame.
    incoming: Vec<u8>,
    closed: bool,
}

impl Cable {
    /// Makes a cable, and gives the end that is for QEMU.
    ///
    /// # Errors
    ///
    /// The operating system has no more sockets.
    pub fn new() -> io::Result<(Self, UnixStream)> {
        let (stream, far) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let cable = Self {
            stream,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            closed: false,
        };
        Ok((cable, far))
    }

    /// Sends a frame, if there is room on the cable. `false`: there is none yet, and nothing was sent.
    ///
    /// A part of it may wait here until the next call of any method.
    ///
    /// # Errors
    ///
    /// * [`io::ErrorKind::InvalidInput`]: the frame is longer than [`MAX_FRAME`]. Nothing is sent.
    /// * [`io::ErrorKind::BrokenPipe`]: QEMU has ended.
    pub fn try_send(&mut self, frame: &[u8]) -> io::Result<bool> {
        let length = u32::try_from(frame.len())
            .ok()
            .filter(|_| frame.len() <= MAX_FRAME)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if !self.push_out()? {
            return Ok(false);
        }
        self.outgoing.extend_from_slice(&length.to_be_bytes());
        self.outgoing.extend_from_slice(frame);
        self.push_out()?;
        Ok(true)
    }

    /// Sends a frame, waiting for room at most `limit`, and until all of it is on its way.
    ///
    /// # Errors
    ///
    /// As those of [`try_send`](Self::try_send), and [`io::ErrorKind::TimedOut`]: no room. Nothing is sent.
    pub fn send(&mut self, frame: &[u8], limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        while !self.try_send(frame)? {
            self.wait(PollFlags::OUT, end)?;
        }
        while !self.push_out()? {
            match self.wait(PollFlags::OUT, end) {
                // The frame is taken: its rest goes with what comes after.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => break,
                result => result?,
            }
        }
        Ok(())
    }

    /// Returns the next frame that the NIC has sent, if one has come.
    ///
    /// # Errors
    ///
    /// * [`io::ErrorKind::UnexpectedEof`]: QEMU has ended, and every frame before was returned.
    /// * [`io::ErrorKind::InvalidData`]: a length beyond [`MAX_FRAME`].
    pub fn try_receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(frame) = self.buffered_frame()? {
                return Ok(Some(frame));
            }
            if self.closed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What is left of a frame of ours may have been waiting for room.
            let _ = self.push_out();
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => self.closed = true,
                Ok(length) => self.incoming.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.closed = true,
            }
        }
    }

    /// Returns the next frame that the NIC sends, waiting at most `limit`.
    ///
    /// # Errors
    ///
    /// As those of [`try_receive`](Self::try_receive), and [`io::ErrorKind::TimedOut`]: none came.
    pub fn receive(&mut self, limit: Duration) -> io::Result<Vec<u8>> {
        let end = Instant::now() + limit;
        loop {
            if let Some(frame) = self.try_receive()? {
                return Ok(frame);
            }
            self.wait(PollFlags::IN, end)?;
        }
    }

    /// Writes what is left of a frame. Returns whether nothing is left.
    fn push_out(&mut self) -> io::Result<bool> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(length) => {
                    self.outgoing.drain(..length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn buffered_frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some((prefix, rest)) = self.incoming.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*prefix))
            .ok()
            .filter(|&length| length <= MAX_FRAME)
            .ok_or(io::ErrorKind::InvalidData)?;
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = frame.to_vec();
        self.incoming.drain(..PREFIX + length);
        Ok(Some(frame))
    }

    fn wait(&self, event: PollFlags, end: Instant) -> io::Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut files = [PollFd::new(&self.stream, event)];
        match poll(&mut files, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn frames_keep_their_bounds_in_both_directions() {
        let (mut cable, far) = Cable::new().unwrap();
        cable.send(b"first", SOON).unwrap();
        cable.send(b"", SOON).unwrap();
        let mut bytes = [0; 13];
        (&far).read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"\0\0\0\x05first\0\0\0\0");

        (&far).write_all(b"\0\0\0\x03one\0\0\0\x03tw").unwrap();
        assert_eq!(cable.receive(SOON).unwrap(), b"one");
        assert_eq!(cable.try_receive().unwrap(), None);
        (&far).write_all(b"o").unwrap();
        assert_eq!(cable.receive(SOON).unwrap(), b"two");
    }

    #[test]
    fn a_full_cable_takes_no_frame_and_loses_none() {
        let (mut cable, far) = Cable::new().unwrap();
        let frame = [7; 60_000];
        let mut sent = 0;
        while cable.try_send(&frame).unwrap() {
            sent += 1;
        }
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            (&far).read_to_end(&mut received).unwrap();
            received.len()
        });
        while !cable.push_out().unwrap() {
            std::thread::yield_now();
        }
        drop(cable);
        assert_eq!(reader.join().unwrap(), sent * (PREFIX + frame.len()));
    }

    #[test]
    fn a_frame_that_is_sent_is_on_its_way_to_the_last_byte() {
        let (mut cable, far) = Cable::new().unwrap();
        let frame = [7; 60_000];
        while cable.try_send(&frame).unwrap() {}
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            (&far).read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        cable.send(&[1; 60_000], SOON).unwrap();
        assert!(cable.outgoing.is_empty());
        drop(cable);
        assert_eq!(reader.join().unwrap() % (PREFIX + frame.len()), 0);
    }

    #[test]
    fn a_frame_too_long_and_a_cable_cut_are_errors() {
        let (mut cable, far) = Cable::new().unwrap();
        let error = cable.try_send(&vec![0; MAX_FRAME + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        (&far).write_all(b"\0\0\0\x01x").unwrap();
        drop(far);
        assert_eq!(cable.receive(SOON).unwrap(), b"x");
        let error = cable.receive(SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_length_that_no_frame_has_is_an_error() {
        let (mut cable, far) = Cable::new().unwrap();
        (&far).write_all(&[0xff; 4]).unwrap();
        let error = cable.receive(SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
