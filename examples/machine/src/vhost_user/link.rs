//! One connection to a back end: requests that end in bounded time, and a watch on the other end and on its display.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::Frontend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::VhostUserError;
use super::screen::Screen;
use crate::Image;

/// Why a connection has ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Loss {
    /// The back end closed it. What it had of the memory, it has given up.
    Closed,
    /// The back end did not answer, so that it was closed here. The back end may still use the memory.
    Silent {
        request: &'static str,
        limit: Duration,
    },
    /// The back end broke the protocol, so that it was closed here. It may still use the memory.
    Wrong {
        subject: &'static str,
        message: String,
    },
}

impl Loss {
    pub(super) fn as_error(&self) -> VhostUserError {
        match self.clone() {
            Self::Closed => VhostUserError::Disconnected,
            Self::Silent { request, limit } => VhostUserError::Silent { request, limit },
            Self::Wrong { subject, message } => VhostUserError::Protocol { subject, message },
        }
    }
}

/// Where the news of a device arrive that come without being asked for.
#[derive(Debug)]
pub(super) struct News {
    /// Readable while there is news: the configuration has changed, or the device has gone.
    pub(super) event: EventFd,
    pub(super) configuration_changed: AtomicBool,
}

impl News {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            configuration_changed: AtomicBool::new(false),
        })
    }

    pub(super) fn tell(&self) {
        // An eventfd whose counter is full is readable, and no more is wanted of it.
        let _ = self.event.write(1);
    }
}

/// How long all sockets of a back end that ends may take to be closed, one after another.
const HANG_UP_LIMIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

#[derive(Debug, Default)]
struct Watched {
    loss: Option<Loss>,
    /// The request under way, when it was sent, and when it has to be answered.
    request: Option<(&'static str, Duration, Instant)>,
    closing: bool,
}

#[derive(Debug)]
struct Shared {
    watched: Mutex<Watched>,
    /// A handle of the connection's socket, to close it with.
    stream: UnixStream,
    /// Gets the watch to look at `watched` again.
    wake: EventFd,
    news: Arc<News>,
    /// That of a display.
    screen: Option<Screen>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection, if it has not ended yet and is not being ended from this side.
    fn lose(&self, loss: Loss) {
        let mut watched = self.lock();
        if watched.loss.is_none() && !watched.closing {
            log::warn!("{}", loss.as_error());
            watched.loss = Some(loss);
            // Whoever waits for an answer wakes up. A socket that is closed already is fine too.
            let _ = self.stream.shutdown(Shutdown::Both);
            self.news.tell();
        }
    }

    /// Takes in what the back end shows by now. Returns whether more can come.
    fn look_at_screen(&self) -> bool {
        let Some(screen) = &self.screen else {
            return false;
        };
        screen.take_in().unwrap_or_else(|message| {
            self.lose(Loss::Wrong {
                subject: "its display",
                message,
            });
            false
        })
    }

    /// Ends a connection without its display, unless it is the whole of it that ends.
    fn lose_screen(&self) {
        let mut stream = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let gone =
            rustix::event::poll(&mut stream, Some(&HANG_UP_LIMIT)).is_ok_and(|count| count > 0);
        self.lose(if gone {
            Loss::Closed
        } else {
            Loss::Wrong {
                subject: "its display",
                message: "it closed the socket".to_owned(),
            }
        });
    }
}

/// A connection to a back end.
pub(super) struct Link {
    frontend: Mutex<Frontend>,
    shared: Arc<Shared>,
    limit: Duration,
    watch: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("loss", &self.loss())
            .finish_non_exhaustive()
    }
}

/// What wakes the watch up.
mod event {
    pub(super) const STREAM: u64 = 0;
    pub(super) const WAKE: u64 = 1;
    pub(super) const REQUESTS: u64 = 2;
    pub(super) const SCREEN: u64 = 3;
}

impl Link {
    /// Uses a connection, whose display if it is one has `screen`. Each request has to be answered within `limit`.
    ///
    /// Returns the socket on which the back end may send requests of its own, too.
    pub(super) fn new(
        stream: UnixStream,
        queues: u64,
        limit: Duration,
        news: Arc<News>,
        screen: Option<Screen>,
    ) -> Result<(Self, UnixStream), VhostUserError> {
        let shared = Arc::new(Shared {
            watched: Mutex::new(Watched::default()),
            stream: stream.try_clone()?,
            wake: EventFd::new(EFD_NONBLOCK)?,
            news,
            screen,
        });
        let (requests, far) = UnixStream::pair()?;
        requests.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let add = |file: &dyn AsRawFd, events, number| {
            let event = EpollEvent::new(events, number);
            epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)
        };
        add(&shared.stream, EventSet::READ_HANG_UP, event::STREAM)?;
        add(&shared.wake, EventSet::IN, event::WAKE)?;
        add(&requests, EventSet::IN, event::REQUESTS)?;
        if let Some(screen) = &shared.screen {
            add(screen, EventSet::IN, event::SCREEN)?;
        }
        let watch = thread::Builder::new()
            .name("vhost-user watch".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared, &epoll, requests)
            })?;
        let link = Self {
            frontend: Mutex::new(Frontend::from_stream(stream, queues)),
            shared,
            limit,
            watch: Some(watch),
        };
        Ok((link, far))
    }

    /// Returns why the connection has ended, if it has.
    pub(super) fn loss(&self) -> Option<Loss> {
        self.shared.lock().loss.clone()
    }

    /// Returns what a head of the display shows, with all that the back end has said by now.
    pub(super) fn image(&self, head: u32) -> Image {
        self.shared.look_at_screen();
        let screen = self.shared.screen.as_ref();
        screen.map_or_else(Image::default, |screen| screen.image(head))
    }

    /// Makes a request that `vhost` does not know: it hands over a file, and has no payload and no answer.
    ///
    /// # Errors
    ///
    /// The connection has ended, now or before.
    pub(super) fn hand_over(
        &self,
        request: &'static str,
        number: u32,
        file: &impl AsRawFd,
    ) -> Result<(), VhostUserError> {
        /// The protocol's version.
        const FLAGS: u32 = 1;

        self.ask(request, |_| {
            let header = [number, FLAGS, 0].map(u32::to_ne_bytes);
            match self
                .shared
                .stream
                .send_with_fd(header.as_flattened(), file.as_raw_fd())
            {
                Ok(12) => Ok(()),
                Ok(_) => Err(vhost::vhost_user::Error::PartialMessage.into()),
                Err(error) => {
                    let error = io::Error::from_raw_os_error(error.errno());
                    Err(vhost::vhost_user::Error::SocketBroken(error).into())
                }
            }
        })
    }

    /// Makes a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// * [`VhostUserError::Refused`]: the back end does not want to. The connection stays.
    /// * Any other: the connection has ended, now or before.
    pub(super) fn ask<R>(
        &self,
        request: &'static str,
        ask: impl FnOnce(&mut Frontend) -> vhost::Result<R>,
    ) -> Result<R, VhostUserError> {
        let mut frontend = self.frontend.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut watched = self.shared.lock();
            if let Some(loss) = &watched.loss {
                return Err(loss.as_error());
            }
            watched.request = Some((request, self.limit, Instant::now() + self.limit));
        }
        let _ = self.shared.wake.write(1);
        let result = ask(&mut frontend);
        self.shared.lock().request = None;
        match result {
            Ok(answer) => Ok(answer),
            Err(vhost::Error::VhostUserProtocol(
                vhost::vhost_user::Error::BackendInternalError,
            )) => Err(VhostUserError::Refused { request }),
            Err(error) => {
                use vhost::vhost_user::Error::{Disconnected, PartialMessage, SocketBroken};
                self.shared.lose(match error {
                    vhost::Error::VhostUserProtocol(
                        Disconnected | PartialMessage | SocketBroken(_),
                    ) => Loss::Closed,
                    error => Loss::Wrong {
                        subject: request,
                        message: error.to_string(),
                    },
                });
                // What the watch found first is the cause, if it found anything.
                Err(self
                    .loss()
                    .map_or(VhostUserError::Disconnected, |loss| loss.as_error()))
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        let _ = self.shared.stream.shutdown(Shutdown::Both);
        let _ = self.shared.wake.write(1);
        if let Some(watch) = self.watch.take() {
            // It has nothing to say that is not in `shared`.
            let _ = watch.join();
        }
    }
}

/// Ends the connection when the other end hangs up or does not answer, and takes its requests.
fn watch(shared: &Shared, epoll: &Epoll, mut requests: UnixStream) {
    let mut inbox = Inbox::default();
    loop {
        let deadline = {
            let watched = shared.lock();
            if watched.closing || watched.loss.is_some() {
                return;
            }
            watched.request
        };
        let left = deadline.map(|(_, _, end)| end.saturating_duration_since(Instant::now()));
        if let Some((request, limit, _)) = deadline
            && left == Some(Duration::ZERO)
        {
            shared.lose(Loss::Silent { request, limit });
            return;
        }
        // In milliseconds, rounded up; -1 waits for an event.
        let timeout = left.map_or(-1, |left| {
            i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); 4];
        let count = match epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("vhost-user: no watch on the connection: {error}");
                shared.lose(Loss::Closed);
                return;
            }
        };
        for event in events.iter().take(count) {
            match event.data() {
                event::STREAM => shared.lose(Loss::Closed),
                event::WAKE => {
                    let _ = shared.wake.read();
                }
                event::SCREEN => {
                    if !shared.look_at_screen() {
                        shared.lose_screen();
                    }
                }
                _ => match inbox.take_in(&mut requests, shared) {
                    Ok(true) => {}
                    // It has no more requests. Whether it has gone is for its own socket to tell.
                    Ok(false) => {
                        let event = EpollEvent::default();
                        let file = requests.as_raw_fd();
                        let _ = epoll.ctl(ControlOperation::Delete, file, event);
                    }
                    Err(message) => shared.lose(Loss::Wrong {
                        subject: "a request of its own",
                        message,
                    }),
                },
            }
        }
    }
}

/// Requests of the back end's, of which a change of the configuration is the only one taken.
///
/// The vhost-user protocol, "Message format": request, flags and size of the payload, 32 bits each.
#[derive(Debug, Default)]
struct Inbox {
    received: Vec<u8>,
}

impl Inbox {
    /// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
    const CONFIGURATION_CHANGED: u32 = 2;
    const NEEDS_REPLY: u32 = 1 << 3;
    /// Version 1, and the flag of a reply.
    const REPLY: u32 = 1 | 1 << 2;
    /// The longest payload of a request that the protocol has, and a bound on what is held here.
    const MAX_PAYLOAD: u32 = 4096;

    /// Takes in what has come, and answers. Returns whether more can come.
    fn take_in(&mut self, stream: &mut UnixStream, shared: &Shared) -> Result<bool, String> {
        let mut chunk = [0; 512];
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(length) => self.received.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A back end that ends with words of ours unread resets the socket.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error.to_string()),
        }
        while let Some((request, flags)) = self.next()? {
            let known = request == Self::CONFIGURATION_CHANGED;
            if known {
                shared
                    .news
                    .configuration_changed
                    .store(true, Ordering::Release);
                shared.news.tell();
            }
            if flags & Self::NEEDS_REPLY != 0 {
                let mut reply = Vec::new();
                for number in [request, Self::REPLY, 8] {
                    reply.extend_from_slice(&number.to_ne_bytes());
                }
                reply.extend_from_slice(&u64::from(!known).to_ne_bytes());
                stream
                    .write_all(&reply)
                    .map_err(|error| error.to_string())?;
            }
        }
        Ok(true)
    }

    /// Takes the next request out, its number and its flags, if it is whole.
    fn next(&mut self) -> Result<Option<(u32, u32)>, String> {
        let (words, _) = self.received.as_chunks::<4>();
        let [request, flags, size, ..] = words else {
            return Ok(None);
        };
        let [request, flags, size] = [request, flags, size].map(|word| u32::from_ne_bytes(*word));
        if size > Self::MAX_PAYLOAD {
            return Err(format!("a request with {size} bytes"));
        }
        let end = usize::try_from(12 + size).map_err(|error| error.to_string())?;
        if self.received.len() < end {
            return Ok(None);
        }
        self.received.drain(..end);
        Ok(Some((request, flags)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::screen::Monitor;

    const LONG: Duration = Duration::from_secs(20);

    fn link() -> (Link, UnixStream, UnixStream, Arc<News>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let news = Arc::new(News::new().unwrap());
        let (link, requests) = Link::new(ours, 1, LONG, news.clone(), None).unwrap();
        (link, theirs, requests, news)
    }

    fn request(number: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [number, flags, u32::try_from(payload.len()).unwrap()] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    fn wait_for(condition: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !condition() {
            assert!(Instant::now() < end);
            thread::yield_now();
        }
    }

    #[test]
    fn a_change_of_the_configuration_is_news_and_is_answered_where_that_is_asked() {
        let (link, _theirs, mut requests, news) = link();
        // In two pieces, after one that is not known.
        let bytes = [
            request(9, 1 | 1 << 3, b"12345678"),
            request(2, 1 | 1 << 3, b""),
        ]
        .concat();
        let (first, second) = bytes.split_at(15);
        requests.write_all(first).unwrap();
        requests.write_all(second).unwrap();
        let mut reply = [0; 40];
        requests.read_exact(&mut reply).unwrap();
        let words: Vec<_> = reply
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [9, 5, 8, 1, 0, 2, 5, 8, 0, 0]);
        assert!(news.configuration_changed.load(Ordering::Acquire));
        assert!(news.event.read().is_ok());
        assert_eq!(link.loss(), None);
    }

    #[test]
    fn a_request_without_an_end_cuts_the_connection() {
        let (link, mut theirs, mut requests, _news) = link();
        let bytes = [2, 1, u32::MAX].map(u32::to_ne_bytes).concat();
        requests.write_all(&bytes).unwrap();
        wait_for(|| link.loss().is_some());
        assert!(matches!(link.loss(), Some(Loss::Wrong { .. })));
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_connection_that_is_ended_from_this_side_is_no_news() {
        let (link, mut theirs, _requests, news) = link();
        drop(link);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert!(news.event.read().is_err());
    }

    #[test]
    fn a_back_end_without_requests_is_not_lost_before_it_hangs_up() {
        let (link, theirs, requests, news) = link();
        drop(requests);
        assert_eq!(link.loss(), None);
        drop(theirs);
        wait_for(|| link.loss().is_some());
        assert_eq!(link.loss(), Some(Loss::Closed));
        assert!(news.event.read().is_ok());
    }

    fn link_with_display() -> (Link, UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let news = Arc::new(News::new().unwrap());
        let (screen, far) = Screen::new(Arc::new(Monitor::new(640, 480))).unwrap();
        let (link, _) = Link::new(ours, 2, LONG, news, Some(screen)).unwrap();
        (link, theirs, far)
    }

    #[test]
    fn what_a_display_was_sent_is_shown_at_once() {
        let (link, _theirs, mut far) = link_with_display();
        for width in 1..100 {
            let scanout = [7, 0, 12, 0, width, 1].map(u32::to_ne_bytes);
            far.write_all(scanout.as_flattened()).unwrap();
            assert_eq!(link.image(0).width, width);
        }
        assert_eq!(link.loss(), None);
    }

    #[test]
    fn a_display_that_talks_nonsense_cuts_the_connection() {
        let (link, mut theirs, mut far) = link_with_display();
        far.write_all(&[0xff; 12]).unwrap();
        wait_for(|| link.loss().is_some());
        let loss = link.loss().unwrap().as_error().to_string();
        assert!(
            loss.contains("its display") && !loss.contains('\n'),
            "{loss}"
        );
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_back_end_that_closes_its_display_alone_is_told_from_one_that_ends() {
        let (link, theirs, far) = link_with_display();
        drop(far);
        wait_for(|| link.loss().is_some());
        assert!(matches!(link.loss(), Some(Loss::Wrong { .. })));
        drop(theirs);

        let (link, theirs, far) = link_with_display();
        drop(far);
        drop(theirs);
        wait_for(|| link.loss().is_some());
        assert_eq!(link.loss(), Some(Loss::Closed));
    }

    #[test]
    fn a_file_is_handed_over_with_its_request() {
        let (link, theirs, _far) = link_with_display();
        let (mut ours, file) = UnixStream::pair().unwrap();
        link.hand_over("GPU_SET_SOCKET", 33, &file).unwrap();
        drop(file);
        let mut header = [0; 12];
        let (length, file) = theirs.recv_with_fd(&mut header).unwrap();
        assert_eq!(length, header.len());
        assert_eq!(header.as_chunks().0, [33, 1, 0].map(u32::to_ne_bytes));
        file.unwrap().write_all(b"here").unwrap();
        let mut word = [0; 4];
        ours.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"here");
        drop(theirs);
        wait_for(|| link.loss().is_some());
        let result = link.hand_over("GPU_SET_SOCKET", 33, &ours);
        assert!(matches!(result, Err(VhostUserError::Disconnected)));
    }
}
