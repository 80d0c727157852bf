//! Builds the kernel, boots it under QEMU's emulation and checks what it did.

mod boards;
#[path = "../../src/checksum.rs"]
mod checksum;
mod compile;
mod faults;
mod image;
mod monitor;
mod qemu;
mod screen;
mod size;

use std::process::ExitCode;

use boards::{BOARDS, Board};
use faults::Fault;

/// What can go wrong here: anything, said in a line.
type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const HELP: &str = "\
Builds the kernel, boots it under QEMU's emulation and checks what it did.

Usage: cargo kernel COMMAND

  run NAME       boots the boards whose name begins with NAME, and shows their console
  test [NAME]    boots all of them, also with each fault that can befall them, and shows what fails
  build NAME     only builds, and prints the kernel's path
  boards         lists the boards
  size           how many bytes of code each driver adds, beside the published crates

Faults are: a request that the disk does not answer, stray interrupts, a card that is pulled, caches
that devices do not see, interrupts lost, and an interrupt storm.

A boot makes disk images, serves a page, calls the echo server, and compares the picture. It is
killed after 30 s. Pictures and images are left in the target directory, under `boots`.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["run", name] => chosen(name).and_then(|boards| run(&boards)),
        ["test"] => chosen("").and_then(|boards| test(&boards)),
        ["test", name] => chosen(name).and_then(|boards| test(&boards)),
        ["build", name] => chosen(name).and_then(|boards| build(&boards)),
        ["size"] => size::table(),
        ["boards"] => {
            for board in BOARDS {
                println!("{:<16} {}", board.name, board.about);
            }
            Ok(())
        }
        ["serve-page", path] => qemu::serve_page(path),
        ["--help" | "-h" | "help"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("this is not a command\n\n{HELP}").into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the boards whose name begins with `name`.
fn chosen(name: &str) -> Result<Vec<&'static Board>> {
    let boards: Vec<_> = BOARDS
        .iter()
        .filter(|board| board.name.starts_with(name))
        .collect();
    if boards.is_empty() {
        let names: Vec<_> = BOARDS.iter().map(|board| board.name).collect();
        return Err(format!("no board {name}; there are {}", names.join(", ")).into());
    }
    Ok(boards)
}

fn build(boards: &[&Board]) -> Result {
    for board in boards {
        println!("{}", compile::kernel(board.architecture)?.display());
    }
    Ok(())
}

fn run(boards: &[&Board]) -> Result {
    for board in boards {
        let kernel = compile::kernel(board.architecture)?;
        println!("== {}", board.name);
        let seconds = qemu::boot(board, &kernel, None, qemu::Console::Shown)?;
        println!("== {}: ok, {seconds:.1} s", board.name);
    }
    Ok(())
}

fn test(boards: &[&Board]) -> Result {
    let mut failed = Vec::new();
    let mut note = |name: String, outcome: Result<f64>| match outcome {
        Ok(seconds) => println!("{name:<34} ok, {seconds:.1} s"),
        Err(error) => {
            println!("{name:<34} FAILED: {error}");
            failed.push(name);
        }
    };
    for board in boards {
        let kernel = compile::kernel(board.architecture)?;
        let name = board.name;
        let boot = |fault| qemu::boot(board, &kernel, fault, qemu::Console::OnFailure);
        note(name.to_owned(), boot(None));
        for &fault in Fault::ALL.iter().filter(|fault| fault.befalls(board)) {
            note(format!("{name}, {}", fault.name()), boot(Some(fault)));
        }
        // Every interrupt is lost: no device may seem to work.
        let failures = ["disk ", "net ", "display "].map(|kind| format!("{kind}{}", board.place()));
        let failures: Vec<&str> = failures.iter().map(String::as_str).collect();
        let outcome = qemu::boot_to_failure(board, &kernel, "lose-interrupts", &failures, ": ok, ");
        note(format!("{name}, interrupts lost"), outcome);
        // Nobody serves the display: its line is masked if it storms, and the kernel goes on.
        let storm = [
            "virtio-gpu: failed",
            "1000 interrupts in a row were nobody's",
        ];
        let storm = &storm[..if board.level { 2 } else { 1 }];
        let outcome =
            qemu::boot_to_failure(board, &kernel, "interrupt-storm", storm, "virtio-gpu: ok");
        note(format!("{name}, interrupt storm"), outcome);
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!("failed: {}", failed.join("; ")).into())
    }
}
