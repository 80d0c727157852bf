//! Links the program with no C library and no start-up files, so that whatever is missing is an error.

/// What the compiler expects of every program, and a kernel therefore brings along.
const RUNTIME: [&str; 6] = ["bcmp", "memcmp", "memcpy", "memmove", "memset", "strlen"];
/// What the precompiled `core` and `alloc` of a host's target name, though nothing unwinds.
const UNWINDING: [&str; 2] = ["_Unwind_Resume", "rust_eh_personality"];

fn main() {
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    // The program is not run, so an address for each will do.
    for symbol in RUNTIME.iter().chain(&UNWINDING) {
        println!("cargo::rustc-link-arg-bins=-Wl,--defsym={symbol}=0");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
