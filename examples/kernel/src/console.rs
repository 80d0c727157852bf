//! Text for the person who watches: `print!` and `println!`, the log, and the last words of a panic.

use core::fmt::{self, Write};
use core::panic::PanicInfo;

use log::{LevelFilter, Log, Metadata, Record};

use crate::arch::{Arch, Architecture};

/// The console, as a place to format to.
pub(crate) struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                Arch::console_write(b'\r');
            }
            Arch::console_write(byte);
        }
        Ok(())
    }
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {{
        // The console's `write_str` does not fail.
        let _ = core::fmt::Write::write_fmt(&mut $crate::console::Console, format_args!($($argument)*));
    }};
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($argument:tt)*) => { $crate::print!("{}\n", format_args!($($argument)*)) };
}

/// Sends what the drivers log, warnings and worse, to the console.
struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        println!("{}: {}: {}", record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

/// Starts the log.
pub(crate) fn start_log() {
    // Fails only when it was done before.
    let _ = log::set_logger(&Logger);
    log::set_max_level(LevelFilter::Warn);
}

#[panic_handler]
fn panic(information: &PanicInfo<'_>) -> ! {
    Arch::mask_interrupts();
    println!("kernel: {information}");
    Arch::exit(false)
}
