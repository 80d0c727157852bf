//! A bus in front of the board's, on which every register access can be seen and changed.

use std::sync::{Arc, Mutex};

use machine::{Board, Installed, Machine, RegisterBus};

/// A register access of the driver.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) address: u64,
    pub(crate) width: u8,
    /// What was read or written.
    pub(crate) value: u64,
}

impl Access {
    /// Returns whether it is a read of the register at `address`.
    pub(crate) fn reads(&self, address: u64) -> bool {
        !self.write && self.address == address
    }

    /// Returns whether it is a write of the register at `address`.
    pub(crate) fn writes(&self, address: u64) -> bool {
        self.write && self.address == address
    }
}

type Hook = Box<dyn FnMut(&Access) -> Option<u64> + Send>;

struct Bus {
    board: Arc<dyn RegisterBus>,
    seen: Mutex<Vec<Access>>,
    hook: Mutex<Hook>,
}

impl Bus {
    fn see(&self, mut access: Access) -> u64 {
        let changed = (self.hook.lock().unwrap())(&access);
        access.value = changed.unwrap_or(access.value);
        self.seen.lock().unwrap().push(access);
        access.value
    }
}

impl RegisterBus for Bus {
    fn read(&self, address: u64, width: u8) -> u64 {
        let value = self.board.read(address, width);
        self.see(Access {
            write: false,
            address,
            width,
            value,
        })
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        let value = self.see(Access {
            write: true,
            address,
            width,
            value,
        });
        self.board.write(address, width, value);
    }

    fn mapped(&self, address: u64, size: usize) {
        self.board.mapped(address, size);
    }
}

/// The tap on a board's registers, there until it is dropped.
///
/// Its hook sees each access before the driver learns what it has read, and before the device learns what is written;
/// what it returns is read or written instead.
pub(crate) struct Tap {
    bus: Arc<Bus>,
    _installed: Installed,
}

impl Tap {
    pub(crate) fn install(
        board: &Board,
        hook: impl FnMut(&Access) -> Option<u64> + Send + 'static,
    ) -> Self {
        let bus = Arc::new(Bus {
            board: board.machine().bus().clone(),
            seen: Mutex::default(),
            hook: Mutex::new(Box::new(hook)),
        });
        let machine = Machine::new(board.memory().clone(), bus.clone());
        Self {
            bus,
            _installed: machine.install(),
        }
    }

    /// Returns the accesses since the last call.
    pub(crate) fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.bus.seen.lock().unwrap())
    }
}
