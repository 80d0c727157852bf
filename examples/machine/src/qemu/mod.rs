//! QEMU as a board: virtio devices that QEMU's authors wrote, driven from this process.
//!
//! No guest runs. QEMU is started as a child with its processor standing still; register accesses go over its qtest socket,
//! memory is a file that both map, so that data moves without QEMU's help. Nothing has a name in a file system, and the
//! child ends with this process however that ends.
//!
//! ```no_run
//! use machine::qemu::{Bus, Disk, ImageFormat, QemuBoard, QemuMachine, QemuOptions};
//!
//! # fn main() -> Result<(), machine::qemu::QemuError> {
//! let options = QemuOptions::new(QemuMachine::Aarch64Virt)
//!     .disk(Disk::new("disk.img", ImageFormat::Raw).on(Bus::Mmio));
//! let board = QemuBoard::start(&options)?;
//! let transport = board.mmio_slots()[0].transport();
//! # let _ = transport;
//! # Ok(())
//! # }
//! ```

mod cable;
pub(crate) mod error;
mod monitor;
pub(crate) mod options;
mod ppm;
pub(crate) mod process;
mod qmp;
mod qtest;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use cable::{Cable, MAX_FRAME};
pub use error::{ImageFault, QemuError};
pub use monitor::Monitor;
pub use options::{
    Bus, Disk, DiskOperation, Display, Fault, ImageFormat, Nic, QemuMachine, QemuOptions,
};
pub use qmp::Qmp;
pub use qtest::{InterruptLine, Qtest};

use serde_json::json;
use virtio_drivers::transport::pci::bus::{DeviceFunction, MmioCam, PciRoot};

use crate::emulated::{Function, Image, Slot};
use crate::{Installed, Machine, Memory, RegisterBus, pci_root};
use options::{FarEnd, Place};
use process::{Launch, Process};

/// The environment variable that names the directory of QEMU's programs, when they are not in `PATH`.
pub const PROGRAM_VARIABLE: &str = "AXDRIVER_QEMU";

/// The environment variable that, set to 1, makes a missing QEMU a failure instead of a reason to skip a test.
pub const REQUIRE_VARIABLE: &str = "AXDRIVER_REQUIRE_QEMU";

/// The first version of QEMU that has all that is asked of it, and the same in words.
const MINIMUM: ((u64, u64), &str) = ((6, 0), "6.0");

/// How long QEMU may take to end in an orderly way. Closing an image writes what is not yet written.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// The address of the first virtio-mmio slot of `virt`, and the size of each, in bytes.
const VIRT_MMIO: (usize, usize) = (0x0a00_0000, 0x200);

/// The interrupt line, at the interrupt controller of `virt`, of its first virtio-mmio slot.
const VIRT_MMIO_LINE: u32 = 16;

/// Where `virt` with `highmem=off` has the configuration space of PCI, and room for BARs.
const VIRT_ECAM: u64 = 0x3f00_0000;
const VIRT_WINDOW: Range<u64> = 0x1000_0000..0x3eff_0000;

/// Where q35 shows the configuration space of PCI once it is told so, and room for BARs above that.
const Q35_ECAM: u64 = 0xb000_0000;
const Q35_WINDOW: Range<u64> = 0xc000_0000..0xfe00_0000;

/// The registers of a machine in QEMU.
#[derive(Debug)]
struct QtestBus {
    state: Mutex<BusState>,
}

#[derive(Debug)]
struct BusState {
    qtest: Qtest,
    /// Why the registers have gone. From then on every register reads as all ones, as those of a device that was pulled out do.
    lost: Option<QemuError>,
}

impl QtestBus {
    fn lock(&self) -> MutexGuard<'_, BusState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusState {
    fn run<R>(&mut self, access: impl FnOnce(&mut Qtest) -> Result<R, QemuError>) -> Option<R> {
        if self.lost.is_some() {
            return None;
        }
        match access(&mut self.qtest) {
            Ok(result) => Some(result),
            Err(error) => {
                log::warn!("registers lost: {error}");
                self.lost = Some(error);
                None
            }
        }
    }
}

impl RegisterBus for QtestBus {
    fn read(&self, address: u64, width: u8) -> u64 {
        self.lock()
            .run(|qtest| qtest.read(address, width))
            .unwrap_or(u64::MAX)
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        let _ = self.lock().run(|qtest| qtest.write(address, width, value));
    }
}

/// A machine in QEMU, as a board, installed on the thread that started it.
///
/// Dropping it lets QEMU close its images and end; [`kill`](Self::kill) does not let it.
#[derive(Debug)]
pub struct QemuBoard {
    machine: Machine,
    kind: QemuMachine,
    bus: Arc<QtestBus>,
    /// Before `process`, whose drop ends QEMU at once.
    qmp: Qmp,
    process: Process,
    cables: Vec<Option<Cable>>,
    mmio_slots: Vec<Slot>,
    pci_functions: Vec<Function>,
    root_ports: Vec<DeviceFunction>,
    /// Where QEMU writes the pictures that are asked of it.
    picture: File,
    /// The path of `picture`, as QEMU sees it.
    picture_path: String,
    intercepting: bool,
    _installed: Installed,
}

impl QemuBoard {
    /// Returns whether QEMU is there, for a test to be skipped without it: `None`, or why not in one line.
    ///
    /// # Panics
    ///
    /// If it is not there although the environment variable [`REQUIRE_VARIABLE`] is `1`.
    pub fn missing(machine: QemuMachine) -> Option<String> {
        missing_program(&program(&QemuOptions::new(machine)))
    }

    /// Starts QEMU with these devices.
    ///
    /// # Errors
    ///
    /// Each names the culprit, and leaves no process and no file behind:
    ///
    /// * [`QemuError::NotInstalled`], [`QemuError::TooOld`]: there is no QEMU that serves.
    /// * [`QemuError::Options`]: no QEMU has what `options` ask for.
    /// * [`QemuError::Property`], [`QemuError::UnknownDevice`], [`QemuError::Image`], [`QemuError::Refused`]: this QEMU, here
    ///   and now, has not.
    /// * [`QemuError::Gone`], [`QemuError::Silent`], [`QemuError::Protocol`]: it started and then did not speak.
    /// * [`QemuError::Host`]: memory, sockets or a process could not be had.
    pub fn start(options: &QemuOptions) -> Result<Self, QemuError> {
        options.check()?;
        let kind = options.machine;
        let size = usize::try_from(options.memory_size)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let memory = Memory::anonymous(kind.memory_base(), size)?;
        let (qtest, qtest_far) = UnixStream::pair()?;
        let (qmp, qmp_far) = UnixStream::pair()?;
        let picture = memory_file("picture")?;

        let program = program(options);
        let mut launch = Launch::new(&program);
        launch
            .arg("-nodefaults")
            .arg("-no-user-config")
            .option("-display", "none");
        let number = launch.inherit(qtest_far);
        launch
            .option("-chardev", format!("socket,id=qtest,fd={number}"))
            .option("-qtest", "chardev:qtest")
            .option("-qtest-log", "none");
        let number = launch.inherit(qmp_far);
        launch
            .option("-chardev", format!("socket,id=qmp,fd={number}"))
            .option("-mon", "chardev=qmp,mode=control");
        let picture_path = inherited_path(launch.inherit(picture.try_clone()?));
        if kind == QemuMachine::X86Q35 {
            let firmware = memory_file("firmware")?;
            firmware.write_all_at(&x86_firmware(), 0)?;
            let path = inherited_path(launch.inherit(firmware));
            launch.option("-bios", path);
        }
        let memory_path = inherited_path(launch.inherit(memory.as_file().try_clone()?));
        let mut cables = Vec::new();
        let mut sockets = Vec::new();
        for nic in &options.nics {
            cables.push(match nic.far_end {
                FarEnd::Cable => {
                    let (cable, far) = Cable::new()?;
                    sockets.push(launch.inherit(far));
                    Some(cable)
                }
                FarEnd::Netdev(_) => None,
            });
        }
        options.write_to(&mut launch, &memory_path, &sockets)?;

        let mut process = launch.start().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => QemuError::NotInstalled {
                program: program.clone(),
            },
            _ => QemuError::Host(error),
        })?;
        let qmp = Qmp::new(qmp).map_err(|error| why_not(error, &mut process, &program, options))?;
        if let Some(error) = too_old(&program, (qmp.version().0, qmp.version().1)) {
            return Err(error);
        }
        let mut qtest = Qtest::new(qtest)?;
        if kind == QemuMachine::X86Q35 {
            show_configuration_space(&mut qtest)
                .map_err(|error| why_not(error, &mut process, &program, options))?;
        }
        let bus = Arc::new(QtestBus {
            state: Mutex::new(BusState { qtest, lost: None }),
        });
        let machine = Machine::new(memory, bus.clone());
        let (mmio_slots, pci_functions) = options.devices()?;
        Ok(Self {
            _installed: machine.install(),
            machine,
            kind,
            bus,
            qmp,
            process,
            cables,
            mmio_slots,
            pci_functions,
            root_ports: options.root_ports()?,
            picture,
            picture_path,
            intercepting: false,
        })
    }

    /// Returns the machine, which can be installed on other threads too.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Returns the memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.machine.memory()
    }

    /// Returns the virtio-mmio slots, devices first in the order of the options. A PC has none.
    pub fn mmio_slots(&self) -> &[Slot] {
        &self.mmio_slots
    }

    /// Returns the PCI root, with virtio-drivers' memory-mapped access to configuration space. The BARs have no addresses yet.
    pub fn pci(&self) -> PciRoot<MmioCam<'static>> {
        pci_root(self.ecam())
    }

    /// Returns the address of the memory-mapped configuration space (ECAM).
    pub fn ecam(&self) -> u64 {
        match self.kind {
            QemuMachine::Aarch64Virt => VIRT_ECAM,
            QemuMachine::X86Q35 => Q35_ECAM,
        }
    }

    /// Returns the addresses that BARs may be given.
    pub fn pci_window(&self) -> Range<u64> {
        match self.kind {
            QemuMachine::Aarch64Virt => VIRT_WINDOW,
            QemuMachine::X86Q35 => Q35_WINDOW,
        }
    }

    /// Returns the functions on bus 0 with a virtio device, in the order of the options. There are others, such as the host
    /// bridge.
    pub fn pci_functions(&self) -> &[Function] {
        &self.pci_functions
    }

    /// Returns the root ports, in the order of the options. Each has one device behind it, and no bus number yet.
    pub fn root_ports(&self) -> &[DeviceFunction] {
        &self.root_ports
    }

    /// Returns QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.qmp.version()
    }

    /// Returns QEMU's process id.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Returns the connection to QEMU's management interface.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Returns the far end of a NIC's cable, by the number of the NIC. Whoever takes it first has it.
    pub fn take_cable(&mut self, nic: usize) -> Option<Cable> {
        self.cables.get_mut(nic)?.take()
    }

    /// Returns why the registers have gone and read as all ones, if they have.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Gone`]: QEMU has ended, with its last words.
    /// * Any other error by which an access failed first.
    pub fn check(&mut self) -> Result<(), QemuError> {
        if self.process.has_ended() {
            return Err(QemuError::Gone {
                message: self.process.complaint(),
            });
        }
        match &self.bus.lock().lost {
            None => Ok(()),
            Some(error) => Err(QemuError::Protocol {
                message: error.to_string(),
            }),
        }
    }

    /// Takes the interrupt lines from the machine's interrupt controller, so that
    /// [`interrupt_line`](Self::interrupt_line) tells of them.
    ///
    /// # Errors
    ///
    /// As those of [`Qtest::intercept_interrupts`].
    pub fn intercept_interrupts(&mut self) -> Result<(), QemuError> {
        if self.intercepting {
            return Ok(());
        }
        let path = match self.kind {
            QemuMachine::Aarch64Virt => self.qmp.find_object("/machine/unattached", "arm_gic")?,
            QemuMachine::X86Q35 => "ioapic".to_owned(),
        };
        self.bus.lock().qtest.intercept_interrupts(&path)?;
        self.intercepting = true;
        Ok(())
    }

    /// Returns the state of an interrupt line.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Options`]: [`intercept_interrupts`](Self::intercept_interrupts) was not called.
    /// * [`QemuError::Gone`]: QEMU has ended.
    pub fn interrupt_line(&mut self, number: u32) -> Result<InterruptLine, QemuError> {
        self.intercepted()?.qtest.interrupt_line(number)
    }

    /// Waits until an interrupt line is asserted, at most `limit`. Returns whether it is.
    ///
    /// Meanwhile the registers can be used from other threads.
    ///
    /// # Errors
    ///
    /// As those of [`interrupt_line`](Self::interrupt_line).
    pub fn wait_for_interrupt(&mut self, number: u32, limit: Duration) -> Result<bool, QemuError> {
        let end = Instant::now() + limit;
        let listener = self.intercepted()?.qtest.listener()?;
        loop {
            if self.interrupt_line(number)?.asserted {
                return Ok(true);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            qtest::has_something(&listener, left);
        }
    }

    fn intercepted(&mut self) -> Result<MutexGuard<'_, BusState>, QemuError> {
        if !self.intercepting {
            return Err(QemuError::Options {
                message: "interrupts are not told of before they are intercepted".to_owned(),
            });
        }
        Ok(self.bus.lock())
    }

    /// Returns what head `head` of the display with this number shows.
    ///
    /// # Errors
    ///
    /// As those of [`Qmp::execute`]; [`QemuError::Protocol`] if what QEMU wrote is no picture.
    pub fn image(&mut self, display: usize, head: u32) -> Result<Image, QemuError> {
        self.picture.set_len(0)?;
        self.qmp
            .screendump(&format!("display{display}"), head, &self.picture_path)?;
        let length = usize::try_from(self.picture.metadata()?.len())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut bytes = vec![0; length];
        self.picture.read_exact_at(&mut bytes, 0)?;
        ppm::image(&bytes).ok_or_else(|| QemuError::Protocol {
            message: "no PPM for a picture".to_owned(),
        })
    }

    /// Plugs a monitor into the head that [`QemuOptions::monitor`] names.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Command`]: the options name none.
    /// * [`QemuError::Gone`], [`QemuError::Silent`], [`QemuError::Protocol`]: QEMU does not speak to it.
    /// * [`QemuError::Host`]: the operating system has no more sockets.
    pub fn monitor(&mut self) -> Result<Monitor, QemuError> {
        let (stream, far) = UnixStream::pair()?;
        self.qmp.hand_over("monitor", far)?;
        self.qmp.execute(
            "add_client",
            json!({ "protocol": "vnc", "fdname": "monitor", "skipauth": true }),
        )?;
        Monitor::new(stream)
    }

    /// Ends QEMU at once, as a power cut would: what it holds back is lost.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Lets QEMU close its images and end.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Gone`]: it had ended before.
    /// * [`QemuError::Silent`]: it does not end; it is killed.
    pub fn shut_down(mut self) -> Result<(), QemuError> {
        self.check()?;
        self.quit()
    }

    fn quit(&mut self) -> Result<(), QemuError> {
        self.qmp.quit()?;
        match self.process.wait(QUIT_LIMIT) {
            Some(_) => Ok(()),
            None => Err(QemuError::Silent {
                waiting_for: "its end".to_owned(),
                limit: QUIT_LIMIT,
            }),
        }
    }
}

impl Drop for QemuBoard {
    fn drop(&mut self) {
        if !self.process.has_ended()
            && let Err(error) = self.quit()
        {
            log::warn!("killing QEMU: {error}");
        }
    }
}

/// Returns the path under which a child opens a file that it has inherited.
fn inherited_path(number: i32) -> String {
    format!("/proc/self/fd/{number}")
}

fn memory_file(name: &str) -> Result<File, QemuError> {
    Ok(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// Returns why a program of QEMU's does not serve, or `None` if it does.
#[expect(
    clippy::panic,
    reason = "a test has no other way to fail, and this one is asked for"
)]
pub(crate) fn missing_program(program: &PathBuf) -> Option<String> {
    let error = match version_of(program) {
        Ok(version) => too_old(program, version)?,
        Err(error) => error,
    };
    if std::env::var_os(REQUIRE_VARIABLE).is_some_and(|value| value == "1") {
        panic!("{REQUIRE_VARIABLE}=1, but {error}");
    }
    Some(format!("skipped: {error}"))
}

/// Returns the program to start.
fn program(options: &QemuOptions) -> PathBuf {
    let name = options.machine.program();
    match (&options.program, std::env::var_os(PROGRAM_VARIABLE)) {
        (Some(program), _) => program.clone(),
        (None, Some(directory)) if !directory.is_empty() => PathBuf::from(directory).join(name),
        (None, _) => name.into(),
    }
}

/// Asks a program of QEMU's for its version: major and minor.
fn version_of(program: &PathBuf) -> Result<(u64, u64), QemuError> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => QemuError::NotInstalled {
                program: program.clone(),
            },
            _ => QemuError::Host(error),
        })?;
    // "QEMU emulator version 7.2.22 (Debian ...)", or "qemu-storage-daemon version ...".
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_once("version ")
        .and_then(|(_, rest)| {
            let mut numbers = rest.split(|letter: char| !letter.is_ascii_digit());
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        })
        .ok_or_else(|| QemuError::Protocol {
            message: format!("{} tells no version", program.display()),
        })
}

fn too_old(program: &std::path::Path, version: (u64, u64)) -> Option<QemuError> {
    (version < MINIMUM.0).then(|| QemuError::TooOld {
        program: program.to_owned(),
        version: format!("{}.{}", version.0, version.1),
        needed: MINIMUM.1,
    })
}

/// Tells why a QEMU that was started does not speak.
fn why_not(
    error: QemuError,
    process: &mut Process,
    program: &PathBuf,
    options: &QemuOptions,
) -> QemuError {
    if !matches!(error, QemuError::Gone { .. }) {
        return error;
    }
    // It closes its sockets a moment before it ends.
    if process.wait(QUIT_LIMIT).is_none() {
        return error;
    }
    // One that is too old does not know an option of ours, and would not say that it is too old.
    if let Ok(version) = version_of(program)
        && let Some(error) = too_old(program, version)
    {
        return error;
    }
    error::refusal(&process.complaint(), &options.images())
}

/// Returns the code that an x86 processor starts with: it stops at once and for good.
fn x86_firmware() -> [u8; 0x1_0000] {
    // The rest is `hlt` too.
    let mut firmware = [0xf4; 0x1_0000];
    // cli; hlt; jmp to the hlt. The processor starts 16 bytes below the end.
    firmware[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    firmware
}

/// Has q35 show the configuration space of PCI in memory, which is the firmware's task.
fn show_configuration_space(qtest: &mut Qtest) -> Result<(), QemuError> {
    // PCIEXBAR of the memory controller hub, device 0 of bus 0: bits 1 and 2 are 0 for 256 buses, bit 0 enables.
    let (address, high) = (0x8000_0060, 0x8000_0064);
    let base = u32::try_from(Q35_ECAM).unwrap_or_default();
    qtest.write_port(0xcf8, high)?;
    qtest.write_port(0xcfc, 0)?;
    qtest.write_port(0xcf8, address)?;
    qtest.write_port(0xcfc, base | 1)
}

impl QemuOptions {
    /// Returns where the root ports are.
    fn root_ports(&self) -> Result<Vec<DeviceFunction>, QemuError> {
        let port = |place: &Place| match place {
            Place::RootPort(device) => Some(DeviceFunction {
                bus: 0,
                device: *device,
                function: 0,
            }),
            Place::MmioSlot(_) | Place::PciDevice(_) => None,
        };
        Ok(self.places()?.iter().filter_map(port).collect())
    }

    /// Returns what the board has in its places.
    fn devices(&self) -> Result<(Vec<Slot>, Vec<Function>), QemuError> {
        let places = self.places()?;
        let on_mmio = places
            .iter()
            .filter(|place| matches!(place, Place::MmioSlot(_)))
            .count();
        let (base, size) = VIRT_MMIO;
        let slots = (0..self.machine.mmio_slots())
            .zip((base..).step_by(size))
            .zip(VIRT_MMIO_LINE..)
            .map(|((number, base), line)| Slot {
                base,
                size,
                line,
                version: self.mmio,
                device: (number < on_mmio).then_some(number),
            })
            .collect();
        let functions = places
            .iter()
            .filter_map(|place| match place {
                Place::PciDevice(number) => Some(*number),
                Place::MmioSlot(_) | Place::RootPort(_) => None,
            })
            .zip(on_mmio..)
            .map(|(number, device)| Function {
                address: DeviceFunction {
                    bus: 0,
                    device: number,
                    function: 0,
                },
                line: match self.machine {
                    // `virt` wires the four pins to lines 3 to 6, turned by one from device to device.
                    QemuMachine::Aarch64Virt => 3 + u32::from(number) % 4,
                    // q35 wires devices 0 to 24 to PIRQ E to H, which are lines 20 to 23.
                    QemuMachine::X86Q35 => 20 + u32::from(number) % 4,
                },
                device,
            })
            .collect();
        Ok((slots, functions))
    }
}
