//! What can go wrong with a device behind a vhost-user socket.

use std::fmt;
use std::io;
use std::time::Duration;

/// Why a vhost-user device could not be had, or has gone.
///
/// Each is one line that names the culprit and says what to do.
#[derive(Debug)]
#[non_exhaustive]
pub enum VhostUserError {
    /// Nobody listens at the socket.
    NotListening {
        /// The socket.
        address: String,
        /// What the operating system says.
        source: io::Error,
    },
    /// The back end closed the connection, or has ended.
    Disconnected,
    /// The back end did not answer in time. The connection is closed.
    Silent {
        /// The request.
        request: &'static str,
        /// For how long it was waited.
        limit: Duration,
    },
    /// The back end turned a request down.
    Refused {
        /// The request.
        request: &'static str,
    },
    /// What the back end says is not in the protocol. The connection is closed.
    Protocol {
        /// What it speaks of: the request that it answers, a request of its own, or its display.
        subject: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The back end lacks something that the device cannot do without.
    Unsuitable {
        /// What it lacks.
        message: &'static str,
    },
    /// The operating system refused a socket, an eventfd or a thread.
    Host(io::Error),
}

impl fmt::Display for VhostUserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotListening { address, source } => write!(
                f,
                "no vhost-user device at {address} ({source}): start its program first, or check the path"
            ),
            Self::Disconnected => f.write_str(
                "the vhost-user device has gone: its program ended or closed the connection",
            ),
            Self::Silent { request, limit } => write!(
                f,
                "the vhost-user device did not answer {request} within {} ms: its program hangs, or is used by another",
                limit.as_millis()
            ),
            Self::Refused { request } => {
                write!(
                    f,
                    "the vhost-user device turned down {request}: its program's log may say why"
                )
            }
            Self::Protocol { subject, message } => write!(
                f,
                "the vhost-user device does not keep to the protocol ({subject}): {message}"
            ),
            Self::Unsuitable { message } => {
                write!(f, "the vhost-user device does not serve: {message}")
            }
            Self::Host(error) => write!(f, "vhost-user: {error}"),
        }
    }
}

/// Without a source: what the operating system says is a part of the line.
impl std::error::Error for VhostUserError {}

impl From<io::Error> for VhostUserError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;
    use crate::qemu::QemuError;

    #[test]
    fn a_chain_of_errors_prints_each_cause_once() {
        let cause = || io::Error::from(io::ErrorKind::PermissionDenied);
        let errors: [Box<dyn Error>; 3] = [
            Box::new(VhostUserError::NotListening {
                address: "/run/disk.sock".to_owned(),
                source: cause(),
            }),
            Box::new(VhostUserError::Host(cause())),
            Box::new(QemuError::Host(cause())),
        ];
        for error in errors {
            let chain =
                std::iter::successors(Some(&*error), |error: &&dyn Error| (*error).source());
            let text: String = chain.map(|error| format!("{error}: ")).collect();
            assert_eq!(text.matches(&cause().to_string()).count(), 1, "{text}");
        }
    }
}
