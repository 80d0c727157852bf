//! `vhost-user-gpu`: QEMU's display as a program of its own, without a machine.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::MemfdFlags;

use super::{Name, Socket};
use crate::qemu::process::{Launch, Process};
use crate::qemu::{PROGRAM_VARIABLE, QemuError, REQUIRE_VARIABLE};

/// The name of the program.
const PROGRAM: &str = "vhost-user-gpu";

/// QEMU's `vhost-user-gpu`, which is started anew for each connection to its socket, since it serves only one.
///
/// A connection ends the one before, and dropping this ends the last.
///
/// ```no_run
/// use machine::vhost_user::{DisplayProgram, VhostUserDevice, VhostUserOptions, VhostUserTransport};
/// # use machine::memory::{DEFAULT_BASE, Memory};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20)?;
/// let program = DisplayProgram::start()?;
/// let device = VhostUserDevice::Display { width: 640, height: 480 };
/// let options = VhostUserOptions::new(device);
/// let transport = VhostUserTransport::connect(program.socket(), memory, options)?;
/// let screen = transport.handle();
/// // A driver that was given the transport draws, and flushes.
/// screen.image(0).save("screen.png")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DisplayProgram {
    starter: Arc<Starter>,
}

#[derive(Debug)]
struct Starter {
    program: PathBuf,
    number: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What serves the last connection, or has served it.
    process: Option<Process>,
    /// Whether it is not to be started.
    killed: bool,
}

impl DisplayProgram {
    /// Returns whether the program is there, for a test to be skipped without it: `None`, or why not in one line.
    ///
    /// # Panics
    ///
    /// If it is not there although the environment variable [`REQUIRE_VARIABLE`] is `1`.
    #[expect(
        clippy::panic,
        reason = "a test has no other way to fail, and this one is asked for"
    )]
    pub fn missing() -> Option<String> {
        let required = std::env::var_os(REQUIRE_VARIABLE).is_some_and(|value| value == "1");
        let error = match find() {
            Err(error) if required => panic!("{REQUIRE_VARIABLE}=1, but {error}"),
            Err(error) => error,
            // No program that is installed would serve on this host.
            Ok(_) => check_host().err()?,
        };
        Some(format!("skipped: {error}"))
    }

    /// Finds the program, and sees whether it serves. It runs once there is a connection.
    ///
    /// # Errors
    ///
    /// * [`QemuError::NotInstalled`]: there is no such program.
    /// * [`QemuError::Refused`]: it does not run, or would not show its pictures over a socket here.
    /// * [`QemuError::Host`]: it cannot be started.
    pub fn start() -> Result<Self, QemuError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let program = find()?;
        check_host()?;
        Ok(Self {
            starter: Arc::new(Starter {
                program,
                number: NUMBER.fetch_add(1, Ordering::Relaxed),
                state: Mutex::default(),
            }),
        })
    }

    /// Returns where the display is to be had, as long as this lives.
    pub fn socket(&self) -> Socket {
        Socket(Name::Program(OnDemand {
            number: self.starter.number,
            starter: Arc::downgrade(&self.starter),
        }))
    }

    /// Returns the process id of the program, if it was started.
    pub fn process_id(&self) -> Option<u32> {
        self.starter.lock().process.as_ref().map(Process::id)
    }

    /// Ends the program at once, as a power cut would. It is not there for new connections either.
    pub fn kill(&self) {
        let mut state = self.starter.lock();
        state.process = None;
        state.killed = true;
    }

    /// Ends the program as [`kill`](Self::kill) does, and has it started again for the next connection.
    pub fn restart(&self) {
        *self.starter.lock() = State::default();
    }

    /// Stops the program where it is: it holds its connection and its memory, and answers nothing.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Host`]: it does not run.
    pub fn pause(&self) -> Result<(), QemuError> {
        Ok(self.starter.with_process(Process::pause)?)
    }

    /// Lets a paused program go on.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Host`]: it does not run.
    pub fn resume(&self) -> Result<(), QemuError> {
        Ok(self.starter.with_process(Process::resume)?)
    }
}

impl Starter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_process(&self, action: impl FnOnce(&Process) -> io::Result<()>) -> io::Result<()> {
        match &self.lock().process {
            Some(process) => action(process),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let mut state = self.lock();
        if state.killed {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        state.process = None;
        let (stream, far) = UnixStream::pair()?;
        let mut launch = Launch::new(&self.program);
        let number = launch.inherit(far);
        launch.option("--fd", number.to_string());
        // With a graphics card it would share pictures as buffers of the card's. A plain file keeps it from looking for one.
        let no_card = rustix::fs::memfd_create("no-card", MemfdFlags::CLOEXEC)?;
        let number = launch.inherit(no_card);
        launch.option("--render-node", format!("/proc/self/fd/{number}"));
        state.process = Some(launch.start()?);
        Ok(stream)
    }
}

/// A program that is started by a connection to it.
#[derive(Clone, Debug)]
pub(super) struct OnDemand {
    number: u64,
    starter: Weak<Starter>,
}

impl OnDemand {
    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        match self.starter.upgrade() {
            Some(starter) => starter.connect(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl PartialEq for OnDemand {
    fn eq(&self, other: &Self) -> bool {
        Weak::ptr_eq(&self.starter, &other.starter)
    }
}

impl Eq for OnDemand {}

impl fmt::Display for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PROGRAM}#{}", self.number)
    }
}

/// Returns the program, if it runs here.
fn find() -> Result<PathBuf, QemuError> {
    let candidates = match std::env::var_os(PROGRAM_VARIABLE) {
        Some(directory) if !directory.is_empty() => vec![PathBuf::from(directory).join(PROGRAM)],
        // In `PATH`, and where distributions have it.
        _ => ["", "/usr/lib/qemu", "/usr/libexec"]
            .map(|directory| Path::new(directory).join(PROGRAM))
            .to_vec(),
    };
    for program in &candidates {
        match Command::new(program).arg("--print-capabilities").output() {
            Ok(output) if output.status.success() => return Ok(program.clone()),
            Ok(output) => {
                let complaint = String::from_utf8_lossy(&output.stderr);
                let line = complaint.lines().next_back();
                return Err(QemuError::Refused {
                    message: line.unwrap_or("vhost-user-gpu gave no reason").to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(QemuError::Host(error)),
        }
    }
    Err(QemuError::NotInstalled {
        program: PROGRAM.into(),
    })
}

/// Checks that the program does not share its pictures as buffers of a graphics card's.
fn check_host() -> Result<(), QemuError> {
    /// Makes such buffers of memory. The program uses it wherever it may open it, and cannot be told not to.
    const UDMABUF: &str = "/dev/udmabuf";

    match File::options().read(true).write(true).open(UDMABUF) {
        Ok(_) => Err(QemuError::Refused {
            message: format!(
                "{PROGRAM} would share pictures by {UDMABUF}, which may be opened here"
            ),
        }),
        Err(_) => Ok(()),
    }
}
