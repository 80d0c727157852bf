//! The least of HTTP/1.0 that fetching and serving a page takes.

use std::collections::VecDeque;

use anyhow::{Context, bail, ensure};
use smoltcp::{
    iface::{SocketHandle, SocketSet},
    socket::tcp,
};

/// The port that pages are served on.
pub const PORT: u16 = 80;

/// The most bytes of a request's or a response's head.
const MAX_HEAD: usize = 8192;

/// Bytes of buffer each way; fewer than 64 receive buffers of a NIC hold.
const SOCKET_BUFFER: usize = 48 * 1024;

/// Makes a TCP socket with buffers that suit a bulk transfer.
#[must_use]
pub fn socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; SOCKET_BUFFER]);
    tcp::Socket::new(buffer(), buffer())
}

/// The head of a response.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub struct Head {
    /// 200 for a page that was found.
    pub status: u16,
    /// The length of the page, in bytes, where the server says it.
    pub content_length: Option<u64>,
    /// The length of the head itself, in bytes.
    pub len: usize,
}

impl Head {
    /// Takes the head of a response apart. `None`: its end has not come yet.
    ///
    /// # Errors
    ///
    /// It is no response of HTTP/1, or the head has more than 8192 bytes.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(len) = head_end(bytes) else {
            ensure!(
                bytes.len() <= MAX_HEAD,
                "the head of the response has more than {MAX_HEAD} bytes"
            );
            return Ok(None);
        };
        let text =
            std::str::from_utf8(&bytes[..len]).context("the head of the response is not text")?;
        let mut lines = text.split("\r\n");
        let status_line = lines.next().unwrap_or_default();
        let mut words = status_line.split(' ');
        ensure!(
            words
                .next()
                .is_some_and(|version| version.starts_with("HTTP/1.")),
            "not HTTP/1: {status_line:?}"
        );
        let status = words.next().and_then(|word| word.parse().ok());
        let status = status.with_context(|| format!("no status in {status_line:?}"))?;
        let mut content_length = None;
        for line in lines {
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                let length = value
                    .trim()
                    .parse()
                    .with_context(|| format!("cannot understand {line:?}"))?;
                content_length = Some(length);
            }
        }
        Ok(Some(Self {
            status,
            content_length,
            len,
        }))
    }
}

/// Returns the length of a head with its closing empty line.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|start| start + 4)
}

/// Returns the request for `path`.
#[must_use]
pub fn request(host: &str, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n").into_bytes()
}

/// Returns the byte at `index` of the pages `/bytes/COUNT`.
#[must_use]
pub fn pattern(index: u64) -> u8 {
    // The period is a prime, so that a lost or repeated frame shifts the pattern visibly.
    (index % 251) as u8
}

/// What a path stands for.
#[derive(Debug, Clone, Eq, PartialEq)]
enum Body {
    Bytes(Vec<u8>),
    /// So many bytes of [`pattern`].
    Pattern(u64),
}

impl Body {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Pattern(count) => *count,
        }
    }

    /// Copies a part that starts at `from` to `target`, and returns how many bytes that were.
    fn copy(&self, from: u64, target: &mut [u8]) -> usize {
        let count =
            usize::try_from(self.len() - from).map_or(target.len(), |left| left.min(target.len()));
        match self {
            Self::Bytes(bytes) => {
                let rest = bytes
                    .iter()
                    .skip(usize::try_from(from).unwrap_or(usize::MAX));
                for (byte, from) in target.iter_mut().zip(rest) {
                    *byte = *from;
                }
            }
            Self::Pattern(_) => {
                for (index, byte) in (from..).zip(&mut target[..count]) {
                    *byte = pattern(index);
                }
            }
        }
        count
    }
}

/// Serves pages, one connection after the other.
///
/// Paths: `/` is the page, `/bytes/COUNT` is so many bytes of [`pattern`], all else is not found.
#[derive(Debug)]
pub struct Server {
    socket: SocketHandle,
    page: Vec<u8>,
    state: State,
    /// Requests that were answered.
    served: u64,
}

#[derive(Debug)]
enum State {
    /// The head of the request up to here.
    Request(Vec<u8>),
    /// The head that is still to be sent, the body, and how much of the body was sent.
    Response(VecDeque<u8>, Body, u64),
    /// All is sent, the connection is closing.
    Closing,
}

impl Server {
    /// Makes a server with a socket of its own in `sockets`.
    #[must_use]
    pub fn new(sockets: &mut SocketSet<'_>, page: impl Into<Vec<u8>>) -> Self {
        Self {
            socket: sockets.add(socket()),
            page: page.into(),
            state: State::Request(Vec::new()),
            served: 0,
        }
    }

    /// Returns how many requests were answered.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served
    }

    /// Does what can be done without waiting. Returns whether anything was done.
    pub fn poll(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        if !socket.is_open() {
            self.state = State::Request(Vec::new());
            return socket.listen(PORT).is_ok();
        }
        match &mut self.state {
            State::Request(head) => {
                let before = head.len();
                while socket.can_recv() && head.len() <= MAX_HEAD && head_end(head).is_none() {
                    let taken = socket.recv(|bytes| {
                        head.extend_from_slice(bytes);
                        (bytes.len(), ())
                    });
                    if taken.is_err() {
                        break;
                    }
                }
                if let Some(end) = head_end(head) {
                    let (status, body) = answer(&head[..end], &self.page);
                    let response = format!(
                        "HTTP/1.0 {status}\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        body.len()
                    );
                    self.state = State::Response(response.into_bytes().into(), body, 0);
                    return true;
                }
                if head.len() > MAX_HEAD {
                    socket.abort();
                    return true;
                }
                if socket.state() == tcp::State::CloseWait {
                    socket.close();
                }
                self.request_length() != before
            }
            State::Response(head, body, sent) => {
                let mut progress = false;
                while socket.can_send() {
                    let count = socket.send(|target| {
                        if !head.is_empty() {
                            let count = target.len().min(head.len());
                            for (byte, from) in target.iter_mut().zip(head.drain(..count)) {
                                *byte = from;
                            }
                            return (count, count);
                        }
                        let count = body.copy(*sent, target);
                        *sent += count as u64;
                        (count, count)
                    });
                    if !count.is_ok_and(|count| count > 0) {
                        break;
                    }
                    progress = true;
                }
                if head.is_empty() && *sent == body.len() {
                    socket.close();
                    self.served += 1;
                    self.state = State::Closing;
                    return true;
                }
                if !socket.may_send() {
                    self.state = State::Closing;
                }
                progress
            }
            State::Closing => {
                // A closed connection lingers for a while; a new one need not wait for that.
                if socket.state() == tcp::State::TimeWait {
                    socket.abort();
                    return true;
                }
                false
            }
        }
    }

    fn request_length(&self) -> usize {
        match &self.state {
            State::Request(head) => head.len(),
            State::Response(..) | State::Closing => 0,
        }
    }
}

fn answer(head: &[u8], page: &[u8]) -> (&'static str, Body) {
    match path(head) {
        Ok("/") => ("200 OK", Body::Bytes(page.to_vec())),
        Ok(path) => match path
            .strip_prefix("/bytes/")
            .and_then(|count| count.parse().ok())
        {
            Some(count) => ("200 OK", Body::Pattern(count)),
            None => ("404 Not Found", Body::Bytes(b"not found\n".to_vec())),
        },
        Err(_) => ("400 Bad Request", Body::Bytes(b"bad request\n".to_vec())),
    }
}

/// Returns the path of a GET request.
fn path(head: &[u8]) -> anyhow::Result<&str> {
    let text = std::str::from_utf8(head)?;
    let line = text.split("\r\n").next().unwrap_or_default();
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["GET", path, version] if version.starts_with("HTTP/1.") => Ok(path),
        _ => bail!("not a GET request: {line:?}"),
    }
}

/// Checks that `bytes`, which start at `from`, are those of [`pattern`].
///
/// # Errors
///
/// A byte is another one.
pub fn check_pattern(from: u64, bytes: &[u8]) -> anyhow::Result<()> {
    match (from..)
        .zip(bytes)
        .find(|(index, byte)| pattern(*index) != **byte)
    {
        None => Ok(()),
        Some((index, byte)) => bail!("byte {index} arrived as {byte}, not as {}", pattern(index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_response_is_refused() {
        let whole = b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        let head = Head {
            status: 200,
            content_length: Some(3),
            len: whole.len() - 3,
        };
        assert_eq!(Head::parse(whole).unwrap(), Some(head));
        assert_eq!(Head::parse(&whole[..20]).unwrap(), None);
        assert!(Head::parse(b"SSH-2.0\r\n\r\n").is_err());
        assert!(Head::parse(b"HTTP/1.0 ok\r\n\r\n").is_err());
        assert!(Head::parse(b"HTTP/1.0 200 ok\r\nContent-Length: -1\r\n\r\n").is_err());
        assert!(Head::parse(&[b'x'; MAX_HEAD + 1]).is_err());
    }

    #[test]
    fn only_get_requests_are_answered_with_a_page() {
        let status = |head: &[u8]| answer(head, b"page").0;
        assert_eq!(status(b"GET / HTTP/1.0\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET /bytes/12 HTTP/1.1\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET /bytes/-1 HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status(b"POST / HTTP/1.0\r\n\r\n"), "400 Bad Request");
        assert_eq!(status(b"\xff\xfe\r\n\r\n"), "400 Bad Request");
    }

    #[test]
    fn a_shifted_pattern_is_seen() {
        let bytes: Vec<u8> = (1000..2000).map(pattern).collect();
        check_pattern(1000, &bytes).unwrap();
        assert!(check_pattern(1001, &bytes).is_err());
    }
}
