//! A host on a network: an address, pings, pages fetched and served, by `smoltcp` over any NIC.

use anyhow::{Context, bail, ensure};
use smoltcp::{
    iface::{Config, Interface, PollResult, SocketHandle, SocketSet},
    phy::{ChecksumCapabilities, Device},
    socket::{dhcpv4, icmp, tcp},
    time::{Duration, Instant},
    wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr},
};

use crate::{http, time::Time};

/// How long the other end may stay silent before an operation fails.
const PATIENCE: Duration = Duration::from_secs(15);

/// The most bytes of a page that [`Stack::get`] takes.
const MAX_PAGE: usize = 16 << 20;

/// What a DHCP server gave.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub struct Lease {
    /// The address and the length of the network's prefix.
    pub address: Ipv4Cidr,
    /// The address of the server.
    pub server: Ipv4Address,
    /// The way out of the network.
    pub router: Option<Ipv4Address>,
}

/// A page that was fetched.
#[derive(Debug, Clone, Eq, PartialEq)]
pub struct Page {
    /// The status of HTTP: 200 for a page that was found.
    pub status: u16,
    /// What the page holds.
    pub body: Vec<u8>,
}

/// Says whether something has come in after all, before time is let pass.
type BeforeWaiting<D> = Box<dyn FnMut(&mut D) -> bool>;

/// A host on a network.
pub struct Stack<D: Device, T> {
    device: D,
    before_waiting: BeforeWaiting<D>,
    time: T,
    interface: Interface,
    sockets: SocketSet<'static>,
    server: Option<http::Server>,
    /// The local port of the next connection.
    next_port: u16,
    /// The number of the next ping.
    next_ping: u16,
}

impl<D: Device, T: Time> Stack<D, T> {
    /// The ports that connections are made from, as RFC 6335 has it.
    const EPHEMERAL_PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;

    /// Makes a host without an address behind a NIC with the address `mac`.
    #[must_use]
    pub fn new(mut device: D, mac: [u8; 6], time: T) -> Self {
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = mac
            .iter()
            .fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        let interface = Interface::new(config, &mut device, time.now());
        Self {
            device,
            before_waiting: Box::new(|_| false),
            time,
            interface,
            sockets: SocketSet::new(Vec::new()),
            server: None,
            next_port: *Self::EPHEMERAL_PORTS.start(),
            next_ping: 0,
        }
    }

    /// Replaces the clock, by one that shows the same time or a later one.
    pub fn with_time<U: Time>(self, time: U) -> Stack<D, U> {
        let Self {
            device,
            before_waiting,
            interface,
            sockets,
            server,
            next_port,
            next_ping,
            ..
        } = self;
        Stack {
            device,
            before_waiting,
            time,
            interface,
            sockets,
            server,
            next_port,
            next_ping,
        }
    }

    /// Has `hook` called each time before time is let pass. Where it returns `true`, the NIC is looked at again instead.
    ///
    /// This is the place to ask a NIC for interrupts, which says whether one was missed.
    pub fn before_waiting(&mut self, hook: impl FnMut(&mut D) -> bool + 'static) {
        self.before_waiting = Box::new(hook);
    }

    /// Serves `page` on port 80 from now on.
    pub fn serve(&mut self, page: impl Into<Vec<u8>>) {
        self.server = Some(http::Server::new(&mut self.sockets, page));
    }

    /// Returns how many requests for pages were answered.
    pub fn served(&self) -> u64 {
        self.server.as_ref().map_or(0, http::Server::served)
    }

    /// Sends and receives what can be without waiting. Returns whether anything changed.
    pub fn poll(&mut self) -> bool {
        let now = self.time.now();
        let changed = self
            .interface
            .poll(now, &mut self.device, &mut self.sockets)
            != PollResult::None;
        let Some(server) = &mut self.server else {
            return changed;
        };
        if !server.poll(&mut self.sockets) {
            return changed;
        }
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
        true
    }

    /// Returns when there is something to do at the latest, if nothing comes in before.
    pub fn poll_at(&mut self) -> Option<Instant> {
        self.interface.poll_at(self.time.now(), &self.sockets)
    }

    /// Polls, then lets time pass if there was nothing to do.
    pub fn turn(&mut self) {
        if !self.poll() && !(self.before_waiting)(&mut self.device) {
            let until = self.poll_at();
            self.time.pass(until);
        }
    }

    /// Takes turns until `step` gives something, or the other end has been silent for too long.
    fn wait<R>(
        &mut self,
        what: &str,
        mut step: impl FnMut(&mut Self) -> anyhow::Result<Progress<R>>,
    ) -> anyhow::Result<R> {
        let mut deadline = self.time.now() + PATIENCE;
        loop {
            let changed = self.poll();
            match step(self)? {
                Progress::Done(result) => return Ok(result),
                Progress::Some => deadline = self.time.now() + PATIENCE,
                Progress::None if self.time.now() > deadline => {
                    bail!("{what}: no answer within {} s", PATIENCE.secs())
                }
                Progress::None if !changed && !(self.before_waiting)(&mut self.device) => {
                    let until = self.poll_at().map_or(deadline, |until| until.min(deadline));
                    self.time.pass(Some(until));
                }
                Progress::None => {}
            }
        }
    }

    /// Takes an address by hand.
    ///
    /// # Errors
    ///
    /// The interface has no room for a route.
    pub fn set_address(
        &mut self,
        address: Ipv4Cidr,
        router: Option<Ipv4Address>,
    ) -> anyhow::Result<()> {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // A list of at least one was just emptied.
            let _ = addresses.push(IpCidr::Ipv4(address));
        });
        match router {
            Some(router) => {
                self.interface
                    .routes_mut()
                    .add_default_ipv4_route(router)
                    .context("cannot set a route")?;
            }
            None => {
                self.interface.routes_mut().remove_default_ipv4_route();
            }
        }
        Ok(())
    }

    /// Asks for an address by DHCP, and takes it.
    ///
    /// # Errors
    ///
    /// Nobody answers.
    pub fn dhcp(&mut self) -> anyhow::Result<Lease> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let lease = self.wait("DHCP", |stack| {
            let socket = stack.sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
            Ok(match socket.poll() {
                Some(dhcpv4::Event::Configured(config)) => Progress::Done(Lease {
                    address: config.address,
                    server: config.server.address,
                    router: config.router,
                }),
                Some(dhcpv4::Event::Deconfigured) | None => Progress::None,
            })
        });
        self.sockets.remove(handle);
        let lease = lease?;
        self.set_address(lease.address, lease.router)?;
        Ok(lease)
    }

    /// Sends `len` bytes to be echoed, and returns when they are back.
    ///
    /// # Errors
    ///
    /// * Nobody answers.
    /// * `len` is more than a frame holds.
    /// * What comes back is not what was sent.
    pub fn ping(&mut self, target: Ipv4Address, len: usize) -> anyhow::Result<()> {
        const IDENT: u16 = 0x6178;
        /// Of the headers of IPv4 and ICMP, in bytes.
        const HEADERS: usize = 28;

        let room = self.device.capabilities().ip_mtu().saturating_sub(HEADERS);
        ensure!(
            len <= room,
            "a ping of {len} bytes does not fit into a frame, {room} do"
        );
        let sequence = self.next_ping;
        self.next_ping = self.next_ping.wrapping_add(1);
        let payload: Vec<u8> = (0..len as u64)
            .map(|index| http::pattern(index + u64::from(sequence)))
            .collect();

        let buffer = || {
            icmp::PacketBuffer::new(
                vec![icmp::PacketMetadata::EMPTY; 4],
                vec![0; 4 * (len + HEADERS)],
            )
        };
        let handle = self.sockets.add(icmp::Socket::new(buffer(), buffer()));
        let result = self.ping_with(handle, target, IDENT, sequence, &payload);
        self.sockets.remove(handle);
        result.with_context(|| format!("cannot ping {target}"))
    }

    fn ping_with(
        &mut self,
        handle: SocketHandle,
        target: Ipv4Address,
        ident: u16,
        sequence: u16,
        payload: &[u8],
    ) -> anyhow::Result<()> {
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(handle);
        socket.bind(icmp::Endpoint::Ident(ident))?;
        let request = Icmpv4Repr::EchoRequest {
            ident,
            seq_no: sequence,
            data: payload,
        };
        let bytes = socket.send(request.buffer_len(), IpAddress::Ipv4(target))?;
        let checksums = ChecksumCapabilities::default();
        request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &checksums);
        self.wait("ping", |stack| {
            let socket = stack.sockets.get_mut::<icmp::Socket<'_>>(handle);
            while socket.can_recv() {
                let (bytes, _) = socket.recv()?;
                let packet = Icmpv4Packet::new_checked(bytes)?;
                if let Icmpv4Repr::EchoReply { seq_no, data, .. } =
                    Icmpv4Repr::parse(&packet, &checksums)?
                    && seq_no == sequence
                {
                    ensure!(data == payload, "other bytes came back than were sent");
                    return Ok(Progress::Done(()));
                }
            }
            Ok(Progress::None)
        })
    }

    /// Fetches a page by HTTP.
    ///
    /// # Errors
    ///
    /// As [`Stack::fetch`], and if the page has more than 16 MiB.
    pub fn get(&mut self, server: Ipv4Address, port: u16, path: &str) -> anyhow::Result<Page> {
        let mut body = Vec::new();
        let status = self.fetch(server, port, path, &mut |bytes| {
            ensure!(
                body.len() + bytes.len() <= MAX_PAGE,
                "the page has more than {MAX_PAGE} bytes"
            );
            body.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(Page { status, body })
    }

    /// Fetches a page by HTTP, and gives its parts to `sink` in order as they come. Returns the status.
    ///
    /// # Errors
    ///
    /// * Nobody answers, or the connection is refused or broken.
    /// * What comes is no response of HTTP/1, or is shorter or longer than it says.
    /// * `sink` fails.
    pub fn fetch(
        &mut self,
        server: Ipv4Address,
        port: u16,
        path: &str,
        sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<u16> {
        let local_port = self.next_port;
        self.next_port = self
            .next_port
            .checked_add(1)
            .unwrap_or(*Self::EPHEMERAL_PORTS.start());
        let handle = self.sockets.add(http::socket());
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        let result = match socket.connect(self.interface.context(), (server, port), local_port) {
            Ok(()) => self.fetch_with(handle, &http::request(&server.to_string(), path), sink),
            Err(error) => Err(error.into()),
        };
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).abort();
        self.poll();
        self.sockets.remove(handle);
        result.with_context(|| format!("cannot fetch http://{server}:{port}{path}"))
    }

    fn fetch_with(
        &mut self,
        handle: SocketHandle,
        request: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<u16> {
        let mut unsent = request;
        let mut head_bytes = Vec::new();
        let mut head: Option<http::Head> = None;
        let mut received = 0_u64;
        self.wait("HTTP", |stack| {
            let socket = stack.sockets.get_mut::<tcp::Socket<'_>>(handle);
            let mut progress = Progress::None;
            if socket.can_send() && !unsent.is_empty() {
                unsent = &unsent[socket.send_slice(unsent)?..];
                progress = Progress::Some;
            }
            while socket.can_recv() {
                progress = Progress::Some;
                socket.recv(|bytes| {
                    let taken = bytes.len();
                    let mut take = || {
                        let Some(_) = head else {
                            head_bytes.extend_from_slice(bytes);
                            head = http::Head::parse(&head_bytes)?;
                            let Some(http::Head { len, .. }) = head else {
                                return Ok(());
                            };
                            received += (head_bytes.len() - len) as u64;
                            return sink(&head_bytes[len..]);
                        };
                        received += taken as u64;
                        sink(bytes)
                    };
                    (taken, take())
                })??;
            }
            if socket.may_recv()
                || matches!(
                    socket.state(),
                    tcp::State::SynSent | tcp::State::SynReceived
                )
            {
                return Ok(progress);
            }
            let Some(http::Head {
                status,
                content_length,
                ..
            }) = head
            else {
                bail!("the connection was closed before a response came");
            };
            if let Some(length) = content_length {
                ensure!(
                    length == received,
                    "the page has {received} bytes, its head says {length}"
                );
            }
            Ok(Progress::Done(status))
        })
    }
}

/// What a step of an operation did.
enum Progress<R> {
    /// Nothing.
    None,
    /// Something: the other end is alive.
    Some,
    /// The last thing.
    Done(R),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        peer::{Peer, ROUTER, tests::Cable},
        time::SimulatedClock,
    };

    const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x11];

    fn stack(lose: impl FnMut(u64) -> bool + 'static) -> Stack<Cable, SimulatedClock> {
        let clock = SimulatedClock::new();
        Stack::new(
            Cable::new(Peer::new(clock.clone(), "a page"), lose),
            MAC,
            clock,
        )
    }

    #[test]
    fn an_address_and_a_page_are_fetched() {
        let mut stack = stack(|_| false);
        let lease = stack.dhcp().unwrap();
        assert_eq!(lease.address.to_string(), "10.0.2.15/24");
        assert_eq!(lease.router, Some(ROUTER));
        let page = stack.get(ROUTER, http::PORT, "/").unwrap();
        assert_eq!(
            page,
            Page {
                status: 200,
                body: b"a page".to_vec()
            }
        );
        assert_eq!(stack.get(ROUTER, http::PORT, "/other").unwrap().status, 404);
    }

    #[test]
    fn pings_of_each_size_that_fits_a_frame_come_back() {
        let mut stack = stack(|_| false);
        stack.dhcp().unwrap();
        for len in [0, 1, 56, 1472] {
            stack.ping(ROUTER, len).unwrap();
        }
        assert!(stack.ping(ROUTER, 1473).is_err());
    }

    #[test]
    fn a_long_page_arrives_whole() {
        let mut stack = stack(|_| false);
        stack.dhcp().unwrap();
        let mut received = 0;
        let mut sink = |bytes: &[u8]| {
            http::check_pattern(received, bytes)?;
            received += bytes.len() as u64;
            Ok(())
        };
        assert_eq!(
            stack
                .fetch(ROUTER, http::PORT, "/bytes/1000003", &mut sink)
                .unwrap(),
            200
        );
        assert_eq!(received, 1_000_003);
    }

    #[test]
    fn lost_frames_are_sent_again() {
        let mut stack = stack(|frame| frame % 7 == 3);
        stack.dhcp().unwrap();
        assert_eq!(
            stack
                .get(ROUTER, http::PORT, "/bytes/100000")
                .unwrap()
                .body
                .len(),
            100_000
        );
    }

    #[test]
    fn a_dead_cable_is_an_error_and_not_a_hang() {
        let mut stack = stack(|_| true);
        let error = stack.dhcp().unwrap_err();
        assert!(error.to_string().contains("no answer"), "{error}");
        stack
            .set_address(Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 9), 24), None)
            .unwrap();
        assert!(stack.ping(ROUTER, 8).is_err());
        assert!(stack.get(ROUTER, http::PORT, "/").is_err());
    }

    #[test]
    fn a_closed_port_is_an_error() {
        let mut stack = stack(|_| false);
        stack.dhcp().unwrap();
        let error = stack.get(ROUTER, 81, "/").unwrap_err();
        assert!(format!("{error:#}").contains("closed before"), "{error:#}");
    }

    #[test]
    fn a_page_that_the_sink_refuses_leaves_the_stack_usable() {
        let mut stack = stack(|_| false);
        stack.dhcp().unwrap();
        assert!(
            stack
                .fetch(ROUTER, http::PORT, "/bytes/90000", &mut |_| bail!("enough"))
                .is_err()
        );
        assert_eq!(stack.get(ROUTER, http::PORT, "/").unwrap().status, 200);
    }
}
