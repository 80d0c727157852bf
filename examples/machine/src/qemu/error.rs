//! What can go wrong with QEMU as a board, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why QEMU could not be started, or did not do what it was asked.
///
/// Each is one line that names the culprit and says what to do.
#[derive(Debug)]
#[non_exhaustive]
pub enum QemuError {
    /// The program is not installed, or not in `PATH`.
    NotInstalled {
        /// The program that was looked for.
        program: PathBuf,
    },
    /// The program is there, but is not as new as what is needed.
    TooOld {
        /// The program.
        program: PathBuf,
        /// The version that it says it has.
        version: String,
        /// The first version that serves.
        needed: &'static str,
    },
    /// A device has no property of this name, or the property does not take this value.
    Property {
        /// QEMU's own words, which name the device, the property and the value.
        message: String,
    },
    /// This QEMU does not know a device, a back end or a machine that was asked for.
    UnknownDevice {
        /// QEMU's own words, which name it.
        message: String,
    },
    /// A disk image cannot be opened.
    Image {
        /// The image.
        path: PathBuf,
        /// What is the matter with it.
        fault: ImageFault,
    },
    /// QEMU refused to start, for a reason that is none of the above.
    Refused {
        /// QEMU's own words.
        message: String,
    },
    /// QEMU has ended, or closed its side of a socket.
    Gone {
        /// QEMU's last words, if it had any.
        message: String,
    },
    /// QEMU did not answer in time.
    Silent {
        /// What was waited for.
        waiting_for: String,
        /// For how long.
        limit: Duration,
    },
    /// QEMU turned a command down.
    Command {
        /// The command.
        command: String,
        /// QEMU's own words.
        message: String,
    },
    /// QEMU said something that is not in the protocol.
    Protocol {
        /// What it said, or what was missing.
        message: String,
    },
    /// An option of ours that no QEMU could fulfil.
    Options {
        /// What is wrong with it.
        message: String,
    },
    /// The operating system refused something that starting QEMU needs.
    Host(io::Error),
}

/// What is the matter with a disk image.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum ImageFault {
    /// There is no such file.
    Missing,
    /// The file may not be read, or not be written.
    Permission,
    /// Another program has it open for writing.
    InUse,
    /// The file is not in the format that was named.
    Format {
        /// QEMU's own words.
        message: String,
    },
}

impl fmt::Display for QemuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInstalled { program } => write!(
                f,
                "{} was not found: install {}, or name its directory in {}",
                program.display(),
                package_of(program),
                super::PROGRAM_VARIABLE,
            ),
            Self::TooOld {
                program,
                version,
                needed,
            } => write!(
                f,
                "{} is version {version}, but {needed} or newer is needed: update it, or name the directory of a newer one in {}",
                program.display(),
                super::PROGRAM_VARIABLE,
            ),
            Self::Property { message } => write!(
                f,
                "QEMU's device does not take a property: {message}; see `-device NAME,help` for those it has"
            ),
            Self::UnknownDevice { message } => write!(
                f,
                "this QEMU lacks what was asked for: {message}; a fuller build of QEMU may have it"
            ),
            Self::Image { path, fault } => {
                write!(f, "disk image {}: ", path.display())?;
                match fault {
                    ImageFault::Missing => f.write_str(
                        "there is no such file; check the path, or make one with `qemu-img create`",
                    ),
                    ImageFault::Permission => f.write_str(
                        "not permitted; check the file's owner and mode, or open it read-only",
                    ),
                    ImageFault::InUse => f.write_str(
                        "in use by another program, which has to close it first (or use a copy)",
                    ),
                    ImageFault::Format { message } => {
                        write!(f, "{message}; `qemu-img info` tells the format of an image")
                    }
                }
            }
            Self::Refused { message } => write!(f, "QEMU did not start: {message}"),
            Self::Gone { message } if message.is_empty() => f.write_str("QEMU has ended"),
            Self::Gone { message } => write!(f, "QEMU has ended: {message}"),
            Self::Silent { waiting_for, limit } => write!(
                f,
                "QEMU did not answer within {} s: waiting for {waiting_for}",
                limit.as_secs()
            ),
            Self::Command { command, message } => {
                write!(f, "QEMU turned down `{command}`: {message}")
            }
            Self::Protocol { message } => write!(f, "QEMU said what was not expected: {message}"),
            Self::Options { message } => f.write_str(message),
            Self::Host(error) => write!(f, "QEMU could not be started: {error}"),
        }
    }
}

/// Without a source: what the operating system says is a part of the line.
impl std::error::Error for QemuError {}

impl From<io::Error> for QemuError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl From<rustix::io::Errno> for QemuError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Host(error.into())
    }
}

/// Returns the Debian package that holds `program`, as a hint.
fn package_of(program: &Path) -> &'static str {
    match program.file_name().and_then(|name| name.to_str()) {
        Some("qemu-system-aarch64") => "qemu-system-arm (Debian's name for it)",
        Some("qemu-system-x86_64") => "qemu-system-x86 (Debian's name for it)",
        Some("qemu-storage-daemon") => "qemu-system-common (Debian's name for it)",
        Some("qemu-img") => "qemu-utils (Debian's name for it)",
        Some("vhost-user-gpu") => "qemu-system-gui (Debian's name for it)",
        _ => "QEMU",
    }
}

/// Tells what a QEMU that ended before it was ready meant by its last words.
///
/// `images` are the disk images that it was asked to open, in the order of their numbers.
pub(crate) fn refusal(complaint: &str, images: &[Option<PathBuf>]) -> QemuError {
    let lines = || {
        complaint
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
    };
    // The error is the last line but for hints, which do not begin with the program's name.
    let line = lines()
        .rfind(|line| line.starts_with("qemu") && !line.contains("warning:"))
        .or_else(|| lines().next_back())
        .unwrap_or("it gave no reason");
    let message = without_prefix(line).to_owned();
    let about = |phrases: &[&str]| phrases.iter().any(|phrase| line.contains(phrase));

    if let Some(path) = image_in(complaint, images) {
        let fault = if about(&["No such file or directory"]) {
            Some(ImageFault::Missing)
        } else if about(&["Permission denied", "Read-only file system"]) {
            Some(ImageFault::Permission)
        } else if about(&["Failed to get "]) && about(&[" lock"]) {
            Some(ImageFault::InUse)
        } else if about(&["-blockdev"]) {
            Some(ImageFault::Format {
                message: message.clone(),
            })
        } else {
            None
        };
        if let Some(fault) = fault {
            return QemuError::Image { path, fault };
        }
    }
    if about(&[
        "is not a valid device model",
        "unsupported machine type",
        "is not compiled into this binary",
        "Unknown driver",
        "does not accept value",
    ]) {
        return QemuError::UnknownDevice { message };
    }
    if about(&["ropert", "expects", "Invalid parameter"]) {
        return QemuError::Property { message };
    }
    QemuError::Refused { message }
}

/// Returns which of `images` a complaint speaks of.
///
/// Some faults name the file, others only the node, which carries the number of the image.
fn image_in(complaint: &str, images: &[Option<PathBuf>]) -> Option<PathBuf> {
    images.iter().enumerate().find_map(|(number, path)| {
        let path = path.as_ref()?;
        let named = complaint.contains(&*path.to_string_lossy())
            || [super::options::file_node, super::options::disk_node]
                .iter()
                .any(|node| complaint.contains(&format!("\"{}\"", node(number))));
        named.then(|| path.clone())
    })
}

/// Drops the name of the program and the option from a line of QEMU's, which no caller wrote.
fn without_prefix(line: &str) -> &str {
    let line = line
        .split_once(": ")
        .filter(|(program, _)| program.contains("qemu"))
        .map_or(line, |(_, rest)| rest);
    // `-device virtio-blk-pci,foo=1: Property ...`, where a value may hold a colon of its own.
    if line.starts_with('-')
        && let Some((_, rest)) = line.rsplit_once(": ")
    {
        return rest;
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> Vec<Option<PathBuf>> {
        vec![Some("/a.img".into()), Some("/b.img".into())]
    }

    #[test]
    fn a_locked_image_is_named_by_its_path() {
        for lock in ["\"write\"", "shared \"write\"", "\"consistent read\""] {
            let complaint = format!(
                "qemu-system-aarch64: -device virtio-blk-device,drive=disk1: Failed to get {lock} lock\n\
                Is another process using the image [/b.img]?"
            );
            assert!(matches!(
                refusal(&complaint, &images()),
                QemuError::Image { path, fault: ImageFault::InUse } if path == *"/b.img"
            ));
        }
    }

    #[test]
    fn an_image_of_another_format_is_named_by_its_number() {
        let complaint = "qemu-system-aarch64: -blockdev {\"driver\":\"qcow2\",\"file\":\"file1\",\"node-name\":\"disk1\"}: \
            Image is not in qcow2 format";
        let error = refusal(complaint, &images());
        assert!(
            matches!(
                &error,
                QemuError::Image { path, fault: ImageFault::Format { message } }
                    if path == &PathBuf::from("/b.img") && message == "Image is not in qcow2 format"
            ),
            "{error:?}"
        );
    }

    #[test]
    fn a_missing_property_is_told_in_qemus_words_without_its_command_line() {
        let complaint = "qemu-system-aarch64: warning: something else\n\
            qemu-system-aarch64: -device virtio-blk-device,foo=1: Property 'virtio-blk-device.foo' not found";
        assert!(matches!(
            refusal(complaint, &images()),
            QemuError::Property { message } if message == "Property 'virtio-blk-device.foo' not found"
        ));
    }

    #[test]
    fn every_error_is_one_line() {
        let errors = [
            QemuError::NotInstalled {
                program: "qemu-system-aarch64".into(),
            },
            QemuError::Image {
                path: "disk.img".into(),
                fault: ImageFault::InUse,
            },
            QemuError::Gone {
                message: String::new(),
            },
        ];
        for error in errors {
            let text = error.to_string();
            assert!(!text.contains('\n'), "{text}");
            assert!(text.len() > 10, "{text}");
        }
    }
}
