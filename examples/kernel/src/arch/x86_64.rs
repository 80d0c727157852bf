//! x86-64: QEMU's `q35` and `microvm`, entered by PVH.
//!
//! The console is COM1, the interrupt controllers are the two 8259 (firmware tells the PCI functions'
//! lines in their terms, without the ACPI byte code that an I/O APIC would need), the tick is the
//! 8254 and the clock the time stamp counter.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use spin::Mutex;

use super::{Architecture, Page, PageTables, TICKS_PER_SECOND, counted_time};
use crate::error::{Error, Result};
use crate::machine::{Boot, Description};
use crate::registers::Registers;
use crate::{interrupts, paging, println, tree::Tree};

/// x86-64.
pub(crate) struct Arch;

// Entered by PVH: 32-bit protected mode, paging off, the start information's address in ebx
// (Xen, docs/misc/pvh.pandoc). Then the tables below, long mode, SSE, and Rust.
global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                      /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long _start

    .section .boot, "ax"
    .code32
    .global _start
_start:
    cld
    movl $boot_root, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x620, %eax                    /* PAE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $0xc0000080, %ecx              /* EFER: LME, NXE */
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl %cr0, %eax
    andl $~4, %eax                      /* EM */
    orl $0x80010002, %eax               /* PG, WP, MP */
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $1f
    .code64
1:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    leaq boot_tss(%rip), %rax           /* The address of a TSS lies in three pieces. */
    movw %ax, boot_gdt+26(%rip)
    shrq $16, %rax
    movb %al, boot_gdt+28(%rip)
    movb %ah, boot_gdt+31(%rip)
    movl $24, %eax
    ltr %ax
    leaq boot_stack_end(%rip), %rsp
    xorl %ebp, %ebp
    movl %ebx, %edi
    call x86_64_start
    ud2

    /* Exceptions 0 to 31, with an error code of 0 where the processor pushes none. */
    .balign 16
    .global x86_64_stubs
x86_64_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp x86_64_exception_stub
    .set vector, vector + 1
    .endr
    /* Interrupts 32 to 47. */
    .rept 16
    .balign 16
    pushq $vector
    jmp x86_64_interrupt_stub
    .set vector, vector + 1
    .endr

x86_64_exception_stub:
    movq %rsp, %rdi
    andq $-16, %rsp
    call x86_64_exception
    ud2

    /* The stack is the gate's own, so what lies below the interrupted stack pointer stays. */
x86_64_interrupt_stub:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    subq $520, %rsp
    fxsave64 (%rsp)
    movq 592(%rsp), %rdi
    cld
    call x86_64_interrupt
    fxrstor64 (%rsp)
    addq $520, %rsp
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    addq $8, %rsp
    iretq

    .section .data.boot, "aw"
    /* The first 4 GiB, where they are and from 0xffff800000000000 on. */
    .balign 4096
    .global boot_root
boot_root:
    .quad boot_gigabytes + 3
    .fill 255, 8, 0
    .quad boot_gigabytes + 3
    .fill 255, 8, 0
boot_gigabytes:
    .quad boot_pages + 3, boot_pages + 0x1003, boot_pages + 0x2003, boot_pages + 0x3003
    .fill 508, 8, 0
boot_pages:
    .set page, 0
    .rept 2048
    .quad (page << 21) + 0x83
    .set page, page + 1
    .endr

boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
    .quad 0x0000890000000067, 0         /* the TSS; its address is filled in above */
boot_gdt_pointer:
    .word boot_gdt_pointer - boot_gdt - 1
    .quad boot_gdt

    .balign 16
    .long 0                             /* so that the TSS's 64-bit fields are aligned */
boot_tss:
    .long 0
    .fill 4, 8, 0
    .quad interrupt_stack_end, exception_stack_end
    .fill 6, 8, 0
    .word 0, 104

    .section .bss.boot, "aw", @nobits
    .balign 16
    .skip 131072
boot_stack_end:
    .skip 32768
interrupt_stack_end:
    .skip 32768
exception_stack_end:
    .text

    /* What the compiler calls and the precompiled core does not bring. */
    .global memcpy, memmove, memset, memcmp, bcmp
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
memmove:
    movq %rdi, %rax
    movq %rdx, %rcx
    movq %rdi, %r8
    subq %rsi, %r8
    cmpq %rdx, %r8
    jb 2f
    rep movsb
    ret
2:  leaq -1(%rdi, %rdx), %rdi
    leaq -1(%rsi, %rdx), %rsi
    std
    rep movsb
    cld
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
memcmp:
bcmp:
    xorl %eax, %eax
    movq %rdx, %rcx
    cmpq %rcx, %rcx
    repe cmpsb
    je 3f
    movzbl -1(%rdi), %eax
    movzbl -1(%rsi), %ecx
    subl %ecx, %eax
3:  ret
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    /// The first of 48 stubs, 16 bytes each, for the vectors in order.
    safe static x86_64_stubs: [u8; 0];
    safe static boot_root: [u64; 512];
}

/// The ports of COM1, an 8250.
const COM1: u16 = 0x3f8;
/// Command and data ports of the two interrupt controllers.
const PIC: [(u16, u16); 2] = [(0x20, 0x21), (0xa0, 0xa1)];
/// Edge or level, one bit for each of the controllers' lines.
const ELCR: u16 = 0x4d0;
/// The first vector of the controllers' lines.
const FIRST_VECTOR: u8 = 32;
/// The lines that are edge triggered whatever is asked: the timer, the keyboard, the cascade, the clock, the coprocessor.
const EDGE_LINES: u32 = 0x2107;
/// What the 8254 counts in 10 ms, at 1,193,182 Hz.
const PIT_COUNT: u16 = 11932;
/// QEMU's `isa-debug-exit`: writing v ends it with the status (v << 1) | 1.
const EXIT: u16 = 0xf4;

/// The local APIC's registers, and of these "spurious interrupt vector" and "LVT LINT0".
const APIC: u64 = 0xfee0_0000;
const APIC_SPURIOUS: usize = 0xf0;
const APIC_LINT0: usize = 0x350;

/// How much the time stamp counter counts in 10 ms, not 0; a guess until it was measured.
static CYCLES_PER_TICK: AtomicU64 = AtomicU64::new(10_000_000);

/// A port's byte is written.
fn write_port(port: u16, value: u8) {
    // SAFETY: of the ports that this file names, none makes a device access memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// A port's byte is read.
fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: of the ports that this file names, none makes a device access memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}

fn cycles() -> u64 {
    // SAFETY: the counter may be read at this privilege, and every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What a hypervisor passes by PVH: `hvm_start_info`, version 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// One range of the memory map: `hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Reads what lies at a physical address below 4 GiB.
///
/// # Safety
///
/// A `T` lies there, and nothing changes it.
unsafe fn read_physical<T: Copy>(address: u64) -> T {
    // SAFETY: the boot tables show the first 4 GiB in the direct map; the rest is the caller's promise.
    unsafe { paging::memory_at(address).cast::<T>().read_unaligned() }
}

#[unsafe(no_mangle)]
extern "C" fn x86_64_start(start_info: u32) -> ! {
    // SAFETY: PVH passes the address of its start information in ebx, which the assembly hands on.
    let info: StartInfo = unsafe { read_physical(u64::from(start_info)) };
    if info.magic != 0x336e_c578 {
        crate::stop(Err(Error::Machine("not started by PVH")));
    }
    let mut memory = 0..0;
    for index in 0..u64::from(info.memory_map_entries) {
        // SAFETY: the start information says that so many entries of 24 bytes lie there.
        let entry: MemoryMapEntry = unsafe { read_physical(info.memory_map + index * 24) };
        let range = entry.address..entry.address.saturating_add(entry.size);
        // The largest range of memory that the direct map shows.
        if entry.kind == 1 && entry.size > memory.end - memory.start && range.end <= 1 << 32 {
            memory = range;
        }
    }
    let mut command_line: &[u8] = &[];
    if info.command_line != 0 {
        let first = paging::memory_at(info.command_line).cast_const();
        let mut length = 0;
        // SAFETY: a string lies there that ends with 0, and this stops at the 0.
        while length < 4096 && unsafe { first.wrapping_add(length).read() } != 0 {
            length += 1;
        }
        // SAFETY: those bytes were just read, and nothing writes them: they are not in `memory`
        // above 1 MiB, of which alone the kernel takes frames, or are reserved below.
        command_line = unsafe { core::slice::from_raw_parts(first, length) };
    }
    crate::start(Boot {
        memory: memory.start.max(0x10_0000)..memory.end,
        command_line: core::str::from_utf8(command_line).unwrap_or_default(),
        description: Description::Pc { rsdp: info.rsdp },
    })
}

/// What the processor and the stub push on an exception.
#[repr(C)]
#[derive(Debug)]
struct ExceptionFrame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

#[unsafe(no_mangle)]
extern "C" fn x86_64_exception(frame: &ExceptionFrame) -> ! {
    let address: u64;
    // SAFETY: reading cr2 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) };
    println!("kernel: exception, address {address:#x}: {frame:x?}");
    Arch::exit(false)
}

#[unsafe(no_mangle)]
extern "C" fn x86_64_interrupt(vector: u8) {
    let line = vector.wrapping_sub(FIRST_VECTOR);
    let controller = usize::from(line / 8) & 1;
    // Lines 7 and 15 also stand for an interrupt that went away: then it is not in service.
    if line % 8 == 7 {
        write_port(PIC[controller].0, 0x0b);
        if read_port(PIC[controller].0) & 0x80 == 0 {
            if controller == 1 {
                write_port(PIC[0].0, 0x20);
            }
            return;
        }
    }
    if line == 0 {
        interrupts::tick();
    } else {
        interrupts::handle(u32::from(line));
    }
    if controller == 1 {
        write_port(PIC[1].0, 0x20);
    }
    write_port(PIC[0].0, 0x20);
}

/// The gates of the vectors.
static GATES: Mutex<[[u64; 2]; 48]> = Mutex::new([[0; 2]; 48]);

/// Points the processor to the stubs.
fn load_gates() {
    let mut gates = GATES.lock();
    for (vector, gate) in gates.iter_mut().enumerate() {
        let stub = x86_64_stubs.as_ptr() as u64 + vector as u64 * 16;
        let stack: u64 = if vector < 32 { 2 } else { 1 };
        // An interrupt gate, present, for the code segment 8.
        gate[0] = stub & 0xffff | 8 << 16 | stack << 32 | 0x8e << 40 | (stub >> 16 & 0xffff) << 48;
        gate[1] = stub >> 32;
    }
    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    let pointer = Pointer {
        limit: 48 * 16 - 1,
        base: gates.as_ptr() as u64,
    };
    // SAFETY: the table is a static and well formed: each gate leads to a stub for its vector, on a
    // stack of its own, which the TSS names.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack)) };
}

impl Architecture for Arch {
    const NAME: &'static str = "x86_64";

    fn console_write(byte: u8) {
        // Bit 5 of the line status: the transmitter takes a byte.
        while read_port(COM1 + 5) & 0x20 == 0 {}
        write_port(COM1, byte);
    }

    fn exit(success: bool) -> ! {
        write_port(EXIT, if success { 0x10 } else { 0x11 });
        loop {
            Self::mask_interrupts();
            // SAFETY: nothing is left to be done, asleep or not.
            unsafe { asm!("hlt", options(nomem, nostack)) };
        }
    }

    fn now() -> Duration {
        let per_tick = CYCLES_PER_TICK.load(Ordering::Relaxed);
        counted_time(cycles(), per_tick.saturating_mul(TICKS_PER_SECOND))
    }

    fn start_interrupts(_: Option<&Tree<'_>>) -> Result {
        // Channel 0 of the 8254 counts 10 ms down, once; then its output, bit 7 of the status that a
        // read-back command asks for, is high.
        let [low, high] = PIT_COUNT.to_le_bytes();
        write_port(0x43, 0x30);
        write_port(0x40, low);
        let start = cycles();
        write_port(0x40, high);
        loop {
            write_port(0x43, 0xe2);
            if read_port(0x40) & 0x80 != 0 {
                break;
            }
        }
        CYCLES_PER_TICK.store((cycles() - start).max(1), Ordering::Relaxed);

        load_gates();
        // ICW1 to ICW4: edge triggered but for the ELCR, vectors 32 to 47, the second behind line 2.
        let settings = [(FIRST_VECTOR, 4, 0xfa), (FIRST_VECTOR + 8, 2, 0xff)];
        for ((command, data), (vector, cascade, mask)) in PIC.into_iter().zip(settings) {
            write_port(command, 0x11);
            write_port(data, vector);
            write_port(data, cascade);
            write_port(data, 1);
            write_port(data, mask);
        }
        // Where no firmware has done so: the local APIC passes the controllers' interrupts on (ExtINT).
        // SAFETY: every x86-64 processor has its local APIC there, and these values send nothing.
        let apic = unsafe { Registers::new(APIC..APIC + 0x1000) }?;
        apic.write(APIC_SPURIOUS, 0x1ff);
        apic.write(APIC_LINT0, 0x700);
        // Channel 0 of the 8254: a pulse every tick.
        write_port(0x43, 0x34);
        write_port(0x40, low);
        write_port(0x40, high);
        Self::unmask_interrupts();
        Ok(())
    }

    fn set_line(line: u32, enabled: bool) {
        if line > 15 {
            return;
        }
        let (half, bit) = (u16::from(line > 7), 1 << (line % 8));
        if EDGE_LINES & 1 << line == 0 {
            write_port(ELCR + half, read_port(ELCR + half) | bit);
        }
        let mask = PIC[usize::from(half)].1;
        let masked = read_port(mask);
        write_port(mask, if enabled { masked & !bit } else { masked | bit });
    }

    fn mask_interrupts() -> bool {
        let flags: u64;
        // SAFETY: no interrupt is a state that all code here can be in.
        unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        flags & 0x200 != 0
    }

    fn unmask_interrupts() {
        // SAFETY: only called once the gates are loaded, or to end a time in which they were masked.
        unsafe { asm!("sti", options(nostack)) };
    }

    fn sleep() {
        // SAFETY: as for `unmask_interrupts`. No interrupt comes between the two instructions.
        unsafe { asm!("sti", "hlt", options(nostack)) };
    }

    fn specified_line(_: &[u32]) -> Option<u32> {
        None
    }

    fn pci_line(_device: u8, _pin: u8, interrupt_line: u8) -> Option<u32> {
        (1..16)
            .contains(&interrupt_line)
            .then_some(u32::from(interrupt_line))
    }
}

impl PageTables for Arch {
    const PAGE_BITS: u32 = 12;
    const LEVELS: u32 = 4;
    const DIRECT_MAP: usize = 0xffff_8000_0000_0000;
    const IMAGE: usize = 0;
    const HEAP: usize = 0xffff_9000_0000_0000;
    const REGISTERS: usize = 0xffff_a000_0000_0000;

    fn root() -> u64 {
        boot_root.as_ptr() as u64
    }

    fn table_entry(table: u64) -> u64 {
        table | 3
    }

    fn page_entry(page: u64, kind: Page) -> u64 {
        // Present, writable, no execution; for registers not cached.
        let flags = if kind == Page::Registers { 0x1b } else { 3 };
        page | flags | 1 << 63
    }

    fn address_in(entry: u64) -> Option<u64> {
        (entry & 1 != 0).then_some(entry & 0x000f_ffff_ffff_f000)
    }

    // The processor does not remember that an entry was empty (Intel SDM 3A, 4.10.2.3).
    fn entry_added(_: usize) {}
}
