//! The contracts of the traits, as the trait crates have them as code, over every transport, with and without the features of
//! the ring, with small and large queues, on devices that answer at once and on devices that answer later.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{DevError, DevResult};
use axdriver_net::NetDriverOps;
use axdriver_net::conformance::Peer;
use common::{AnyTransport, Bench, MAC, Over, running};
use machine::emulated::features::{RING_EVENT_IDX, RING_INDIRECT_DESC};
use machine::{Device, Disk, Display, MachineHal, Nic};

/// Sizes of queues that a device may offer.
const SIZES: [u16; 7] = [1, 2, 4, 8, 128, 1024, 32768];

/// How a device is to be.
#[derive(Clone, Copy, Debug)]
struct Setting {
    over: Over,
    event_idx: bool,
    indirect: bool,
    size: u16,
    later: bool,
}

impl Setting {
    /// All settings over a transport, of queues with at least `least` entries.
    fn all(over: Over, least: u16) -> impl Iterator<Item = Self> {
        let sizes = SIZES.into_iter().filter(move |size| *size >= least);
        sizes.flat_map(move |size| {
            (0..8).map(move |bits| Self {
                over,
                event_idx: bits & 1 != 0,
                indirect: bits & 2 != 0,
                size,
                later: bits & 4 != 0,
            })
        })
    }

    fn plug(self, device: impl Into<Device>) -> Bench {
        let mut withheld = 0;
        if !self.event_idx {
            withheld |= RING_EVENT_IDX;
        }
        if !self.indirect {
            withheld |= RING_INDIRECT_DESC;
        }
        let mut device = device.into().withhold(withheld).queue_size(self.size);
        if self.later {
            device = device.answer_later();
        }
        self.over.plug(device)
    }
}

fn check_disks(over: Over) {
    for setting in Setting::all(over, 4) {
        let disk = Disk::memory(24 * 512);
        let bench = setting.plug(&disk);
        let running_board = bench.run_while_waiting();
        let mut driver = common::Disk::try_new_with(bench.transport(), running()).unwrap();
        let verdict = axdriver_block::conformance::check(&mut driver);
        assert_eq!(verdict, Ok(()), "{setting:?}");
        let verdict = axdriver_block::conformance::flushed_writes_survive(&mut driver, |driver| {
            disk.power_cut();
            driver.reset()
        });
        assert_eq!(verdict, Ok(()), "{setting:?}");
        let verdict = axdriver_base::conformance::interrupts_can_be_switched(&mut driver);
        assert_eq!(verdict, Ok(()), "{setting:?}");
        drop(driver);
        drop(running_board);
        bench.assert_clean();
    }
}

#[test]
fn disks_over_mmio_keep_the_contract() {
    check_disks(Over::Modern);
}

#[test]
fn disks_over_legacy_mmio_keep_the_contract() {
    check_disks(Over::Legacy);
}

#[test]
fn disks_over_pci_keep_the_contract() {
    check_disks(Over::Pci);
}

#[test]
fn disks_of_other_kinds_keep_the_contract() {
    for over in Over::ALL {
        for disk in [
            Disk::memory(8 * 512).read_only(),
            Disk::memory(8 * 512).without_flush(),
            Disk::memory(8 * 4096).block_size(4096),
            Disk::memory(32 * 512).size_max(1024),
            Disk::memory(512),
            Disk::memory(0),
        ] {
            let bench = over.plug(&disk);
            let mut driver = bench.disk();
            let verdict = axdriver_block::conformance::check(&mut driver);
            assert_eq!(verdict, Ok(()), "{disk:?} over {over:?}");
            drop(driver);
            bench.assert_clean();
        }
    }
}

/// The other end of the cable.
struct OtherEnd<'a> {
    bench: &'a Bench,
    nic: Nic,
    arrived: Vec<Vec<u8>>,
}

impl OtherEnd<'_> {
    fn gather(&mut self) {
        self.bench.board.run();
        self.arrived.extend(self.nic.take_sent());
    }
}

impl<const QS: usize> Peer<common::Nic<QS>> for OtherEnd<'_> {
    fn send(&mut self, _: &mut common::Nic<QS>, frame: &[u8]) -> DevResult {
        self.nic.inject(frame);
        Ok(())
    }

    fn receive(&mut self, _: &mut common::Nic<QS>, frame: &mut [u8]) -> DevResult<usize> {
        if self.arrived.is_empty() {
            self.gather();
        }
        if self.arrived.is_empty() {
            return Err(DevError::Again);
        }
        let arrived = self.arrived.remove(0);
        let len = arrived.len().min(frame.len());
        frame[..len].copy_from_slice(&arrived[..len]);
        Ok(arrived.len())
    }

    fn wait(&mut self, _: &mut common::Nic<QS>, attempts: u32) -> bool {
        self.gather();
        attempts < 10
    }
}

fn check_nic<const QS: usize>(bench: &Bench, nic: &Nic) {
    let mut driver = Box::new(
        axdriver_virtio::VirtIoNetDev::<MachineHal, AnyTransport, QS>::try_new(bench.transport())
            .unwrap(),
    );
    let mut peer = OtherEnd {
        bench,
        nic: nic.clone(),
        arrived: Vec::new(),
    };
    let context = format!(
        "queues of {} and {} over {:?}",
        driver.rx_queue_size(),
        driver.tx_queue_size(),
        bench.over
    );
    let verdict = axdriver_net::conformance::check(&mut *driver, &mut peer);
    assert_eq!(verdict, Ok(()), "{context}");
    driver.reset().unwrap();
    let verdict = axdriver_base::conformance::interrupts_can_be_switched(&mut *driver);
    assert_eq!(verdict, Ok(()), "{context}");
    drop(driver);
    bench.assert_clean();
}

fn check_nics(over: Over) {
    for setting in Setting::all(over, 1) {
        let nic = Nic::new(MAC);
        check_nic::<8>(&setting.plug(&nic), &nic);
    }
}

#[test]
fn nics_over_mmio_keep_the_contract() {
    check_nics(Over::Modern);
}

#[test]
fn nics_over_legacy_mmio_keep_the_contract() {
    check_nics(Over::Legacy);
}

#[test]
fn nics_over_pci_keep_the_contract() {
    check_nics(Over::Pci);
}

#[test]
fn nics_with_queues_of_any_size_keep_the_contract() {
    for (over, offered) in Over::ALL.into_iter().zip([32768, 256, 1024]) {
        let plug = || {
            let nic = Nic::new(MAC);
            (over.plug(Device::from(&nic).queue_size(offered)), nic)
        };
        let (bench, nic) = plug();
        check_nic::<1>(&bench, &nic);
        let (bench, nic) = plug();
        check_nic::<3>(&bench, &nic);
        let (bench, nic) = plug();
        check_nic::<64>(&bench, &nic);
        if over == Over::Pci {
            let (bench, nic) = plug();
            check_nic::<300>(&bench, &nic);
        }
    }
}

#[test]
fn nics_of_other_kinds_keep_the_contract() {
    for over in Over::ALL {
        for nic in [
            Nic::new(MAC).mtu(68),
            Nic::new(MAC).mtu(9000),
            Nic::new(MAC).without_mac().without_status(),
        ] {
            check_nic::<8>(&over.plug(&nic), &nic);
        }
    }
}

fn check_displays(over: Over) {
    for setting in Setting::all(over, 4) {
        let display = Display::new(12, 7);
        let bench = setting.plug(&display);
        let running_board = bench.run_while_waiting();
        let mut driver = common::Display::try_new_with(bench.transport(), running()).unwrap();
        let verdict = axdriver_display::conformance::check(&mut driver);
        assert_eq!(verdict, Ok(()), "{setting:?}");
        driver.reset().unwrap();
        let verdict = axdriver_base::conformance::interrupts_can_be_switched(&mut driver);
        assert_eq!(verdict, Ok(()), "{setting:?}");
        drop(driver);
        drop(running_board);
        bench.assert_clean();
    }
}

#[test]
fn displays_over_mmio_keep_the_contract() {
    check_displays(Over::Modern);
}

#[test]
fn displays_over_legacy_mmio_keep_the_contract() {
    check_displays(Over::Legacy);
}

#[test]
fn displays_over_pci_keep_the_contract() {
    check_displays(Over::Pci);
}

#[test]
fn displays_of_one_pixel_and_of_many_keep_the_contract() {
    for (width, height) in [(1, 1), (1, 100), (333, 1), (200, 150)] {
        let bench = Over::Pci.plug(Display::new(width, height));
        let mut driver = bench.display();
        let verdict = axdriver_display::conformance::check(&mut driver);
        assert_eq!(verdict, Ok(()), "{width} x {height}");
        drop(driver);
        bench.assert_clean();
    }
}

#[test]
fn several_devices_on_one_bus_do_not_disturb_one_another() {
    use axdriver_virtio::{PciRangeAllocator, probe_pci_buses};
    let (disk, nic) = (Disk::memory(16 * 512), Nic::new(MAC));
    let display = Display::new(16, 8);
    let board = machine::Board::emulated()
        .pci(&disk)
        .pci(machine::Entropy::default())
        .pci(&nic)
        .pci(&display)
        .build()
        .unwrap();
    let bench = Bench {
        board: std::rc::Rc::new(board),
        over: Over::Pci,
    };
    let range = bench.board.pci_window();
    let mut window = PciRangeAllocator::new(range.start, range.end - range.start);
    let mut root = bench.board.pci();
    let mut found = probe_pci_buses::<MachineHal, _>(&mut root, 0..=0, Some(&mut window));
    let mut next = || found.next().unwrap().2.into();
    let mut disk = common::Disk::try_new(next()).unwrap();
    let mut nic_driver = common::Nic::<8>::try_new(next()).unwrap();
    let mut display = common::Display::try_new(next()).unwrap();
    assert!(found.next().is_none());
    assert_eq!(axdriver_block::conformance::check(&mut disk), Ok(()));
    let mut peer = OtherEnd {
        bench: &bench,
        nic,
        arrived: Vec::new(),
    };
    assert_eq!(
        axdriver_net::conformance::check(&mut nic_driver, &mut peer),
        Ok(())
    );
    assert_eq!(axdriver_display::conformance::check(&mut display), Ok(()));
    drop((disk, nic_driver, display));
    bench.assert_clean();
}
