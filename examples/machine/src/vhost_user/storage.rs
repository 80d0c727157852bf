//! `qemu-storage-daemon`: QEMU's disks behind a vhost-user socket, without a machine.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use super::Socket;
use crate::qemu::error::refusal;
use crate::qemu::options::disk_node;
use crate::qemu::process::{Launch, Process};
use crate::qemu::{Disk, PROGRAM_VARIABLE, QemuError, Qmp};

/// How long the daemon may take to end in an orderly way.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// The name of the program.
const PROGRAM: &str = "qemu-storage-daemon";

/// A running `qemu-storage-daemon` with one disk, whose socket is no file.
///
/// Dropping it lets it close its image and end; [`kill`](Self::kill) does not let it.
#[derive(Debug)]
pub struct StorageDaemon {
    disk: Disk,
    queues: u16,
    socket: Socket,
    running: Running,
}

#[derive(Debug)]
struct Running {
    qmp: Qmp,
    process: Process,
}

impl StorageDaemon {
    /// Returns whether the program is there, for a test to be skipped without it: `None`, or why not in one line.
    ///
    /// # Panics
    ///
    /// If it is not there although the environment variable [`REQUIRE_VARIABLE`](crate::qemu::REQUIRE_VARIABLE) is `1`.
    pub fn missing() -> Option<String> {
        crate::qemu::missing_program(&program())
    }

    /// Starts the daemon with a disk of `queues` queues. The disk's bus and properties do not matter.
    ///
    /// # Errors
    ///
    /// As those of [`QemuBoard::start`](crate::qemu::QemuBoard::start).
    pub fn start(disk: &Disk, queues: u16) -> Result<Self, QemuError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("machine-disk-{}-{number}", std::process::id());
        let socket = Socket::without_file(name);
        Ok(Self {
            running: start(disk, queues, &socket)?,
            disk: disk.clone(),
            queues,
            socket,
        })
    }

    /// Returns where the daemon listens. It stays the same after a [restart](Self::restart).
    pub fn socket(&self) -> Socket {
        self.socket.clone()
    }

    /// Returns the connection to the daemon's management interface. The disk is the block node `disk0`.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.running.qmp
    }

    /// Returns the daemon's process id.
    pub fn process_id(&self) -> u32 {
        self.running.process.id()
    }

    /// Ends the daemon at once, as a power cut would: what it holds back is lost.
    pub fn kill(&mut self) {
        self.running.process.kill();
    }

    /// Stops the daemon where it is: it holds its socket and its memory, and answers nothing.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Host`]: it has ended.
    pub fn pause(&self) -> Result<(), QemuError> {
        Ok(self.running.process.pause()?)
    }

    /// Lets a paused daemon go on.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Host`]: it has ended.
    pub fn resume(&self) -> Result<(), QemuError> {
        Ok(self.running.process.resume()?)
    }

    /// Starts the daemon anew, with the same disk at the same socket. One that still runs is killed first.
    ///
    /// # Errors
    ///
    /// As those of [`start`](Self::start).
    pub fn restart(&mut self) -> Result<(), QemuError> {
        self.running.process.kill();
        self.running = start(&self.disk, self.queues, &self.socket)?;
        Ok(())
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        if self.running.process.has_ended() {
            return;
        }
        // A paused one would not hear it.
        let _ = self.running.process.resume();
        let ended =
            self.running.qmp.quit().is_ok() && self.running.process.wait(QUIT_LIMIT).is_some();
        if !ended {
            log::warn!("killing {PROGRAM}");
        }
    }
}

fn program() -> PathBuf {
    match std::env::var_os(PROGRAM_VARIABLE) {
        Some(directory) if !directory.is_empty() => PathBuf::from(directory).join(PROGRAM),
        _ => PROGRAM.into(),
    }
}

fn start(disk: &Disk, queues: u16, socket: &Socket) -> Result<Running, QemuError> {
    disk.check()?;
    let program = program();
    let mut launch = Launch::new(&program);
    let (qmp, far) = UnixStream::pair()?;
    let number = launch.inherit(far);
    launch
        .option("--chardev", format!("socket,id=qmp,fd={number}"))
        .option("--monitor", "chardev=qmp");
    // An export shares its image with all the world.
    for node in disk.nodes(0, true) {
        launch.option("--blockdev", node.to_string());
    }
    let number = launch.inherit(socket.listen()?);
    let export = json!({
        "type": "vhost-user-blk",
        "id": "disk0",
        "node-name": disk_node(0),
        "addr": { "type": "fd", "str": number.to_string() },
        "writable": !disk.is_read_only(),
        "num-queues": queues,
    });
    launch.option("--export", export.to_string());
    let mut process = launch.start().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => QemuError::NotInstalled { program },
        _ => QemuError::Host(error),
    })?;
    match Qmp::new(qmp) {
        Ok(qmp) => Ok(Running { qmp, process }),
        Err(QemuError::Gone { .. }) if process.wait(QUIT_LIMIT).is_some() => {
            Err(refusal(&process.complaint(), &[disk.path()]))
        }
        Err(error) => Err(error),
    }
}
