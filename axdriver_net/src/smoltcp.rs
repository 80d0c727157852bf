//! smoltcp over any driver: [`phy::Device`](::smoltcp::phy::Device) for [`NetDriverOps`](crate::NetDriverOps).
