//! Lays the kernel out in memory: one linker script, and two addresses for each architecture.

use std::env;

fn main() {
    let variable = |name| env::var(name).unwrap_or_default();
    // Where the kernel is linked, and what to take off to get the physical address.
    let (base, offset) = match variable("CARGO_CFG_TARGET_ARCH").as_str() {
        "aarch64" => (0x4020_0000_u64, 0),
        "loongarch64" => (0x9000_0000_0020_0000, 0x9000_0000_0000_0000_u64),
        "riscv64" => (0x8020_0000, 0),
        _ => (0x20_0000, 0),
    };
    let script = format!("{}/kernel.ld", variable("CARGO_MANIFEST_DIR"));
    let mut arguments = vec![
        format!("--defsym=KERNEL_BASE={base:#x}"),
        format!("--defsym=KERNEL_OFFSET={offset:#x}"),
        "-T".to_owned(),
        script,
        "--build-id=none".to_owned(),
        "--no-dynamic-linker".to_owned(),
        "-z".to_owned(),
        "norelro".to_owned(),
        "-z".to_owned(),
        "noexecstack".to_owned(),
    ];
    // A host's target links through the C compiler, which has start-up files and options of its own.
    if variable("CARGO_CFG_TARGET_OS") != "none" {
        arguments = arguments
            .into_iter()
            .flat_map(|argument| ["-Xlinker".to_owned(), argument])
            .collect();
        for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
            arguments.push(argument.to_owned());
        }
    }
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=kernel.ld");
    println!("cargo::rerun-if-changed=build.rs");
}
