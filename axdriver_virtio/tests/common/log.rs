//! What the driver says in the log, by thread.

use std::cell::RefCell;
use std::sync::Once;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// A message of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub(crate) level: Level,
    pub(crate) text: String,
}

thread_local! {
    static MESSAGES: RefCell<Vec<Logged>> = const { RefCell::new(Vec::new()) };
}

struct Recorder;

impl Log for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("axdriver")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let message = Logged {
                level: record.level(),
                text: record.args().to_string(),
            };
            MESSAGES.with_borrow_mut(|messages| messages.push(message));
        }
    }

    fn flush(&self) {}
}

/// Records messages from now on.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Recorder).unwrap();
        log::set_max_level(LevelFilter::Trace);
    });
}

/// Returns this thread's messages since the last call.
pub(crate) fn logged() -> Vec<Logged> {
    install();
    MESSAGES.with_borrow_mut(std::mem::take)
}
