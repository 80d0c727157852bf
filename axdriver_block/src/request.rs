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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers near the edges of their type, where arithmetic wraps, and small ones.
    fn edgy_u64() -> impl Strategy<Value = u64> {
        prop_oneof![0..64_u64, any::<u64>(), u64::MAX - 64..=u64::MAX]
    }

    fn edgy_len() -> impl Strategy<Value = usize> {
        prop_oneof![
            0..8192_usize,
            (0..64_usize).prop_map(|blocks| blocks * 512),
            any::<usize>(),
            usize::MAX - 64..=usize::MAX
        ]
    }

    fn edgy_block_size() -> impl Strategy<Value = usize> {
        prop_oneof![Just(512), Just(4096), 0..600_usize, any::<usize>()]
    }

    proptest! {
        #[test]
        fn a_request_is_right_exactly_when_it_is_whole_blocks_inside_the_device(
            num_blocks in edgy_u64(),
            block_size in edgy_block_size(),
            block_id in edgy_u64(),
            len in edgy_len(),
        ) {
            let checked = check_request(num_blocks, block_size, block_id, len);
            // The same in numbers that cannot wrap.
            let (wide_len, wide_size) = (len as u128, block_size as u128);
            let whole = len > 0 && block_size > 0 && wide_len % wide_size == 0;
            let start = u128::from(block_id) * wide_size;
            let inside = start + wide_len <= u128::from(num_blocks) * wide_size;
            if whole && inside {
                prop_assert_eq!(checked, Ok((len / block_size) as u64));
            } else {
                prop_assert_eq!(checked, Err(DevError::InvalidParam));
            }
        }

        #[test]
        fn a_write_is_checked_as_a_request_before_read_only_counts(
            num_blocks in edgy_u64(),
            block_size in edgy_block_size(),
            block_id in edgy_u64(),
            len in edgy_len(),
        ) {
            let request = check_request(num_blocks, block_size, block_id, len);
            prop_assert_eq!(
                check_write(num_blocks, block_size, block_id, len, false),
                request
            );
            prop_assert_eq!(
                check_write(num_blocks, block_size, block_id, len, true),
                request.and(Err(DevError::Unsupported))
            );
        }
    }

    #[test]
    fn block_numbers_beyond_32_bits_are_not_truncated() {
        assert_eq!(check_request(1 << 40, 512, 1 << 32, 512), Ok(1));
        assert_eq!(
            check_request(1 << 32, 512, 1 << 32, 512),
            Err(DevError::InvalidParam)
        );
    }

    #[test]
    fn a_device_without_blocks_takes_no_request() {
        assert_eq!(check_request(0, 512, 0, 512), Err(DevError::InvalidParam));
        assert_eq!(check_request(1, 0, 0, 512), Err(DevError::InvalidParam));
    }
}
