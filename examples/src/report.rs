//! What programs print: tables, sizes, errors, and what the drivers log.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

/// Prints a line to the standard output.
///
/// As `println!`, but a reader that has seen enough ends the program in an orderly way: `probe | head -1` is no failure.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::report::say(format_args!($($argument)*))
    };
}

/// Nobody reads what the program prints any more.
#[derive(Debug, Clone, Copy, Eq, PartialEq)]
pub struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the standard output is closed")
    }
}

impl std::error::Error for ReaderGone {}

/// Prints a line to the standard output; `say!` is the macro for it.
///
/// # Errors
///
/// * [`ReaderGone`]: the other end of a pipe was closed.
/// * Whatever the host says of the file that the output goes to.
pub fn say(line: fmt::Arguments<'_>) -> anyhow::Result<()> {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        result => result.context("cannot print"),
    }
}

/// Runs a program, and says on the standard error what it failed of.
///
/// Returns 0 on success and 1 on failure. A reader of the standard output that has gone is no failure.
pub fn run(program: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    match program() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Lets the messages of drivers through to the standard error.
///
/// 0: warnings and errors; 1: information as well; 2 and more: all.
pub fn log_to_stderr(verbosity: u8) {
    static LOGGER: StderrLogger = StderrLogger;
    let level = match verbosity {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Trace,
    };
    // There can be one logger; where there is another already, it stays.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

struct StderrLogger;

impl log::Log for StderrLogger {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // What the drivers say is what counts here; smoltcp traces each poll, fatfs each access.
        let theirs = ["smoltcp", "fatfs"]
            .iter()
            .any(|crate_name| record.target().starts_with(crate_name));
        let wanted =
            log::max_level() == log::LevelFilter::Trace && record.level() <= log::Level::Info;
        if !theirs || wanted {
            eprintln!("{} {}: {}", record.level(), record.target(), record.args());
        }
    }

    fn flush(&self) {}
}

/// Columns of text, as wide as they have to be.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Makes a table with a line of headings.
    #[must_use]
    pub fn new<const N: usize>(headings: [&str; N]) -> Self {
        Self {
            rows: vec![headings.map(str::to_owned).to_vec()],
        }
    }

    /// Adds a line.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                write!(line, "{cell:width$}  ")?;
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Returns a number of bytes as text, in the largest unit that it is at least one of.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = ((bytes.ilog2() / 10) as usize).min(UNITS.len());
    let step = 1_u64 << (10 * unit);
    let name = UNITS[unit - 1];
    if bytes.is_multiple_of(step) {
        return format!("{} {name}", bytes / step);
    }
    let tenths = u128::from(bytes) * 10 / u128::from(step);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// Returns a rate as text.
#[must_use]
pub fn rate(bytes: u64, elapsed: Duration) -> String {
    let nanoseconds = elapsed.as_nanos().max(1);
    let per_second = u128::from(bytes) * 1_000_000_000 / nanoseconds;
    format!("{}/s", size(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

/// Makes a progress bar for `bytes` bytes on the standard error, which shows only where that is a terminal.
#[must_use]
pub fn progress(bytes: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let template = "{msg:10} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.with_message(what)
}

/// Measures durations, and says the least, the middle one and the most of them.
#[derive(Debug, Clone, Default)]
pub struct Durations(Vec<Duration>);

impl Durations {
    /// Adds the time since `start`.
    pub fn add_since(&mut self, start: Instant) {
        self.0.push(start.elapsed());
    }
}

impl std::fmt::Display for Durations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut sorted = self.0.clone();
        sorted.sort();
        match (sorted.first(), sorted.get(sorted.len() / 2), sorted.last()) {
            (Some(least), Some(median), Some(most)) => {
                write!(f, "min {least:.1?}, median {median:.1?}, max {most:.1?}")
            }
            _ => f.write_str("nothing measured"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_said_in_the_largest_unit_that_fits() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1 KiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(64 << 20), "64 MiB");
        assert_eq!(size(u64::MAX), "15.9 EiB");
        assert_eq!(rate(1 << 20, Duration::from_millis(500)), "2 MiB/s");
        assert_eq!(rate(1, Duration::ZERO), "953.6 MiB/s");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["a", "long heading"]);
        table.row(["wide cell".to_owned(), "x".to_owned()]);
        assert_eq!(table.to_string(), "a          long heading\nwide cell  x\n");
    }

    #[test]
    fn durations_are_summed_up() {
        let mut durations = Durations::default();
        assert_eq!(durations.to_string(), "nothing measured");
        durations.0 = [3, 1, 2].map(Duration::from_millis).to_vec();
        assert_eq!(durations.to_string(), "min 1.0ms, median 2.0ms, max 3.0ms");
    }
}
