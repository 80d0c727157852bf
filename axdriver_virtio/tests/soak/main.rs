//! Very many requests and frames against devices that misbehave by chance.
//!
//! `AXDRIVER_SOAK` sets the number of requests of each kind; `AXDRIVER_SEED` the first seed, to see
//! a failure again: a failure says which seed it had.

#![cfg(all(feature = "block", feature = "net", feature = "gpu"))]
#![expect(
    unreachable_pub,
    reason = "the fuzz targets are made of these modules too"
)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail this way"
)]

mod bench;
mod block;
mod choices;
mod display;
mod net;

use std::time::Instant;

use machine::hostile::{Fault, Hostile};

use self::{
    bench::BELIEVABLE,
    block::Count,
    choices::{Choices, next},
};

/// The requests of each kind.
fn requests() -> u64 {
    let default = if cfg!(debug_assertions) {
        20_000
    } else {
        1_000_000
    };
    std::env::var("AXDRIVER_SOAK").map_or(default, |number| {
        number.parse().expect("AXDRIVER_SOAK is a number")
    })
}

fn first_seed() -> u64 {
    std::env::var("AXDRIVER_SEED").map_or(1, |number| {
        number.parse().expect("AXDRIVER_SEED is a number")
    })
}

/// Says which seed failed.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "to see this again: AXDRIVER_SEED={} AXDRIVER_SOAK=1",
                self.0
            );
        }
    }
}

/// Steps on one board, so that drivers fail, are reset, and go on.
const STEPS: usize = 1000;

/// Lets scenarios run, each with a seed of its own, until all requests are done.
fn soak(name: &str, requests: u64, scenario: fn(&mut Choices, Hostile, usize) -> Count) {
    let started = Instant::now();
    let mut count = Count::default();
    let mut boards = 0;
    for number in first_seed().. {
        let seed = Seed(number);
        let mut state = number.wrapping_mul(0x0001_0000_0001);
        let mut hostile = Hostile::seed(next(&mut state));
        // From a lie at every other occasion to hardly any.
        hostile = hostile
            .one_in([2, 8, 32, 32, 128, 512][usize::from(next(&mut state).to_le_bytes()[0]) % 6]);
        if next(&mut state).is_multiple_of(2) {
            // Only what the driver can see, so that all data can be checked.
            let visible: Vec<Fault> = Fault::ALL
                .iter()
                .copied()
                .filter(|fault| !BELIEVABLE.contains(fault))
                .collect();
            hostile = hostile.only(&visible);
        }
        count.add(scenario(
            &mut Choices::Seed(next(&mut state)),
            hostile,
            STEPS,
        ));
        boards += 1;
        drop(seed);
        if count.done >= requests {
            break;
        }
    }
    println!(
        "{name}: {count:?} on {boards} boards in {:.1?}",
        started.elapsed()
    );
    assert!(count.faults > 0 && count.good > 0 && count.resets > 0);
}

#[test]
fn a_million_block_requests_to_hostile_disks_harm_nobody() {
    soak("block", requests(), block::run);
}

#[test]
fn a_million_frames_through_hostile_nics_harm_nobody() {
    // Both ways.
    soak("net", 2 * requests(), net::run::<16>);
}

#[test]
fn pictures_on_hostile_displays_harm_nobody() {
    soak("display", requests() / 20, display::run);
}

#[test]
fn decisions_of_bytes_come_to_an_end() {
    let mut choices = Choices::bytes(&[8; 200]);
    let count = block::run(&mut choices, Hostile::bytes(&[]), STEPS);
    assert!(count.done > 0 && choices.is_over(), "{count:?}");
}
