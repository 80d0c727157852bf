//! A network card that receives what it transmits: the reference implementation, and a fake for tests.
