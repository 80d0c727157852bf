//! The contract of [`BlockDriverOps`](crate::BlockDriverOps) as code.
