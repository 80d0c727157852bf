//! vhost-user as a board: virtio devices of other programs, at native speed.
//!
//! A [`VhostUserTransport`] takes the place of registers: the driver and the back end share memory, kick each other by
//! eventfds, and everything else goes over a Unix socket. [`StorageDaemon`] and [`DisplayProgram`] are back ends to have: QEMU's
//! disks and QEMU's display.
//!
//! ```no_run
//! use machine::memory::{DEFAULT_BASE, Memory};
//! use machine::vhost_user::{Socket, VhostUserDevice, VhostUserOptions, VhostUserTransport};
//! use machine::{Machine, MachineHal};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20)?;
//! let options = VhostUserOptions::new(VhostUserDevice::Block);
//! let socket = Socket::at("/run/disk.sock");
//! let transport = VhostUserTransport::connect(socket, memory.clone(), options)?;
//! // The driver finds its memory in the machine; there are no registers.
//! let machine = Machine::new(memory, std::sync::Arc::new(()));
//! let _installed = machine.install();
//! # let _ = transport;
//! # Ok(())
//! # }
//! ```

mod display;
mod error;
mod link;
mod screen;
mod storage;
mod transport;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

pub use display::DisplayProgram;
pub use error::VhostUserError;
pub use storage::StorageDaemon;
pub use transport::{VhostUserDevice, VhostUserHandle, VhostUserOptions, VhostUserTransport};

/// Where a back end listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Socket(Name);

#[derive(Clone, Debug, Eq, PartialEq)]
enum Name {
    Path(PathBuf),
    /// A name that no file has, in Linux' abstract namespace.
    Abstract(String),
    Program(display::OnDemand),
}

impl Socket {
    /// The socket at a path.
    pub fn at(path: impl AsRef<Path>) -> Self {
        Self(Name::Path(path.as_ref().to_owned()))
    }

    fn without_file(name: String) -> Self {
        Self(Name::Abstract(name))
    }

    fn listen(&self) -> std::io::Result<UnixListener> {
        match &self.0 {
            Name::Path(path) => UnixListener::bind(path),
            Name::Abstract(name) => UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?),
            Name::Program(_) => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    fn connect(&self) -> Result<UnixStream, VhostUserError> {
        match &self.0 {
            Name::Path(path) => UnixStream::connect(path),
            Name::Abstract(name) => SocketAddr::from_abstract_name(name)
                .and_then(|address| UnixStream::connect_addr(&address)),
            Name::Program(program) => program.connect(),
        }
        .map_err(|source| VhostUserError::NotListening {
            address: self.to_string(),
            source,
        })
    }
}

impl std::fmt::Display for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Name::Path(path) => path.display().fmt(f),
            Name::Abstract(name) => write!(f, "@{name}"),
            Name::Program(program) => program.fmt(f),
        }
    }
}
