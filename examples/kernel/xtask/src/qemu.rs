//! A boot: QEMU is started, spoken to, visited, and its end judged.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::boards::Board;
use crate::checksum::checksum;
use crate::faults::Fault;
use crate::monitor::{Monitor, Wires};
use crate::{Result, compile, image, screen};

/// How long a boot may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How many of the console's last lines are shown when something is wrong.
const LAST_LINES: usize = 25;
/// What the kernel prints when it waits for a visitor.
const READY: &str = "net: echo on port 7";
/// The length of the page and of what the visitor says, in bytes.
const PAGE: usize = 300_000;
const SPEECH: usize = 200_000;
/// The size that the disk grows to, in bytes.
const RESIZED: u64 = 32 << 20;

/// When the console is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Console {
    /// As it comes.
    Shown,
    /// Its last lines, when something is wrong.
    OnFailure,
}

/// QEMU, which is killed when this is dropped.
pub(crate) struct Qemu {
    child: Child,
    /// Where its sockets are.
    directory: PathBuf,
    lines: Receiver<String>,
    console: Console,
    /// What the console has said so far.
    said: Vec<String>,
    started: Instant,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Boots a board, checks all that it did, and returns how many seconds it took. With a fault, the
/// kernel must survive that.
///
/// # Errors
///
/// Something is wrong, or takes too long; the console's last lines are then printed.
pub(crate) fn boot(
    board: &Board,
    kernel: &Path,
    fault: Option<Fault>,
    console: Console,
) -> Result<f64> {
    let directory = directory(board)?;
    let content = bytes(PAGE, 1);
    prepare(board, &directory, &content)?;

    let mut qemu = Qemu::start(
        board,
        kernel,
        &directory,
        fault.map_or("", Fault::command_line),
        fault.and_then(Fault::missing_property),
        console,
    )?;
    let result = (|| {
        // The console's first line: the monitor is there.
        qemu.wait_for("kernel: ")?;
        let mut monitor = Monitor::connect(&directory.join("qmp"))?;
        if let Some(fault) = fault {
            fault.inflict(board, &mut qemu, &mut monitor)?;
        }
        qemu.wait_for(READY)?;
        let picture = directory.join("screen.ppm");
        let answer = monitor.execute(&format!(
            r#"{{"execute":"screendump","arguments":{{"filename":"{}","device":"gpu0"}}}}"#,
            picture.display()
        ));
        answer?;
        screen::compare(&std::fs::read(&picture)?, board.architecture)?;
        disturb(&mut monitor)?;
        visit(monitor.echo_port()?)?;
        qemu.wait_for_end(board.status.0)?;
        qemu.expect(&format!(
            "page of {PAGE} bytes, sum {:08x}",
            checksum(&content)
        ))?;
        let (name, theirs) = image::THEIRS;
        qemu.expect(&format!(
            "{name} {} bytes, sum {:08x}",
            theirs.len(),
            checksum(theirs)
        ))?;
        qemu.expect(&format!("echoed {SPEECH} bytes"))?;
        qemu.expect("net: the link is up")?;
        qemu.expect(&format!("{} blocks now", RESIZED / 512))?;
        if let Some(fault) = fault {
            fault.check(board, &qemu)?;
        }
        if qemu.said.last().is_none_or(|line| line != "kernel: ok") {
            return Err("the last line is not `kernel: ok`".into());
        }
        for disk in disks(board) {
            image::check(&directory.join(disk))?;
        }
        Ok(())
    })();
    qemu.conclude(result)
}

/// Boots a board on which something is wrong with interrupts, told by `command_line`. The kernel
/// must end with a failure, have said each of `expected`, and nothing that contains `unexpected`.
///
/// # Errors
///
/// It does not.
pub(crate) fn boot_to_failure(
    board: &Board,
    kernel: &Path,
    command_line: &str,
    expected: &[&str],
    unexpected: &str,
) -> Result<f64> {
    let directory = directory(board)?;
    prepare(board, &directory, &bytes(PAGE, 3))?;
    let console = Console::OnFailure;
    let mut qemu = Qemu::start(board, kernel, &directory, command_line, None, console)?;
    let result = (|| {
        while let Some(line) = qemu.next_line()? {
            if line.contains(READY) {
                visit(Monitor::connect(&directory.join("qmp"))?.echo_port()?)?;
            }
        }
        qemu.wait_for_end(board.status.1)?;
        for text in expected {
            qemu.expect(text)?;
        }
        if let Some(line) = qemu.said.iter().find(|line| line.contains(unexpected)) {
            return Err(format!("this went well: {line}").into());
        }
        Ok(())
    })();
    qemu.conclude(result)
}

fn directory(board: &Board) -> Result<PathBuf> {
    let directory = compile::target_directory().join("boots").join(board.name);
    std::fs::create_dir_all(&directory)?;
    Ok(std::path::absolute(directory)?)
}

/// Returns the names of the images of a board's disks.
fn disks(board: &Board) -> &'static [&'static str] {
    &["disk.img", "card.img"][..if board.pci { 2 } else { 1 }]
}

/// Makes the images of a board's disks, and its page.
fn prepare(board: &Board, directory: &Path, page: &[u8]) -> Result {
    for disk in disks(board) {
        image::create(&directory.join(disk))?;
    }
    Ok(std::fs::write(directory.join("page.bin"), page)?)
}

/// Writes the device tree of the machine that `command` would start to `path`, with another name
/// for a property.
fn dump_tree_without(property: &str, command: &Command, path: &Path) -> Result {
    let dump = format!("dumpdtb={}", path.display());
    let mut dumping = Command::new(command.get_program());
    dumping.args(command.get_args()).args(["-machine", &dump]);
    let output = dumping.output()?;
    let mut tree = std::fs::read(path).map_err(|_| format!("no device tree: {output:?}"))?;
    // Names stand apart from the nodes, each once, and end with a 0.
    let name = [property.as_bytes(), b"\0"].concat();
    let place = tree.windows(name.len()).position(|bytes| bytes == name);
    tree[place.ok_or("the device tree has no such property")?] = b'-';
    // The names come last. QEMU pads this tree, and pads it again when it reads it, beyond the room
    // that there is below the kernel.
    let cell = |at: usize| Some(u32::from_be_bytes(tree.get(at..at + 4)?.try_into().ok()?));
    let (names, length) = cell(12)
        .zip(cell(32))
        .ok_or("the device tree has no header")?;
    tree.truncate((names + length) as usize);
    tree[4..8].copy_from_slice(&(names + length).to_be_bytes());
    Ok(std::fs::write(path, tree)?)
}

impl Qemu {
    fn start(
        board: &Board,
        kernel: &Path,
        directory: &Path,
        command_line: &str,
        missing_property: Option<&str>,
        console: Console,
    ) -> Result<Self> {
        let program = format!("qemu-system-{}", board.architecture);
        let socket = directory.join("qmp");
        // It may be there from an earlier boot.
        let _ = std::fs::remove_file(&socket);
        let bus = if board.pci { "pci" } else { "device" };
        let server = std::env::current_exe()?;
        let page = directory.join("page.bin");
        let mut command = Command::new(&program);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-accel",
            "tcg",
        ]);
        command.args(["-display", "none", "-serial", "stdio"]);
        command.args(board.machine).arg("-kernel").arg(kernel);
        match board.command_line {
            None => command.args(["-append", command_line]),
            Some(address) => {
                let file = directory.join("command-line");
                std::fs::write(&file, format!("{command_line}\0"))?;
                let loader = format!("loader,addr={address:#x},force-raw=on,file=");
                command.args(["-device", &format!("{loader}{}", file.display())])
            }
        };
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        // Another way to the machine's wires, beside the processor.
        let wires = directory.join("qtest");
        let _ = std::fs::remove_file(&wires);
        command.args(["-qtest-log", "none", "-qtest"]);
        command.arg(format!("unix:{},server=on,wait=off", wires.display()));
        command.arg("-drive").arg(format!(
            "if=none,id=disk0,format=raw,file={}",
            directory.join("disk.img").display()
        ));
        // The guest sees nothing but these two: a page, and its own port from the host.
        command.arg("-netdev").arg(format!(
            "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:7,\
             guestfwd=tcp:10.0.2.100:80-cmd:'{}' serve-page '{}'",
            server.display(),
            page.display()
        ));
        let cable = format!("virtio-net-{bus},id=nic0,netdev=net0");
        command
            .arg("-device")
            .arg(format!("virtio-blk-{bus},drive=disk0"));
        command.arg("-device").arg(cable);
        command
            .arg("-device")
            .arg(format!("virtio-gpu-{bus},id=gpu0"));
        if board.pci {
            command.arg("-drive").arg(format!(
                "if=none,id=disk1,format=raw,file={}",
                directory.join("card.img").display()
            ));
            command.args(["-device", "pcie-root-port,id=slot0,addr=5"]);
            command.args(["-device", "virtio-blk-pci,id=card,bus=slot0,drive=disk1"]);
        }
        if let Some(property) = missing_property {
            let tree = directory.join("tree.dtb");
            dump_tree_without(property, &command, &tree)?;
            command.arg("-dtb").arg(tree);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| format!("{program}: {error}; on Debian, see qemu-system-*"))?;
        let output = child.stdout.take().ok_or("QEMU has no output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else {
                    break;
                };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            child,
            directory: directory.to_owned(),
            lines,
            console,
            said: Vec::new(),
            started: Instant::now(),
        })
    }

    /// Returns what the console has said so far.
    pub(crate) fn said(&self) -> &[String] {
        &self.said
    }

    /// Connects to the machine's wires.
    ///
    /// # Errors
    ///
    /// QEMU does not let one.
    pub(crate) fn wires(&self, board: &Board, monitor: &mut Monitor) -> Result<Wires> {
        Wires::connect(&self.directory.join("qtest"), board, monitor)
    }

    /// Returns the console's next line, or `None` at its end.
    fn next_line(&mut self) -> Result<Option<&str>> {
        let left = PATIENCE.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                if self.console == Console::Shown {
                    println!("{line}");
                }
                self.said.push(line);
                Ok(self.said.last().map(String::as_str))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("it hangs: {PATIENCE:?} are over").into())
            }
        }
    }

    /// Waits for a line that contains `text`, and returns it.
    ///
    /// # Errors
    ///
    /// QEMU ends without it, or it takes too long.
    pub(crate) fn wait_for(&mut self, text: &str) -> Result<String> {
        while let Some(line) = self.next_line()? {
            if line.contains(text) {
                return Ok(line.to_owned());
            }
        }
        Err(format!("it ended without `{text}`").into())
    }

    fn wait_for_end(&mut self, status: i32) -> Result {
        while self.next_line()?.is_some() {}
        let code = self.child.wait()?.code();
        if code != Some(status) {
            return Err(format!("QEMU's status is {code:?}, not {status}").into());
        }
        Ok(())
    }

    /// Checks that the console has said `text`.
    ///
    /// # Errors
    ///
    /// It has not.
    pub(crate) fn expect(&self, text: &str) -> Result {
        if self.said.iter().any(|line| line.contains(text)) {
            return Ok(());
        }
        Err(format!("the console never said `{text}`").into())
    }

    fn conclude(mut self, result: Result) -> Result<f64> {
        if result.is_err() && self.console == Console::OnFailure {
            self.said.extend(self.lines.try_iter());
            let first = self.said.len().saturating_sub(LAST_LINES);
            for line in &self.said[first..] {
                println!("    | {line}");
            }
        }
        result.map(|()| self.started.elapsed().as_secs_f64())
    }
}

/// Does to the board what can happen to one: its cable is pulled and put back, its disk grows.
fn disturb(monitor: &mut Monitor) -> Result {
    for up in [false, true] {
        monitor.execute(&format!(
            r#"{{"execute":"set_link","arguments":{{"name":"nic0","up":{up}}}}}"#
        ))?;
    }
    monitor.resize_disk(RESIZED)
}

/// Speaks to the kernel's echo server, and hears whether everything comes back.
fn visit(port: u16) -> Result {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let speech = bytes(SPEECH, 2);
    let mut speaker = stream.try_clone()?;
    let spoken = speech.clone();
    let speaking = thread::spawn(move || {
        speaker
            .write_all(&spoken)
            .and_then(|()| speaker.shutdown(Shutdown::Write))
    });
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    speaking.join().map_err(|_| "the speaker failed")??;
    if heard != speech {
        return Err(format!(
            "the echo is wrong: {} of {SPEECH} bytes came back",
            heard.len()
        )
        .into());
    }
    Ok(())
}

/// Answers one request for a page, from standard input to standard output. QEMU starts a process
/// for each connection that the guest makes.
///
/// # Errors
///
/// There is no page at `path`, or the guest is gone.
pub(crate) fn serve_page(path: &str) -> Result {
    let mut input = BufReader::new(std::io::stdin().lock());
    let mut line = String::new();
    while input.read_line(&mut line)? > 0 && !line.trim_end().is_empty() {
        line.clear();
    }
    let page = std::fs::read(path)?;
    let mut output = std::io::stdout().lock();
    write!(
        output,
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
        page.len()
    )?;
    output.write_all(&page)?;
    Ok(output.flush()?)
}

/// Returns bytes that look random; another `seed` makes others.
fn bytes(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}
