//! What is done with a network card: an address by DHCP, a page by HTTP, and an echo server.

use alloc::{format, string::String, vec, vec::Vec};
use core::time::Duration;

use axdriver_net::{NetDriverOps, smoltcp::SmoltcpDevice};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use crate::arch::{Arch, Architecture};
use crate::checksum::checksum;
use crate::devices::Nic;
use crate::error::{Error, Result};
use crate::{interrupts, println};

/// Where the page is: QEMU passes connections to this address on.
const SERVER: (Ipv4Address, u16) = (Ipv4Address::new(10, 0, 2, 100), 80);
/// The port that every byte comes back from (RFC 862).
const ECHO: u16 = 7;
/// How long each step may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a sleep may last until a look whether a frame is there without its interrupt.
const WATCH: Duration = Duration::from_millis(500);
const BUFFER: usize = 32 * 1024;

/// A host on the network: smoltcp over any network card.
struct Host<'a> {
    device: SmoltcpDevice<&'a mut (dyn Nic + 'static)>,
    /// The card's interrupts.
    source: usize,
    interface: Interface,
    sockets: SocketSet<'static>,
}

/// Gets an address, gets a page, serves echoes to one visitor. Says what came of it.
///
/// # Errors
///
/// * [`Error::Device`]: the card failed.
/// * [`Error::Late`]: an answer, or an interrupt, did not come.
/// * [`Error::Wrong`]: the page is none.
pub(crate) fn work(nic: &mut (dyn Nic + 'static), source: usize) -> Result<String> {
    let address = EthernetAddress(nic.mac_address().0);
    let mut device = SmoltcpDevice::new(nic);
    let mut config = Config::new(address.into());
    // Spreads sequence numbers; a kernel with a source of randomness takes that.
    config.random_seed = Arch::now().subsec_nanos().into();
    let interface = Interface::new(config, &mut device, now());
    let mut host = Host {
        device,
        source,
        interface,
        sockets: SocketSet::new(vec![]),
    };
    let own = host.configure()?;
    println!("net: {own} by DHCP");
    let page = host.fetch()?;
    println!(
        "net: page of {} bytes, sum {:08x}",
        page.len(),
        checksum(&page)
    );
    let echoed = host.echo()?;
    Ok(format!(
        "{own}, fetched {} bytes, echoed {echoed} bytes",
        page.len()
    ))
}

fn now() -> Instant {
    Instant::from_micros(i64::try_from(Arch::now().as_micros()).unwrap_or(i64::MAX))
}

impl Host<'_> {
    /// Lets packets come and go until `done` returns something, asleep while there are none.
    fn until<R>(
        &mut self,
        late: &'static str,
        mut done: impl FnMut(&mut Interface, &mut SocketSet<'static>) -> Result<Option<R>>,
    ) -> Result<R> {
        let deadline = Arch::now() + PATIENCE;
        loop {
            // Before the look at the device, so that an interrupt that comes after it is seen.
            let seen = interrupts::count();
            self.interface
                .poll(now(), &mut self.device, &mut self.sockets);
            if let Some(result) = done(&mut self.interface, &mut self.sockets)? {
                // What was put into a socket leaves with the next poll.
                return Ok(result);
            }
            if Arch::now() >= deadline {
                return Err(Error::Late(late));
            }
            let nic = self.device.driver_mut();
            if interrupts::take_changed(self.source) && nic.reconfigure().is_ok() {
                let state = match nic.capabilities().link {
                    Some(true) => "up",
                    Some(false) => "down",
                    None => "not known",
                };
                println!("net: the link is {state}");
            }
            let more = nic
                .enable_interrupts()
                .map_err(|error| Error::Device("the network card", error))?;
            let delay = self.interface.poll_delay(now(), &self.sockets);
            let delay = delay.map_or(PATIENCE, Duration::from);
            if more || delay.is_zero() {
                continue;
            }
            let interrupted = interrupts::sleep_until(seen, Arch::now() + delay.min(WATCH));
            if !interrupted
                && self.device.driver().can_receive()
                && !interrupts::sleep_until(seen, Arch::now() + interrupts::GRACE)
            {
                return Err(Error::Late("the interrupt of a frame"));
            }
        }
    }

    /// Gets an address.
    fn configure(&mut self) -> Result<IpCidr> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        self.until("a DHCP server", |interface, sockets| {
            let event = sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
            let Some(dhcpv4::Event::Configured(lease)) = event else {
                return Ok(None);
            };
            let own = IpCidr::Ipv4(lease.address);
            interface.update_ip_addrs(|addresses| {
                addresses.clear();
                // There is room for one.
                let _ = addresses.push(own);
            });
            if let Some(router) = lease.router {
                interface
                    .routes_mut()
                    .add_default_ipv4_route(router)
                    .map_err(|_| Error::Memory("a route"))?;
            }
            Ok(Some(own))
        })
    }

    fn add_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    /// Gets the page `/`.
    fn fetch(&mut self) -> Result<Vec<u8>> {
        let handle = self.add_socket();
        self.sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .connect(self.interface.context(), SERVER, 49152)
            .map_err(|_| Error::Wrong("the connection"))?;
        let mut requested = false;
        let mut answer = Vec::new();
        self.until("the page", |_, sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            if !requested && socket.can_send() {
                let request = b"GET / HTTP/1.0\r\nHost: 10.0.2.100\r\n\r\n";
                requested = socket.send_slice(request) == Ok(request.len());
            }
            while socket.can_recv() {
                let taken = socket.recv(|bytes| {
                    answer.extend_from_slice(bytes);
                    (bytes.len(), ())
                });
                if taken.is_err() {
                    break;
                }
            }
            if requested && !socket.may_recv() {
                socket.close();
                return Ok(Some(()));
            }
            Ok(None)
        })?;
        page(&answer)
    }

    /// Sends one visitor everything back, and returns how many bytes that was.
    fn echo(&mut self) -> Result<usize> {
        let handle = self.add_socket();
        self.sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .listen(ECHO)
            .map_err(|_| Error::Wrong("the port"))?;
        println!("net: echo on port {ECHO}");
        let mut echoed = 0;
        self.until("a visitor", |_, sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            while socket.can_recv() && socket.can_send() {
                let room = socket.send_capacity() - socket.send_queue();
                let bytes = socket.recv(|bytes| {
                    let count = bytes.len().min(room);
                    (count, bytes[..count].to_vec())
                });
                let Ok(bytes) = bytes else {
                    break;
                };
                echoed += socket.send_slice(&bytes).unwrap_or(0);
            }
            if echoed > 0 && !socket.may_recv() {
                socket.close();
            }
            // Until the visitor has it all.
            Ok((!socket.is_open() || socket.state() == tcp::State::TimeWait).then_some(()))
        })?;
        Ok(echoed)
    }
}

/// Takes the page out of an answer.
fn page(answer: &[u8]) -> Result<Vec<u8>> {
    let text = |bytes| core::str::from_utf8(bytes).unwrap_or_default();
    let end = answer
        .windows(4)
        .position(|bytes| bytes == b"\r\n\r\n")
        .ok_or(Error::Wrong("the page has no head"))?;
    let mut lines = text(&answer[..end]).split("\r\n");
    if lines.next() != Some("HTTP/1.0 200 OK") {
        return Err(Error::Wrong("the page is refused"));
    }
    let length = lines
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .and_then(|length| length.parse::<usize>().ok());
    let page = &answer[end + 4..];
    if length != Some(page.len()) {
        return Err(Error::Wrong("the page is not as long as it says"));
    }
    Ok(page.to_vec())
}
