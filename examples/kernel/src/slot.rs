//! A slot that a card can be pulled from, as PCI Express has it (Base Specification 4.0, 7.5.3).

use axdriver_virtio::pci::{ConfigurationAccess, DeviceFunction, MmioCam};

/// The id of the capability that a port has; its first register says whether there is a slot.
const PCI_EXPRESS: u8 = 0x10;
const SLOT_IMPLEMENTED: u32 = 1 << 24;
/// Slot Capabilities, and of these: cards may come and go.
const CAPABILITIES: u8 = 0x14;
const HOT_PLUG: u32 = 1 << 6;
/// Slot Control, and in the upper half Slot Status, of which the button is cleared by writing a one.
const CONTROL: u8 = 0x18;
const POWER_INDICATOR_OFF: u32 = 3 << 8;
const POWER_OFF: u32 = 1 << 10;
const BUTTON: u32 = 1 << 16;
const PRESENT: u32 = 1 << 22;

/// A slot behind a port, with a button that asks for the card in it to be let go.
pub(crate) struct Slot<'a> {
    configuration: &'a mut MmioCam<'static>,
    port: DeviceFunction,
    /// Where the port's capability lies.
    capability: u8,
}

impl<'a> Slot<'a> {
    /// Returns the slot of a port, if it has one from which a card may be pulled.
    pub(crate) fn of(
        configuration: &'a mut MmioCam<'static>,
        port: DeviceFunction,
    ) -> Option<Self> {
        let read = |register| configuration.read_word(port, register);
        let [first, ..] = read(0x34).to_le_bytes();
        // Each takes 4 bytes at least of the 192 that there are.
        let capability = core::iter::successors(Some(first), |&last| {
            let [_, next, ..] = read(last & 0xfc).to_le_bytes();
            Some(next)
        })
        .take(48)
        .take_while(|&offset| offset != 0)
        .map(|offset| offset & 0xfc)
        .find(|&offset| read(offset).to_le_bytes()[0] == PCI_EXPRESS)
        .filter(|&offset| offset <= 0xfc - CONTROL)?;
        let pluggable = read(capability) & SLOT_IMPLEMENTED != 0
            && read(capability + CAPABILITIES) & HOT_PLUG != 0;
        pluggable.then_some(Self {
            configuration,
            port,
            capability,
        })
    }

    fn read(&self) -> u32 {
        self.configuration
            .read_word(self.port, self.capability + CONTROL)
    }

    /// Returns whether the button was pressed.
    pub(crate) fn button_pressed(&self) -> bool {
        self.read() & BUTTON != 0
    }

    /// Takes the power from the card, and says so with the indicator: it may be pulled now.
    pub(crate) fn power_off(&mut self) {
        let control = self.read() & 0xffff | POWER_INDICATOR_OFF | POWER_OFF;
        self.configuration
            .write_word(self.port, self.capability + CONTROL, control | BUTTON);
    }

    /// Returns whether there is a card.
    pub(crate) fn is_occupied(&self) -> bool {
        self.read() & PRESENT != 0
    }
}
