//! Draws on a [`Canvas`](crate::Canvas) with embedded-graphics.
