//! A child process that does not outlive this one, and hands over open files instead of named ones.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// The most that is kept of what a child writes to its standard error, in bytes: enough for every
/// message that names a fault, and a bound on a child that never stops complaining.
const MAX_COMPLAINT: usize = 16 * 1024;

/// A program to start, with its arguments and the open files that it takes over.
#[derive(Debug)]
pub(crate) struct Launch {
    program: OsString,
    arguments: Vec<OsString>,
    files: Vec<OwnedFd>,
}

impl Launch {
    /// Describes a start of `program`, looked up in `PATH` if it has no slash.
    pub(crate) fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Adds one argument.
    pub(crate) fn arg(&mut self, argument: impl Into<OsString>) -> &mut Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds an option and its value.
    pub(crate) fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.arg(name).arg(value)
    }

    /// Hands an open file to the child, and returns the number under which the child finds it.
    pub(crate) fn inherit(&mut self, file: impl Into<OwnedFd>) -> RawFd {
        let file = file.into();
        let number = file.as_raw_fd();
        self.files.push(file);
        number
    }

    /// Starts the program. Standard input and output are closed to it, standard error is kept.
    ///
    /// # Errors
    ///
    /// * [`io::ErrorKind::NotFound`]: there is no such program.
    /// * Any other error of starting a process. No child is left.
    pub(crate) fn start(self) -> io::Result<Process> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C on a terminal goes to a whole process group. The child is not to see it: its
            // end is decided here, or by the kernel when this process is gone.
            .process_group(0);
        let parent = rustix::process::getpid();
        let numbers: Vec<RawFd> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        let prepare = move || prepare_child(parent, &numbers);
        // SAFETY: `prepare_child` keeps the rules for code between `fork` and `exec`: it makes
        // system calls only, takes no lock and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        let mut child = start_from_lasting_thread(command)?;
        // The child has its own copies now.
        drop(self.files);

        let complaint = Arc::new(Mutex::new(Vec::new()));
        let listener = child.stderr.take().map(|stream| {
            let complaint = Arc::clone(&complaint);
            thread::spawn(move || keep_beginning(stream, &complaint))
        });
        Ok(Process {
            child,
            complaint,
            listener,
        })
    }
}

/// Readies the child, after `fork` and before `exec`.
fn prepare_child(parent: Pid, files: &[RawFd]) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // A parent that died before the line above sends no signal any more.
    if rustix::process::getppid() != Some(parent) {
        return Err(io::Error::from_raw_os_error(
            rustix::io::Errno::SRCH.raw_os_error(),
        ));
    }
    for &file in files {
        // SAFETY: `Launch::start` holds the owner of each number open until the child exists, and
        // this process, a copy of it, closes none.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(file) };
        rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

/// Starts `command` from a thread that ends only with the process.
///
/// The kernel sends the parent-death signal when the *thread* that started the child ends
/// (`PR_SET_PDEATHSIG` in prctl(2)), so a child started from a test's or a worker's thread would
/// die with it.
fn start_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static ORDERS: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();

    let orders = ORDERS.get_or_init(|| {
        let (sender, receiver) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in receiver {
                // A caller that went away drops the child's handle; the kernel ends the child.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, result) = channel();
    orders
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(io::Error::other)?;
    result.recv().map_err(io::Error::other)?
}

/// Reads `stream` to its end and keeps the first [`MAX_COMPLAINT`] bytes.
fn keep_beginning(mut stream: impl Read, kept: &Mutex<Vec<u8>>) {
    let mut chunk = [0; 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return,
            Ok(length) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = MAX_COMPLAINT.saturating_sub(kept.len()).min(length);
                kept.extend_from_slice(&chunk[..room]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// A running child. Dropping it kills the child and waits for its end.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    complaint: Arc<Mutex<Vec<u8>>>,
    /// Ends when the child has closed its standard error, at the latest by dying.
    listener: Option<JoinHandle<()>>,
}

impl Process {
    /// Returns the child's process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns what the child wrote to standard error, up to now.
    ///
    /// Of a child that has ended it is the whole, up to the bound.
    pub(crate) fn complaint(&mut self) -> String {
        if self.has_ended()
            && let Some(listener) = self.listener.take()
        {
            // The listener cannot panic; if it did, its text would be what is missing.
            let _ = listener.join();
        }
        let complaint = self
            .complaint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&complaint).trim().to_owned()
    }

    /// Returns whether the child has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))
    }

    /// Waits for the child to end, at most `limit`. `None`: it still runs.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                Ok(None) => return None,
                // Someone else has waited for it: it has ended, and how is not known.
                Err(_) => return Some(ExitStatus::from_raw(0)),
            }
        }
    }

    /// Ends the child at once, as a power cut would, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        // Both fail only for a child that has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops the child where it is, so that it answers nothing until [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// The child has ended.
    pub(crate) fn pause(&self) -> io::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets a paused child go on.
    ///
    /// # Errors
    ///
    /// The child has ended.
    pub(crate) fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::kill_process(
            Pid::from_child(&self.child),
            signal,
        )?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_not_found() {
        let error = Launch::new("/no/such/program").start().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_child_is_gone_once_it_is_dropped() {
        let mut launch = Launch::new("sleep");
        launch.arg("1000");
        let child = launch.start().unwrap();
        let path = format!("/proc/{}", child.id());
        assert!(std::fs::exists(&path).unwrap());
        drop(child);
        assert!(!std::fs::exists(&path).unwrap());
    }

    #[test]
    fn a_child_outlives_the_thread_that_started_it() {
        let mut child = thread::spawn(|| {
            let mut launch = Launch::new("sleep");
            launch.arg("1000");
            launch.start().unwrap()
        })
        .join()
        .unwrap();
        assert!(child.wait(Duration::from_millis(50)).is_none());
    }

    #[test]
    fn a_child_finds_the_files_it_was_given() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut launch = Launch::new("sh");
        let number = launch.inherit(theirs);
        launch.option("-c", format!("cat <&{number} >&2"));
        let mut child = launch.start().unwrap();
        ours.write_all(b"through the socket").unwrap();
        drop(ours);
        assert!(child.wait(Duration::from_secs(10)).is_some());
        assert_eq!(child.complaint(), "through the socket");
    }
}
