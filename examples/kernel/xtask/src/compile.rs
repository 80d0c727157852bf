//! Building the kernel: with rustup's target where it is installed, else with Debian's compiler and
//! the library's sources.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;

/// Debian's compiler, which brings the library's sources in a package of its own.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_PACKAGES: &str = "rustc-web cargo-web rust-web-src rust-web-llvm lld-22";

/// What makes code for a host's target fit for a kernel: fixed addresses, and room below the stack
/// pointer for interrupts.
pub(crate) const HOST_FLAGS: &str = "-Crelocation-model=static -Ctarget-feature=+crt-static -Cno-redzone=y -Cforce-frame-pointers=yes";

/// Returns the kernel workspace's directory.
pub(crate) fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Returns the directory that builds go to.
pub(crate) fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Builds the kernel for an architecture, in release, and returns where it is.
///
/// # Errors
///
/// It does not build, or nothing here can build it.
pub(crate) fn kernel(architecture: &str) -> Result<PathBuf> {
    let target = target(architecture)?;
    let directory = target_directory();
    let variable = target.replace('-', "_").to_uppercase();
    let installed = sysroot("rustc").is_some_and(|sysroot| has_target(&sysroot, target));
    let mut cargo = if installed {
        Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    } else {
        debian_cargo(target, &variable)?
    };
    if target.ends_with("linux-gnu") {
        cargo.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), HOST_FLAGS);
    }
    cargo.current_dir(workspace());
    cargo.args(["build", "--quiet", "--release", "--package", "kernel"]);
    cargo
        .args(["--target", target])
        .arg("--target-dir")
        .arg(&directory);
    if !installed {
        cargo.arg("-Zbuild-std=core,alloc");
    }
    if !cargo.status()?.success() {
        return Err(format!("the kernel does not build for {target}").into());
    }
    Ok(directory.join(target).join("release/kernel"))
}

fn target(architecture: &str) -> Result<&'static str> {
    let linux_host = cfg!(all(
        target_arch = "x86_64",
        target_os = "linux",
        target_env = "gnu"
    ));
    Ok(match architecture {
        "aarch64" => "aarch64-unknown-none-softfloat",
        "loongarch64" => "loongarch64-unknown-none-softfloat",
        "riscv64" => "riscv64imac-unknown-none-elf",
        "x86_64" if linux_host => "x86_64-unknown-linux-gnu",
        "x86_64" => "x86_64-unknown-none",
        _ => return Err(format!("no target for {architecture}").into()),
    })
}

fn sysroot(rustc: &str) -> Option<PathBuf> {
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim()))
}

fn has_target(sysroot: &Path, target: &str) -> bool {
    sysroot
        .join("lib/rustlib")
        .join(target)
        .join("lib")
        .is_dir()
}

fn debian_cargo(target: &str, variable: &str) -> Result<Command> {
    let sources = sysroot(DEBIAN_RUSTC).is_some_and(|sysroot| {
        sysroot
            .join("lib/rustlib/src/rust/library/Cargo.lock")
            .is_file()
    });
    if !sources {
        return Err(format!(
            "rustc has no target {target}. Either: rustup target add {target}\n\
             Or, on Debian: apt-get install --no-install-recommends {DEBIAN_PACKAGES}"
        )
        .into());
    }
    let mut cargo = Command::new(DEBIAN_CARGO);
    cargo.env("RUSTC", DEBIAN_RUSTC);
    // That `build-std` is unstable is known.
    cargo.env("RUSTC_BOOTSTRAP", "1");
    for name in [
        "CARGO",
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
    ] {
        cargo.env_remove(name);
    }
    cargo.env(format!("CARGO_TARGET_{variable}_LINKER"), linker()?);
    Ok(cargo)
}

/// Returns a `rust-lld` that runs: Debian's, or the one inside rustup's toolchain.
fn linker() -> Result<PathBuf> {
    let host = format!(
        "lib/rustlib/{}-unknown-linux-gnu/bin/rust-lld",
        env::consts::ARCH
    );
    let inside = sysroot("rustc").map(|sysroot| sysroot.join(host));
    let candidates = [Some(PathBuf::from("/usr/bin/rust-lld")), inside];
    let runs = |path: &PathBuf| {
        let mut command = Command::new(path);
        command.args(["-flavor", "gnu", "--version"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    candidates
        .into_iter()
        .flatten()
        .find(runs)
        .ok_or_else(|| format!("no rust-lld. On Debian: apt-get install {DEBIAN_PACKAGES}").into())
}
