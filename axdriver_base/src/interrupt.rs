//! What an interrupt of a device can mean.

bitflags::bitflags! {
    /// What an interrupt of a device meant: a set, since one interrupt may have several causes.
    ///
    /// Bits that are not named here are reserved.
    #[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
    pub struct InterruptCause: u32 {
        /// The device is done with buffers: requests are complete, frames have come or have left.
        const USED_BUFFERS = 1;
        /// What the device says about itself has changed: its size, its link, its modes.
        const CONFIGURATION = 2;
    }
}

#[cfg(test)]
mod tests {
    use super::InterruptCause;

    #[test]
    fn one_interrupt_can_have_two_causes() {
        let both = InterruptCause::USED_BUFFERS | InterruptCause::CONFIGURATION;
        assert_eq!(both.bits(), 3);
        assert!(both.contains(InterruptCause::CONFIGURATION));
        assert!(InterruptCause::default().is_empty());
    }
}
