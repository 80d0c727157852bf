//! What the example programs share.

pub mod fat;
pub mod http;
pub mod image;
pub mod partition;
pub mod peer;
pub mod picture;
pub mod report;
pub mod stack;
pub mod time;
