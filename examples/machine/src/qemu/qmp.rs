//! QMP, QEMU's management protocol: one JSON object a line, commands and answers and events.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Map, Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::QemuError;

/// How long an answer may take. Flushing an image to a slow disk is the longest of what is asked.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// The most events that are kept; older ones make room.
const MAX_EVENTS: usize = 256;

/// A connection to QEMU's management interface.
///
/// [`execute`](Self::execute) takes any command of QEMU's; the other methods are those that a test
/// of a driver wants, with their arguments checked by the compiler.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    version: (u64, u64, u64),
    events: VecDeque<Value>,
}

impl Qmp {
    /// Greets the QEMU at the other end of `stream`.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Gone`]: it has ended, or closed the socket.
    /// * [`QemuError::Silent`]: it says nothing.
    /// * [`QemuError::Protocol`]: what it says is not QMP.
    pub fn new(stream: UnixStream) -> Result<Self, QemuError> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            version: (0, 0, 0),
            events: VecDeque::new(),
        };
        let greeting = Value::Object(qmp.next_object("the greeting of QMP")?);
        let part = |name| {
            greeting
                .pointer("/QMP/version/qemu")
                .and_then(|version| version.get(name))
                .and_then(Value::as_u64)
        };
        let (Some(major), Some(minor), Some(micro)) = (part("major"), part("minor"), part("micro"))
        else {
            return Err(QemuError::Protocol {
                message: format!("{greeting} for a greeting"),
            });
        };
        qmp.version = (major, minor, micro);
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Returns QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.version
    }

    /// Runs any command and returns what it returns.
    ///
    /// # Errors
    ///
    /// * [`QemuError::Command`]: QEMU turned it down.
    /// * [`QemuError::Gone`], [`QemuError::Silent`], [`QemuError::Protocol`]: no answer, or none
    ///   that is QMP.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(|error| lost(&error, command))?;
        self.answer(command)
    }

    /// Hands an open file to QEMU, which knows it by `name` from then on.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn hand_over(&mut self, name: &str, file: impl AsFd) -> Result<(), QemuError> {
        let command = "getfd";
        let mut line = json!({ "execute": command, "arguments": { "fdname": name } }).to_string();
        line.push('\n');
        // It goes along with the first byte, and so short a line is taken whole.
        self.stream
            .get_mut()
            .send_with_fd(line.as_bytes(), file.as_fd().as_raw_fd())
            .map_err(|error| lost(&error.into(), command))?;
        self.answer(command).map(drop)
    }

    /// Reads up to the answer to a command.
    fn answer(&mut self, command: &str) -> Result<Value, QemuError> {
        loop {
            let mut object = self.next_object(command)?;
            if object.contains_key("event") {
                self.keep(Value::Object(object));
            } else if let Some(result) = object.remove("return") {
                return Ok(result);
            } else if let Some(error) = object.remove("error") {
                let message = error.get("desc").and_then(Value::as_str);
                return Err(QemuError::Command {
                    command: command.to_owned(),
                    message: message.unwrap_or("no reason given").to_owned(),
                });
            } else {
                return Err(QemuError::Protocol {
                    message: Value::Object(object).to_string(),
                });
            }
        }
    }

    /// Returns the oldest event that QEMU has told of and that was not taken yet.
    ///
    /// Events are taken in with the answer to a command, so they are at most as new as the last one.
    pub fn take_event(&mut self) -> Option<Value> {
        self.events.pop_front()
    }

    /// Waits for an event by its name (`DEVICE_DELETED`, `BLOCK_IO_ERROR`, ...) and takes it, with
    /// all that came before it.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute); [`QemuError::Silent`] if it does not come.
    pub fn wait_for_event(&mut self, name: &str) -> Result<Value, QemuError> {
        loop {
            while let Some(event) = self.events.pop_front() {
                if event.get("event").and_then(Value::as_str) == Some(name) {
                    return Ok(event);
                }
            }
            let object = self.next_object(name)?;
            self.keep(Value::Object(object));
        }
    }

    /// Plugs the cable of a NIC in or pulls it out.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn set_link(&mut self, name: &str, up: bool) -> Result<(), QemuError> {
        self.execute("set_link", json!({ "name": name, "up": up }))?;
        Ok(())
    }

    /// Changes the size of a disk while it is in use.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn block_resize(&mut self, node: &str, size: u64) -> Result<(), QemuError> {
        self.execute("block_resize", json!({ "node-name": node, "size": size }))?;
        Ok(())
    }

    /// Asks the guest to let a PCI device go. It goes when the guest says so, or at a reset.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn device_del(&mut self, id: &str) -> Result<(), QemuError> {
        self.execute("device_del", json!({ "id": id }))?;
        Ok(())
    }

    /// Returns what QEMU knows about its disks.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn query_block(&mut self) -> Result<Value, QemuError> {
        self.execute("query-block", json!({}))
    }

    /// Returns how much each disk has done.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn query_block_statistics(&mut self) -> Result<Value, QemuError> {
        self.execute("query-blockstats", json!({}))
    }

    /// Reads a property of an object in QEMU's tree.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn property(&mut self, path: &str, property: &str) -> Result<Value, QemuError> {
        self.execute("qom-get", json!({ "path": path, "property": property }))
    }

    /// Returns the path of the first object right below `parent` whose type is `kind`.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute); [`QemuError::Protocol`] if there is none.
    pub fn find_object(&mut self, parent: &str, kind: &str) -> Result<String, QemuError> {
        let wanted = format!("child<{kind}>");
        let children = self.execute("qom-list", json!({ "path": parent }))?;
        children
            .as_array()
            .into_iter()
            .flatten()
            .find(|child| child.get("type").and_then(Value::as_str) == Some(&wanted))
            .and_then(|child| child.get("name").and_then(Value::as_str))
            .map(|name| format!("{parent}/{name}"))
            .ok_or_else(|| QemuError::Protocol {
                message: format!("no {kind} below {parent}"),
            })
    }

    /// Writes what head `head` of the display `device` shows to `file`, as PPM.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn screendump(&mut self, device: &str, head: u32, file: &str) -> Result<(), QemuError> {
        self.execute(
            "screendump",
            json!({ "filename": file, "device": device, "head": head }),
        )?;
        Ok(())
    }

    /// Asks QEMU to close its images and end. It answers before it ends.
    ///
    /// # Errors
    ///
    /// As those of [`execute`](Self::execute).
    pub fn quit(&mut self) -> Result<(), QemuError> {
        self.execute("quit", json!({}))?;
        Ok(())
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn next_object(&mut self, waiting_for: &str) -> Result<Map<String, Value>, QemuError> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => {
                return Err(QemuError::Gone {
                    message: String::new(),
                });
            }
            Ok(_) => {}
            Err(error) => return Err(lost(&error, waiting_for)),
        }
        match serde_json::from_str(&line) {
            Ok(Value::Object(object)) => Ok(object),
            _ => Err(QemuError::Protocol { message: line }),
        }
    }
}

fn lost(error: &io::Error, waiting_for: &str) -> QemuError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QemuError::Silent {
            waiting_for: format!("`{waiting_for}`"),
            limit: ANSWER_LIMIT,
        },
        io::ErrorKind::InvalidData => QemuError::Protocol {
            message: "bytes that are no text".to_owned(),
        },
        _ => QemuError::Gone {
            message: String::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;

    /// A server that greets, and then gives `answers` in turn.
    fn server(answers: &'static [&'static str]) -> Result<Qmp, QemuError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            (&theirs).write_all(GREETING.as_bytes()).unwrap();
            (&theirs).write_all(b"\n").unwrap();
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            for answer in [r#"{"return": {}}"#].iter().chain(answers) {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                (&theirs).write_all(answer.as_bytes()).unwrap();
                (&theirs).write_all(b"\n").unwrap();
            }
        });
        Qmp::new(ours)
    }

    #[test]
    fn the_greeting_tells_the_version() {
        assert_eq!(server(&[]).unwrap().version(), (7, 2, 22));
    }

    #[test]
    fn events_between_a_command_and_its_answer_are_kept() {
        let mut qmp = server(&[concat!(
            r#"{"event": "RESUME"}"#,
            "\n",
            r#"{"event": "STOP"}"#,
            "\n",
            r#"{"return": 3}"#
        )])
        .unwrap();
        assert_eq!(qmp.execute("anything", json!({})).unwrap(), 3);
        assert_eq!(qmp.wait_for_event("STOP").unwrap()["event"], "STOP");
        assert_eq!(qmp.take_event(), None);
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let mut qmp =
            server(&[r#"{"error": {"class": "GenericError", "desc": "no such node"}}"#]).unwrap();
        let error = qmp.block_resize("d9", 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "QEMU turned down `block_resize`: no such node"
        );
    }

    #[test]
    fn an_answer_that_is_no_json_is_an_error() {
        let mut qmp = server(&["}{"]).unwrap();
        assert!(matches!(qmp.query_block(), Err(QemuError::Protocol { .. })));
    }
}
