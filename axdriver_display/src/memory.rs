//! A display in memory: the reference implementation, and a fake for tests.
