//! The other end of a display: the size that it asks its driver for, and the pictures that its back end shows.
//!
//! The protocol is QEMU's ("Vhost-user-gpu Protocol" in its documentation): over a socket of its own the back end makes
//! requests, each of its number, flags and the size of the payload, 32 bits each in the byte order of the machine.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Image;

/// VirtIO 1.3, 5.7.4: the most heads.
pub(super) const HEADS: u32 = 16;

/// The most bytes that all heads have together.
const MOST: u64 = 256 << 20;

/// The size that a display asks its driver for. It lasts from connection to connection.
#[derive(Debug)]
pub(super) struct Monitor(Mutex<Mode>);

#[derive(Clone, Copy, Debug)]
struct Mode {
    width: u32,
    height: u32,
    /// Whether the driver has not been told of it yet.
    new: bool,
}

impl Monitor {
    pub(super) fn new(width: u32, height: u32) -> Self {
        Self(Mutex::new(Mode {
            width,
            height,
            new: false,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Mode> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn resize(&self, width: u32, height: u32) {
        *self.lock() = Mode {
            width,
            height,
            new: true,
        };
    }

    /// Returns whether the size is news to the driver.
    pub(super) fn is_new(&self) -> bool {
        self.lock().new
    }

    /// Takes it that the driver knows of the size.
    pub(super) fn acknowledge(&self) {
        self.lock().new = false;
    }

    /// Returns the answer to GET_DISPLAY_INFO (VirtIO 1.3, 5.7.6.8): the first head is there, the others are not.
    fn display_info(&self) -> Vec<u8> {
        const OK_DISPLAY_INFO: u32 = 0x1101;
        /// The words of the header, and of each head: x, y, width, height, enabled, flags.
        const HEADER: usize = 6;
        const HEAD: usize = 6;

        let Mode { width, height, .. } = *self.lock();
        let mut words = vec![0; HEADER + HEAD * HEADS as usize];
        // The header is for the back end, which has it in its own byte order; the rest it passes on as it is.
        words[0] = OK_DISPLAY_INFO;
        words[HEADER + 2] = width.to_le();
        words[HEADER + 3] = height.to_le();
        words[HEADER + 4] = 1_u32.to_le();
        bytes(&words)
    }
}

/// The requests of the protocol. The cursor is left out of the picture, as by QEMU's `screendump`.
mod request {
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 1;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 2;
    pub(super) const GET_DISPLAY_INFO: u32 = 3;
    pub(super) const CURSOR_POS: u32 = 4;
    pub(super) const CURSOR_POS_HIDE: u32 = 5;
    pub(super) const CURSOR_UPDATE: u32 = 6;
    pub(super) const SCANOUT: u32 = 7;
    pub(super) const UPDATE: u32 = 8;
    pub(super) const DMABUF_SCANOUT: u32 = 9;
    pub(super) const DMABUF_UPDATE: u32 = 10;
}

/// The words before the pixels of an UPDATE.
const UPDATE_WORDS: usize = 5;

/// The screen of one connection.
#[derive(Debug)]
pub(super) struct Screen {
    monitor: Arc<Monitor>,
    stream: UnixStream,
    wire: Mutex<Wire>,
}

/// What has come over the socket.
#[derive(Debug)]
struct Wire {
    /// What has come of a message that is not whole yet.
    received: Vec<u8>,
    heads: Vec<Image>,
    /// Whether something came that is not in the protocol, so that nothing more is read.
    broken: bool,
}

impl Screen {
    /// Makes a screen, and the socket that its back end is to have.
    pub(super) fn new(monitor: Arc<Monitor>) -> io::Result<(Self, UnixStream)> {
        let (stream, far) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let screen = Self {
            monitor,
            stream,
            wire: Mutex::new(Wire {
                received: Vec::new(),
                heads: vec![Image::default(); HEADS as usize],
                broken: false,
            }),
        };
        Ok((screen, far))
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in all that has come by now, and answers. Returns whether more can come.
    pub(super) fn take_in(&self) -> Result<bool, String> {
        let mut wire = self.lock();
        if wire.broken {
            return Ok(false);
        }
        let result = wire.take_in(self);
        wire.broken = result.is_err();
        result
    }

    /// Returns what a head shows, as far as it was taken in.
    pub(super) fn image(&self, head: u32) -> Image {
        let wire = self.lock();
        let image = wire.heads.get(head as usize);
        image.cloned().unwrap_or_default()
    }

    fn answer(&self, request: u32, payload: &[u8]) -> Result<(), String> {
        const REPLY: u32 = 1 << 2;

        let size = u32::try_from(payload.len()).map_err(line)?;
        let reply = [&bytes(&[request, REPLY, size]), payload].concat();
        match (&self.stream).write_all(&reply) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(format!("answers to request {request} are not read"))
            }
            // It has ended, which its own socket tells.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl AsRawFd for Screen {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Wire {
    fn take_in(&mut self, screen: &Screen) -> Result<bool, String> {
        // No more than is there now, or a back end that never stops would keep the caller for ever. At least a byte, since
        // only a read tells the end.
        let waiting = rustix::io::ioctl_fionread(&screen.stream).map_err(line)?;
        let mut more = true;
        match (&screen.stream)
            .take(waiting.max(1))
            .read_to_end(&mut self.received)
        {
            Ok(0) => more = false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A back end that ends with words of ours unread resets the socket.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => more = false,
            Err(error) => return Err(error.to_string()),
        }
        while let Some((request, payload)) = self.next()? {
            self.serve(request, &payload, screen)?;
        }
        Ok(more)
    }

    /// Takes the next request out, its number and its payload, if it is whole.
    fn next(&mut self) -> Result<Option<(u32, Vec<u8>)>, String> {
        let Some(([request, _flags, size], _)) = words::<3>(&self.received) else {
            return Ok(None);
        };
        let fits = match request {
            request::GET_PROTOCOL_FEATURES | request::GET_DISPLAY_INFO => size == 0,
            request::SET_PROTOCOL_FEATURES => size == 8,
            request::CURSOR_POS | request::CURSOR_POS_HIDE | request::SCANOUT => size == 12,
            // Place, hot spot and 64 by 64 pixels.
            request::CURSOR_UPDATE => size == 5 * 4 + 64 * 64 * 4,
            request::UPDATE => (20..=20 + MOST).contains(&u64::from(size)),
            request::DMABUF_SCANOUT | request::DMABUF_UPDATE => {
                return Err(
                    "it shares pictures by DMABUF, which is not served: start it without a render node and /dev/udmabuf"
                        .to_owned(),
                );
            }
            _ => return Err(format!("request {request} is not known")),
        };
        if !fits {
            return Err(format!("request {request} with {size} bytes"));
        }
        let end = usize::try_from(12 + size).map_err(line)?;
        if self.received.len() < end {
            return Ok(None);
        }
        let rest = self.received.split_off(end);
        let mut message = std::mem::replace(&mut self.received, rest);
        Ok(Some((request, message.split_off(12))))
    }

    fn serve(&mut self, request: u32, payload: &[u8], screen: &Screen) -> Result<(), String> {
        match request {
            // None of the features.
            request::GET_PROTOCOL_FEATURES => screen.answer(request, &[0; 8]),
            request::GET_DISPLAY_INFO => screen.answer(request, &screen.monitor.display_info()),
            request::SCANOUT => match words::<3>(payload) {
                Some(([head, width, height], _)) => self.set_scanout(head, width, height),
                None => Ok(()),
            },
            request::UPDATE => match words::<UPDATE_WORDS>(payload) {
                Some((place, pixels)) => self.update(place, pixels),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn set_scanout(&mut self, head: u32, width: u32, height: u32) -> Result<(), String> {
        let index = head as usize;
        let others: u64 = self
            .heads
            .iter()
            .enumerate()
            .filter(|&(other, _)| other != index)
            .map(|(_, image)| image.rgba.len() as u64)
            .sum();
        let Some(image) = self.heads.get_mut(index) else {
            return Err(format!("head {head} of {HEADS}"));
        };
        let pixels = u64::from(width) * u64::from(height);
        if pixels > (MOST - others) / 4 {
            return Err(format!("a head of {width} x {height} pixels is too large"));
        }
        *image = if pixels == 0 {
            Image::default()
        } else {
            Image {
                width,
                height,
                rgba: [0, 0, 0, 255].repeat(usize::try_from(pixels).map_err(line)?),
            }
        };
        Ok(())
    }

    fn update(
        &mut self,
        [head, x, y, width, height]: [u32; UPDATE_WORDS],
        pixels: &[u8],
    ) -> Result<(), String> {
        let Some(image) = self.heads.get_mut(head as usize) else {
            return Err(format!("head {head} of {HEADS}"));
        };
        let inside = |start: u32, length: u32, end: u32| {
            start.checked_add(length).is_some_and(|last| last <= end)
        };
        let area = u64::from(width) * u64::from(height);
        if !inside(x, width, image.width)
            || !inside(y, height, image.height)
            || !pixels.len().is_multiple_of(4)
            || area != pixels.len() as u64 / 4
        {
            return Err(format!(
                "{} bytes for {width} x {height} pixels at {x}, {y} of {} x {}",
                pixels.len(),
                image.width,
                image.height
            ));
        }
        // What is inside of a head has no more than `MOST` bytes.
        let [x, y, width, stride] = [x, y, width, image.width].map(|number| number as usize);
        if width == 0 {
            return Ok(());
        }
        let (rows, _) = image.rgba.as_chunks_mut::<4>();
        let (pixels, _) = pixels.as_chunks::<4>();
        let rows = rows.chunks_exact_mut(stride).skip(y);
        for (row, pixels) in rows.zip(pixels.chunks_exact(width)) {
            for (shown, pixel) in row.iter_mut().skip(x).zip(pixels) {
                let [_, red, green, blue] = u32::from_ne_bytes(*pixel).to_be_bytes();
                *shown = [red, green, blue, 255];
            }
        }
        Ok(())
    }
}

/// Returns the first `N` words, in the byte order of the machine, and what follows them.
fn words<const N: usize>(bytes: &[u8]) -> Option<([u32; N], &[u8])> {
    let (chunks, _) = bytes.as_chunks::<4>();
    let first = chunks.first_chunk::<N>()?;
    Some((first.map(u32::from_ne_bytes), &bytes[4 * N..]))
}

/// Returns the bytes of words, in the byte order of the machine.
fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn line(error: impl fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen() -> (Screen, UnixStream) {
        Screen::new(Arc::new(Monitor::new(640, 480))).unwrap()
    }

    fn message(request: u32, payload: &[u32]) -> Vec<u8> {
        let size = u32::try_from(payload.len() * 4).unwrap();
        bytes(&[&[request, 0, size], payload].concat())
    }

    fn answer(far: &mut UnixStream) -> Vec<u32> {
        let mut header = [0; 12];
        far.read_exact(&mut header).unwrap();
        let ([request, flags, size], _) = words::<3>(&header).unwrap();
        assert_eq!(flags, 4);
        let mut payload = vec![0; size as usize];
        far.read_exact(&mut payload).unwrap();
        let (payload, _) = payload.as_chunks::<4>();
        let payload = payload.iter().map(|word| u32::from_ne_bytes(*word));
        [request].into_iter().chain(payload).collect()
    }

    #[test]
    fn no_features_and_one_head_are_offered() {
        let (screen, mut far) = screen();
        far.write_all(&message(1, &[])).unwrap();
        far.write_all(&message(2, &[0, 0])).unwrap();
        far.write_all(&message(3, &[])).unwrap();
        assert_eq!(screen.take_in(), Ok(true));
        assert_eq!(answer(&mut far), [1, 0, 0]);
        let info = answer(&mut far);
        assert_eq!(info.len(), 1 + 6 + 16 * 6);
        assert_eq!(info[..2], [3, 0x1101]);
        let heads: Vec<_> = info[7..].iter().map(|word| u32::from_le(*word)).collect();
        assert_eq!(heads[..6], [0, 0, 640, 480, 1, 0]);
        assert!(heads[6..].iter().all(|&word| word == 0));
    }

    #[test]
    fn a_new_size_is_asked_for_and_is_news_until_it_is_acknowledged() {
        let (screen, mut far) = screen();
        assert!(!screen.monitor.is_new());
        screen.monitor.resize(300, 200);
        assert!(screen.monitor.is_new());
        far.write_all(&message(3, &[])).unwrap();
        assert_eq!(screen.take_in(), Ok(true));
        assert_eq!(answer(&mut far)[9..11], [300_u32.to_le(), 200_u32.to_le()]);
        screen.monitor.acknowledge();
        assert!(!screen.monitor.is_new());
    }

    #[test]
    fn pictures_come_in_pieces_and_each_goes_to_its_head() {
        let (screen, mut far) = screen();
        let bytes = [
            message(7, &[0, 3, 2]),
            message(7, &[15, 1, 1]),
            message(4, &[0, 1, 1]),
            message(
                8,
                &[
                    0,
                    1,
                    0,
                    2,
                    2,
                    0x0001_0203,
                    0xff11_1213,
                    0x0021_2223,
                    0x0031_3233,
                ],
            ),
            message(8, &[15, 0, 0, 1, 1, 0x0041_4243]),
            message(8, &[0, 0, 0, 0, 0]),
        ]
        .concat();
        for piece in bytes.chunks(7) {
            far.write_all(piece).unwrap();
            assert_eq!(screen.take_in(), Ok(true));
        }
        let image = screen.image(0);
        assert_eq!((image.width, image.height), (3, 2));
        let pixels: Vec<_> = (0..2)
            .flat_map(|y| (0..3).map(move |x| (x, y)))
            .map(|(x, y)| image.pixel(x, y).unwrap())
            .collect();
        assert_eq!(
            pixels,
            [
                [0, 0, 0, 255],
                [1, 2, 3, 255],
                [0x11, 0x12, 0x13, 255],
                [0, 0, 0, 255],
                [0x21, 0x22, 0x23, 255],
                [0x31, 0x32, 0x33, 255],
            ]
        );
        assert_eq!(screen.image(15).rgba, [0x41, 0x42, 0x43, 255]);
        for head in [1, 16, u32::MAX] {
            assert_eq!(screen.image(head), Image::default());
        }
        far.write_all(&message(7, &[0, 0, 0])).unwrap();
        assert_eq!(screen.take_in(), Ok(true));
        assert_eq!(screen.image(0), Image::default());
    }

    #[test]
    fn the_end_is_told_from_nothing_new() {
        let (screen, far) = screen();
        assert_eq!(screen.take_in(), Ok(true));
        drop(far);
        assert_eq!(screen.take_in(), Ok(false));
    }

    #[test]
    fn what_is_not_in_the_protocol_is_one_line_and_ends_it() {
        let far_away = u32::MAX;
        for wrong in [
            message(0, &[]),
            message(11, &[0]),
            message(12, &[]),
            message(3, &[0]),
            message(6, &[0]),
            bytes(&[7, 0, u32::MAX]),
            bytes(&[8, 0, u32::MAX]),
            message(8, &[0, 0, 0, 0]),
            message(7, &[16, 1, 1]),
            message(7, &[far_away, 1, 1]),
            message(7, &[0, far_away, far_away]),
            message(7, &[0, 8193, 8192]),
            // A head of 4 by 4 pixels is there.
            message(8, &[0, 0, 0, 1, 1]),
            message(8, &[0, 0, 0, 1, 1, 0, 0]),
            [bytes(&[8, 0, 25, 0, 0, 0, 1, 1, 0]), vec![0]].concat(),
            message(8, &[0, 4, 0, 1, 1, 0]),
            message(8, &[0, 0, 4, 1, 1, 0]),
            message(8, &[0, far_away, 0, 1, 1, 0]),
            message(8, &[0, 0, far_away, 1, 1, 0]),
            message(8, &[0, 0, 0, far_away, far_away]),
            message(8, &[1, 0, 0, 1, 1, 0]),
            message(8, &[16, 0, 0, 0, 0]),
            message(9, &[0; 10]),
            message(10, &[0; 5]),
        ] {
            let (screen, mut far) = screen();
            far.write_all(&message(7, &[0, 4, 4])).unwrap();
            far.write_all(&wrong).unwrap();
            let error = screen.take_in().unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
            far.write_all(&message(7, &[0, 5, 5])).unwrap();
            assert_eq!(screen.take_in(), Ok(false));
            assert_eq!(screen.image(0).width, 4, "{wrong:?}");
        }
    }

    #[test]
    fn all_heads_together_are_bounded() {
        let (screen, mut far) = screen();
        far.write_all(&message(7, &[0, 8192, 4096])).unwrap();
        far.write_all(&message(7, &[0, 4096, 8192])).unwrap();
        assert_eq!(screen.take_in(), Ok(true));
        far.write_all(&message(7, &[1, 8192, 4097])).unwrap();
        assert!(screen.take_in().is_err());
    }

    #[test]
    fn a_back_end_that_asks_and_does_not_read_is_cut_off() {
        let (screen, mut far) = screen();
        let questions = message(3, &[]).repeat(100);
        let error = (0..100).find_map(|_| {
            far.write_all(&questions).unwrap();
            screen.take_in().err()
        });
        assert_eq!(error.unwrap(), "answers to request 3 are not read");
    }
}
