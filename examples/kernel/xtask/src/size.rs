//! How much code each driver adds to a kernel, beside the published crates of version 0.2.0.

use std::path::Path;
use std::process::Command;

use crate::{Result, compile};

/// The most that a driver may be of the published one's code, in percent.
const LIMIT: u64 = 150;

/// Prints a table.
///
/// # Errors
///
/// Something does not build, or a driver is too large.
pub(crate) fn table() -> Result {
    let base = text("")?;
    let mut large = Vec::new();
    println!(
        "{:<8} {:>8} {:>10} {:>6}",
        "driver", "here", "published", "ratio"
    );
    for driver in ["block", "net", "gpu"] {
        let ours = text(driver)?.saturating_sub(base);
        let published = text(&format!("published-{driver}"))?
            .saturating_sub(base)
            .max(1);
        let percent = ours * 100 / published;
        println!("{driver:<8} {ours:>8} {published:>10} {percent:>5}%");
        if percent > LIMIT {
            large.push(driver);
        }
    }
    if large.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "more than {LIMIT} % of the published code: {}",
            large.join(", ")
        )
        .into())
    }
}

/// Builds the least kernel with a driver, and returns how many bytes of code it has.
fn text(feature: &str) -> Result<u64> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    // A directory of its own, as the settings differ from the kernel's.
    let directory = compile::target_directory().join("size");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(compile::workspace());
    cargo.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "size",
        "--target",
        TARGET,
    ]);
    cargo
        .args(["--features", feature])
        .arg("--target-dir")
        .arg(&directory);
    cargo.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s");
    cargo.env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        compile::HOST_FLAGS,
    );
    if !cargo.status()?.success() {
        return Err(format!("size does not build with {feature}").into());
    }
    executable_bytes(&directory.join(TARGET).join("release/size"))
}

/// Returns the size of all executable sections of a 64-bit ELF file (System V ABI, "Sections").
fn executable_bytes(path: &Path) -> Result<u64> {
    let file = std::fs::read(path)?;
    let number = |offset: usize, length: usize| -> Result<u64> {
        let bytes = file
            .get(offset..offset + length)
            .ok_or("the file is cut off")?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let (first, size, count) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?);
    let mut sum = 0;
    for index in 0..count {
        let section = usize::try_from(first + index * size)?;
        // sh_flags: SHF_EXECINSTR; sh_size.
        if number(section + 8, 8)? & 4 != 0 {
            sum += number(section + 0x20, 8)?;
        }
    }
    Ok(sum)
}
