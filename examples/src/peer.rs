//! The other end of the cable: a host that gives addresses by DHCP, answers pings and serves pages.

use std::collections::VecDeque;

use smoltcp::{
    iface::{Config, Interface, PollResult, SocketHandle, SocketSet},
    phy::{self, Device, DeviceCapabilities, Medium},
    socket::udp,
    time::Instant,
    wire::{
        DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, IpAddress, IpCidr, IpEndpoint,
        IpListenEndpoint, Ipv4Address,
    },
};

use crate::{
    http,
    time::{SimulatedClock, Time},
};

/// The address of the peer, which is also the way out of its network.
pub const ROUTER: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);

/// The address that the first client is given. The following ones get the following ones.
const FIRST_LEASE: u8 = 15;

/// The last number of a leased address.
const LAST_LEASE: u8 = 254;

const PREFIX: u8 = 24;
const NETMASK: Ipv4Address = Ipv4Address::new(255, 255, 255, 0);
const MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// The most bytes of an Ethernet frame, without its check sequence.
const MAX_FRAME: usize = 1514;

/// A host that lives from the frames it is given, and never waits.
pub struct Peer {
    ports: Ports,
    clock: SimulatedClock,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: DhcpServer,
    http: http::Server,
}

impl Peer {
    /// Makes a host that serves `page` and whose timers follow `clock`.
    #[must_use]
    pub fn new(clock: SimulatedClock, page: impl Into<Vec<u8>>) -> Self {
        let mut ports = Ports::default();
        let mut interface = Interface::new(
            Config::new(EthernetAddress(MAC).into()),
            &mut ports,
            clock.now(),
        );
        interface.update_ip_addrs(|addresses| {
            // A list of at least one is empty at first.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(ROUTER), PREFIX));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = DhcpServer::new(&mut sockets);
        let http = http::Server::new(&mut sockets, page);
        let mut peer = Self {
            ports,
            clock,
            interface,
            sockets,
            dhcp,
            http,
        };
        peer.poll();
        peer
    }

    /// Takes a frame from the cable, and does what it asks for. Too large a frame is lost.
    pub fn receive(&mut self, frame: &[u8]) {
        if frame.len() <= MAX_FRAME {
            self.ports.incoming.push_back(frame.to_vec());
            self.poll();
        }
    }

    /// Returns the next frame to put on the cable.
    pub fn take_frame(&mut self) -> Option<Vec<u8>> {
        self.ports.outgoing.pop_front()
    }

    /// Does what the clock asks for.
    pub fn poll(&mut self) {
        loop {
            let polled = self
                .interface
                .poll(self.clock.now(), &mut self.ports, &mut self.sockets);
            let dhcp = self.dhcp.poll(&mut self.sockets);
            let http = self.http.poll(&mut self.sockets);
            if polled == PollResult::None && !dhcp && !http {
                break;
            }
        }
    }

    /// Returns how many requests for pages were answered.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.http.served()
    }
}

/// Gives each client an address of its own.
struct DhcpServer {
    socket: SocketHandle,
    /// The client at index `i` has the address `FIRST_LEASE + i`.
    clients: Vec<EthernetAddress>,
}

impl DhcpServer {
    const SERVER_PORT: u16 = 67;
    const CLIENT_PORT: u16 = 68;
    /// In seconds.
    const LEASE: u32 = 86_400;

    fn new(sockets: &mut SocketSet<'_>) -> Self {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        if let Err(error) = socket.bind(IpListenEndpoint::from(Self::SERVER_PORT)) {
            log::warn!("no DHCP server: {error}");
        }
        Self {
            socket: sockets.add(socket),
            clients: Vec::new(),
        }
    }

    /// Answers what has come in. Returns whether that was anything.
    fn poll(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        let socket = sockets.get_mut::<udp::Socket<'_>>(self.socket);
        let mut request = [0; MAX_FRAME];
        let mut answered = false;
        while let Ok((len, _)) = socket.recv_slice(&mut request) {
            let Some(reply) = self.reply(&request[..len]) else {
                continue;
            };
            let target =
                IpEndpoint::new(IpAddress::Ipv4(Ipv4Address::BROADCAST), Self::CLIENT_PORT);
            answered |= socket.send_slice(&reply, target).is_ok();
        }
        answered
    }

    /// Returns the answer to a request; to something else, `None`.
    fn reply(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let packet = DhcpPacket::new_checked(bytes).ok()?;
        let request = DhcpRepr::parse(&packet).ok()?;
        let message_type = match request.message_type {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            DhcpMessageType::Request
                if request
                    .server_identifier
                    .is_none_or(|server| server == ROUTER) =>
            {
                DhcpMessageType::Ack
            }
            _ => return None,
        };
        let address = self.lease(request.client_hardware_address)?;
        let reply = DhcpRepr {
            message_type,
            your_ip: address,
            server_ip: ROUTER,
            client_ip: Ipv4Address::UNSPECIFIED,
            router: Some(ROUTER),
            subnet_mask: Some(NETMASK),
            server_identifier: Some(ROUTER),
            lease_duration: Some(Self::LEASE),
            requested_ip: None,
            client_identifier: None,
            parameter_request_list: None,
            max_size: None,
            ..request
        };
        let mut reply_bytes = vec![0; reply.buffer_len()];
        reply
            .emit(&mut DhcpPacket::new_unchecked(&mut reply_bytes))
            .ok()?;
        Some(reply_bytes)
    }

    /// Returns the address of a client; `None` if all are taken.
    fn lease(&mut self, client: EthernetAddress) -> Option<Ipv4Address> {
        let index = self
            .clients
            .iter()
            .position(|known| *known == client)
            .unwrap_or(self.clients.len());
        let number = u8::try_from(index)
            .ok()?
            .checked_add(FIRST_LEASE)
            .filter(|number| *number <= LAST_LEASE)?;
        if index == self.clients.len() {
            self.clients.push(client);
        }
        Some(Ipv4Address::new(10, 0, 2, number))
    }
}

/// The peer's own NIC: two lists of frames.
#[derive(Default)]
struct Ports {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

pub(crate) struct Incoming(Vec<u8>);

struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Ports {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        Some((
            Incoming(self.incoming.pop_front()?),
            Outgoing(&mut self.outgoing),
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        capabilities
    }
}

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A NIC whose cable ends at a peer, and loses frames on request.
    pub(crate) struct Cable {
        peer: Peer,
        lose: Box<dyn FnMut(u64) -> bool>,
        frames: u64,
    }

    impl Cable {
        pub(crate) fn new(peer: Peer, lose: impl FnMut(u64) -> bool + 'static) -> Self {
            Self {
                peer,
                lose: Box::new(lose),
                frames: 0,
            }
        }
    }

    pub(crate) struct ToPeer<'a>(&'a mut Cable);

    impl Device for Cable {
        type RxToken<'a> = Incoming;
        type TxToken<'a> = ToPeer<'a>;

        fn receive(&mut self, _now: Instant) -> Option<(Incoming, ToPeer<'_>)> {
            self.peer.poll();
            Some((Incoming(self.peer.take_frame()?), ToPeer(self)))
        }

        fn transmit(&mut self, _now: Instant) -> Option<ToPeer<'_>> {
            Some(ToPeer(self))
        }

        fn capabilities(&self) -> DeviceCapabilities {
            self.peer.ports.capabilities()
        }
    }

    impl phy::TxToken for ToPeer<'_> {
        fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
            let mut frame = vec![0; len];
            let result = f(&mut frame);
            self.0.frames += 1;
            if !(self.0.lose)(self.0.frames) {
                self.0.peer.receive(&frame);
            }
            result
        }
    }

    #[test]
    fn each_client_gets_an_address_of_its_own_and_keeps_it() {
        let mut server = DhcpServer::new(&mut SocketSet::new(Vec::new()));
        let client = |number: u8| EthernetAddress([2, 0, 0, 0, 0, number]);
        assert_eq!(
            server.lease(client(1)),
            Some(Ipv4Address::new(10, 0, 2, 15))
        );
        assert_eq!(
            server.lease(client(2)),
            Some(Ipv4Address::new(10, 0, 2, 16))
        );
        assert_eq!(
            server.lease(client(1)),
            Some(Ipv4Address::new(10, 0, 2, 15))
        );
        for number in 3..=240 {
            assert!(server.lease(client(number)).is_some());
        }
        assert_eq!(server.lease(client(241)), None);
        assert!(server.lease(client(2)).is_some());
    }

    #[test]
    fn frames_of_rubbish_are_ignored() {
        let mut peer = Peer::new(SimulatedClock::new(), "a page");
        peer.receive(&[]);
        peer.receive(&[0xff; 13]);
        peer.receive(&[0xff; 1514]);
        peer.receive(&[0xff; 9000]);
        assert!(peer.take_frame().is_none());
        let mut server = DhcpServer::new(&mut SocketSet::new(Vec::new()));
        assert_eq!(server.reply(&[0; 300]), None);
    }
}
