//! What a network card can do beyond what all of them do.

/// What a network device can do.
///
/// Fields may be added, so a driver starts from [`new`](Self::new) and says what it knows:
///
/// ```
/// use axdriver_net::NetCapabilities;
///
/// let jumbo = NetCapabilities::new()
///     .with_max_frame_len(9014)
///     .with_link(Some(true));
/// assert_eq!(jumbo.max_frame_len, 9014);
/// // What is not known is not claimed.
/// assert_eq!(NetCapabilities::new().link, None);
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct NetCapabilities {
    /// The length of the longest frame that can be sent, in bytes, from the Ethernet header on and without the frame
    /// check sequence. The default is 1514: an IP MTU of 1500.
    pub max_frame_len: usize,
    /// Whether the link is up. `None`, the default, means that the device does not say.
    pub link: Option<bool>,
}

impl NetCapabilities {
    /// Returns what is true of a device of which nothing is known: frames of up to 1514 bytes, a link of unknown state.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            max_frame_len: 1514,
            link: None,
        }
    }

    /// Sets the length of the longest frame, in bytes, from the Ethernet header on.
    #[must_use]
    pub const fn with_max_frame_len(mut self, max_frame_len: usize) -> Self {
        self.max_frame_len = max_frame_len;
        self
    }

    /// Sets whether the link is up, `None` for not known.
    #[must_use]
    pub const fn with_link(mut self, link: Option<bool>) -> Self {
        self.link = link;
        self
    }
}

impl Default for NetCapabilities {
    fn default() -> Self {
        Self::new()
    }
}
