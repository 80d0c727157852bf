//! LoongArch, 64 bits: QEMU's `virt`, entered in direct address mode.
//!
//! The console is an 8250, the interrupt controllers are the bridge chip's (PCH-PIC) and, behind it,
//! the processor's extended one (EIOINTC). The kernel's image and memory are seen through a direct
//! mapping window, the heap and registers through page tables, which a few instructions walk.

use core::arch::{asm, global_asm};
use core::ffi::CStr;
use core::time::Duration;

use spin::Once;

use super::{Architecture, Page, PageTables, TICKS_PER_SECOND, counted_time, word};
use crate::error::{Error, Result};
use crate::machine::Boot;
use crate::registers::Registers;
use crate::tree::{self, Tree};
use crate::{interrupts, paging, println};

/// LoongArch.
pub(crate) struct Arch;

// Section numbers are those of the LoongArch Reference Manual, volume 1.
global_asm!(
    r#"
    .section .boot, "ax"
    .global _start
_start:
    li.d $t0, 0x8000000000000001        /* DMW0: 0x8000... is registers (5.2.1) */
    csrwr $t0, 0x180
    li.d $t0, 0x9000000000000011        /* DMW1: 0x9000... is memory */
    csrwr $t0, 0x181
    la.pcrel $t0, 1f
    li.d $t1, 0x9000000000000000
    or $t0, $t0, $t1
    li.w $t1, 0xb0                      /* CRMD: mapped addresses, interrupts masked */
    csrwr $t1, 0x0
    jr $t0
1:  la.pcrel $sp, boot_stack_end
    la.pcrel $t0, loongarch64_trap
    csrwr $t0, 0xc                      /* EENTRY */
    /* Page tables of two levels: 14 and 23 are the lowest bits of the indexes, 9 bits each. */
    li.w $t0, 0x4dd2e                   /* PWCL */
    csrwr $t0, 0x1c
    csrwr $zero, 0x1d                   /* PWCH */
    li.w $t0, 14
    csrwr $t0, 0x1e                     /* STLBPS: pages of 16 KiB, the smallest that QEMU 7.2 has */
    li.w $t0, 14                        /* csrwr has put the old value there. */
    csrwr $t0, 0x8e                     /* TLBREHI.PS: the same */
    li.d $t1, 0x0fffffffffffffff
    la.pcrel $t0, boot_root
    and $t0, $t0, $t1
    csrwr $t0, 0x19                     /* PGDL */
    la.pcrel $t0, loongarch64_refill
    and $t0, $t0, $t1
    csrwr $t0, 0x88                     /* TLBRENTRY */
    invtlb 0, $zero, $zero
    move $fp, $zero
    bl loongarch64_start

    /* In direct address mode. A page whose tables are not there is entered as not valid. */
    .balign 4096
loongarch64_refill:
    csrwr $t0, 0x8b                     /* TLBRSAVE */
    csrrd $t0, 0x1b                     /* PGD */
    lddir $t0, $t0, 1
    beqz $t0, 2f
    ldpte $t0, 0
    ldpte $t0, 1
3:  tlbfill
    csrrd $t0, 0x8b
    ertn
2:  csrwr $zero, 0x8c                   /* TLBRELO0, TLBRELO1 */
    csrwr $zero, 0x8d
    b 3b

    .balign 4096
loongarch64_trap:
    addi.d $sp, $sp, -144
    st.d $ra, $sp, 0
    st.d $t0, $sp, 8
    st.d $t1, $sp, 16
    st.d $t2, $sp, 24
    st.d $t3, $sp, 32
    st.d $t4, $sp, 40
    st.d $t5, $sp, 48
    st.d $t6, $sp, 56
    st.d $t7, $sp, 64
    st.d $t8, $sp, 72
    st.d $a0, $sp, 80
    st.d $a1, $sp, 88
    st.d $a2, $sp, 96
    st.d $a3, $sp, 104
    st.d $a4, $sp, 112
    st.d $a5, $sp, 120
    st.d $a6, $sp, 128
    st.d $a7, $sp, 136
    csrrd $a0, 0x5                      /* ESTAT */
    csrrd $a1, 0x6                      /* ERA */
    csrrd $a2, 0x7                      /* BADV */
    bl loongarch64_trapped
    ld.d $ra, $sp, 0
    ld.d $t0, $sp, 8
    ld.d $t1, $sp, 16
    ld.d $t2, $sp, 24
    ld.d $t3, $sp, 32
    ld.d $t4, $sp, 40
    ld.d $t5, $sp, 48
    ld.d $t6, $sp, 56
    ld.d $t7, $sp, 64
    ld.d $t8, $sp, 72
    ld.d $a0, $sp, 80
    ld.d $a1, $sp, 88
    ld.d $a2, $sp, 96
    ld.d $a3, $sp, 104
    ld.d $a4, $sp, 112
    ld.d $a5, $sp, 120
    ld.d $a6, $sp, 128
    ld.d $a7, $sp, 136
    addi.d $sp, $sp, 144
    ertn

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .global boot_root
boot_root:
    .skip 4096
    .skip 131072
boot_stack_end:
    .text
    "#
);

unsafe extern "C" {
    safe static boot_root: [u64; 512];
}

/// What this board has where, as its device tree does not tell all of it: the tree itself, memory,
/// the console, and the register that turns it off.
const TREE: u64 = 0x10_0000;
/// Where whoever starts the machine may leave a command line, as QEMU 7.2 passes none here. It ends
/// with a 0; so does one that is not there, as memory begins as zeros.
const COMMAND_LINE: u64 = 0x8_0000;
const LOW_MEMORY: u64 = 0x1000_0000;
const CONSOLE: u64 = 0x1fe0_01e0;
const POWER: u64 = 0x100e_001c;
/// The window through which registers are seen without a page table.
const WINDOW: u64 = 0x8000_0000_0000_0000;

/// Control and status registers: the interrupts let in, the timer's setting and acknowledgment.
const ECFG: u32 = 0x4;
const TCFG: u32 = 0x41;
const TICLR: u32 = 0x44;
/// Bits of `ESTAT` and `ECFG`: the first hardware interrupt, and the timer's.
const HARDWARE: u64 = 1 << 2;
const TIMER: u64 = 1 << 11;

/// Registers of the extended controller, in the processor's IO space: the mapping of groups of lines to
/// hardware interrupts, the lines let in, those pending, and the processors that they go to.
const EIO_GROUPS: u64 = 0x14c0;
const EIO_ENABLE: u64 = 0x1600;
const EIO_PENDING: u64 = 0x1800;
const EIO_ROUTE: u64 = 0x1c00;

/// The bridge chip's controller; line n of it is line n of the extended one.
static PIC: Once<Registers> = Once::new();
/// Its registers: lines masked, edge triggered or not, and the line of the extended controller.
const PIC_MASK: usize = 0x20;
const PIC_EDGE: usize = 0x60;
const PIC_VECTOR: usize = 0x200;
const PIC_LINES: u32 = 64;

fn write_csr<const REGISTER: u32>(value: u64) {
    // SAFETY: the registers that this file names control interrupts, which are handled.
    unsafe {
        asm!("csrwr {}, {}", inout(reg) value => _, const REGISTER, options(nostack));
    }
}

fn read_iocsr(register: u64) -> u32 {
    let value: u32;
    // SAFETY: the registers that this file names are those of an interrupt controller.
    unsafe { asm!("iocsrrd.w {}, {}", out(reg) value, in(reg) register, options(nostack)) };
    value
}

fn write_iocsr(register: u64, value: u32) {
    // SAFETY: as for `read_iocsr`.
    unsafe { asm!("iocsrwr.w {}, {}", in(reg) value, in(reg) register, options(nostack)) };
}

/// Returns a word of the processor's description.
fn cpucfg(word: u32) -> u64 {
    let value: u64;
    // SAFETY: reading it changes nothing.
    unsafe { asm!("cpucfg {}, {}", out(reg) value, in(reg) word, options(nomem, nostack)) };
    value
}

/// Returns how much the counter counts in a second (2.2.10.5: words 4 and 5).
fn hertz() -> u64 {
    let (multiplier, divider) = (cpucfg(5) & 0xffff, cpucfg(5) >> 16 & 0xffff);
    (cpucfg(4) * multiplier.max(1) / divider.max(1)).max(1)
}

fn counter() -> u64 {
    let value;
    // SAFETY: reading the counter changes nothing.
    unsafe { asm!("rdtime.d {}, $zero", out(reg) value, options(nomem, nostack)) };
    value
}

/// Returns where an 8-bit register of the board is seen.
fn register(physical: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(word(WINDOW + physical))
}

#[unsafe(no_mangle)]
extern "C" fn loongarch64_start() -> ! {
    // SAFETY: on this board a device tree lies there, which nothing changes: memory is put to use from
    // the kernel's end on.
    let mut boot = unsafe { Boot::from_tree(paging::memory_at(TREE)) };
    if boot.memory.is_empty() {
        boot.memory = 0..LOW_MEMORY;
    }
    // SAFETY: that is memory, of which nothing below the kernel is put to use, and a 0 is in it.
    let text = unsafe { CStr::from_ptr(paging::memory_at(COMMAND_LINE).cast()) };
    boot.command_line = text.to_str().unwrap_or_default();
    crate::start(boot)
}

#[unsafe(no_mangle)]
extern "C" fn loongarch64_trapped(status: u64, pc: u64, address: u64) {
    if status >> 16 & 0x3f != 0 {
        println!("kernel: exception {status:#x} at {pc:#x}, address {address:#x}");
        Arch::exit(false);
    }
    if status & TIMER != 0 {
        write_csr::<TICLR>(1);
        interrupts::tick();
    }
    if status & HARDWARE != 0 {
        for group in 0..PIC_LINES / 32 {
            let register = EIO_PENDING + u64::from(4 * group);
            let pending = read_iocsr(register);
            for bit in (0..32).filter(|bit| pending & 1 << bit != 0) {
                interrupts::handle(32 * group + bit);
                write_iocsr(register, 1 << bit);
            }
        }
    }
}

impl Architecture for Arch {
    const NAME: &'static str = "loongarch64";

    fn console_write(byte: u8) {
        let status = register(CONSOLE + 5);
        // SAFETY: the window shows the console there; bit 5: the transmitter takes a byte.
        while unsafe { status.read_volatile() } & 0x20 == 0 {}
        // SAFETY: as above.
        unsafe { register(CONSOLE).write_volatile(byte) };
    }

    fn exit(_success: bool) -> ! {
        // SAFETY: the window shows the register there, which turns the machine off.
        unsafe { register(POWER).write_volatile(0x34) };
        loop {
            Self::mask_interrupts();
            core::hint::spin_loop();
        }
    }

    fn now() -> Duration {
        counted_time(counter(), hertz())
    }

    fn start_interrupts(tree: Option<&Tree<'_>>) -> Result {
        const NO_PIC: Error = Error::Machine("no PCH-PIC");
        let node = tree
            .and_then(|tree| tree.find_compatible(&["loongarch,ls7a", "loongson,pch-pic-1.0"]))
            .ok_or(NO_PIC)?;
        let range = tree::registers(node).next().ok_or(NO_PIC)?;
        // The tree gives less than the controller has.
        // SAFETY: the tree says that the controller lies there, which accesses no memory.
        let registers = unsafe { Registers::new(range.start..range.start + 0x400) }?;
        for half in [0, 4] {
            registers.write(PIC_MASK + half, u32::MAX);
            registers.write(PIC_EDGE + half, 0);
        }
        PIC.call_once(|| registers);
        // All groups of 32 lines to the first hardware interrupt, all lines to the first processor.
        write_iocsr(EIO_GROUPS, 0x0101_0101);
        for register in (0..u64::from(PIC_LINES)).step_by(4) {
            write_iocsr(EIO_ROUTE + register, 0x0101_0101);
        }
        // The timer: on, again and again; the two lowest bits of the count are 0.
        let interval = hertz() / TICKS_PER_SECOND;
        write_csr::<TCFG>(interval & !3 | 3);
        write_csr::<ECFG>(HARDWARE | TIMER);
        Self::unmask_interrupts();
        Ok(())
    }

    fn set_line(line: u32, enabled: bool) {
        let Some(pic) = PIC.get().filter(|_| line < PIC_LINES) else {
            return;
        };
        let (half, bit) = (line as usize / 32 * 4, 1 << (line % 32));
        pic.write_u8(PIC_VECTOR + line as usize, line.to_le_bytes()[0]);
        let group = EIO_ENABLE + u64::from(line / 32 * 4);
        let (lines, mask) = (read_iocsr(group), pic.read(PIC_MASK + half));
        write_iocsr(group, if enabled { lines | bit } else { lines & !bit });
        pic.write(
            PIC_MASK + half,
            if enabled { mask & !bit } else { mask | bit },
        );
    }

    fn mask_interrupts() -> bool {
        let old: u64;
        // SAFETY: no interrupt is a state that all code here can be in. Bit 2 of CRMD lets them in.
        unsafe {
            asm!("csrxchg {}, {}, 0", inout(reg) 0_u64 => old, in(reg) 4_u64, options(nostack));
        }
        old & 4 != 0
    }

    fn unmask_interrupts() {
        // SAFETY: only called once there is a handler, or to end a time in which they were masked.
        unsafe {
            asm!("csrxchg {}, {}, 0", inout(reg) 4_u64 => _, in(reg) 4_u64, options(nostack));
        }
    }

    fn sleep() {
        // Between the two, an interrupt may come, whose sleeper then waits until the next tick.
        Self::unmask_interrupts();
        // SAFETY: the tick ends the sleep.
        unsafe { asm!("idle 0", options(nostack)) };
    }

    fn specified_line(specifier: &[u32]) -> Option<u32> {
        specifier.first().copied()
    }

    fn pci_line(device: u8, pin: u8, _interrupt_line: u8) -> Option<u32> {
        // This board's tree has no interrupt-map: four lines from 16 on, turned by the device's number.
        Some(16 + u32::from(device.wrapping_add(pin) % 4))
    }
}

impl PageTables for Arch {
    const PAGE_BITS: u32 = 14;
    const LEVELS: u32 = 2;
    const DIRECT_MAP: usize = 0x9000_0000_0000_0000;
    const IMAGE: usize = 0x9000_0000_0000_0000;
    const HEAP: usize = 0x4000_0000;
    const REGISTERS: usize = 0x8000_0000;

    fn root() -> u64 {
        (boot_root.as_ptr() as usize - Self::IMAGE) as u64
    }

    fn table_entry(table: u64) -> u64 {
        table
    }

    fn page_entry(page: u64, kind: Page) -> u64 {
        // Valid, dirty, there, writable, global; cached or not; not to be executed (5.4.5).
        let flags = if kind == Page::Memory { 0x1d3 } else { 0x1c3 };
        page | flags | 1 << 62
    }

    fn address_in(entry: u64) -> Option<u64> {
        (entry != 0).then_some(entry & 0x0000_ffff_ffff_f000)
    }

    fn entry_added(_: usize) {
        // A page is remembered with its neighbour, which may have been empty.
        // SAFETY: the processor forgets what it remembers of the tables.
        unsafe { asm!("dbar 0", "invtlb 0, $zero, $zero", options(nostack)) };
    }
}
