//! The contract of [`BaseDriverOps`] as code, and the violation that all conformance suites report.
