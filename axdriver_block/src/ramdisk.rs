//! A disk in memory: the reference implementation, and a fake for tests.
