//! Finds a disk, a NIC and a display on each bus of a board, and has each do real work.

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, anyhow, ensure};
use axdriver_base::DeviceType;
use clap::Parser;
use embedded_graphics::Drawable;
use examples::{
    board::{Board, BoardKind, Found, Map},
    http,
    image::Image,
    picture::TestCard,
    report::{self, Table},
    say, work,
};

/// Finds virtio devices over MMIO and PCI, and has them do real work: files on the disks, a page over the NICs, a picture
/// on the displays.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The board that the devices are on.
    #[arg(long, value_enum, default_value_t = BoardKind::Emulated)]
    board: BoardKind,

    /// Where the pictures of the displays are saved.
    #[arg(long, value_name = "DIR", default_value = "target/tour")]
    out: PathBuf,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// What the host at the other end of each cable serves.
const PAGE: &str = "<!doctype html>\n<title>axdriver</title>\n<p>This page came through a virtio network card.</p>\n";

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| tour(&args))
}

fn tour(args: &Args) -> anyhow::Result<()> {
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    let mut summary = Vec::new();
    for variant in args.board.variants() {
        let plan = variant.everything(PAGE.as_bytes());
        let board = args.board.start(&plan)?;
        visit(board.as_ref(), args, &mut summary)?;
    }
    let failed = summary.iter().filter(|(_, result)| result.is_err()).count();
    let width = summary
        .iter()
        .map(|(device, _)| device.len())
        .max()
        .unwrap_or(0);
    for (device, result) in &summary {
        match result {
            Ok(()) => say!("{device:width$}  ok")?,
            Err(error) => say!("{device:width$}  FAILED: {error:#}")?,
        }
    }
    ensure!(failed == 0, "{failed} of {} devices failed", summary.len());
    Ok(())
}

/// A device in words, and whether it did its work.
type Outcome = (String, anyhow::Result<()>);

/// Finds the devices of a board, and has each do its work.
fn visit(board: &dyn Board, args: &Args, summary: &mut Vec<Outcome>) -> anyhow::Result<()> {
    let map = board.map();
    let found = map.probe();
    let mut table = Table::new(["transport", "place", "type", "name", "what it has"]);
    let mut devices = Vec::new();
    for device in found {
        let (kind, name) = (kind(device.device_type), device.transport);
        match map.describe(&device) {
            Ok(description) => {
                let place = device.place.to_string();
                table.row([
                    name.to_owned(),
                    place,
                    kind.to_owned(),
                    description.name,
                    description.size,
                ]);
                devices.push(device);
            }
            Err(error) => summary.push((format!("{kind} over {name}"), Err(error))),
        }
    }
    say!("{}\n\n{table}", board.title())?;
    for device in devices {
        let name = format!("{} over {}", kind(device.device_type), device.transport);
        let start = Instant::now();
        let result = match device.device_type {
            DeviceType::Block => work::keep_files(&mut || map.start_disk(&device.place)),
            DeviceType::Net => fetch(board, &map, &device),
            _ => show(board, &map, &device, args),
        };
        if let Ok(done) = &result {
            say!("{name}: {done} ({:.0?})", start.elapsed())?;
        }
        summary.push((name, result.map(drop)));
    }
    let complaints = board.complaints();
    if !complaints.is_empty() {
        summary.push((
            board.title().to_owned(),
            Err(anyhow!(complaints.join("; "))),
        ));
    }
    say!("")?;
    Ok(())
}

fn kind(device_type: DeviceType) -> &'static str {
    match device_type {
        DeviceType::Block => "disk",
        DeviceType::Net => "NIC",
        DeviceType::Display => "display",
        _ => "device",
    }
}

/// Gets an address and a page from the other end of the cable.
fn fetch(board: &dyn Board, map: &Map, device: &Found) -> anyhow::Result<String> {
    let nic = map.start_nic(&device.place)?;
    work::fetch_page(
        nic,
        board.network_time(&device.place)?,
        http::PORT,
        "/",
        PAGE.as_bytes(),
    )
}

/// Draws the test card, and saves and checks what the display shows of it.
fn show(board: &dyn Board, map: &Map, device: &Found, args: &Args) -> anyhow::Result<String> {
    let mut display = map.start_display(&device.place)?;
    let info = display.info();
    let transport = device.transport;
    let detail = format!(
        "{} over {transport}, {} x {}",
        display.device_name(),
        info.width,
        info.height
    );
    let card = TestCard {
        title: "axdriver",
        detail: &detail,
    };
    work::draw(display.as_mut(), &card)?;

    let shown = board.screen(&device.place)?;
    let file_name = format!("display {transport}.png")
        .replace(' ', "-")
        .to_lowercase();
    let path = args.out.join(file_name);
    shown.save(&path)?;
    let mut expected = Image::new(info.width, info.height)?;
    card.draw(&mut expected)?;
    ensure!(
        shown == expected,
        "the display shows another picture than was drawn, see {}",
        path.display()
    );
    Ok(format!(
        "a test card, as the display shows it in {}",
        path.display()
    ))
}
