//! The one check of a request's arguments, which every driver makes first.

use crate::{DevError, DevResult};

/// Checks the arguments of a read, and returns how many blocks it is for: at least 1.
///
/// `num_blocks` and `block_size` (in bytes) describe the device, `block_id` is the first block of the request and
/// `len` the length of its buffer, in bytes.
///
/// ```
/// use axdriver_block::{DevError, check_request};
///
/// // A device of 100 blocks of 512 bytes each.
/// assert_eq!(check_request(100, 512, 98, 1024), Ok(2));
/// assert_eq!(check_request(100, 512, 99, 1024), Err(DevError::InvalidParam));
/// ```
///
/// # Errors
///
/// * [`DevError::InvalidParam`]: `len` is 0 or not a multiple of `block_size`, the range leaves the device, or
///   `block_size` is 0.
pub const fn check_request(
    num_blocks: u64,
    block_size: usize,
    block_id: u64,
    len: usize,
) -> DevResult<u64> {
    // A length of 0 is a multiple of every size, and nothing but 0 is a multiple of 0.
    if len == 0 || !len.is_multiple_of(block_size) {
        return Err(DevError::InvalidParam);
    }
    let count = (len / block_size) as u64;
    match block_id.checked_add(count) {
        Some(end) if end <= num_blocks => Ok(count),
        _ => Err(DevError::InvalidParam),
    }
}

/// Checks the arguments of a write, and returns how many blocks it is for: at least 1.
///
/// `read_only` says that the device takes no writes; for the other arguments, see [`check_request`].
///
/// ```
/// use axdriver_block::{DevError, check_write};
///
/// assert_eq!(check_write(100, 512, 99, 512, false), Ok(1));
/// assert_eq!(check_write(100, 512, 99, 512, true), Err(DevError::Unsupported));
/// // What is wrong in any case is said first.
/// assert_eq!(check_write(100, 512, 100, 512, true), Err(DevError::InvalidParam));
/// ```
///
/// # Errors
///
/// * [`DevError::InvalidParam`]: as [`check_request`] has it.
/// * [`DevError::Unsupported`]: the request is right, but `read_only` is set.
pub const fn check_write(
    num_blocks: u64,
    block_size: usize,
    block_id: u64,
    len: usize,
    read_only: bool,
) -> DevResult<u64> {
    match check_request(num_blocks, block_size, block_id, len) {
        Ok(_) if read_only => Err(DevError::Unsupported),
        checked => checked,
    }
}
