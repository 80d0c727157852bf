//! Two NICs on a cable, with ping times and throughput; or one NIC whose cable ends at a TAP interface of the host.

use std::{
    net::Ipv4Addr,
    process::ExitCode,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use axdriver_net::{NetDriverOps, smoltcp::SmoltcpDevice};
use clap::Parser;
use examples::{
    board::{Map, Transport},
    http,
    report::{self, Durations},
    say,
    stack::Stack,
    tap::Tap,
    time::{HostClock, SimulatedClock, Time},
};
use machine::{Board, Cable, Nic};
use smoltcp::{time::Instant as NetworkInstant, wire::Ipv4Cidr};

/// Drives virtio NICs.
///
/// Without --tap, two NICs are joined by a cable, each with a network stack of its own: ping times and the throughput of
/// TCP are measured.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// How the NICs are joined to the board.
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,

    /// How many pings of each size to send.
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 1000,
        conflicts_with = "tap"
    )]
    pings: u32,

    /// How much to fetch by HTTP, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, conflicts_with = "tap")]
    fetch: u32,

    /// Joins a TAP interface of the host instead, and answers its pings and its requests for pages.
    #[arg(long, value_name = "NAME")]
    tap: Option<String>,

    /// The address to answer under, with --tap.
    #[arg(long, value_name = "ADDRESS/PREFIX", default_value = "192.168.69.1/24", value_parser = parse_address)]
    address: Ipv4Cidr,

    /// Ends after so many seconds, with --tap. Without it, Ctrl-C ends.
    #[arg(long, value_name = "COUNT", requires = "tap")]
    seconds: Option<u64>,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn parse_address(text: &str) -> Result<Ipv4Cidr, String> {
    let parts = text.split_once('/').and_then(|(address, prefix)| {
        let (address, prefix) = (
            address.parse::<Ipv4Addr>().ok()?,
            prefix.parse::<u8>().ok()?,
        );
        (prefix <= 32).then(|| Ipv4Cidr::new(address, prefix))
    });
    parts.ok_or_else(|| "an address looks like 192.168.69.1/24".to_owned())
}

const PAGE: &str = "<!doctype html>\n<title>axdriver</title>\n<p>This page came through a virtio network card.</p>\n";

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| match &args.tap {
        Some(name) => serve_tap(&args, name),
        None => measure(&args),
    })
}

type NicStack<T> = Stack<SmoltcpDevice<Box<dyn NetDriverOps>>, T>;

/// Starts the NICs of a board, each with a network stack.
fn start_stacks<T: Time>(
    map: &Map,
    mut time: impl FnMut() -> T,
) -> anyhow::Result<Vec<NicStack<T>>> {
    let mut stacks = Vec::new();
    for found in map.probe() {
        let nic = map.start_nic(found.place)?;
        let mac = nic.mac_address();
        say!(
            "{} over {} at {}: {mac}",
            nic.device_name(),
            found.transport,
            found.place
        )?;
        stacks.push(Stack::new(SmoltcpDevice::new(nic), mac.0, time()));
    }
    Ok(stacks)
}

/// A clock that stands while the other host has something to do.
struct OtherHost {
    clock: SimulatedClock,
    host: NicStack<SimulatedClock>,
}

impl Time for OtherHost {
    fn now(&self) -> NetworkInstant {
        self.clock.now()
    }

    fn pass(&mut self, until: Option<NetworkInstant>) {
        if !self.host.poll() {
            let until = [until, self.host.poll_at()].into_iter().flatten().min();
            self.clock.advance(until);
        }
    }
}

/// Measures between two NICs on a cable.
fn measure(args: &Args) -> anyhow::Result<()> {
    const PREFIX: u8 = 24;
    const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    let [one, other] = [1, 2].map(|number| Nic::new([0x02, 0, 0, 0, 0, number]));
    Cable::join(&one, &other);
    let builder = args.transport.plug(Board::emulated().without_watch(), &one);
    let board = args
        .transport
        .plug(builder, &other)
        .build()
        .context("cannot have the memory of an emulated board")?;
    let map = Map::from(&board);
    let clock = SimulatedClock::new();

    let mut stacks = start_stacks(&map, || clock.clone())?;
    let mut there = stacks.pop().context("the second NIC is not found")?;
    there.set_address(Ipv4Cidr::new(THERE, PREFIX), None)?;
    there.serve(PAGE);
    let here = stacks.pop().context("the first NIC is not found")?;
    let mut here = here.with_time(OtherHost { clock, host: there });
    here.set_address(Ipv4Cidr::new(HERE, PREFIX), None)?;

    for len in [56, 1472] {
        let mut times = Durations::default();
        for _ in 0..args.pings {
            let start = Instant::now();
            here.ping(THERE, len)?;
            times.add_since(start);
        }
        say!("{} pings of {len} bytes: {times}", args.pings)?;
    }

    let bytes = u64::from(args.fetch) << 20;
    let bar = report::progress(bytes, "fetching");
    let before = (one.counters(), board.machine().accesses());
    let mut received = 0;
    let start = Instant::now();
    let status = here.fetch(THERE, http::PORT, &format!("/bytes/{bytes}"), &mut |part| {
        http::check_pattern(received, part)?;
        received += part.len() as u64;
        bar.set_position(received);
        Ok(())
    })?;
    let elapsed = start.elapsed();
    bar.finish_and_clear();
    ensure!(status == 200, "the page is answered with status {status}");
    let (counters, accesses) = (one.counters(), board.machine().accesses());
    let frames = counters.sent - before.0.sent + counters.received - before.0.received;
    let writes = accesses.writes - before.1.writes;
    say!(
        "{} over TCP: {}; {frames} frames, {writes} register writes, {} frames dropped",
        report::size(received),
        report::rate(received, elapsed),
        counters.dropped
    )?;
    Ok(())
}

/// The other end of a NIC's cable at the host.
struct TapPeer {
    tap: Tap,
    /// Why frames no longer pass.
    error: Option<std::io::Error>,
}

impl machine::Peer for TapPeer {
    fn receive(&mut self, frame: &[u8]) {
        if let Err(error) = self.tap.send(frame) {
            self.error = Some(error);
        }
    }

    fn transmit(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1514];
        match self.tap.receive(&mut frame) {
            Ok(Some(length)) => {
                frame.truncate(length);
                Some(frame)
            }
            Ok(None) => None,
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }
}

/// The host's clock, which lets the board look at its cables as it goes.
struct TapTime {
    clock: HostClock,
    board: Rc<Board>,
}

impl Time for TapTime {
    fn now(&self) -> NetworkInstant {
        self.clock.now()
    }

    fn pass(&mut self, until: Option<NetworkInstant>) {
        self.clock.pass(until);
        self.board.run();
    }
}

/// Answers what comes over a TAP interface.
fn serve_tap(args: &Args, name: &str) -> anyhow::Result<()> {
    let tap = Tap::open(name)?;
    let nic = Nic::new([0x02, 0, 0, 0, 0, 1]);
    let peer: Arc<Mutex<TapPeer>> = nic.attach(TapPeer { tap, error: None });
    let board = args.transport.plug(Board::emulated(), &nic).build();
    let board = Rc::new(board.context("cannot have the memory of an emulated board")?);
    let map = Map::from(&*board);
    let time = || TapTime {
        clock: HostClock,
        board: board.clone(),
    };
    let mut stack = start_stacks(&map, time)?
        .pop()
        .context("the NIC is not found")?;
    stack.set_address(args.address, None)?;
    stack.serve(PAGE);
    say!(
        "answering pings and http://{}/ on {name}; the host needs an address in that network",
        args.address.address()
    )?;

    let end = args
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut served = 0;
    while end.is_none_or(|end| Instant::now() < end) {
        stack.turn();
        if stack.served() > served {
            served = stack.served();
            say!("served {served} pages")?;
        }
        let error = peer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .error
            .take();
        if let Some(error) = error {
            // A frame for an interface that is down is lost, as on a cable that is not plugged in.
            ensure!(error.raw_os_error() == Some(libc::EIO), "{name}: {error}");
        }
    }
    say!(
        "{} frames sent, {} received",
        nic.counters().sent,
        nic.counters().received
    )?;
    Ok(())
}
