//! Draws a test card or a picture on a display, and saves what the display shows.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use axdriver_display::DisplayDriverOps;
use clap::Parser;
use embedded_graphics::prelude::Size;
use examples::{
    board::{BoardArgs, Device},
    image::Image,
    picture::TestCard,
    report, say, work,
};

/// Draws on a virtio display, and saves what it shows as a PNG.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The size of the display, in pixels.
    #[arg(long, value_name = "WxH", default_value = "1280x800", value_parser = parse_size)]
    size: Size,

    /// The picture to show, scaled to fit, instead of a test card.
    #[arg(long, value_name = "PNG")]
    image: Option<PathBuf>,

    /// Where to save what the display shows.
    #[arg(long, value_name = "PNG", default_value = "target/display.png")]
    out: PathBuf,

    #[command(flatten)]
    board: BoardArgs,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn parse_size(text: &str) -> Result<Size, String> {
    let sides = text.split_once(['x', 'X']).and_then(|(width, height)| {
        Some(Size::new(
            width.trim().parse().ok()?,
            height.trim().parse().ok()?,
        ))
    });
    let size = sides.ok_or_else(|| "a size looks like 640x480".to_owned())?;
    Image::new(size.width, size.height).map_err(|error| error.to_string())?;
    Ok(size)
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| show(&args))
}

fn show(args: &Args) -> anyhow::Result<()> {
    // What can be wrong with the arguments is found before anything is started.
    let image = args
        .image
        .as_deref()
        .map(|path| Image::load(path)?.fitted(args.size))
        .transpose()?;

    let Size { width, height } = args.size;
    let board = args.board.start([Device::Display { width, height }])?;
    let map = board.map();
    let found = map.probe();
    let found = found
        .first()
        .context("the display is not found on the board")?;
    let mut display = map.start_display(&found.place)?;
    let info = display.info();
    say!(
        "{} over {} at {}: {} x {} pixels",
        display.device_name(),
        found.transport,
        found.place,
        info.width,
        info.height
    )?;
    match &image {
        Some(image) => work::draw(display.as_mut(), image)?,
        None => {
            let detail = format!("{} x {}", info.width, info.height);
            work::draw(
                display.as_mut(),
                &TestCard {
                    title: "axdriver",
                    detail: &detail,
                },
            )?;
        }
    }
    let shown = board.screen(&found.place)?;
    ensure!(
        shown.pixel(info.width - 1, info.height - 1).is_some(),
        "the display shows a smaller picture than it should"
    );
    if let Some(directory) = args.out.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    shown.save(&args.out)?;
    say!("{}", args.out.display())?;
    Ok(())
}
