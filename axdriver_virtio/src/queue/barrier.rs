//! The barrier that orders memory accesses for a hardware device, not only for other processors.
//!
//! Unsafe code here is the barrier instruction of an architecture.

/// Orders all earlier memory accesses before all later ones, as seen by a device behind a bus.
///
/// Where the architecture makes no such difference, or the compiler has no name for the
/// instruction here, this is the barrier between processors.
pub(super) fn platform() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: `dsb sy` only waits; it changes neither registers nor memory.
    unsafe {
        core::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv32", target_arch = "riscv64"))]
    // SAFETY: `fence` only orders accesses; it changes neither registers nor memory.
    unsafe {
        core::arch::asm!("fence iorw, iorw", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "loongarch64")]
    // SAFETY: `dbar` only orders accesses; it changes neither registers nor memory.
    unsafe {
        core::arch::asm!("dbar 0", options(nostack, preserves_flags));
    }
    #[cfg(not(any(
        target_arch = "aarch64",
        target_arch = "riscv32",
        target_arch = "riscv64",
        target_arch = "loongarch64"
    )))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}
