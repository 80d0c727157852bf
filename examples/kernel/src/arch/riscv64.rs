//! RISC-V, 64 bits: QEMU's `virt`, entered by the firmware (SBI) in supervisor mode.
//!
//! The console, the timer and the power button are the firmware's, the interrupt controller is a PLIC.
//! The kernel is compiled without floating point, so no trap has to save its registers.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use spin::Once;

use super::{Architecture, Page, PageTables, TICKS_PER_SECOND, counted_time, word};
use crate::error::{Error, Result};
use crate::machine::Boot;
use crate::registers::Registers;
use crate::tree::{self, Tree};
use crate::{interrupts, paging, println};

/// RISC-V.
pub(crate) struct Arch;

// Entered with paging off, the hart's number in a0, the device tree's address in a1.
global_asm!(
    r#"
    .section .boot, "ax"
    .global _start
_start:
    csrw sie, zero
    la t0, boot_root
    srli t0, t0, 12
    li t1, 8 << 60                      /* Sv39 */
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
    la sp, boot_stack_end
    la t0, riscv64_trap
    csrw stvec, t0
    mv a0, a1
    call riscv64_start

    .balign 4
    .global riscv64_trap
riscv64_trap:
    addi sp, sp, -128
    sd ra, 0(sp)
    sd t0, 8(sp)
    sd t1, 16(sp)
    sd t2, 24(sp)
    sd t3, 32(sp)
    sd t4, 40(sp)
    sd t5, 48(sp)
    sd t6, 56(sp)
    sd a0, 64(sp)
    sd a1, 72(sp)
    sd a2, 80(sp)
    sd a3, 88(sp)
    sd a4, 96(sp)
    sd a5, 104(sp)
    sd a6, 112(sp)
    sd a7, 120(sp)
    csrr a0, scause
    csrr a1, sepc
    csrr a2, stval
    call riscv64_trapped
    ld ra, 0(sp)
    ld t0, 8(sp)
    ld t1, 16(sp)
    ld t2, 24(sp)
    ld t3, 32(sp)
    ld t4, 40(sp)
    ld t5, 48(sp)
    ld t6, 56(sp)
    ld a0, 64(sp)
    ld a1, 72(sp)
    ld a2, 80(sp)
    ld a3, 88(sp)
    ld a4, 96(sp)
    ld a5, 104(sp)
    ld a6, 112(sp)
    ld a7, 120(sp)
    addi sp, sp, 128
    sret

    .section .data.boot, "aw"
    /* The first 16 GiB where they are, executable, and from 0xffffffc000000000 on, not. */
    .balign 4096
    .global boot_root
boot_root:
    .set gigabyte, 0
    .rept 16
    .quad (gigabyte << 28) + 0xcf
    .set gigabyte, gigabyte + 1
    .endr
    .fill 240, 8, 0
    .set gigabyte, 0
    .rept 16
    .quad (gigabyte << 28) + 0xc7
    .set gigabyte, gigabyte + 1
    .endr
    .fill 240, 8, 0

    .section .bss.boot, "aw", @nobits
    .balign 16
    .skip 131072
boot_stack_end:
    .text
    "#
);

unsafe extern "C" {
    safe static boot_root: [u64; 512];
}

/// SBI's legacy call to print a byte, and its extensions for the timer and for system reset.
const SBI_PUTCHAR: usize = 1;
const SBI_TIMER: usize = 0x5449_4d45;
const SBI_RESET: usize = 0x5352_5354;

/// Bits of `sie`: the timer and the external interrupt.
const INTERRUPTS: usize = 1 << 5 | 1 << 9;
/// `sstatus`'s bit that lets interrupts in.
const SIE: usize = 2;

/// What the counter counts in a second; a guess until the tree was read.
static HERTZ: AtomicU64 = AtomicU64::new(10_000_000);
static PLIC: Once<Plic> = Once::new();
/// The device that ends QEMU with a status.
static TEST: Once<Registers> = Once::new();

/// The interrupt controller (RISC-V PLIC Specification 1.0).
struct Plic {
    registers: Registers,
    /// The context of this hart's supervisor mode.
    context: usize,
}

impl Plic {
    /// Offset of the register that claims, when read, and completes, when written.
    const fn claim(&self) -> usize {
        0x20_0004 + 0x1000 * self.context
    }

    fn set_line(&self, line: u32, enabled: bool) {
        let number = line as usize;
        self.registers.write(4 * number, 1);
        let enable = 0x2000 + 0x80 * self.context + 4 * (number / 32);
        let bit = 1 << (line % 32);
        let old = self.registers.read(enable);
        self.registers
            .write(enable, if enabled { old | bit } else { old & !bit });
    }
}

/// Calls the firmware.
fn sbi(extension: usize, function: usize, argument: usize, second: usize) {
    // SAFETY: the calls that this file makes touch no memory of the kernel's.
    unsafe {
        asm!("ecall", inlateout("a0") argument => _, inlateout("a1") second => _,
            in("a6") function, in("a7") extension, options(nostack));
    }
}

fn counter() -> u64 {
    let value;
    // SAFETY: reading the counter changes nothing.
    unsafe { asm!("rdtime {}", out(reg) value, options(nomem, nostack)) };
    value
}

/// Asks for the next tick, and so takes the request for the last one back.
fn start_tick() {
    let next = counter() + HERTZ.load(Ordering::Relaxed) / TICKS_PER_SECOND;
    sbi(SBI_TIMER, 0, word(next), 0);
}

#[unsafe(no_mangle)]
extern "C" fn riscv64_start(tree: u64) -> ! {
    // SAFETY: the firmware passes the address of a device tree, which nothing changes: the range is
    // reserved when memory is put to use.
    crate::start(unsafe { Boot::from_tree(paging::memory_at(tree)) })
}

#[unsafe(no_mangle)]
extern "C" fn riscv64_trapped(cause: usize, pc: usize, value: usize) {
    const INTERRUPT: usize = 1 << 63;
    match (cause & INTERRUPT != 0, cause & !INTERRUPT) {
        (true, 5) => {
            start_tick();
            interrupts::tick();
        }
        (true, 9) => {
            if let Some(plic) = PLIC.get() {
                let line = plic.registers.read(plic.claim());
                if line != 0 {
                    interrupts::handle(line);
                    plic.registers.write(plic.claim(), line);
                }
            }
        }
        _ => {
            println!("kernel: exception {cause:#x} at {pc:#x}, value {value:#x}");
            Arch::exit(false);
        }
    }
}

impl Architecture for Arch {
    const NAME: &'static str = "riscv64";

    fn console_write(byte: u8) {
        sbi(SBI_PUTCHAR, 0, usize::from(byte), 0);
    }

    fn exit(success: bool) -> ! {
        if let Some(test) = TEST.get() {
            test.write(0, if success { 0x5555 } else { 1 << 16 | 0x3333 });
        }
        // Shut down; the reason is none, or a failure.
        sbi(SBI_RESET, 0, 0, usize::from(!success));
        loop {
            Self::mask_interrupts();
            core::hint::spin_loop();
        }
    }

    fn now() -> Duration {
        counted_time(counter(), HERTZ.load(Ordering::Relaxed))
    }

    fn start_interrupts(tree: Option<&Tree<'_>>) -> Result {
        let tree = tree.ok_or(Error::Machine("no device tree"))?;
        if let Some(node) = tree.find_compatible(&["sifive,test0"])
            && let Some(range) = tree::registers(node).next()
        {
            // SAFETY: the tree says that the test device lies there; it only ends the machine.
            let registers = unsafe { Registers::new(range) }?;
            TEST.call_once(|| registers);
        }
        let hertz = tree
            .find(|node| !tree::cells(node, "timebase-frequency").is_empty())
            .and_then(|node| tree::cells(node, "timebase-frequency").first().copied())
            .ok_or(Error::Machine("no timebase-frequency"))?;
        HERTZ.store(u64::from(hertz).max(1), Ordering::Relaxed);

        let node = tree
            .find_compatible(&["sifive,plic-1.0.0", "riscv,plic0"])
            .ok_or(Error::Machine("no PLIC"))?;
        let range = tree::registers(node)
            .next()
            .ok_or(Error::Machine("no PLIC"))?;
        // Pairs of a hart and an interrupt of it, one for each context; 9 is supervisor mode's.
        let context = tree::cells(node, "interrupts-extended")
            .chunks_exact(2)
            .position(|pair| pair[1] == 9)
            .ok_or(Error::Machine(
                "the PLIC has no context for supervisor mode",
            ))?;
        // SAFETY: the tree says that the controller lies there, which accesses no memory.
        let registers = unsafe { Registers::new(range) }?;
        // Let every priority through.
        registers.write(0x20_0000 + 0x1000 * context, 0);
        PLIC.call_once(|| Plic { registers, context });

        start_tick();
        // SAFETY: the trap entry handles both interrupts.
        unsafe { asm!("csrs sie, {}", in(reg) INTERRUPTS, options(nostack)) };
        Self::unmask_interrupts();
        Ok(())
    }

    fn set_line(line: u32, enabled: bool) {
        if let Some(plic) = PLIC.get() {
            plic.set_line(line, enabled);
        }
    }

    fn mask_interrupts() -> bool {
        let status: usize;
        // SAFETY: no interrupt is a state that all code here can be in.
        unsafe { asm!("csrrc {}, sstatus, {}", out(reg) status, in(reg) SIE, options(nostack)) };
        status & SIE != 0
    }

    fn unmask_interrupts() {
        // SAFETY: only called once there is a trap entry, or to end a time in which they were masked.
        unsafe { asm!("csrs sstatus, {}", in(reg) SIE, options(nostack)) };
    }

    fn sleep() {
        // SAFETY: a pending interrupt ends the sleep though it is masked (Privileged ISA 3.3.3).
        unsafe { asm!("wfi", options(nostack)) };
        Self::unmask_interrupts();
    }

    fn specified_line(specifier: &[u32]) -> Option<u32> {
        specifier.first().copied()
    }

    fn pci_line(_device: u8, _pin: u8, _interrupt_line: u8) -> Option<u32> {
        None
    }
}

impl PageTables for Arch {
    const PAGE_BITS: u32 = 12;
    const LEVELS: u32 = 3;
    const DIRECT_MAP: usize = 0xffff_ffc0_0000_0000;
    const IMAGE: usize = 0;
    const HEAP: usize = 0xffff_ffd0_0000_0000;
    const REGISTERS: usize = 0xffff_ffe0_0000_0000;

    fn root() -> u64 {
        boot_root.as_ptr() as u64
    }

    fn table_entry(table: u64) -> u64 {
        table >> 2 | 1
    }

    fn page_entry(page: u64, _: Page) -> u64 {
        // Valid, readable, writable, accessed, dirty. The machine knows what is not to be cached.
        page >> 2 | 0xc7
    }

    fn address_in(entry: u64) -> Option<u64> {
        (entry & 1 != 0).then_some((entry << 2) & 0x00ff_ffff_ffff_f000)
    }

    fn entry_added(virtual_address: usize) {
        // SAFETY: the fence makes the processor forget what it remembers of the address.
        unsafe { asm!("sfence.vma {}, zero", in(reg) virtual_address, options(nostack)) };
    }
}
