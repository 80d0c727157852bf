//! AArch64: QEMU's `virt`, entered at EL1 with the device tree at the start of memory.
//!
//! The console is a PL011, the interrupt controller a GICv2, the clock the generic timer's virtual
//! one. The kernel is compiled without floating point, so no trap has to save its registers.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;

use spin::Once;

use super::{Architecture, Page, PageTables, TICKS_PER_SECOND, counted_time};
use crate::error::{Error, Result};
use crate::machine::Boot;
use crate::registers::Registers;
use crate::tree::{self, Tree};
use crate::{interrupts, paging, println};

/// AArch64.
pub(crate) struct Arch;

// Entered with the MMU off. The tables have three levels, so 39 bits of address on each side.
global_asm!(
    r#"
    .section .boot, "ax"
    .global _start
_start:
    msr daifset, #15
    ldr x0, =0x4400ff                   /* MAIR: 0 is memory, write-back; 1 registers, nGnRnE; 2 memory, not cached */
    msr mair_el1, x0
    ldr x0, =0x2b5193519                /* TCR: 39 bits, 4 KiB pages, cached tables, 40 bits physical */
    msr tcr_el1, x0
    adrp x0, boot_identity
    msr ttbr0_el1, x0
    adrp x0, boot_root
    msr ttbr1_el1, x0
    tlbi vmalle1
    dsb sy
    isb
    mrs x0, sctlr_el1
    ldr x1, =0x1005                     /* I, C, M */
    orr x0, x0, x1
    msr sctlr_el1, x0
    isb
    adrp x0, aarch64_vectors
    msr vbar_el1, x0
    msr spsel, #1
    adrp x0, boot_stack_end
    add x0, x0, :lo12:boot_stack_end
    mov sp, x0
    mov x29, xzr
    bl aarch64_start

    .section .text.vectors, "ax"
    .balign 4096
aarch64_vectors:
    .set vector, 0
    .rept 16
    .balign 128
    .if vector == 5                     /* IRQ, from this level with its own stack */
    b 1f
    .else
    mov x0, #vector
    mrs x1, esr_el1
    mrs x2, elr_el1
    mrs x3, far_el1
    b aarch64_exception
    .endif
    .set vector, vector + 1
    .endr

    .balign 128
1:  sub sp, sp, #160
    stp x0, x1, [sp]
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x30, [sp, #144]
    bl aarch64_interrupt
    ldp x0, x1, [sp]
    ldp x2, x3, [sp, #16]
    ldp x4, x5, [sp, #32]
    ldp x6, x7, [sp, #48]
    ldp x8, x9, [sp, #64]
    ldp x10, x11, [sp, #80]
    ldp x12, x13, [sp, #96]
    ldp x14, x15, [sp, #112]
    ldp x16, x17, [sp, #128]
    ldp x18, x30, [sp, #144]
    add sp, sp, #160
    eret

    .section .data.boot, "aw"
    .balign 4096
boot_identity:                          /* 1 GiB of registers, then 3 GiB of memory, executable */
    .quad 0x0060000000000405
    .set gigabyte, 1
    .rept 3
    .quad (gigabyte << 30) + 0x701
    .set gigabyte, gigabyte + 1
    .endr
    .fill 508, 8, 0
    .global boot_root
boot_root:                              /* the same 3 GiB of memory, not executable */
    .quad 0
    .set gigabyte, 1
    .rept 3
    .quad (gigabyte << 30) + 0x0060000000000701
    .set gigabyte, gigabyte + 1
    .endr
    .fill 508, 8, 0

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

/// Where memory begins on this board, and in it the device tree.
const MEMORY: u64 = 0x4000_0000;
/// The console's registers, seen where they are by the boot tables.
const PL011: usize = 0x0900_0000;
/// The virtual timer's interrupt: PPI 11.
const TIMER: u32 = 27;
/// Numbers from here on stand for no interrupt.
const SPURIOUS: u32 = 1020;

static GIC: Once<Gic> = Once::new();

/// The interrupt controller (ARM IHI 0048B).
struct Gic {
    distributor: Registers,
    interface: Registers,
}

impl Gic {
    fn set_line(&self, line: u32, enabled: bool) {
        let number = line as usize;
        let bit = 1 << (line % 32);
        if !enabled {
            self.distributor.write(0x180 + number / 32 * 4, bit);
            return;
        }
        // Level triggered, to processor 0, and on: GICD_ICFGR, GICD_ITARGETSR, GICD_ISENABLER.
        let configuration = 0xc00 + number / 16 * 4;
        let old = self.distributor.read(configuration);
        self.distributor
            .write(configuration, old & !(2 << (line % 16 * 2)));
        let target = 0x800 + number / 4 * 4;
        let old = self.distributor.read(target);
        self.distributor.write(target, old | 1 << (line % 4 * 8));
        self.distributor.write(0x100 + number / 32 * 4, bit);
    }
}

/// Returns the counter and how much it counts in a second.
fn counter() -> (u64, u64) {
    let (count, hertz): (u64, u64);
    // SAFETY: reading these registers changes nothing.
    unsafe {
        asm!("isb", "mrs {}, cntvct_el0", "mrs {}, cntfrq_el0", out(reg) count, out(reg) hertz,
            options(nostack));
    }
    (count, hertz.max(1))
}

/// Asks for the next tick, and so takes the request for the last one back.
fn start_tick() {
    let interval = counter().1 / TICKS_PER_SECOND;
    // SAFETY: the timer does nothing but interrupt, and that is handled.
    unsafe {
        asm!("msr cntv_tval_el0, {}", "msr cntv_ctl_el0, {}", "isb", in(reg) interval, in(reg) 1_u64,
            options(nostack));
    }
}

#[unsafe(no_mangle)]
extern "C" fn aarch64_start() -> ! {
    // SAFETY: on this board a device tree lies at the start of memory, which nothing changes: memory
    // is put to use from the kernel's end on.
    crate::start(unsafe { Boot::from_tree(paging::memory_at(MEMORY)) })
}

#[unsafe(no_mangle)]
extern "C" fn aarch64_exception(vector: u64, syndrome: u64, pc: u64, address: u64) -> ! {
    println!("kernel: exception {vector}, syndrome {syndrome:#x} at {pc:#x}, address {address:#x}");
    Arch::exit(false)
}

#[unsafe(no_mangle)]
extern "C" fn aarch64_interrupt() {
    let Some(gic) = GIC.get() else {
        return;
    };
    // GICC_IAR and GICC_EOIR.
    let acknowledged = gic.interface.read(0xc);
    match acknowledged & 0x3ff {
        TIMER => {
            start_tick();
            interrupts::tick();
        }
        SPURIOUS.. => return,
        line => interrupts::handle(line),
    }
    gic.interface.write(0x10, acknowledged);
}

/// Cleans and invalidates the lines to the point of coherency (ARM DDI 0487, D7.5.9).
fn flush(first: usize, size: usize) {
    let cache_type: usize;
    // SAFETY: reading the register changes nothing.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) cache_type, options(nomem, nostack)) };
    // DminLine: the length of the shortest line, in words of 4 bytes, as a power of two.
    let line = 4 << (cache_type >> 16 & 15);
    for address in (first / line * line..first + size).step_by(line) {
        // SAFETY: what the processor reads and writes there stays the same.
        unsafe { asm!("dc civac, {}", in(reg) address, options(nostack)) };
    }
    // SAFETY: a barrier changes nothing but the order.
    unsafe { asm!("dsb sy", options(nostack)) };
}

impl Architecture for Arch {
    const NAME: &'static str = "aarch64";

    const FLUSH: Option<fn(usize, usize)> = Some(flush);

    fn console_write(byte: u8) {
        let flags = core::ptr::with_exposed_provenance::<u32>(PL011 + 0x18);
        // SAFETY: the boot tables show the console there; bit 5: the transmitter is full.
        while unsafe { flags.read_volatile() } & 0x20 != 0 {}
        let data = core::ptr::with_exposed_provenance_mut::<u32>(PL011);
        // SAFETY: as above.
        unsafe { data.write_volatile(u32::from(byte)) };
    }

    fn exit(success: bool) -> ! {
        // Semihosting is an exception where nobody hosts, whose handler gets here again.
        static STOPPING: AtomicBool = AtomicBool::new(false);
        if !success && !STOPPING.swap(true, Ordering::Relaxed) {
            // Semihosting's SYS_EXIT_EXTENDED: ADP_Stopped_ApplicationExit, with the status 1.
            let parameters = [0x20026_u64, 1];
            // SAFETY: the call reads the parameters.
            unsafe {
                asm!("hlt #0xf000", inout("x0") 0x20_u64 => _, in("x1") &raw const parameters,
                    options(nostack));
            }
        }
        // SAFETY: PSCI's SYSTEM_OFF does not return.
        unsafe { asm!("hvc #0", in("x0") 0x8400_0008_u64, options(noreturn)) };
    }

    fn now() -> Duration {
        let (count, hertz) = counter();
        counted_time(count, hertz)
    }

    fn start_interrupts(tree: Option<&Tree<'_>>) -> Result {
        const NO_GIC: Error = Error::Machine("no GICv2");
        let node = tree
            .and_then(|tree| tree.find_compatible(&["arm,cortex-a15-gic", "arm,gic-400"]))
            .ok_or(NO_GIC)?;
        let mut ranges = tree::registers(node);
        let (distributor, interface) = ranges.next().zip(ranges.next()).ok_or(NO_GIC)?;
        // SAFETY: the tree says that the controller lies there, which accesses no memory.
        let distributor = unsafe { Registers::new(distributor) }?;
        // SAFETY: as above.
        let interface = unsafe { Registers::new(interface) }?;
        // Both on, and every priority let through: GICD_CTLR, GICC_PMR, GICC_CTLR.
        distributor.write(0, 1);
        interface.write(4, 0xff);
        interface.write(0, 1);
        let gic = GIC.call_once(|| Gic {
            distributor,
            interface,
        });
        gic.set_line(TIMER, true);
        start_tick();
        Self::unmask_interrupts();
        Ok(())
    }

    fn set_line(line: u32, enabled: bool) {
        if let Some(gic) = GIC.get().filter(|_| line < SPURIOUS) {
            gic.set_line(line, enabled);
        }
    }

    fn mask_interrupts() -> bool {
        let masks: u64;
        // SAFETY: no interrupt is a state that all code here can be in.
        unsafe { asm!("mrs {}, daif", "msr daifset, #2", out(reg) masks, options(nostack)) };
        masks & 0x80 == 0
    }

    fn unmask_interrupts() {
        // SAFETY: only called once there is a handler, or to end a time in which they were masked.
        unsafe { asm!("msr daifclr, #2", options(nostack)) };
    }

    fn sleep() {
        // SAFETY: a pending interrupt ends the sleep though it is masked (ARM DDI 0487, D1.6.2).
        unsafe { asm!("dsb sy", "wfi", options(nostack)) };
        Self::unmask_interrupts();
    }

    fn specified_line(specifier: &[u32]) -> Option<u32> {
        // 0: shared, numbered from 32 on; 1: private, from 16 on.
        match *specifier {
            [0, number, ..] => number.checked_add(32),
            [1, number, ..] => number.checked_add(16),
            _ => None,
        }
    }

    fn pci_line(_device: u8, _pin: u8, _interrupt_line: u8) -> Option<u32> {
        None
    }
}

impl PageTables for Arch {
    const PAGE_BITS: u32 = 12;
    const LEVELS: u32 = 3;
    const DIRECT_MAP: usize = 0xffff_ff80_0000_0000;
    const IMAGE: usize = 0;
    const HEAP: usize = 0xffff_ffc0_0000_0000;
    const REGISTERS: usize = 0xffff_ffe0_0000_0000;

    fn root() -> u64 {
        boot_root.as_ptr() as u64
    }

    fn table_entry(table: u64) -> u64 {
        table | 3
    }

    fn page_entry(page: u64, kind: Page) -> u64 {
        // A page that was accessed, not executable; memory 0, 1 or 2 of MAIR, inner shareable.
        let flags = match kind {
            Page::Memory => 0x703,
            Page::Registers => 0x407,
            Page::Uncached => 0x70b,
        };
        page | flags | 3 << 53
    }

    fn address_in(entry: u64) -> Option<u64> {
        (entry & 1 != 0).then_some(entry & 0x0000_ffff_ffff_f000)
    }

    fn entry_added(_: usize) {
        // SAFETY: barriers change nothing but the order: the entry is there before it is used.
        unsafe { asm!("dsb ishst", "isb", options(nostack)) };
    }
}
