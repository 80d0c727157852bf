//! Two NICs on a cable, with ping times and throughput; or one NIC that answers whoever is at the other end.

use std::{
    net::Ipv4Addr,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use axdriver_net::{NetDriverOps, smoltcp::SmoltcpDevice};
use clap::Parser;
use examples::{
    board::{Board, BoardArgs, Device, FarEnd, Place},
    http,
    report::{self, Durations},
    say,
    stack::Stack,
    time::Time,
};
use machine::Machine;
use smoltcp::{time::Instant as NetworkInstant, wire::Ipv4Cidr};

/// Drives virtio NICs.
///
/// Two NICs are joined by a cable, each with a network stack of its own: ping times and the throughput of TCP are
/// measured. With --tap, or with --board vhost-user and one socket, a NIC answers whoever is at the other end.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    board: BoardArgs,

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
    #[arg(long, value_name = "NAME", conflicts_with = "socket")]
    tap: Option<String>,

    /// The address to answer under.
    #[arg(long, value_name = "ADDRESS/PREFIX", default_value = "192.168.69.1/24", value_parser = parse_address)]
    address: Ipv4Cidr,

    /// Answers for so many seconds. Without it, Ctrl-C ends.
    #[arg(long, value_name = "COUNT")]
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
    report::run(|| match (&args.tap, args.board.socket.as_slice()) {
        (Some(name), _) => serve(&args, FarEnd::Tap(name.clone()), name),
        (None, [socket]) => {
            let name = socket.display().to_string();
            serve(&args, FarEnd::Elsewhere, &name)
        }
        _ => measure(&args),
    })
}

type NicStack<T> = Stack<SmoltcpDevice<Box<dyn NetDriverOps>>, T>;

/// A NIC of a board, with a network stack.
struct Host {
    place: Place,
    stack: NicStack<Box<dyn Time>>,
}

/// Starts the NICs of a board.
fn start_hosts(board: &dyn Board) -> anyhow::Result<Vec<Host>> {
    let map = board.map();
    let mut hosts = Vec::new();
    for found in map.probe() {
        let nic = map.start_nic(&found.place)?;
        let mac = nic.mac_address();
        say!(
            "{} over {} at {}: {mac}",
            nic.device_name(),
            found.transport,
            found.place
        )?;
        let time = board.network_time(&found.place)?;
        hosts.push(Host {
            place: found.place,
            stack: Stack::new(SmoltcpDevice::new(nic), mac.0, time),
        });
    }
    Ok(hosts)
}

/// A clock that stands while the other host has something to do.
struct OtherHost {
    time: Box<dyn Time>,
    host: NicStack<Box<dyn Time>>,
}

impl Time for OtherHost {
    fn now(&self) -> NetworkInstant {
        self.time.now()
    }

    fn pass(&mut self, until: Option<NetworkInstant>) {
        if !self.host.poll() {
            let until = [until, self.host.poll_at()].into_iter().flatten().min();
            self.time.pass(until);
        }
    }
}

/// Measures between two NICs on a cable.
fn measure(args: &Args) -> anyhow::Result<()> {
    const PREFIX: u8 = 24;
    const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    let board = args
        .board
        .start([Device::Nic(FarEnd::OtherNic), Device::Nic(FarEnd::OtherNic)])?;
    let mut hosts = start_hosts(board.as_ref())?;
    let Host { stack, .. } = hosts.pop().context("the second NIC is not found")?;
    let mut there = stack;
    there.set_address(Ipv4Cidr::new(THERE, PREFIX), None)?;
    there.serve(PAGE);
    let Host { place, stack } = hosts.pop().context("the first NIC is not found")?;
    let time = OtherHost {
        time: board.network_time(&place)?,
        host: there,
    };
    let mut here = stack.with_time(time);
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
    let before = (board.work(&place), register_writes());
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
    let after = (board.work(&place), register_writes());
    let mut details = String::new();
    if let (Some(before), Some(after)) = (before.0, after.0) {
        let (frames, dropped) = (after.done - before.done, after.dropped);
        details = format!("; {frames} frames, {dropped} frames dropped");
    }
    if after.1 > before.1 {
        details += &format!("; {} register writes", after.1 - before.1);
    }
    say!(
        "{} over TCP: {}{details}",
        report::size(received),
        report::rate(received, elapsed)
    )?;
    Ok(())
}

/// Returns how many registers were written so far.
fn register_writes() -> u64 {
    Machine::current().map_or(0, |machine| machine.accesses().writes)
}

/// Answers whoever is at the other end of the cable.
fn serve(args: &Args, far_end: FarEnd, name: &str) -> anyhow::Result<()> {
    let board = args.board.start([Device::Nic(far_end)])?;
    let mut hosts = start_hosts(board.as_ref())?;
    let Host { place, mut stack } = hosts.pop().context("the NIC is not found")?;
    stack.set_address(args.address, None)?;
    stack.serve(PAGE);
    say!(
        "answering pings and http://{}/ on {name}; the other end needs an address in that network",
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
        board.check().with_context(|| name.to_owned())?;
    }
    if let Some(work) = board.work(&place) {
        say!("{} frames sent and received", work.done)?;
    }
    Ok(())
}
