//! Prints what a board has: registers, features by name, and queues, without taking the devices into use.

use std::process::ExitCode;

use clap::Parser;
use examples::{board::BoardKind, registers, report, say};

/// Prints what the virtio devices of a board say of themselves. No driver is started, no status is written.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The board that the devices are on.
    #[arg(long, value_enum, default_value_t = BoardKind::Emulated)]
    board: BoardKind,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| probe(args.board))
}

fn probe(kind: BoardKind) -> anyhow::Result<()> {
    for variant in kind.variants() {
        let board = kind.start(&variant.everything(b""))?;
        let map = board.map();
        let found = map.probe();
        say!("{}, devices: {}\n", board.title(), found.len())?;
        for device in found {
            say!("{}", registers::describe(&map, &device)?)?;
        }
    }
    Ok(())
}
