//! An entropy source (5.4): a virtio device of a type that drivers of disks, NICs and displays leave alone.

use super::device::{Device, Field, Model};
use super::state::State;

/// A source of numbers, the same ones in each run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entropy {
    state: u64,
}

impl Entropy {
    /// Returns a source.
    pub fn new() -> Self {
        Self::default()
    }

    fn next(&mut self) -> u8 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 56) as u8
    }
}

impl From<Entropy> for Device {
    fn from(entropy: Entropy) -> Self {
        Device::new(entropy)
    }
}

impl Model for Entropy {
    fn kind(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &[8]
    }

    fn fields(&self) -> &'static [Field] {
        &[]
    }

    fn config(&mut self, _device: &mut State) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, queue: u16, device: &mut State) {
        while let Some(chain) = device.pop(queue) {
            let len = usize::try_from(chain.writable_len())
                .unwrap_or(0)
                .min(1 << 16);
            let bytes: Vec<u8> = (0..len).map(|_| self.next()).collect();
            let memory = device.guest();
            let written = chain.write(memory.guest(), 0, &bytes);
            device.complete(queue, chain.head, u32::try_from(written).unwrap_or(0));
        }
    }

    fn reset(&mut self) {}
}
