//! VirtIO 1.3, 5.1: network devices. Each test is a row of `CONFORMANCE.md`.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use axdriver_base::{BaseDriverOps, DevError, InterruptCause};
use axdriver_net::{EthernetAddress, NetDriverOps};
use common::{Chain, MAC, Over};
use machine::emulated::net_features::{MAC as MAC_FEATURE, MTU, STATUS};
use machine::hostile::{Fault, Hostile};
use machine::{Device, Event, Nic};

/// Features of `struct virtio_net_hdr` and what comes with them (5.1.3).
const CTRL_VQ: u64 = 1 << 17;

/// What is to be accepted before a feature may be (5.1.3.1).
const PREREQUISITES: [(u64, u64); 19] = [
    (1 << 11, 1 << 0),
    (1 << 12, 1 << 0),
    (1 << 14, 1 << 0),
    (1 << 56, 1 << 0),
    (1 << 13, 1 << 11 | 1 << 12),
    (1 << 7, 1 << 1),
    (1 << 8, 1 << 1),
    (1 << 9, 1 << 7 | 1 << 8),
    (1 << 10, 1 << 1),
    (1 << 54, 1 << 1),
    (1 << 55, 1 << 1),
    (1 << 18, CTRL_VQ),
    (1 << 19, CTRL_VQ),
    (1 << 20, CTRL_VQ),
    (1 << 21, CTRL_VQ),
    (1 << 22, CTRL_VQ),
    (1 << 23, CTRL_VQ),
    (1 << 60, CTRL_VQ),
    (1 << 61, 1 << 7 | 1 << 8),
];

/// Sends a frame of `len` bytes.
fn send<const QS: usize>(nic: &mut common::Nic<QS>, len: usize) -> Result<(), DevError> {
    let mut buf = nic.alloc_tx_buffer(len)?;
    buf.packet_mut().fill(0xee);
    nic.transmit(buf)
}

/// The buffers that are posted for receiving, and the frames that are sent in some work.
fn chains(nic: &Nic, work: impl FnOnce(&mut common::Nic<8>)) -> (Vec<Chain>, Vec<Chain>) {
    let bench = Over::Modern.plug(nic);
    let rings = bench.watch_rings();
    let mut driver = bench.nic::<8>();
    work(&mut driver);
    bench.assert_rules_kept();
    rings.take().into_iter().partition(|chain| chain.queue == 0)
}

#[test]
fn net_01_no_feature_is_accepted_without_what_it_depends_on() {
    for over in Over::ALL {
        for (feature, prerequisite) in PREREQUISITES {
            let bench = over.plug(Device::from(Nic::new(MAC)).offer(feature | prerequisite));
            let _driver = bench.nic::<8>();
            let accepted = bench.device().accepted_features();
            assert!(accepted & feature == 0 || accepted & prerequisite != 0);
        }
    }
}

#[test]
fn net_02_the_configuration_is_not_written() {
    for over in Over::ALL {
        let nic = Nic::new(MAC).mtu(1400);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<8>();
        nic.set_link(false);
        driver.configuration_changed().unwrap();
        let write = |event: &Event| matches!(event, Event::ConfigWrite { .. });
        assert!(!bench.events().iter().any(write));
        bench.assert_rules_kept();
    }
}

#[test]
fn net_03_the_address_of_the_device_is_accepted_and_used() {
    for over in Over::ALL {
        let bench = over.plug(Nic::new(MAC));
        let driver = bench.nic::<8>();
        assert_ne!(bench.device().accepted_features() & MAC_FEATURE, 0);
        assert_eq!(driver.mac_address(), EthernetAddress(MAC));
        bench.assert_rules_kept();
    }
}

#[test]
fn net_04_without_an_address_the_driver_makes_a_local_one_of_one_station() {
    for over in Over::ALL {
        let bench = over.plug(Nic::new(MAC).without_mac());
        let mut driver = bench.nic::<8>();
        let EthernetAddress(address) = driver.mac_address();
        assert_eq!(
            address[0] & 0b11,
            0b10,
            "locally administered, not of a group"
        );
        assert_ne!(address, [0; 6]);
        // It stays the same.
        driver.reset().unwrap();
        assert_eq!(driver.mac_address(), EthernetAddress(address));
        // Another card has another.
        let other = over.plug(Nic::new(MAC).without_mac());
        drop(other.board.memory().buffer(4096));
        let other = other.nic::<8>();
        assert_ne!(other.mac_address(), EthernetAddress(address));
    }
    // An address of a group, or of nobody, is not used either.
    for wrong in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let bench = Over::Modern.plug(Nic::new(wrong));
        let EthernetAddress(address) = bench.nic::<8>().mac_address();
        assert_eq!(address[0] & 0b11, 0b10);
    }
}

#[test]
fn net_05_the_link_is_read_with_status_and_taken_to_be_up_without() {
    for over in Over::ALL {
        let nic = Nic::new(MAC);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<8>();
        assert_ne!(bench.device().accepted_features() & STATUS, 0);
        assert_eq!(driver.capabilities().link, Some(true));
        nic.set_link(false);
        assert_eq!(
            driver.acknowledge_interrupt(),
            Ok(InterruptCause::CONFIGURATION)
        );
        assert_eq!(driver.capabilities().link, Some(false));
        nic.set_link(true);
        driver.configuration_changed().unwrap();
        assert_eq!(driver.capabilities().link, Some(true));

        let bench = over.plug(Nic::new(MAC).without_status());
        let mut driver = bench.nic::<8>();
        assert_eq!(
            driver.capabilities().link,
            None,
            "nobody says that it is down"
        );
        assert!(driver.can_transmit());
        send(&mut driver, 60).unwrap();
        bench.assert_rules_kept();
    }
}

#[test]
fn net_06_the_mtu_is_accepted_and_used() {
    for over in Over::ALL {
        for mtu in [68, 576, 1280, 1500, 2000, 9000, 9216] {
            let bench = over.plug(Nic::new(MAC).mtu(mtu));
            let driver = bench.nic::<8>();
            assert_ne!(bench.device().accepted_features() & MTU, 0);
            let max = driver.capabilities().max_frame_len;
            assert_eq!(max, usize::from(mtu) + 14);
            bench.assert_rules_kept();
        }
        // 5.1.4.1: less than 68 is not allowed; what no buffer is made for is not negotiated either.
        for mtu in [0, 67, 65535] {
            let bench = over.plug(Nic::new(MAC).mtu(mtu));
            let driver = bench.nic::<8>();
            assert_eq!(bench.device().accepted_features() & MTU, 0, "{mtu}");
            assert_eq!(driver.capabilities().max_frame_len, 1514);
        }
    }
}

#[test]
fn net_07_receive_buffers_hold_the_mtu_and_its_headers() {
    for mtu in [68, 1500, 2500, 9000] {
        let (posted, _) = chains(&Nic::new(MAC).mtu(mtu), |driver| {
            assert_eq!(driver.rx_queue_size(), 8);
        });
        assert_eq!(posted.len(), 8);
        for chain in posted {
            assert!(
                chain.writable_len() >= 12 + 14 + u64::from(mtu),
                "MTU {mtu}"
            );
        }
    }
    // And a frame of that size is received.
    let nic = Nic::new(MAC).mtu(9000);
    let bench = Over::Pci.plug(&nic);
    let mut driver = bench.nic::<8>();
    nic.inject(&[0x77; 9014]);
    bench.board.run();
    assert_eq!(driver.receive().unwrap().packet(), [0x77; 9014]);
}

#[test]
fn net_08_frames_longer_than_the_mtu_are_not_sent() {
    for over in Over::ALL {
        let nic = Nic::new(MAC).mtu(1000);
        let bench = over.plug(&nic);
        let mut driver = bench.nic::<8>();
        assert_eq!(send(&mut driver, 1015), Err(DevError::InvalidParam));
        send(&mut driver, 1014).unwrap();
        assert_eq!(nic.take_sent(), [[0xee; 1014]]);
        bench.assert_rules_kept();
    }
}

#[test]
fn net_09_standby_is_not_negotiated() {
    const STANDBY: u64 = 1 << 62;
    for over in Over::SINCE_1 {
        let bench = over.plug(Device::from(Nic::new(MAC)).offer(STANDBY));
        let _driver = bench.nic::<8>();
        assert_eq!(bench.device().accepted_features() & STANDBY, 0);
    }
}

/// The headers of frames that are sent one after the other, also in buffers that were received into.
fn sent_headers() -> Vec<Vec<u8>> {
    let nic = Nic::new(MAC);
    let peer = nic.clone();
    let (_, sent) = chains(&nic, move |driver| {
        send(driver, 60).unwrap();
        for _ in 0..20 {
            peer.inject(&[0xff; 100]);
            send(driver, 100).unwrap();
            let received = driver.receive().unwrap();
            driver.transmit(received).unwrap();
            driver.recycle_tx_buffers().unwrap();
        }
    });
    assert!(sent.len() > 30);
    let header = |chain: &Chain| {
        assert!(chain.parts.iter().all(|part| !part.is_writable()));
        chain.readable()[..12].to_vec()
    };
    sent.iter().map(header).collect()
}

#[test]
fn net_11_num_buffers_of_a_frame_that_is_sent_is_0() {
    assert!(sent_headers().iter().all(|header| header[10..] == [0, 0]));
}

#[test]
fn net_12_without_checksum_offload_the_flags_are_0() {
    assert!(sent_headers().iter().all(|header| header[0] == 0));
}

#[test]
fn net_14_without_segmentation_offload_the_gso_type_is_none() {
    assert!(sent_headers().iter().all(|header| header[1] == 0));
}

#[test]
fn net_18_no_flag_of_received_frames_is_set_on_frames_that_are_sent() {
    assert!(sent_headers().iter().all(|header| header[..10] == [0; 10]));
}

#[test]
fn net_19_receive_buffers_hold_1526_bytes() {
    for nic in [Nic::new(MAC), Nic::new(MAC).mtu(68)] {
        let (posted, _) = chains(&nic, |_| {});
        assert!(posted.iter().all(|chain| chain.writable_len() >= 1526));
    }
}

/// What is received of a frame of 100 bytes whose header is this one.
fn received_with_header(header: [u8; 12]) -> Vec<u8> {
    use vm_memory::{Bytes, GuestAddress};
    let nic = Nic::new(MAC);
    let bench = Over::Modern.plug(&nic);
    let rings = bench.watch_rings();
    let mut driver = bench.nic::<8>();
    let posted = rings.take();
    nic.inject(&[0x3c; 100]);
    bench.board.run();
    // The device has used the first buffer; the header in it is changed before the driver looks.
    let buffer = GuestAddress(posted[0].parts[0].address);
    let memory = bench.board.memory().guest();
    memory.write_slice(&header, buffer).unwrap();
    driver.receive().unwrap().packet().to_vec()
}

#[test]
fn net_22_unknown_flags_of_a_received_frame_are_ignored() {
    let mut header = [0; 12];
    header[0] = 0xff;
    assert_eq!(received_with_header(header), [0x3c; 100]);
}

#[test]
fn net_23_the_place_of_a_checksum_is_not_used() {
    // csum_start and csum_offset far beyond the frame.
    let header = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0];
    assert_eq!(received_with_header(header), [0x3c; 100]);
}

#[test]
fn net_24_the_header_length_of_a_received_frame_is_not_used() {
    let header = [0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(received_with_header(header), [0x3c; 100]);
}

#[test]
fn net_25_checksums_are_left_to_the_network_stack() {
    // Neither is GUEST_CSUM accepted, nor does a flag change what is handed over.
    const GUEST_CSUM: u64 = 1 << 1;
    for over in Over::ALL {
        let bench = over.plug(Device::from(Nic::new(MAC)).offer(GUEST_CSUM));
        let _driver = bench.nic::<8>();
        assert_eq!(bench.device().accepted_features() & GUEST_CSUM, 0);
    }
    let valid = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(received_with_header(valid), [0x3c; 100]);
}

#[test]
fn net_26_without_mergeable_buffers_a_frame_is_one_buffer_whatever_the_device_says() {
    const MRG_RXBUF: u64 = 1 << 15;
    for over in Over::ALL {
        let nic = Nic::new(MAC);
        let hostile = Hostile::new().always(Fault::NetBuffersWrong);
        let device = Device::from(&nic).offer(MRG_RXBUF).hostile(hostile);
        let bench = over.plug(device);
        let mut driver = bench.nic::<8>();
        assert_eq!(bench.device().accepted_features() & MRG_RXBUF, 0);
        for _ in 0..20 {
            nic.inject(&[0x3c; 100]);
            bench.board.run();
            let buf = driver.receive().unwrap();
            assert_eq!(buf.packet(), [0x3c; 100]);
            driver.recycle_rx_buffer(buf).unwrap();
        }
        bench.assert_rules_kept();
    }
}
