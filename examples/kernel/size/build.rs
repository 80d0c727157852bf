//! Links as a kernel is linked, without anything of the host's.

fn main() {
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--gc-sections",
        // What the precompiled core and alloc name, and memory functions, which are not weighed.
        "-Wl,--unresolved-symbols=ignore-all",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
