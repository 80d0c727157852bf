//! Runs the example programs as a user does: what they print, what they leave behind, how they end.

#![expect(clippy::unwrap_used, reason = "what a test cannot do without ends it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use embedded_graphics::{Drawable, pixelcolor::Rgb888, prelude::RgbColor};
use examples::{image::Image, picture::TestCard, scratch::Scratch};
use machine::qemu::{QemuBoard, QemuMachine};

/// Returns the path of an example, which `cargo test` builds along with this test.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let path = profile
        .join("examples")
        .join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !path.exists() {
        // This test was asked for by its name, and then cargo builds it alone.
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--quiet",
            "--package",
            "examples",
            "--example",
            name,
        ]);
        cargo.env("CARGO_TARGET_DIR", profile.parent().unwrap());
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success());
    }
    path
}

/// What a program printed, and how it ended.
struct Ended {
    code: Option<i32>,
    out: String,
    error: String,
}

fn run(name: &str, arguments: &[&str]) -> Ended {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(program(name))
        .args(arguments)
        .output()
        .unwrap();
    Ended {
        code: status.code(),
        out: String::from_utf8(stdout).unwrap(),
        error: String::from_utf8(stderr).unwrap(),
    }
}

#[track_caller]
fn succeed(name: &str, arguments: &[&str]) -> String {
    let Ended { code, out, error } = run(name, arguments);
    assert_eq!(code, Some(0), "{name} {arguments:?}\n{out}\n{error}");
    out
}

/// Runs a program that must fail in an orderly way, and returns what it said.
#[track_caller]
fn fail(name: &str, arguments: &[&str]) -> String {
    let Ended { code, out, error } = run(name, arguments);
    // 1: it failed; 2: it did not understand its arguments. A panic would be 101.
    assert!(
        matches!(code, Some(1 | 2)),
        "{name} {arguments:?} ended with {code:?}\n{out}\n{error}"
    );
    assert!(error.starts_with("error: "), "{error}");
    error
}

const PROGRAMS: [&str; 6] = ["tour", "block", "net", "display", "probe", "interrupts"];

#[test]
fn each_program_explains_itself_and_refuses_what_it_does_not_know() {
    for name in PROGRAMS {
        assert!(succeed(name, &["--help"]).contains("Usage:"));
        assert!(fail(name, &["--no-such-option"]).contains("--no-such-option"));
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut probe = Command::new(program("probe"));
    let mut child = probe
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(
        (ended.status.code(), ended.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

#[test]
fn the_tour_finds_nine_devices_and_each_does_its_work() {
    let directory = Scratch::new("tour").unwrap();
    let out = directory.path().join("pictures");
    let said = succeed("tour", &["--out", out.to_str().unwrap()]);
    let outcomes: Vec<&str> = said.lines().filter(|line| line.ends_with("  ok")).collect();
    assert_eq!(outcomes.len(), 9, "{said}");
    for device in ["disk", "NIC", "display"] {
        for transport in ["MMIO", "legacy MMIO", "PCI"] {
            let name = format!("{device} over {transport} ");
            assert!(
                outcomes.iter().any(|line| line.starts_with(&name)),
                "{name}\n{said}"
            );
        }
    }
    for transport in ["mmio", "legacy-mmio", "pci"] {
        let path = out.join(format!("display-{transport}.png"));
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        let picture = Image::load(&path).unwrap();
        assert!(picture.pixel(1279, 799).is_some() && picture.pixel(1280, 0).is_none());
        // In the middle of the card is the green bar.
        assert_eq!(picture.pixel(640, 350), Some(Rgb888::new(0, 191, 0)));
    }
}

#[test]
fn the_tour_goes_the_same_way_on_the_devices_of_qemu() {
    if let Some(why) = QemuBoard::missing(QemuMachine::Aarch64Virt) {
        eprintln!("{why}");
        return;
    }
    let directory = Scratch::new("tour").unwrap();
    let said = succeed(
        "tour",
        &[
            "--board",
            "qemu",
            "--out",
            directory.path().to_str().unwrap(),
        ],
    );
    assert_eq!(
        said.lines().filter(|line| line.ends_with("  ok")).count(),
        9,
        "{said}"
    );
}

#[test]
fn the_tour_says_that_qemu_is_missing() {
    let directory = Scratch::new("tour").unwrap();
    let empty = directory.path().to_str().unwrap();
    let mut tour = Command::new(program("tour"));
    let ended = tour
        .args(["--board", "qemu", "--out", empty])
        .env("AXDRIVER_QEMU", empty)
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let error = String::from_utf8(ended.stderr).unwrap();
    assert!(
        error.contains("QEMU") && error.contains("qemu-system-aarch64"),
        "{error}"
    );
}

#[test]
fn the_tour_says_where_it_cannot_write() {
    let directory = Scratch::new("tour").unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "no directory").unwrap();
    let below = file.join("below");
    assert!(fail("tour", &["--out", below.to_str().unwrap()]).contains("cannot create"));
}

#[test]
fn the_display_shows_the_test_card_in_each_size_and_over_each_transport() {
    let directory = Scratch::new("display").unwrap();
    for (transport, width, height) in [("pci", 640, 480), ("mmio", 333, 77), ("legacy-mmio", 1, 1)]
    {
        let path = directory.path().join(format!("{transport}.png"));
        let size = format!("{width}x{height}");
        let out = path.to_str().unwrap();
        let said = succeed(
            "display",
            &["--size", &size, "--transport", transport, "--out", out],
        );
        assert!(said.ends_with(&format!("{out}\n")), "{said}");
        let mut expected = Image::new(width, height).unwrap();
        let detail = format!("{width} x {height}");
        TestCard {
            title: "axdriver",
            detail: &detail,
        }
        .draw(&mut expected)
        .unwrap();
        assert!(Image::load(&path).unwrap() == expected, "{transport}");
    }
}

#[test]
fn the_display_shows_a_picture_of_its_own_size_pixel_by_pixel() {
    let directory = Scratch::new("display").unwrap();
    let (source, shown) = (
        directory.path().join("source.png"),
        directory.path().join("shown.png"),
    );
    let level = |number: u32| u8::try_from(number % 256).unwrap();
    let colour = |index: u32| Rgb888::new(level(index), level(index / 7), level(index / 63));
    let image = Image::from_pixels(90, 60, (0..90 * 60).map(colour)).unwrap();
    image.save(&source).unwrap();
    let (source, out) = (source.to_str().unwrap(), shown.to_str().unwrap());
    succeed(
        "display",
        &["--size", "90x60", "--image", source, "--out", out],
    );
    assert!(Image::load(&shown).unwrap() == image);

    // On a display of other proportions it is scaled, with black around it.
    succeed(
        "display",
        &["--size", "180x180", "--image", source, "--out", out],
    );
    let scaled = Image::load(&shown).unwrap();
    assert_eq!(scaled.pixel(0, 0), Some(Rgb888::BLACK));
    assert_eq!(scaled.pixel(100, 100), image.pixel(50, 35));
}

#[test]
fn the_display_refuses_bad_sizes_and_bad_pictures() {
    let directory = Scratch::new("display").unwrap();
    let no_picture = directory.path().join("no.png");
    fs::write(&no_picture, "no picture").unwrap();
    for size in [
        "0x0",
        "0x480",
        "640",
        "x",
        "-1x5",
        "99999x99999",
        "4294967296x1",
    ] {
        let error = fail("display", &[&format!("--size={size}")]);
        assert!(error.contains("--size"), "{error}");
    }
    assert!(fail("display", &["--image", no_picture.to_str().unwrap()]).contains("PNG"));
    let missing = directory.path().join("missing.png");
    assert!(fail("display", &["--image", missing.to_str().unwrap()]).contains("missing.png"));
    assert!(fail("display", &["--transport", "isa"]).contains("legacy-mmio"));
}

/// Makes an image with a file system and a file in it.
fn make_image(directory: &Scratch) -> String {
    let path = directory.path().join("disk.img");
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let file = directory.path().join("hello.txt");
    fs::write(&file, "hello\n").unwrap();
    let (path, file) = (path.to_str().unwrap().to_owned(), file.to_str().unwrap());
    let said = succeed(
        "block",
        &[
            "--disk",
            &path,
            "--format",
            "--destroy-all-data",
            "--copy-in",
            file,
            "hello.txt",
        ],
    );
    assert!(said.contains("6 bytes"), "{said}");
    path
}

#[test]
fn files_are_listed_and_copied_out_and_the_image_stays_as_it_is() {
    let directory = Scratch::new("block").unwrap();
    let disk = make_image(&directory);
    let before = fs::read(&disk).unwrap();
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let said = succeed("block", &["--disk", &disk, "--transport", transport]);
        assert!(
            said.contains("4 MiB, 8192 blocks of 512 bytes, read-only"),
            "{said}"
        );
        assert!(said.contains("6  hello.txt"), "{said}");
    }
    let target = directory.path().join("copy.txt");
    succeed(
        "block",
        &[
            "--disk",
            &disk,
            "--copy-out",
            "hello.txt",
            target.to_str().unwrap(),
        ],
    );
    assert_eq!(fs::read(&target).unwrap(), b"hello\n");
    assert!(fs::read(&disk).unwrap() == before);
}

#[test]
fn a_file_that_cannot_be_copied_leaves_nothing_behind() {
    let directory = Scratch::new("block").unwrap();
    let disk = make_image(&directory);
    let before = fs::read(&disk).unwrap();
    let target = directory.path().join("none.txt");
    let error = fail(
        "block",
        &[
            "--disk",
            &disk,
            "--copy-out",
            "none.txt",
            target.to_str().unwrap(),
        ],
    );
    assert!(error.contains("none.txt"), "{error}");
    assert!(!target.exists());
    assert!(
        fail(
            "block",
            &["--disk", &disk, "--copy-in", target.to_str().unwrap(), "x"]
        )
        .contains("none.txt")
    );
    let error = fail(
        "block",
        &[
            "--disk",
            &disk,
            "--partition",
            "1",
            "--copy-out",
            "hello.txt",
            "unused",
        ],
    );
    assert!(error.contains("no partition 1"), "{error}");
    assert!(fs::read(&disk).unwrap() == before);
}

#[test]
fn a_disk_is_filled_and_checked_only_when_all_may_be_lost() {
    let directory = Scratch::new("block").unwrap();
    let disk = make_image(&directory);
    let before = fs::read(&disk).unwrap();
    assert!(fail("block", &["--disk", &disk, "--verify"]).contains("--destroy-all-data"));
    assert!(fail("block", &["--disk", &disk, "--format"]).contains("--destroy-all-data"));
    assert!(fs::read(&disk).unwrap() == before);
    let said = succeed(
        "block",
        &["--disk", &disk, "--verify", "--destroy-all-data"],
    );
    assert!(
        said.contains("all 8192 blocks hold what was written"),
        "{said}"
    );
    let after = fs::read(&disk).unwrap();
    assert!(after.chunks(512).all(|block| block != [0; 512]) && after != before);
}

#[test]
fn what_is_no_disk_image_is_refused_with_a_reason() {
    let directory = Scratch::new("block").unwrap();
    let file = |name: &str, contents: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let refused = |path: &str| fail("block", &["--disk", path]);
    assert!(refused(directory.path().join("none").to_str().unwrap()).contains("cannot open"));
    assert!(refused(directory.path().to_str().unwrap()).contains("directory"));
    assert!(refused(&file("empty", b"")).contains("0 bytes"));
    assert!(refused(&file("short", &[0; 511])).contains("511 bytes"));
    assert!(refused(&file("zeroes", &[0; 8192])).contains("no partition table"));
    assert!(refused(&file("text", &[b'x'; 8192])).contains("no partition table"));
    let mut qcow2 = b"QFI\xfb".to_vec();
    qcow2.resize(8192, 0);
    assert!(refused(&file("qcow2", &qcow2)).contains("qemu-img convert"));
    let mut beyond = vec![0; 8192];
    beyond[446 + 4] = 0x0c;
    beyond[446 + 8..446 + 16].fill(0x7f);
    beyond[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert!(refused(&file("beyond", &beyond)).contains("leaves the disk"));
}

/// A program that offers an image by vhost-user, until this is dropped.
struct StorageDaemon(Child);

impl StorageDaemon {
    fn start(image: &str, socket: &Path) -> Self {
        let blockdev = format!("driver=file,filename={image},node-name=file");
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        );
        let mut command = Command::new("qemu-storage-daemon");
        command.args([
            "--blockdev",
            &blockdev,
            "--blockdev",
            "driver=raw,file=file,node-name=disk",
            "--export",
            &export,
        ]);
        let mut daemon = Self(command.spawn().unwrap());
        while !socket.exists() {
            assert!(
                daemon.0.try_wait().unwrap().is_none(),
                "qemu-storage-daemon has ended"
            );
            std::thread::yield_now();
        }
        daemon
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_of_another_program_is_driven_through_vhost_user() {
    if let Some(why) = machine::vhost_user::StorageDaemon::missing() {
        eprintln!("{why}");
        return;
    }
    let directory = Scratch::new("block").unwrap();
    let image = make_image(&directory);
    let socket = directory.path().join("disk.sock");
    let path = socket.to_str().unwrap();
    let error = fail("block", &["--board", "vhost-user", "--socket", path]);
    assert!(error.contains("disk.sock"), "{error}");
    let daemon = StorageDaemon::start(&image, &socket);
    let said = succeed("block", &["--board", "vhost-user", "--socket", path]);
    assert!(said.contains("6  hello.txt"), "{said}");
    let source = directory.path().join("hello.txt");
    succeed(
        "block",
        &[
            "--board",
            "vhost-user",
            "--socket",
            path,
            "--copy-in",
            source.to_str().unwrap(),
            "again.txt",
        ],
    );
    drop(daemon);
    let said = succeed("block", &["--disk", &image]);
    assert!(said.contains("6  again.txt"), "{said}");
}

#[test]
fn two_nics_on_a_cable_are_measured() {
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let said = succeed(
            "net",
            &["--transport", transport, "--pings", "5", "--fetch", "1"],
        );
        assert!(said.contains("5 pings of 56 bytes: min "), "{said}");
        assert!(said.contains("5 pings of 1472 bytes: min "), "{said}");
        assert!(
            said.contains("1 MiB over TCP: ") && said.contains(" 0 frames dropped;"),
            "{said}"
        );
    }
}

#[test]
fn tap_interfaces_that_cannot_be_are_refused() {
    assert!(fail("net", &["--tap", ""]).contains("interface"));
    assert!(fail("net", &["--tap", "much-too-long-a-name"]).contains("interface"));
    assert!(fail("net", &["--tap", "tap0", "--address", "10.0.0.1/33"]).contains("--address"));
    assert!(fail("net", &["--tap", "tap0", "--pings", "1"]).contains("--pings"));
}

#[test]
fn a_probe_prints_registers_features_and_queues() {
    let said = succeed("probe", &[]);
    assert_eq!(said.matches("\nMMIO 0x").count(), 6, "{said}");
    assert_eq!(said.matches("\nPCI 00:0").count(), 3, "{said}");
    assert_eq!(
        said.matches("status    0x0, not in use").count(),
        9,
        "{said}"
    );
    assert_eq!(said.matches("VERSION_1 (32)").count(), 6, "{said}");
    assert_eq!(
        said.matches("32768 sectors of 512 bytes, 16 MiB").count(),
        3,
        "{said}"
    );
    assert_eq!(
        said.matches("address 02:00:00:00:00:0").count(),
        3,
        "{said}"
    );
}

#[test]
fn interrupts_wake_the_drivers_and_nothing_is_polled() {
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let said = succeed("interrupts", &["--transport", transport]);
        assert!(said.contains("4 MiB filled and checked"), "{said}");
        assert!(said.contains("10.0.2.15/24 by DHCP"), "{said}");
        assert!(
            said.contains("looks at a device that was not done: 0"),
            "{said}"
        );
    }
}

/// Leaves a test of QEMU's devices, with a line that says so, where QEMU is missing.
macro_rules! need_qemu {
    () => {
        if let Some(why) = QemuBoard::missing(QemuMachine::Aarch64Virt) {
            eprintln!("{why}");
            return;
        }
    };
}

#[test]
fn files_go_in_and_out_of_raw_and_qcow2_images_on_qemu() {
    need_qemu!();
    let directory = Scratch::new("block").unwrap();
    let raw = make_image(&directory);
    let qcow2 = directory.path().join("disk.qcow2");
    let qcow2 = qcow2.to_str().unwrap();
    let convert = |from: &str, to: &str, format: &str| {
        let mut image = Command::new("qemu-img");
        image.args(["convert", "-O", format, from, to]);
        assert!(image.status().unwrap().success());
    };
    convert(&raw, qcow2, "qcow2");
    let source = directory.path().join("hello.txt");
    let source = source.to_str().unwrap();
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let board = ["--board", "qemu", "--transport", transport];
        for image in [raw.as_str(), qcow2] {
            let said = succeed("block", &[&board[..], &["--disk", image]].concat());
            assert!(said.contains("blocks of 512 bytes, read-only"), "{said}");
            assert!(said.contains("6  hello.txt"), "{said}");
            let copy = ["--disk", image, "--copy-in", source, transport];
            succeed("block", &[&board[..], &copy].concat());
        }
    }
    // What the driver wrote is what others see.
    let back = directory.path().join("back.img");
    let back = back.to_str().unwrap();
    convert(qcow2, back, "raw");
    for image in [raw.as_str(), back] {
        let said = succeed("block", &["--disk", image]);
        for transport in ["pci", "mmio", "legacy-mmio"] {
            assert!(said.contains(&format!("6  {transport}\n")), "{said}");
        }
    }
    let verify = ["--verify", "--destroy-all-data"];
    let on = ["--board", "qemu", "--disk", raw.as_str()];
    let said = succeed("block", &[&on[..], &verify].concat());
    assert!(said.contains("all 8192 blocks"), "{said}");
}

#[test]
fn an_image_that_is_in_use_is_named() {
    need_qemu!();
    let directory = Scratch::new("block").unwrap();
    let image = make_image(&directory);
    let socket = directory.path().join("disk.sock");
    let _daemon = StorageDaemon::start(&image, &socket);
    for board in ["emulated", "qemu", "vhost-user"] {
        let arguments = ["--board", board, "--disk", &image, "--copy-in", &image, "x"];
        let error = fail("block", &arguments);
        assert!(
            error.contains("disk.img") && error.contains("in use"),
            "{error}"
        );
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    }
}

#[test]
fn two_nics_on_a_cable_are_measured_on_qemu() {
    need_qemu!();
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let size = ["--pings", "5", "--fetch", "1"];
        let board = ["--board", "qemu", "--transport", transport];
        let said = succeed("net", &[&board[..], &size].concat());
        assert!(said.contains("5 pings of 1472 bytes: min "), "{said}");
        assert!(said.contains("1 MiB over TCP: "), "{said}");
    }
}

#[test]
fn the_display_of_qemu_shows_the_same_picture_as_the_emulated_one() {
    need_qemu!();
    let directory = Scratch::new("display").unwrap();
    let show = |board: &str| {
        let path = directory.path().join(format!("{board}.png"));
        let out = path.to_str().unwrap();
        succeed(
            "display",
            &["--size", "333x77", "--board", board, "--out", out],
        );
        Image::load(&path).unwrap()
    };
    assert!(show("qemu") == show("emulated"));
}

#[test]
fn a_probe_prints_what_qemu_has() {
    need_qemu!();
    let said = succeed("probe", &["--board", "qemu"]);
    assert_eq!(
        said.matches("status    0x0, not in use").count(),
        9,
        "{said}"
    );
    assert_eq!(
        said.matches("32768 sectors of 512 bytes").count(),
        3,
        "{said}"
    );
}

#[test]
fn interrupts_of_qemu_wake_the_drivers() {
    need_qemu!();
    for transport in ["pci", "mmio", "legacy-mmio"] {
        let said = succeed("interrupts", &["--board", "qemu", "--transport", transport]);
        assert!(said.contains("4 MiB filled and checked"), "{said}");
        assert!(said.contains("10.0.2.15/24 by DHCP"), "{said}");
    }
}

#[test]
fn programs_without_a_socket_of_the_user_bring_their_own_daemon() {
    if let Some(why) = machine::vhost_user::StorageDaemon::missing() {
        eprintln!("{why}");
        return;
    }
    let directory = Scratch::new("tour").unwrap();
    let out = directory.path().to_str().unwrap();
    let said = succeed("tour", &["--board", "vhost-user", "--out", out]);
    assert!(said.contains("disk over vhost-user"), "{said}");
    assert!(said.lines().last().unwrap().ends_with("  ok"), "{said}");
    let said = succeed("probe", &["--board", "vhost-user"]);
    assert!(said.contains("32768 sectors of 512 bytes"), "{said}");
    let said = succeed("interrupts", &["--board", "vhost-user"]);
    assert!(said.contains("4 MiB filled and checked"), "{said}");
}

#[test]
fn an_image_is_driven_through_a_daemon_of_the_programs_own() {
    if let Some(why) = machine::vhost_user::StorageDaemon::missing() {
        eprintln!("{why}");
        return;
    }
    let directory = Scratch::new("block").unwrap();
    let image = make_image(&directory);
    let on = ["--board", "vhost-user", "--disk", &image];
    let said = succeed("block", &on);
    assert!(
        said.contains("read-only") && said.contains("6  hello.txt"),
        "{said}"
    );
    let verify = ["--verify", "--destroy-all-data"];
    let said = succeed("block", &[&on[..], &verify].concat());
    assert!(said.contains("all 8192 blocks"), "{said}");
}

#[test]
fn a_display_behind_vhost_user_shows_the_same_picture_as_the_emulated_one() {
    if let Some(why) = machine::vhost_user::DisplayProgram::missing() {
        eprintln!("{why}");
        return;
    }
    let directory = Scratch::new("display").unwrap();
    let show = |board: &[&str]| {
        let path = directory.path().join("shown.png");
        let out = path.to_str().unwrap();
        let arguments = [&["--size", "333x77", "--out", out], board].concat();
        succeed("display", &arguments);
        Image::load(&path).unwrap()
    };
    let expected = show(&[]);
    assert!(show(&["--board", "vhost-user"]) == expected);
}

#[test]
fn a_socket_goes_with_its_board() {
    assert!(fail("net", &["--board", "vhost-user"]).contains("--socket"));
    assert!(fail("net", &["--socket", "a.sock"]).contains("--board vhost-user"));
    let three = ["--socket", "a", "--socket", "b", "--socket", "c"];
    let board = ["--board", "vhost-user"];
    assert!(fail("net", &[&board[..], &three].concat()).contains("3 sockets"));
    assert!(fail("net", &[&board[..], &three[..2]].concat()).contains("no vhost-user device at a"));
    let both = ["--socket", "a", "--transport", "mmio"];
    assert!(fail("net", &[&board[..], &both].concat()).contains("--transport"));
}
