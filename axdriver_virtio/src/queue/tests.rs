//! The queue against a model of it, against lies, and against a device in another thread.

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
};
use std::{collections::VecDeque, sync::Arc, thread, vec, vec::Vec};

use machine::{MachineHal, Memory, registers::Machine};
use proptest::prelude::*;

use super::{AddError, Lie, Segment, Used, VirtQueue};
use crate::lifecycle::Features;

type Queue<const N: usize> = VirtQueue<MachineHal, N>;

/// The device's view of a queue's memory.
#[derive(Clone, Copy)]
struct DeviceSide {
    descriptors: NonNull<u8>,
    available: NonNull<u8>,
    used: NonNull<u8>,
    size: u16,
}

// SAFETY: the pointers are used for atomic accesses only.
unsafe impl Send for DeviceSide {}

/// A descriptor, as the device reads it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Descriptor {
    paddr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl DeviceSide {
    fn new<const N: usize>(memory: &Memory, queue: &Queue<N>) -> Self {
        let [descriptors, available, used] = queue
            .rings
            .paddrs()
            .map(|paddr| memory.host_address(paddr, 16).unwrap());
        Self {
            descriptors,
            available,
            used,
            size: queue.size(),
        }
    }

    fn u16(self, area: NonNull<u8>, offset: usize) -> &'static AtomicU16 {
        // SAFETY: the offsets below lie in the queue's memory, which outlives the tests' uses.
        unsafe { AtomicU16::from_ptr(area.as_ptr().wrapping_byte_add(offset).cast()) }
    }

    fn u32(self, area: NonNull<u8>, offset: usize) -> &'static AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(area.as_ptr().wrapping_byte_add(offset).cast()) }
    }

    fn available_flags(self) -> u16 {
        self.u16(self.available, 0).load(Ordering::Relaxed)
    }

    fn available_index(self) -> u16 {
        self.u16(self.available, 2).load(Ordering::Acquire)
    }

    fn available_entry(self, index: u16) -> u16 {
        let offset = 4 + 2 * usize::from(index % self.size);
        self.u16(self.available, offset).load(Ordering::Relaxed)
    }

    fn used_event(self) -> u16 {
        let offset = 4 + 2 * usize::from(self.size);
        self.u16(self.available, offset).load(Ordering::Relaxed)
    }

    fn set_used_flags(self, flags: u16) {
        self.u16(self.used, 0).store(flags, Ordering::Relaxed);
    }

    fn set_avail_event(self, index: u16) {
        let offset = 4 + 8 * usize::from(self.size);
        self.u16(self.used, offset).store(index, Ordering::Relaxed);
    }

    fn set_used_index(self, index: u16) {
        self.u16(self.used, 2).store(index, Ordering::Release);
    }

    fn use_chain(self, index: u16, id: u32, len: u32) {
        let offset = 4 + 8 * usize::from(index % self.size);
        self.u32(self.used, offset).store(id, Ordering::Relaxed);
        self.u32(self.used, offset + 4)
            .store(len, Ordering::Relaxed);
        self.set_used_index(index.wrapping_add(1));
    }

    fn descriptor_at(self, table: NonNull<u8>, index: u16) -> Descriptor {
        let at = 16 * usize::from(index);
        let low = u64::from(self.u32(table, at).load(Ordering::Relaxed));
        let high = u64::from(self.u32(table, at + 4).load(Ordering::Relaxed));
        Descriptor {
            paddr: low | high << 32,
            len: self.u32(table, at + 8).load(Ordering::Relaxed),
            flags: self.u16(table, at + 12).load(Ordering::Relaxed),
            next: self.u16(table, at + 14).load(Ordering::Relaxed),
        }
    }

    /// Returns the segments of a chain and whether each is writable, and whether it is indirect.
    fn chain(self, memory: &Memory, head: u16) -> (Vec<(u64, u32, bool)>, bool) {
        let mut table = self.descriptors;
        let mut descriptor = self.descriptor_at(table, head);
        let indirect = descriptor.flags & super::INDIRECT != 0;
        if indirect {
            assert_eq!(descriptor.flags, super::INDIRECT, "INDIRECT goes alone");
            let len = usize::try_from(descriptor.len).unwrap();
            table = memory.host_address(descriptor.paddr, len).unwrap();
            assert_eq!(len % 16, 0);
            descriptor = self.descriptor_at(table, 0);
        }
        let mut segments = Vec::new();
        loop {
            let Descriptor {
                paddr,
                len,
                flags,
                next,
            } = descriptor;
            assert_eq!(flags & super::INDIRECT, 0, "tables are not nested");
            segments.push((paddr, len, flags & super::WRITE != 0));
            if flags & super::NEXT == 0 {
                return (segments, indirect);
            }
            assert!(segments.len() < usize::from(self.size), "the chain loops");
            descriptor = self.descriptor_at(table, next);
        }
    }
}

fn queue<const N: usize>(size: u16, features: Features) -> Queue<N> {
    let mut queue = Queue::new(0).unwrap();
    if features.contains(Features::RING_INDIRECT_DESC) {
        let len = super::table_len(N * usize::from(super::INDIRECT_LEN));
        let direction = virtio_drivers::BufferDirection::DriverToDevice;
        queue.tables = Some(crate::dma::Dma::new(len, direction).unwrap());
    }
    queue.clear(size, features, false);
    queue
}

fn machine() -> (Arc<Memory>, Machine) {
    let memory = Memory::anonymous(machine::memory::DEFAULT_BASE, 1 << 20).unwrap();
    (memory.clone(), Machine::new(memory, Arc::new(())))
}

fn add<const N: usize>(
    queue: &mut Queue<N>,
    readable: &[Segment],
    writable: &[Segment],
) -> Result<u16, AddError> {
    // SAFETY: no device follows these addresses.
    unsafe { queue.add(readable, writable) }
}

fn segments(count: usize, len: u32) -> Vec<Segment> {
    (1..=count as u64)
        .map(|index| Segment {
            paddr: index << 12,
            len,
        })
        .collect()
}

/// What the model knows of a chain with the device.
struct Chain {
    token: u16,
    descriptors: u16,
    writable: u32,
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: usize,
        writable: usize,
        len: u32,
    },
    Publish,
    Kick {
        wish: u16,
    },
    /// The device uses the chain number `which` of those it has, and writes part of it.
    Use {
        which: usize,
        percent: u32,
    },
    Pop,
    Listen,
    Silence,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4_usize, 0..4_usize, 1..5000_u32)
            .prop_map(|(readable, writable, len)| Step::Add { readable, writable, len }),
        3 => Just(Step::Publish),
        2 => (0..6_u16).prop_map(|wish| Step::Kick { wish }),
        4 => (any::<usize>(), 0..=100_u32)
            .prop_map(|(which, percent)| Step::Use { which, percent }),
        5 => Just(Step::Pop),
        1 => Just(Step::Listen),
        1 => Just(Step::Silence),
    ];
    proptest::collection::vec(step, 1..400)
}

/// Runs the steps on a queue whose indices start at `start`, and checks each against the model.
fn check_against_model(size: u16, features: Features, start: u16, steps: &[Step]) {
    let (memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<16>(size, features);
    (
        queue.next_available,
        queue.published,
        queue.kicked,
        queue.next_used,
    ) = (start, start, start, start);
    queue.rings.publish(start);
    let device = DeviceSide::new(&memory, &queue);
    device.set_used_index(start);
    queue.silence();
    let event_idx = features.contains(Features::RING_EVENT_IDX);

    let mut free = size;
    let mut added: Vec<Chain> = Vec::new();
    let mut with_device: Vec<Chain> = Vec::new();
    let mut used: VecDeque<Used> = VecDeque::new();
    let (mut published, mut kicked, mut used_index) = (start, start, start);
    for step in steps {
        match *step {
            Step::Add {
                readable,
                writable,
                len,
            } => {
                let count = u16::try_from(readable + writable).unwrap();
                let (readable, writable) = (segments(readable, len), segments(writable, len));
                let result = add(&mut queue, &readable, &writable);
                if count == 0 || count > size {
                    assert_eq!(result, Err(AddError::Invalid));
                    continue;
                }
                let Ok(token) = result else {
                    assert_eq!(result, Err(AddError::Full));
                    assert!(free < count);
                    continue;
                };
                assert!(
                    added
                        .iter()
                        .chain(&with_device)
                        .all(|chain| chain.token != token),
                    "token {token} is in use"
                );
                let index = published.wrapping_add(u16::try_from(added.len()).unwrap());
                assert_eq!(device.available_entry(index), token);
                let (seen, indirect) = device.chain(&memory, token);
                let expected: Vec<_> = readable
                    .iter()
                    .map(|segment| (segment.paddr, segment.len, false))
                    .chain(
                        writable
                            .iter()
                            .map(|segment| (segment.paddr, segment.len, true)),
                    )
                    .collect();
                assert_eq!(seen, expected);
                assert!(!indirect || features.contains(Features::RING_INDIRECT_DESC));
                let descriptors = if indirect { 1 } else { count };
                free -= descriptors;
                let writable = writable.iter().map(|segment| segment.len).sum();
                added.push(Chain {
                    token,
                    descriptors,
                    writable,
                });
            }
            Step::Publish => {
                queue.publish();
                published = published.wrapping_add(u16::try_from(added.len()).unwrap());
                with_device.append(&mut added);
                assert_eq!(device.available_index(), published);
            }
            Step::Kick { wish } => {
                // An event index near what was kicked last, or a flag.
                let event = kicked.wrapping_add(wish).wrapping_sub(2);
                device.set_avail_event(event);
                device.set_used_flags(wish & 1);
                let passed = |index: u16| index.wrapping_sub(1) == event;
                let mut indices = Vec::new();
                while kicked != published {
                    kicked = kicked.wrapping_add(1);
                    indices.push(kicked);
                }
                let expected = if event_idx {
                    indices.into_iter().any(passed)
                } else {
                    !indices.is_empty() && wish & 1 == 0
                };
                assert_eq!(queue.should_kick(), expected);
            }
            Step::Use { which, percent } => {
                if with_device.is_empty() {
                    continue;
                }
                let chain = with_device.remove(which % with_device.len());
                let len = chain.writable / 100 * percent;
                device.use_chain(used_index, chain.token.into(), len);
                used_index = used_index.wrapping_add(1);
                used.push_back(Used {
                    token: chain.token,
                    len,
                });
                // The descriptors are free when the chain is popped, not yet.
                with_device.reserve(1);
                popped_later(&mut queue, chain.token, chain.descriptors);
            }
            Step::Pop => {
                assert_eq!(queue.has_used(), !used.is_empty());
                let expected = used.pop_front();
                if let Some(Used { token, .. }) = expected {
                    free += queue.slot(token).chain;
                }
                assert_eq!(queue.pop(), Ok(expected));
                if expected.is_some() && queue.notifications && event_idx {
                    assert_eq!(device.used_event(), queue.next_used);
                }
            }
            Step::Listen => {
                assert_eq!(queue.listen(), !used.is_empty());
                if event_idx {
                    assert_eq!(device.used_event(), queue.next_used);
                } else {
                    assert_eq!(device.available_flags(), 0);
                }
            }
            Step::Silence => {
                queue.silence();
                assert_eq!(device.available_flags(), if event_idx { 0 } else { 1 });
            }
        }
        assert_eq!(queue.free(), free);
    }
}

/// Checks that the queue accounts for a chain with as many descriptors as the model does.
fn popped_later<const N: usize>(queue: &mut Queue<N>, token: u16, descriptors: u16) {
    assert_eq!(queue.slot(token).chain, descriptors);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 200 }))]

    #[test]
    fn the_queue_does_what_its_model_does(
        size in prop_oneof![Just(1_u16), Just(2), Just(4), Just(8), Just(16)],
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
        // Near the 16-bit wrap, so that indices go round.
        start in prop_oneof![Just(0_u16), 65500..=65535_u16],
        steps in steps(),
    ) {
        let mut features = Features::VERSION_1;
        if event_idx {
            features = features.union(Features::RING_EVENT_IDX);
        }
        if indirect {
            features = features.union(Features::RING_INDIRECT_DESC);
        }
        check_against_model(size, features, start, &steps);
    }

    #[test]
    fn whatever_a_device_writes_to_the_used_ring_is_a_truth_or_a_lie(
        chains in 1..8_usize,
        index in any::<u16>(),
        entries in proptest::collection::vec((any::<u32>(), any::<u32>()), 16),
        small_ids in any::<bool>(),
    ) {
        let (memory, machine) = machine();
        let _installed = machine.install();
        let mut queue = queue::<16>(16, Features::VERSION_1);
        let device = DeviceSide::new(&memory, &queue);
        for _ in 0..chains {
            add(&mut queue, &segments(1, 16), &segments(1, 100)).unwrap();
        }
        queue.publish();
        for (at, &(id, len)) in (0..).zip(&entries) {
            let (id, len) = if small_ids { (id % 17, len % 120) } else { (id, len) };
            device.use_chain(at, id, len);
        }
        device.set_used_index(index);
        let mut popped = Vec::new();
        while let Ok(Some(used)) = queue.pop() {
            prop_assert!(used.token < 16 && used.len <= 100);
            prop_assert!(!popped.contains(&used.token), "a chain came back twice");
            popped.push(used.token);
        }
        prop_assert!(popped.len() <= chains);
    }
}

/// A queue of 8 with one chain of 100 writable bytes in flight under token 0.
fn one_in_flight() -> (
    Arc<Memory>,
    machine::registers::Installed,
    Queue<8>,
    DeviceSide,
) {
    let (memory, machine) = machine();
    let installed = machine.install();
    let mut queue = queue::<8>(8, Features::VERSION_1);
    let device = DeviceSide::new(&memory, &queue);
    assert_eq!(add(&mut queue, &[], &segments(1, 100)), Ok(0));
    queue.publish();
    (memory, installed, queue, device)
}

#[test]
fn an_id_with_high_bits_is_not_taken_for_its_low_bits() {
    let (_memory, _installed, mut queue, device) = one_in_flight();
    device.use_chain(0, 0x1_0000, 1);
    assert_eq!(queue.pop(), Err(Lie));
}

#[test]
fn an_id_that_is_not_in_flight_is_a_lie_and_changes_nothing() {
    for id in [1, 7, 8, 0xffff_ffff] {
        let (_memory, _installed, mut queue, device) = one_in_flight();
        device.use_chain(0, id, 1);
        assert_eq!(queue.pop(), Err(Lie));
        assert_eq!(queue.free(), 7);
    }
}

#[test]
fn a_chain_that_is_used_twice_is_a_lie() {
    let (_memory, _installed, mut queue, device) = one_in_flight();
    assert_eq!(add(&mut queue, &[], &segments(1, 100)), Ok(1));
    queue.publish();
    device.use_chain(0, 0, 1);
    assert_eq!(queue.pop(), Ok(Some(Used { token: 0, len: 1 })));
    device.use_chain(1, 0, 1);
    assert_eq!(queue.pop(), Err(Lie));
}

#[test]
fn more_bytes_than_were_writable_are_a_lie_but_for_a_legacy_device() {
    let (_memory, _installed, mut queue, device) = one_in_flight();
    device.use_chain(0, 0, 101);
    assert_eq!(queue.pop(), Err(Lie));
    queue.legacy = true;
    assert_eq!(queue.pop(), Ok(Some(Used { token: 0, len: 100 })));
}

#[test]
fn an_index_past_what_was_posted_is_a_lie() {
    for index in [2, 9, 0x8000, 0xffff] {
        let (_memory, _installed, mut queue, device) = one_in_flight();
        device.set_used_index(index);
        assert_eq!(queue.pop(), Err(Lie));
    }
}

#[test]
fn what_was_added_and_not_published_cannot_be_used() {
    let (memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<8>(8, Features::VERSION_1);
    let device = DeviceSide::new(&memory, &queue);
    add(&mut queue, &segments(1, 1), &[]).unwrap();
    assert_eq!(device.available_index(), 0);
    device.use_chain(0, 0, 0);
    assert_eq!(queue.pop(), Err(Lie));
}

#[test]
fn a_batch_of_100_is_one_kick() {
    for features in [Features::VERSION_1, Features::RING_EVENT_IDX] {
        let (memory, machine) = machine();
        let _installed = machine.install();
        let mut queue = queue::<128>(128, features);
        let device = DeviceSide::new(&memory, &queue);
        device.set_avail_event(0);
        let mut kicks = 0;
        for _ in 0..100 {
            add(&mut queue, &segments(1, 64), &[]).unwrap();
        }
        queue.publish();
        for _ in 0..100 {
            kicks += u32::from(queue.should_kick());
        }
        assert_eq!(kicks, 1);
    }
}

#[test]
fn an_event_index_that_stays_put_is_passed_once() {
    let (memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<128>(128, Features::RING_EVENT_IDX);
    let device = DeviceSide::new(&memory, &queue);
    device.set_avail_event(0);
    let mut kicks = 0;
    for _ in 0..100 {
        add(&mut queue, &segments(1, 64), &[]).unwrap();
        queue.publish();
        kicks += u32::from(queue.should_kick());
    }
    assert_eq!(kicks, 1);
}

#[test]
fn a_batch_over_the_wrap_of_the_index_is_not_lost() {
    let (memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<8>(8, Features::RING_EVENT_IDX);
    (queue.next_available, queue.published, queue.kicked) = (65534, 65534, 65534);
    let device = DeviceSide::new(&memory, &queue);
    device.set_avail_event(65534);
    add(&mut queue, &segments(1, 64), &[]).unwrap();
    add(&mut queue, &segments(1, 64), &[]).unwrap();
    queue.publish();
    assert_eq!(device.available_index(), 0);
    assert!(queue.should_kick());
}

#[test]
fn a_chain_of_over_4_gib_is_refused() {
    let (_memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<8>(8, Features::VERSION_1);
    let half = segments(2, 1 << 31);
    assert_eq!(add(&mut queue, &half, &[]), Err(AddError::Invalid));
    assert_eq!(
        add(&mut queue, &half[..1], &half[..1]),
        Err(AddError::Invalid)
    );
    assert_eq!(queue.free(), 8);
}

#[test]
fn a_chain_longer_than_the_queue_never_fits_even_indirectly() {
    let (_memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<8>(2, Features::RING_INDIRECT_DESC);
    let three = segments(3, 1);
    assert_eq!(add(&mut queue, &three, &[]), Err(AddError::Invalid));
    assert_eq!(add(&mut queue, &[], &[]), Err(AddError::Invalid));
}

#[test]
fn indirect_tables_let_a_small_queue_hold_as_many_requests_as_entries() {
    let (_memory, machine) = machine();
    let _installed = machine.install();
    let mut queue = queue::<4>(4, Features::RING_INDIRECT_DESC);
    for _ in 0..4 {
        add(&mut queue, &segments(2, 1), &segments(1, 1)).unwrap();
    }
    assert_eq!(
        add(&mut queue, &segments(2, 1), &segments(1, 1)),
        Err(AddError::Full)
    );
}

#[test]
fn silence_holds_for_both_kinds_of_suppression() {
    for features in [Features::VERSION_1, Features::RING_EVENT_IDX] {
        let (memory, machine) = machine();
        let _installed = machine.install();
        let mut queue = queue::<8>(8, features);
        let device = DeviceSide::new(&memory, &queue);
        let event_idx = features.contains(Features::RING_EVENT_IDX);
        for round in 0..20_u16 {
            let wanted = if event_idx {
                device.used_event() == round
            } else {
                device.available_flags() == 0
            };
            assert!(!wanted, "a notification is wanted in round {round}");
            let token = add(&mut queue, &segments(1, 1), &[]).unwrap();
            queue.publish();
            device.use_chain(round, token.into(), 0);
            assert_eq!(queue.pop(), Ok(Some(Used { token, len: 0 })));
        }
    }
}

/// The number of adds of the litmus test: enough in release to lose hundreds without the barrier.
const LITMUS_ADDS: u64 = if cfg!(debug_assertions) {
    200_000
} else {
    20_000_000
};

/// Spins, and lets another thread run when that takes as long as if the other side had no processor.
fn relax(spins: &mut u64) {
    *spins += 1;
    if spins.is_multiple_of(4096) {
        thread::yield_now();
    } else {
        core::hint::spin_loop();
    }
}

/// A device in a thread of its own goes to sleep when it finds nothing, as late as the
/// specification lets it, while the driver adds: whenever both miss each other, a kick is lost.
fn count_lost_kicks(event_idx: bool) -> u64 {
    let (memory, machine) = machine();
    let _installed = machine.install();
    let features = if event_idx {
        Features::RING_EVENT_IDX
    } else {
        Features::VERSION_1
    };
    let mut queue = queue::<8>(8, features);
    let device = DeviceSide::new(&memory, &queue);
    let kicks = Arc::new(AtomicU64::new(0));
    let lost = Arc::new(AtomicU64::new(0));
    // The number of adds after which the driver has kicked, or decided not to.
    let decided = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let thread = {
        let (kicks, lost) = (kicks.clone(), lost.clone());
        let (decided, done) = (decided.clone(), done.clone());
        thread::spawn(move || {
            let mut index = 0_u16;
            let mut consumed = 0;
            let mut seen = 0;
            let mut spins = 0_u64;
            loop {
                while device.available_index() != index {
                    let head = device.available_entry(index);
                    device.use_chain(index, head.into(), 0);
                    index = index.wrapping_add(1);
                    consumed += 1;
                }
                if event_idx {
                    device.set_avail_event(index);
                } else {
                    device.set_used_flags(0);
                }
                core::sync::atomic::fence(Ordering::SeqCst);
                if device.available_index() != index {
                    if !event_idx {
                        device.set_used_flags(1);
                    }
                    continue;
                }
                // Asleep: only a kick wakes it, or the test when it sees that none will come.
                loop {
                    if done.load(Ordering::Acquire) {
                        return;
                    }
                    let now = kicks.load(Ordering::Acquire);
                    if now != seen {
                        seen = now;
                        break;
                    }
                    let another = decided.load(Ordering::SeqCst) > consumed;
                    if another && kicks.load(Ordering::SeqCst) == seen {
                        lost.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                    relax(&mut spins);
                }
                if !event_idx {
                    device.set_used_flags(1);
                }
            }
        })
    };

    let mut spins = 0_u64;
    for count in 1..=LITMUS_ADDS {
        add(&mut queue, &segments(1, 64), &[]).unwrap();
        queue.publish();
        if queue.should_kick() {
            kicks.fetch_add(1, Ordering::SeqCst);
        }
        decided.store(count, Ordering::SeqCst);
        while queue.pop().unwrap().is_none() {
            relax(&mut spins);
        }
        spins = 0;
    }
    done.store(true, Ordering::Release);
    thread.join().unwrap();
    lost.load(Ordering::Relaxed)
}

#[test]
fn litmus_no_kick_is_lost_with_event_idx() {
    assert_eq!(count_lost_kicks(true), 0);
}

#[test]
fn litmus_no_kick_is_lost_with_flags() {
    assert_eq!(count_lost_kicks(false), 0);
}

#[test]
fn a_size_is_a_power_of_two_within_what_is_offered_and_useful() {
    for (offered, size) in [
        (0, None),
        (1, Some(1)),
        (3, Some(2)),
        (4, Some(4)),
        (100, Some(16)),
        (32768, Some(16)),
        (u32::MAX, Some(16)),
    ] {
        assert_eq!(Queue::<16>::choose_size(offered), size);
    }
    assert_eq!(Queue::<0>::choose_size(4), None);
    assert_eq!(Queue::<24>::choose_size(256), Some(16));
    assert_eq!(vec![Queue::<16>::choose_size(16)], [Some(16)]);
}
