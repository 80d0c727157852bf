//! The address of a station on an Ethernet.

use core::fmt;

/// An Ethernet address (MAC address), in the order in which its bytes are sent.
///
/// ```
/// use axdriver_net::EthernetAddress;
///
/// let address = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// assert_eq!(address.to_string(), "52:54:00:12:34:56");
/// assert!(!address.is_multicast());
/// assert!(EthernetAddress::BROADCAST.is_multicast());
/// ```
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct EthernetAddress(pub [u8; 6]);

impl EthernetAddress {
    /// The address of all stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Returns whether this is the address of a group of stations, of which the broadcast address is one.
    #[must_use]
    pub const fn is_multicast(&self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for EthernetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for EthernetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EthernetAddress({self})")
    }
}

impl From<[u8; 6]> for EthernetAddress {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, format};

    use super::EthernetAddress;

    #[test]
    fn addresses_can_be_copied_compared_ordered_and_printed() {
        let address = EthernetAddress([2, 0, 0, 0xab, 0, 1]);
        let copy = address;
        assert_eq!(address, copy);
        assert_eq!(format!("{address:?}"), "EthernetAddress(02:00:00:ab:00:01)");
        let all: BTreeSet<_> = [address, EthernetAddress::BROADCAST, copy].into();
        assert_eq!(all.len(), 2);
    }
}
