//! A TAP interface of Linux: a network card of the host whose cable ends in this process.
//!
//! The unsafe code here is the one call that asks the kernel for the interface.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
};

use anyhow::{Context, ensure};

/// The device that TAP interfaces are asked of.
const DEVICE: &str = "/dev/net/tun";

/// An interface that this process holds the cable of.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Takes the cable of the interface `name`, which is made if there is none and that is allowed.
    ///
    /// # Errors
    ///
    /// * The name is empty or too long.
    /// * Interfaces of this kind are not to be had, or not by this user, or another process holds the cable.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let room = libc::IFNAMSIZ - 1;
        ensure!(
            (1..=room).contains(&name.len()),
            "the name of an interface has 1 to {room} bytes, {name:?} has not"
        );
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .with_context(|| format!("cannot open {DEVICE}"))?;
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: FLAGS },
        };
        for (place, letter) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = letter.cast_signed();
        }
        // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which `request` is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if result < 0 {
            let hint = format!(
                "cannot take the TAP interface {name}; `ip tuntap add name {name} mode tap user $USER` makes one"
            );
            return Err(io::Error::last_os_error()).context(hint);
        }
        Ok(Self { file })
    }

    /// Sends a frame to the host.
    ///
    /// # Errors
    ///
    /// The interface is down or gone, or takes no more for now. The frame is lost.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.file.write(frame).map(drop)
    }

    /// Takes a frame that the host sent, and returns its length. `None`: there is none.
    ///
    /// # Errors
    ///
    /// The interface is gone.
    pub fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match self.file.read(frame) {
            Ok(length) => Ok(Some(length)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Ethernet frames, and nothing in front of them.
const FLAGS: libc::c_short = 0x1002;
const _: () = assert!(FLAGS as libc::c_int == libc::IFF_TAP | libc::IFF_NO_PI);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        assert!(Tap::open("").is_err());
        assert!(Tap::open("a-name-longer-than-15").is_err());
    }
}
