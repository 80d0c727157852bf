//! The disk driver: what to say over a virtqueue to a block device (VirtIO 1.3, 5.2).
//!
//! Unsafe code here guards the caller's buffer and the request, while the device has them.

use core::ptr::NonNull;

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};
use axdriver_block::{BlockCapabilities, BlockDriverOps, check_request, check_write};
use log::{error, info, warn};
use virtio_drivers::{BufferDirection, Hal, transport::Transport};

use crate::{
    WaitPolicy,
    dma::{Dma, Shared},
    interrupt::cause,
    lifecycle::{Features, Lifecycle},
    queue::{Segment, Used, VirtQueue},
};

/// The sector that the device counts in, in bytes, whatever its block size.
const SECTOR: usize = 512;
const SECTOR_SIZE: u64 = SECTOR as u64;
/// The number of the one queue, `requestq1`.
const QUEUE: u16 = 0;
/// The most descriptors that are of use.
const QUEUE_SIZE: usize = 16;
/// A header, data and a status.
const MIN_QUEUE_SIZE: u16 = 4;
/// The most data in one request, in bytes, if the device has no lower limit.
const MAX_REQUEST: u32 = 4 << 20;

// 5.2.3: feature bits.
const SIZE_MAX: Features = Features::bit(1);
const RO: Features = Features::bit(5);
const BLK_SIZE: Features = Features::bit(6);
const FLUSH: Features = Features::bit(9);

const SUPPORTED: Features = SIZE_MAX.union(RO).union(BLK_SIZE).union(FLUSH);

// 5.2.4: where the fields of the configuration space are.
const CONFIG_CAPACITY: usize = 0;
const CONFIG_SIZE_MAX: usize = 8;
const CONFIG_BLK_SIZE: usize = 20;

// 5.2.6: request types and statuses.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;
/// What the driver writes where the device is to write the status.
const STATUS_NONE: u32 = 0xff;

/// Where the header and the status of the request in flight are, in the memory for them.
const HEADER: usize = 0;
const HEADER_LEN: u32 = 16;
const STATUS: usize = 64;

/// A virtio disk.
///
/// Requests are complete, or the device has been reset, when a call returns; until then the
/// buffer is shared with the device through [`Hal::share`]. A call waits as long as its
/// [`WaitPolicy`] says, and fails with [`DevError::Io`] after that, or when the device does what
/// it must not. From then on every call fails with [`DevError::BadState`], and nothing that the
/// device does has any effect, until [`reset`](Self::reset).
///
/// A device that is told to reset and does not is never given anything again, and the memory that
/// it was told of is never freed. Where the HAL lets the device reach the caller's buffer itself
/// (it neither copies nor maps it through an IOMMU), only that buffer is then not protected.
///
/// [`block_size`](BlockDriverOps::block_size) is the device's logical block size if it has one,
/// else 512. After a change of the capacity, [`configuration_changed`](Self::configuration_changed)
/// reads it anew.
///
/// # Examples
///
/// ```
/// # extern crate machine;
/// use axdriver_block::BlockDriverOps;
/// use axdriver_virtio::{Transport, VirtIoBlkDev, VirtIoHal};
///
/// fn first_block<H: VirtIoHal, T: Transport + Send + Sync>(
///     transport: T,
/// ) -> axdriver_base::DevResult<Vec<u8>> {
///     let mut disk = VirtIoBlkDev::<H, T>::try_new(transport)?;
///     let mut block = vec![0; disk.block_size()];
///     disk.read_block(0, &mut block)?;
///     Ok(block)
/// }
/// ```
pub struct VirtIoBlkDev<H: Hal, T: Transport> {
    lifecycle: Lifecycle<T>,
    queue: VirtQueue<H, QUEUE_SIZE>,
    /// The header and the status of the request in flight.
    request: Dma<H>,
    /// In sectors.
    capacity: u64,
    /// In bytes: a power of two, at least [`SECTOR_SIZE`], and it never changes.
    block_size: usize,
    /// Whether the device may cache writes, and can flush them. Once set, it stays.
    can_flush: bool,
    /// The most data in one request: a multiple of `block_size`.
    max_request: usize,
}

/// The data of a request.
enum Data<'a> {
    None,
    /// For the device to read.
    Out(&'a [u8]),
    /// For the device to write.
    In(&'a mut [u8]),
}

impl<H: Hal, T: Transport> VirtIoBlkDev<H, T> {
    /// Starts the device, and waits for it as [`WaitPolicy::new`] says.
    ///
    /// # Errors
    ///
    /// As [`try_new_with`](Self::try_new_with).
    pub fn try_new(transport: T) -> DevResult<Self> {
        Self::try_new_with(transport, WaitPolicy::new())
    }

    /// Starts the device, and waits for it as `wait` says, now and later.
    ///
    /// # Errors
    ///
    /// The device has been reset, and all memory freed, unless it does not reset.
    ///
    /// * [`DevError::Io`]: the device does not reset, or its configuration does not settle.
    /// * [`DevError::Unsupported`]: the device refuses the features, or its queue is too small.
    /// * [`DevError::BadState`]: the queue is in use after the reset, or the configuration space is
    ///   too small.
    /// * [`DevError::NoMemory`]: the HAL has no memory.
    pub fn try_new_with(transport: T, wait: WaitPolicy) -> DevResult<Self> {
        let mut disk = Self {
            lifecycle: Lifecycle::new("virtio-blk", transport, wait),
            queue: VirtQueue::new(QUEUE)?,
            request: Dma::new(STATUS + 4, BufferDirection::Both)?,
            capacity: 0,
            block_size: 0,
            can_flush: false,
            max_request: 0,
        };
        disk.start()?;
        info!(
            "virtio-blk: {} sectors in blocks of {} bytes{}",
            disk.capacity,
            disk.block_size,
            if disk.is_read_only() {
                ", read-only"
            } else {
                ""
            }
        );
        Ok(disk)
    }

    /// Resets the device and starts it again, after a failure or because a new owner wants to
    /// find it as new.
    ///
    /// Interrupts are then off, as after [`try_new`](Self::try_new).
    ///
    /// # Errors
    ///
    /// As [`try_new_with`](Self::try_new_with); [`DevError::BadState`] also if the block size
    /// is not what it was, or if the device could flush its cache and no longer can: what was
    /// written before may then be lost. The driver may be reset again.
    pub fn reset(&mut self) -> DevResult {
        self.start()
    }

    /// Sets how long later calls wait.
    pub fn set_wait_policy(&mut self, wait: WaitPolicy) {
        self.lifecycle.wait = wait;
    }

    fn start(&mut self) -> DevResult {
        let result = self.try_start();
        if let Err(error) = result {
            self.lifecycle.fail(match error {
                DevError::NoMemory => "it cannot be started for want of memory",
                _ => "it cannot be started",
            });
        }
        result
    }

    fn try_start(&mut self) -> DevResult {
        let features = self.lifecycle.begin(|_, _| Ok(SUPPORTED))?;
        self.read_capacity()?;
        let block_size = self.read_block_size(features)?;
        if self.block_size != 0 && self.block_size != block_size {
            error!(
                "virtio-blk: the block size is {block_size}, and was {}",
                self.block_size
            );
            return Err(DevError::BadState);
        }
        let can_flush = features.contains(FLUSH);
        if self.can_flush && !can_flush {
            error!("virtio-blk: what was written before the reset can no longer be flushed");
            return Err(DevError::BadState);
        }
        self.block_size = block_size;
        self.can_flush = can_flush;
        self.max_request = self.read_max_request(features)?;
        self.queue
            .start(self.lifecycle.transport(), features, MIN_QUEUE_SIZE)?;
        self.lifecycle.go_live()
    }

    fn read_capacity(&mut self) -> DevResult {
        self.capacity = self.lifecycle.read_config(|transport| {
            let low: u32 = transport.read_config_space(CONFIG_CAPACITY)?;
            let high: u32 = transport.read_config_space(CONFIG_CAPACITY + 4)?;
            Ok(u64::from(u32::from_le(high)) << 32 | u64::from(u32::from_le(low)))
        })?;
        Ok(())
    }

    fn read_le32(&self, offset: usize) -> DevResult<u32> {
        self.lifecycle
            .read_config(|transport| transport.read_config_space(offset).map(u32::from_le))
    }

    /// Returns the logical block size.
    fn read_block_size(&self, features: Features) -> DevResult<usize> {
        if !features.contains(BLK_SIZE) {
            return Ok(SECTOR);
        }
        let size = self.read_le32(CONFIG_BLK_SIZE)?;
        match usize::try_from(size) {
            Ok(size) if size.is_power_of_two() && (SECTOR..=1 << 16).contains(&size) => Ok(size),
            _ => {
                warn!("virtio-blk: blk_size is {size}, which is no block size: 512 is used");
                Ok(SECTOR)
            }
        }
    }

    /// Returns the most data in a request, which is a single segment: 5.2.4, `size_max`.
    fn read_max_request(&self, features: Features) -> DevResult<usize> {
        let mut limit = MAX_REQUEST;
        if features.contains(SIZE_MAX) {
            let size_max = self.read_le32(CONFIG_SIZE_MAX)?;
            // `qemu-storage-daemon` says 0, and means that there is no limit.
            if size_max != 0 {
                limit = limit.min(size_max);
            }
        }
        let limit = limit as usize & !(self.block_size - 1);
        if limit == 0 {
            error!(
                "virtio-blk: a segment cannot hold a block of {}",
                self.block_size
            );
            return Err(DevError::Unsupported);
        }
        Ok(limit)
    }

    fn is_read_only(&self) -> bool {
        self.lifecycle.features().contains(RO)
    }

    /// Does what a [configuration change](InterruptCause::CONFIGURATION) asks for: reads the
    /// capacity anew (5.2.6.1), and sees whether the device needs a reset.
    ///
    /// Only needed if the interrupt was acknowledged with an
    /// [`InterruptHandle`](crate::InterruptHandle).
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device needs a reset, and has been, or its configuration does not
    ///   settle: the capacity is what it was.
    /// * [`DevError::BadState`]: the device failed before.
    pub fn configuration_changed(&mut self) -> DevResult {
        self.lifecycle.check()?;
        let before = self.capacity;
        self.read_capacity()?;
        if self.capacity != before {
            info!("virtio-blk: {} sectors now, {before} before", self.capacity);
        }
        Ok(())
    }

    /// Returns the first sector of a block that is in range.
    fn sector(&self, block_id: u64) -> u64 {
        block_id * (self.block_size as u64 / SECTOR_SIZE)
    }

    /// Makes one request and waits for it.
    fn request(&mut self, kind: u32, sector: u64, data: Data<'_>) -> DevResult {
        self.lifecycle.live()?;
        // 5.2.6: type, reserved, sector.
        self.request.store_le32(HEADER, kind);
        self.request.store_le32(HEADER + 4, 0);
        self.request.store_le64(HEADER + 8, sector);
        self.request.store_le32(STATUS, STATUS_NONE);
        let header = Segment {
            paddr: self.request.paddr(HEADER),
            len: HEADER_LEN,
        };
        let status = Segment {
            paddr: self.request.paddr(STATUS),
            len: 1,
        };

        let (buffer, direction) = match data {
            Data::None => (None, BufferDirection::Both),
            Data::Out(data) => (Some(NonNull::from(data)), BufferDirection::DriverToDevice),
            Data::In(data) => (Some(NonNull::from(data)), BufferDirection::DeviceToDriver),
        };
        // SAFETY: the buffer is borrowed for longer than this call, and nothing here accesses it
        // before `unshare`, which is only left out when the device may still use it.
        let shared = buffer.map(|buffer| unsafe { Shared::<H>::new(buffer, direction) });
        let len = buffer.map_or(0, |buffer| buffer.len());
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_REQUEST")]
        let segment = shared.as_ref().map(|shared| Segment {
            paddr: shared.paddr(),
            len: len as u32,
        });

        let result = match (segment, direction) {
            (None, _) => self.complete(&[header], &[status]),
            (Some(data), BufferDirection::DeviceToDriver) => {
                self.complete(&[header], &[data, status])
            }
            (Some(data), _) => self.complete(&[header, data], &[status]),
        };
        if let Some(shared) = shared
            && !self.lifecycle.is_stuck()
        {
            // SAFETY: the device has used the chain, has been reset, or was never told of it.
            unsafe { shared.unshare() };
        }
        let Used { len: written, .. } = result?;
        self.check_completion(written, if kind == TYPE_IN { len } else { 0 })
    }

    /// Hands a chain to the device, and waits until the device is done with it or has been reset.
    fn complete(&mut self, readable: &[Segment], writable: &[Segment]) -> DevResult<Used> {
        // SAFETY: `request` keeps its own memory and the caller's buffer as they are until this
        // returns, and for good if the device is then stuck.
        unsafe { self.queue.add(readable, writable) }?;
        self.queue.submit(self.lifecycle.live()?);
        self.lifecycle.complete(&mut self.queue)
    }

    /// Says what the status of a request means that was answered with `written` bytes, of which
    /// `data` should be data.
    fn check_completion(&self, written: u32, data: usize) -> DevResult {
        let [status, ..] = self.request.load_le32(STATUS).to_le_bytes();
        match status {
            // 2.7.8.2: beyond what the device wrote, nothing is known. A legacy device does not
            // say how much that is.
            STATUS_OK if self.lifecycle.is_legacy() || written as usize > data => Ok(()),
            STATUS_OK => {
                error!("virtio-blk: done, but only {written} bytes of {data} and 1 were written");
                Err(DevError::Io)
            }
            STATUS_UNSUPP => Err(DevError::Unsupported),
            STATUS_IOERR => Err(DevError::Io),
            _ => {
                error!("virtio-blk: unknown status {status:#x}");
                Err(DevError::Io)
            }
        }
    }
}

impl<H: Hal, T: Transport + Send + Sync> BaseDriverOps for VirtIoBlkDev<H, T> {
    fn device_name(&self) -> &str {
        "virtio-blk"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        let cause = cause(self.lifecycle.transport().ack_interrupt());
        if cause.contains(InterruptCause::CONFIGURATION) && self.lifecycle.is_live() {
            self.configuration_changed()?;
        }
        Ok(cause)
    }

    fn enable_interrupts(&mut self) -> DevResult<bool> {
        self.lifecycle.live()?;
        Ok(self.queue.listen())
    }

    fn disable_interrupts(&mut self) -> DevResult {
        self.lifecycle.live()?;
        self.queue.silence();
        Ok(())
    }
}

impl<H: Hal, T: Transport + Send + Sync> BlockDriverOps for VirtIoBlkDev<H, T> {
    fn num_blocks(&self) -> u64 {
        self.capacity / (self.block_size as u64 / SECTOR_SIZE)
    }

    fn block_size(&self) -> usize {
        self.block_size
    }

    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
        check_request(self.num_blocks(), self.block_size, block_id, buf.len())?;
        let mut sector = self.sector(block_id);
        for part in buf.chunks_mut(self.max_request) {
            let sectors = part.len() as u64 / SECTOR_SIZE;
            self.request(TYPE_IN, sector, Data::In(part))?;
            sector += sectors;
        }
        Ok(())
    }

    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
        let read_only = self.is_read_only();
        check_write(
            self.num_blocks(),
            self.block_size,
            block_id,
            buf.len(),
            read_only,
        )?;
        let mut sector = self.sector(block_id);
        for part in buf.chunks(self.max_request) {
            self.request(TYPE_OUT, sector, Data::Out(part))?;
            sector += part.len() as u64 / SECTOR_SIZE;
        }
        Ok(())
    }

    fn flush(&mut self) -> DevResult {
        self.lifecycle.live()?;
        if self.can_flush {
            // 5.2.6.1: sector 0, no data.
            self.request(TYPE_FLUSH, 0, Data::None)
        } else {
            // 5.2.5.1: without FLUSH (and CONFIG_WCE, which is not accepted), every write is
            // durable when it is complete.
            Ok(())
        }
    }

    fn capabilities(&self) -> BlockCapabilities {
        BlockCapabilities::new()
            .with_read_only(self.is_read_only())
            .with_volatile_write_cache(self.can_flush)
    }
}

impl<H: Hal, T: Transport> Drop for VirtIoBlkDev<H, T> {
    fn drop(&mut self) {
        // 3.3.1: reset first, then free.
        if self.lifecycle.stop().is_err() {
            self.queue.keep();
            self.request.keep();
        }
    }
}
