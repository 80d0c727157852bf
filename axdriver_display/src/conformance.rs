//! The contract of [`DisplayDriverOps`](crate::DisplayDriverOps) as code.
