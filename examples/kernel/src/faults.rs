//! What goes wrong on purpose, where the command line asks for it: what a kernel has to survive.
//!
//! Whoever started the machine reads the console, and does to it what a line here asks for.

use alloc::{vec, vec::Vec};
use core::time::Duration;

use axdriver_base::DevError;

use crate::arch::{Arch, Architecture};
use crate::devices::{Device, Devices, Disk, Place};
use crate::error::{Error, Result};
use crate::{disk, interrupts, println};

/// How many requests may be lost until the disk is let go on.
const MAX_LOST: u32 = 4;

/// Lines are raised that no device has raised: those of all devices, and the one below, which nobody
/// serves. After each, the disk is made larger as a sign that the line is low again.
///
/// # Errors
///
/// * [`Error::Wrong`]: a device has taken such an interrupt for its own.
/// * [`Error::Device`]: the disk fails.
pub(crate) fn stray_interrupts(device: &mut Device<dyn Disk>) -> Result {
    let lowest = interrupts::lines().first().copied().unwrap_or_default();
    interrupts::add_source(lowest.saturating_sub(1), None);
    let lines = interrupts::lines();
    println!("lines: {lines:?}");
    for line in lines {
        let (of_devices, before, _) = interrupts::totals();
        println!("line {line}: raise it");
        let stray = loop {
            match interrupts::totals() {
                (count, ..) if count != of_devices => {
                    return Err(Error::Wrong("a device has served a stray interrupt"));
                }
                (_, strays, _) if strays != before => break strays - before,
                _ => nap(),
            }
        };
        println!("line {line}: {stray} stray, lower it");
        while !interrupts::take_changed(device.source) {
            nap();
        }
        let failed = |error| Error::Device("the disk", error);
        device.driver.reconfigure().map_err(failed)?;
    }
    while interrupts::any_masked() {
        nap();
    }
    Ok(())
}

/// Sleeps for a tick of the clock, between two looks at what no interrupt tells.
fn nap() {
    interrupts::sleep_until(interrupts::count(), Arch::now() + Duration::from_millis(10));
}

/// A disk that has been worked with does not answer a request, and is let go on later.
///
/// # Errors
///
/// * [`Error::Device`]: the disk does not come back.
/// * [`Error::Wrong`]: what was written and flushed is not there.
pub(crate) fn unanswered_request(device: &mut Device<dyn Disk>) -> Result {
    let (place, driver) = (device.place, device.driver.as_mut());
    let failed = |error| Error::Device("the disk", error);
    let mut block = vec![0; driver.block_size()];
    interrupts::watch(device.source);
    println!("disk {place}: answer it no more");
    let error = loop {
        if let Err(error) = driver.read_block(0, &mut block) {
            break error;
        }
    };
    println!("disk {place}: a request was not answered, {error}; answer it again");
    if (error, driver.read_block(0, &mut block)) != (DevError::Io, Err(DevError::BadState)) {
        return Err(Error::Wrong("the disk has not been given up"));
    }
    let mut lost = 1;
    driver.start_over().map_err(failed)?;
    while let Err(error) = driver.read_block(0, &mut block) {
        if lost == MAX_LOST {
            return Err(failed(error));
        }
        lost += 1;
        driver.start_over().map_err(failed)?;
    }
    disk::check(driver)?;
    println!("disk {place}: {lost} lost, and what was written before is there");
    Ok(())
}

/// A disk loses its power while its driver lives, which is what a card that is pulled looks like. The
/// disk that has been pulled is no device any more.
///
/// # Errors
///
/// * [`Error::Machine`]: no disk can be pulled.
/// * [`Error::Wrong`]: the driver does not notice, or the disk does not go.
pub(crate) fn pulled_card(devices: &mut Devices) -> Result {
    let places: Vec<Place> = devices.disks.iter().map(|disk| disk.place).collect();
    let index = places
        .iter()
        .position(|&place| devices.slot(place).is_some());
    let mut disk = devices
        .disks
        .remove(index.ok_or(Error::Machine("no disk can be pulled"))?);
    let mut slot = devices
        .slot(disk.place)
        .ok_or(Error::Machine("the slot has gone"))?;
    println!("disk {}: pull it", disk.place);
    while !slot.button_pressed() {
        nap();
    }
    slot.power_off();
    interrupts::watch(disk.source);
    let mut block = vec![0; disk.driver.block_size()];
    let answers = [(); 2].map(|()| disk.driver.read_block(0, &mut block));
    if answers != [Err(DevError::Io), Err(DevError::BadState)] {
        return Err(Error::Wrong(
            "the driver does not know that its disk has gone",
        ));
    }
    interrupts::remove_source(disk.source);
    drop(disk.driver);
    if slot.is_occupied() {
        return Err(Error::Wrong("the slot is not empty"));
    }
    println!("disk {}: gone, and its driver with it", disk.place);
    Ok(())
}
