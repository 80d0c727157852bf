//! What the example programs share.

pub mod board;
pub mod fat;
pub mod http;
pub mod image;
pub mod partition;
pub mod peer;
pub mod picture;
pub mod registers;
pub mod report;
pub mod scratch;
pub mod stack;
pub mod tap;
pub mod time;
pub mod work;
