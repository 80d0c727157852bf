//! What goes wrong on purpose, where the command line asks for it: what a kernel has to survive.
//!
//! Whoever started the machine reads the console, and does to it what a line here asks for.

use alloc::vec;

use axdriver_base::DevError;

use crate::devices::{Device, Disk};
use crate::error::{Error, Result};
use crate::{disk, interrupts, println};

/// How many requests may be lost until the disk is let go on.
const MAX_LOST: u32 = 4;

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
