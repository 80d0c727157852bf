//! The boards: what QEMU is told, and what its exit status then means.

/// A machine with a disk, a network card and a display, and where there is PCI a second disk behind a bridge.
#[derive(Debug)]
pub(crate) struct Board {
    /// Its name: the architecture's, and what is special about it.
    pub(crate) name: &'static str,
    /// A line about it.
    pub(crate) about: &'static str,
    /// The architecture.
    pub(crate) architecture: &'static str,
    /// QEMU's options for the machine.
    pub(crate) machine: &'static [&'static str],
    /// Whether the devices are on PCI, rather than on virtio-mmio.
    pub(crate) pci: bool,
    /// Where in memory the command line has to be left, if QEMU does not pass it on.
    pub(crate) command_line: Option<u64>,
    /// Whether a line that stays asserted interrupts again, as it should. QEMU 7.2's PLIC forgets to.
    pub(crate) level: bool,
    /// Whether devices see the caches only because the device tree says so (`dma-coherent`).
    pub(crate) dma_coherent: bool,
    /// The type of QEMU's interrupt controllers, the line that is the first one's first input, and how
    /// many inputs each has.
    pub(crate) controllers: (&'static str, u32, u32),
    /// QEMU's exit status when the kernel says that all is well, and when it says that it is not.
    pub(crate) status: (i32, i32),
}

impl Board {
    /// Returns how the kernel names the places of this board's devices.
    pub(crate) const fn place(&self) -> &'static str {
        if self.pci { "pci" } else { "mmio" }
    }
}

const MODERN: &str = "virtio-mmio.force-legacy=false";
const LEGACY: &str = "virtio-mmio.force-legacy=true";

/// All boards.
pub(crate) const BOARDS: &[Board] = &[
    Board {
        name: "x86_64-q35",
        about: "a PC: PCI, its BARs and bridges set up by the firmware",
        architecture: "x86_64",
        machine: &[
            "-M", "q35", "-cpu", "max", "-m", "256M", "-device", PC_EXIT, "-global", PC_SLOTS,
        ],
        pci: true,
        command_line: None,
        level: true,
        dma_coherent: false,
        controllers: PC_CONTROLLERS,
        status: PC_STATUS,
    },
    Board {
        name: "x86_64-microvm",
        about: "a PC without PCI: virtio-mmio (modern) by the command line",
        architecture: "x86_64",
        machine: &[
            "-M",
            "microvm,acpi=off",
            "-cpu",
            "max",
            "-m",
            "256M",
            "-device",
            PC_EXIT,
            "-global",
            MODERN,
        ],
        pci: false,
        command_line: None,
        level: true,
        dma_coherent: false,
        controllers: PC_CONTROLLERS,
        status: PC_STATUS,
    },
    Board {
        name: "aarch64-mmio",
        about: "virt: virtio-mmio (modern) by the device tree",
        architecture: "aarch64",
        machine: &[
            "-M",
            "virt",
            "-cpu",
            "max",
            "-m",
            "256M",
            "-global",
            MODERN,
            "-semihosting-config",
            "enable=on,target=native",
        ],
        pci: false,
        command_line: None,
        level: true,
        dma_coherent: true,
        controllers: ("arm_gic", 32, 288),
        status: (0, 1),
    },
    Board {
        name: "aarch64-pci",
        about: "virt: PCI by the device tree, its BARs and bridges set up by the kernel",
        architecture: "aarch64",
        machine: &[
            "-M",
            "virt",
            "-cpu",
            "cortex-a57",
            "-m",
            "512M",
            "-semihosting-config",
            "enable=on,target=native",
        ],
        pci: true,
        command_line: None,
        level: true,
        dma_coherent: true,
        controllers: ("arm_gic", 32, 288),
        status: (0, 1),
    },
    Board {
        name: "riscv64-mmio",
        about: "virt: virtio-mmio (legacy) by the device tree",
        architecture: "riscv64",
        machine: &["-M", "virt", "-m", "256M", "-global", LEGACY],
        pci: false,
        command_line: None,
        level: false,
        dma_coherent: false,
        controllers: ("riscv.sifive.plic", 0, 96),
        status: (0, 1),
    },
    Board {
        name: "riscv64-pci",
        about: "virt: PCI by the device tree, its BARs and bridges set up by the kernel",
        architecture: "riscv64",
        machine: &["-M", "virt", "-m", "256M"],
        pci: true,
        command_line: None,
        level: false,
        dma_coherent: false,
        controllers: ("riscv.sifive.plic", 0, 96),
        status: (0, 1),
    },
    Board {
        name: "loongarch64-pci",
        about: "virt: PCI by the device tree, its BARs and bridges set up by the kernel",
        architecture: "loongarch64",
        machine: &["-M", "virt", "-cpu", "la464-loongarch-cpu", "-m", "2G"],
        pci: true,
        command_line: Some(0x8_0000),
        level: false,
        dma_coherent: false,
        controllers: ("loongarch_pch_pic", 0, 64),
        // The machine has no way to end with a status.
        status: (0, 0),
    },
];

/// Writing v to this ends QEMU with the status (v << 1) | 1.
const PC_EXIT: &str = "isa-debug-exit,iobase=0xf4,iosize=0x04";
/// Cards come and go by the ports' own registers, not by ACPI's byte code.
const PC_SLOTS: &str = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off";
const PC_STATUS: (i32, i32) = (0x10 << 1 | 1, 0x11 << 1 | 1);
const PC_CONTROLLERS: (&str, u32, u32) = ("isa-i8259", 0, 8);
