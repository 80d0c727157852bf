//! The contract of [`NetDriverOps`](crate::NetDriverOps) as code.
