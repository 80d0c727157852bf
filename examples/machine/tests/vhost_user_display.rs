//! The display driver of `axdriver_virtio` on QEMU's `vhost-user-gpu`.
//!
//! Without the program the tests are skipped, each with a line that says so; `AXDRIVER_REQUIRE_QEMU=1` makes them fail instead.

#![allow(
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its patterns wrap"
)]

mod support;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axdriver_base::{DevError, InterruptCause};
use axdriver_display::DisplayDriverOps;
use axdriver_virtio::{VirtIoGpuDev, WaitPolicy};
use machine::memory::DEFAULT_BASE;
use machine::vhost_user::{
    DisplayProgram, Socket, VhostUserDevice, VhostUserError, VhostUserHandle, VhostUserOptions,
    VhostUserTransport,
};
use machine::{Image, Installed, Machine, MachineHal, Memory};
use support::{LONG, Scratch, draw, drawn, patiently, skip};

type GpuDev = VirtIoGpuDev<MachineHal, VhostUserTransport>;

/// Leaves the test, with a line that says so, where the program is missing.
macro_rules! need_program {
    () => {
        if let Some(why) = DisplayProgram::missing() {
            skip(&why);
            return;
        }
    };
}

/// A display of the program's and what it needs, in the order in which they go.
struct Rig {
    display: GpuDev,
    handle: VhostUserHandle,
    program: DisplayProgram,
    memory: Arc<Memory>,
    _installed: Installed,
}

fn memory() -> (Arc<Memory>, Installed) {
    let memory = Memory::anonymous(DEFAULT_BASE, 16 << 20).unwrap();
    let installed = Machine::new(memory.clone(), Arc::new(())).install();
    (memory, installed)
}

fn options(width: u32, height: u32) -> VhostUserOptions {
    VhostUserOptions::new(VhostUserDevice::Display { width, height })
}

fn rig(options: VhostUserOptions, wait: WaitPolicy) -> Rig {
    let program = DisplayProgram::start().unwrap();
    let (memory, installed) = memory();
    let transport = VhostUserTransport::connect(program.socket(), memory.clone(), options).unwrap();
    let handle = transport.handle();
    Rig {
        display: GpuDev::try_new_with(transport, wait).unwrap(),
        handle,
        program,
        memory,
        _installed: installed,
    }
}

#[test]
fn what_is_drawn_is_what_the_program_shows() {
    need_program!();
    // The last is shown in more pieces than a socket holds at once.
    for (width, height) in [(1, 1), (300, 200), (1280, 1024)] {
        let mut rig = rig(options(width, height), patiently());
        let info = rig.display.info();
        assert_eq!((info.width, info.height), (width, height));
        for shade in [1, 99] {
            draw(&mut rig.display, shade);
            rig.display.flush().unwrap();
            assert!(rig.handle.image(0) == drawn(shade, width, height));
        }
        // Only a flush shows it.
        draw(&mut rig.display, 5);
        assert!(rig.handle.image(0) == drawn(99, width, height));
        assert_eq!(rig.handle.image(1), Image::default());
        assert_eq!(rig.handle.image(u32::MAX), Image::default());
        rig.handle.check().unwrap();
    }
}

#[test]
fn a_display_that_is_to_be_resized_says_so_and_a_reset_adopts_it() {
    need_program!();
    let mut rig = rig(options(64, 48), patiently());
    draw(&mut rig.display, 3);
    rig.display.flush().unwrap();
    assert!(!rig.display.configuration_changed().unwrap());

    rig.handle.resize(96, 40);
    assert!(rig.handle.wait_for_interrupt(LONG).unwrap());
    let cause = InterruptCause::from_bits_truncate(rig.handle.acknowledge().bits());
    assert!(cause.contains(InterruptCause::CONFIGURATION));
    assert!(rig.display.configuration_changed().unwrap());
    // It is told once, and the old size goes on.
    assert!(!rig.display.configuration_changed().unwrap());
    assert!(rig.handle.image(0) == drawn(3, 64, 48));

    rig.display.reset().unwrap();
    draw(&mut rig.display, 7);
    rig.display.flush().unwrap();
    assert!(rig.handle.image(0) == drawn(7, 96, 40));
    assert!(!rig.display.configuration_changed().unwrap());
}

#[test]
fn a_reset_starts_from_nothing_again_and_again() {
    need_program!();
    let mut rig = rig(options(64, 48), patiently());
    for shade in 0..4 {
        rig.display.reset().unwrap();
        draw(&mut rig.display, shade);
        rig.display.flush().unwrap();
        assert!(rig.handle.image(0) == drawn(shade, 64, 48));
    }
    let Rig {
        display, memory, ..
    } = rig;
    drop(display);
    assert_eq!(memory.counters().pages_live, 0);
}

#[test]
fn a_program_that_dies_gives_an_error_and_a_reset_finds_the_next_one() {
    need_program!();
    let mut rig = rig(options(64, 48), patiently().with_max_polls(40_000));
    draw(&mut rig.display, 3);
    rig.display.flush().unwrap();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            rig.program.kill();
        });
        loop {
            if let Err(error) = rig.display.flush() {
                break error;
            }
        }
    });
    assert!(
        matches!(error, DevError::Io | DevError::BadState),
        "{error}"
    );
    let loss = rig.handle.check().unwrap_err();
    assert!(matches!(loss, VhostUserError::Disconnected), "{loss}");
    assert_eq!(rig.display.flush(), Err(DevError::BadState));
    assert_eq!(rig.handle.image(0), Image::default());
    assert!(rig.display.reset().is_err());

    rig.program.restart();
    rig.display.reset().unwrap();
    rig.handle.check().unwrap();
    draw(&mut rig.display, 8);
    rig.display.flush().unwrap();
    assert!(rig.handle.image(0) == drawn(8, 64, 48));
}

#[test]
fn a_program_that_hangs_gives_an_error_in_time_and_a_reset_starts_another() {
    need_program!();
    let quick = options(64, 48).answer_limit(Duration::from_millis(200));
    let mut rig = rig(quick, patiently().with_max_polls(30_000));
    rig.program.pause().unwrap();
    assert_eq!(rig.display.flush(), Err(DevError::Io));
    assert_eq!(rig.display.flush(), Err(DevError::BadState));
    let end = Instant::now() + LONG;
    while let Err(error) = rig.display.reset() {
        assert!(Instant::now() < end, "{error}");
    }
    draw(&mut rig.display, 9);
    rig.display.flush().unwrap();
    assert!(rig.handle.image(0) == drawn(9, 64, 48));
    assert!(rig.memory.overwritten_free_pages().is_empty());
}

#[test]
fn no_process_outlives_its_owner_and_the_socket_is_of_no_use_without_it() {
    need_program!();
    let rig = rig(options(64, 48), patiently());
    let path = format!("/proc/{}", rig.program.process_id().unwrap());
    assert!(std::fs::exists(&path).unwrap());
    let Rig {
        mut display,
        program,
        memory,
        ..
    } = rig;
    let socket = program.socket();
    drop(program);
    assert!(!std::fs::exists(&path).unwrap());
    assert!(display.reset().is_err());
    let error = VhostUserTransport::connect(socket.clone(), memory, options(1, 1)).unwrap_err();
    assert!(matches!(error, VhostUserError::NotListening { .. }));
    assert!(error.to_string().contains(&socket.to_string()), "{error}");
}

/// A program of the test's own, which does not outlive it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_program_that_someone_else_started_serves_once() {
    need_program!();
    let path = Scratch::new("display.sock");
    let program = ["vhost-user-gpu", "/usr/lib/qemu/vhost-user-gpu"]
        .into_iter()
        .find_map(|program| {
            Command::new(program)
                .arg("-s")
                .arg(&path.0)
                .stderr(Stdio::null())
                .spawn()
                .ok()
        });
    let Some(mut program) = program.map(Running) else {
        skip("skipped: vhost-user-gpu is elsewhere than in PATH and /usr/lib/qemu");
        return;
    };
    let (memory, _installed) = memory();
    let end = Instant::now() + LONG;
    let transport = loop {
        let socket = Socket::at(&path.0);
        match VhostUserTransport::connect(socket, memory.clone(), options(64, 48)) {
            Ok(transport) => break transport,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let handle = transport.handle();
    let mut display = GpuDev::try_new_with(transport, patiently()).unwrap();
    draw(&mut display, 3);
    display.flush().unwrap();
    assert!(handle.image(0) == drawn(3, 64, 48));
    // It has ended with its connection.
    assert!(display.reset().is_err());
    while program.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_program_that_is_missing_is_told_in_one_line() {
    // Only a process of its own may change its environment.
    const CHILD: &str = "MACHINE_TEST_WITHOUT_PROGRAM";
    const NAME: &str = "a_program_that_is_missing_is_told_in_one_line";
    if std::env::var_os(CHILD).is_some() {
        println!("{}", DisplayProgram::start().unwrap_err());
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(CHILD, "1")
        .env("AXDRIVER_QEMU", "/no/such/directory")
        .output()
        .unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = output
        .lines()
        .filter(|line| line.contains("was not found"))
        .collect();
    assert_eq!(lines.len(), 1, "{output}");
    assert!(lines[0].contains("vhost-user-gpu"), "{output}");
}
