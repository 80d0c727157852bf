//! The display driver: what to say over a virtqueue to a GPU device in 2D mode (VirtIO 1.3, 5.7).
//!
//! Unsafe code here guards the commands and the framebuffer, while the device has them.

use axdriver_base::{BaseDriverOps, DevError, DevResult, DeviceType, InterruptCause};
use axdriver_display::{DisplayDriverOps, DisplayInfo, FrameBuffer};
use log::{error, info};
use virtio_drivers::{BufferDirection, Hal, transport::Transport};

use crate::{
    WaitPolicy,
    dma::Dma,
    interrupt::cause,
    lifecycle::{Features, Lifecycle},
    queue::{Segment, VirtQueue},
};

/// `controlq` (5.7.2).
const QUEUE: u16 = 0;
/// The most descriptors that are of use.
const QUEUE_SIZE: usize = 16;
/// Two commands, of a request and a response each.
const MIN_QUEUE_SIZE: u16 = 4;

// 5.7.4: where the fields of the configuration space are.
const CONFIG_EVENTS_READ: usize = 0;
const CONFIG_EVENTS_CLEAR: usize = 4;
const CONFIG_NUM_SCANOUTS: usize = 8;
const EVENT_DISPLAY: u32 = 1;

// 5.7.6.7: command and response types.
const GET_DISPLAY_INFO: u32 = 0x0100;
const RESOURCE_CREATE_2D: u32 = 0x0101;
const SET_SCANOUT: u32 = 0x0103;
const RESOURCE_FLUSH: u32 = 0x0104;
const TRANSFER_TO_HOST_2D: u32 = 0x0105;
const RESOURCE_ATTACH_BACKING: u32 = 0x0106;
const OK_NODATA: u32 = 0x1100;
const OK_DISPLAY_INFO: u32 = 0x1101;
const ERR_OUT_OF_MEMORY: u32 = 0x1201;

/// The words of `struct virtio_gpu_ctrl_hdr` (5.7.6.7): type, flags, fence id, context, ring.
const HEADER_WORDS: usize = 6;
const HEADER_LEN: usize = HEADER_WORDS * 4;
/// The most words after the header in the commands used here.
const MAX_PAYLOAD_WORDS: usize = 8;
/// A display in the response to GET_DISPLAY_INFO: x, y, width, height, enabled, flags.
const DISPLAY_LEN: usize = 24;
/// 5.7.4: the most scanouts.
const MAX_SCANOUTS: usize = 16;
const DISPLAY_INFO_LEN: usize = HEADER_LEN + MAX_SCANOUTS * DISPLAY_LEN;

/// Commands in flight at once, and where in the memory for them each has its place.
const SLOTS: usize = 2;
const SLOT_LEN: usize = 1024;
const RESPONSE: usize = 128;
const _: () = assert!(HEADER_LEN + MAX_PAYLOAD_WORDS * 4 <= RESPONSE);
const _: () = assert!(RESPONSE + DISPLAY_INFO_LEN <= SLOT_LEN);

/// The one resource: the framebuffer.
const RESOURCE: u32 = 1;
/// `VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM`: bytes in the order blue, green, red, unused.
const FORMAT: u32 = 2;
const BYTES_PER_PIXEL: u32 = 4;
/// The widest and the highest display that is driven, in pixels.
const MAX_SIDE: u32 = 16384;

/// A virtio display, with a framebuffer for the first scanout that is enabled.
///
/// The framebuffer is the driver's memory, and the device shows what is in it at
/// [`flush`](DisplayDriverOps::flush), whole. A call waits as long as its [`WaitPolicy`] says, and
/// fails with [`DevError::Io`] after that, or when the device does what it must not. From then on
/// every call fails with [`DevError::BadState`] until [`reset`](Self::reset). A device that does
/// not reset keeps its memory for ever.
///
/// The size of the display is that of the start. A display that changes its size (the
/// [`CONFIGURATION`](InterruptCause::CONFIGURATION) interrupt) goes on with the old one until
/// [`reset`](Self::reset), which adopts the new.
///
/// # Examples
///
/// ```
/// # extern crate machine;
/// use axdriver_display::DisplayDriverOps;
/// use axdriver_virtio::{Transport, VirtIoGpuDev, VirtIoHal};
///
/// fn white<H: VirtIoHal, T: Transport + Send + Sync>(
///     transport: T,
/// ) -> axdriver_base::DevResult<VirtIoGpuDev<H, T>> {
///     let mut display = VirtIoGpuDev::<H, T>::try_new(transport)?;
///     display.fb().as_bytes_mut().fill(0xff);
///     display.flush()?;
///     Ok(display)
/// }
/// ```
pub struct VirtIoGpuDev<H: Hal, T: Transport> {
    lifecycle: Lifecycle<T>,
    control: VirtQueue<H, QUEUE_SIZE>,
    /// The commands in flight and their responses.
    commands: Dma<H>,
    /// What the device reads the pixels from, and is never told to write to.
    framebuffer: Dma<H>,
    width: u32,
    height: u32,
}

/// A scanout that is enabled.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Scanout {
    id: u32,
    width: u32,
    height: u32,
}

/// A command: its type, what follows the header, and the type and length of a good response.
struct Command<'a> {
    kind: u32,
    payload: &'a [u32],
    response: u32,
    response_len: usize,
}

impl<'a> Command<'a> {
    /// A command that is answered with no data.
    fn new(kind: u32, payload: &'a [u32]) -> Self {
        Self {
            kind,
            payload,
            response: OK_NODATA,
            response_len: HEADER_LEN,
        }
    }
}

impl<H: Hal, T: Transport> VirtIoGpuDev<H, T> {
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
    /// * [`DevError::Io`]: the device does not reset or does not answer, or its answer is wrong.
    /// * [`DevError::Unsupported`]: the device refuses the features, its queue is too small, or no
    ///   scanout is enabled with a size of 1 to 16384 pixels each way.
    /// * [`DevError::BadState`]: the queue is in use after the reset, the device refuses a command,
    ///   or the configuration space is too small.
    /// * [`DevError::NoMemory`]: the HAL or the device has no memory.
    pub fn try_new_with(transport: T, wait: WaitPolicy) -> DevResult<Self> {
        let mut display = Self {
            lifecycle: Lifecycle::new("virtio-gpu", transport, wait),
            control: VirtQueue::new(QUEUE)?,
            commands: Dma::new(SLOTS * SLOT_LEN, BufferDirection::Both)?,
            // A page, until the size is known.
            framebuffer: Dma::new(1, BufferDirection::DriverToDevice)?,
            width: 0,
            height: 0,
        };
        display.start()?;
        info!("virtio-gpu: {} x {} pixels", display.width, display.height);
        Ok(display)
    }

    /// Resets the device and starts it again, in the size that the display has now.
    ///
    /// If the size is another, the framebuffer is a new one, and black. Interrupts are then off,
    /// as after [`try_new`](Self::try_new).
    ///
    /// # Errors
    ///
    /// As [`try_new_with`](Self::try_new_with). The driver may be reset again.
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
        let features = self.lifecycle.begin(|_, _| Ok(Features::empty()))?;
        self.control
            .start(self.lifecycle.transport(), features, MIN_QUEUE_SIZE)?;
        self.lifecycle.go_live()?;

        let scanout = self.find_scanout()?;
        self.prepare_framebuffer(scanout)?;
        let Scanout { id, width, height } = scanout;
        self.run(&[Command::new(
            RESOURCE_CREATE_2D,
            &[RESOURCE, FORMAT, width, height],
        )])?;
        let [low, high] = halves(self.framebuffer.paddr(0));
        let len = width * height * BYTES_PER_PIXEL;
        // 5.7.6: backing first, then transfers; the scanout shows all of the resource.
        self.run(&[
            Command::new(RESOURCE_ATTACH_BACKING, &[RESOURCE, 1, low, high, len, 0]),
            Command::new(SET_SCANOUT, &[0, 0, width, height, id, RESOURCE]),
        ])
    }

    /// Asks which displays there are, and returns the first that is enabled.
    fn find_scanout(&mut self) -> DevResult<Scanout> {
        let count = self.lifecycle.read_config(|transport| {
            transport
                .read_config_space(CONFIG_NUM_SCANOUTS)
                .map(u32::from_le)
        })?;
        self.run(&[Command {
            kind: GET_DISPLAY_INFO,
            payload: &[],
            response: OK_DISPLAY_INFO,
            response_len: DISPLAY_INFO_LEN,
        }])?;
        let word = |id: usize, word: usize| {
            let at = RESPONSE + HEADER_LEN + id * DISPLAY_LEN + word * 4;
            self.commands.load_le32(at)
        };
        (0..count)
            .take(MAX_SCANOUTS)
            .zip(0..MAX_SCANOUTS)
            .map(|(id, index)| (id, word(index, 2), word(index, 3), word(index, 4)))
            .find(|&(_, width, height, enabled)| {
                let sides = 1..=MAX_SIDE;
                enabled != 0 && sides.contains(&width) && sides.contains(&height)
            })
            .map(|(id, width, height, _)| Scanout { id, width, height })
            .ok_or_else(|| {
                error!("virtio-gpu: none of {count} scanouts is enabled with a size to be driven");
                DevError::Unsupported
            })
    }

    /// Makes the framebuffer one of this size. The device does not know of the old one.
    fn prepare_framebuffer(&mut self, scanout: Scanout) -> DevResult {
        let Scanout { width, height, .. } = scanout;
        if (self.width, self.height) != (width, height) {
            // At most 1 GiB, see `MAX_SIDE`.
            let len = width * height * BYTES_PER_PIXEL;
            let len = usize::try_from(len).map_err(|_| DevError::NoMemory)?;
            self.framebuffer = Dma::new(len, BufferDirection::DriverToDevice)?;
            (self.width, self.height) = (width, height);
        }
        Ok(())
    }

    /// Runs commands one after another, with one notification, and waits for them all.
    fn run(&mut self, commands: &[Command<'_>]) -> DevResult {
        self.lifecycle.live()?;
        debug_assert!(commands.len() <= SLOTS);
        let mut tokens = [0; SLOTS];
        for ((slot, token), command) in tokens.iter_mut().enumerate().zip(commands) {
            debug_assert!(command.payload.len() <= MAX_PAYLOAD_WORDS);
            let at = slot * SLOT_LEN;
            let len = HEADER_LEN + command.payload.len() * 4;
            self.commands.zero(at, HEADER_LEN);
            self.commands.store_le32(at, command.kind);
            for (index, &word) in command.payload.iter().enumerate() {
                self.commands.store_le32(at + HEADER_LEN + index * 4, word);
            }
            // What the device does not write must not look like a response.
            self.commands.zero(at + RESPONSE, HEADER_LEN);
            let request = self.segment(at, len);
            let response = self.segment(at + RESPONSE, command.response_len);
            // SAFETY: `commands` is accessed atomically, and lives until the device is done.
            *token = unsafe { self.control.add(&[request], &[response]) }?;
        }
        self.control.submit(self.lifecycle.live()?);

        // They are carried out in order, but may be given back in any.
        let mut written = [0; SLOTS];
        for _ in commands {
            let used = self.lifecycle.complete(&mut self.control)?;
            let slot = tokens.iter().position(|&token| token == used.token);
            if let Some(written) = slot.and_then(|slot| written.get_mut(slot)) {
                *written = used.len;
            }
        }
        commands
            .iter()
            .zip(written)
            .enumerate()
            .try_for_each(|(slot, (command, written))| self.check_response(slot, command, written))
    }

    fn segment(&self, offset: usize, len: usize) -> Segment {
        #[expect(clippy::cast_possible_truncation, reason = "at most SLOT_LEN")]
        Segment {
            paddr: self.commands.paddr(offset),
            len: len as u32,
        }
    }

    /// Says what a response means of which `written` bytes were written (2.7.8.2).
    fn check_response(&self, slot: usize, command: &Command<'_>, written: u32) -> DevResult {
        let kind = self.commands.load_le32(slot * SLOT_LEN + RESPONSE);
        let whole = self.lifecycle.is_legacy() || written as usize >= command.response_len;
        if kind == command.response && whole {
            return Ok(());
        }
        error!(
            "virtio-gpu: command {:#x} answered with {written} bytes of type {kind:#x}",
            command.kind
        );
        Err(match kind {
            ERR_OUT_OF_MEMORY => DevError::NoMemory,
            // The other errors say that the command makes no sense to the device.
            0x1202..=0x12ff => DevError::BadState,
            _ => DevError::Io,
        })
    }

    /// Does what a [configuration change](InterruptCause::CONFIGURATION) asks for: sees whether
    /// the display has another size now (5.7.4.2), and whether the device needs a reset.
    ///
    /// Returns whether [`reset`](Self::reset) would change the size. Only needed if the interrupt
    /// was acknowledged with an [`InterruptHandle`](crate::InterruptHandle).
    ///
    /// # Errors
    ///
    /// * [`DevError::Io`]: the device needs a reset, and has been, or it does not answer.
    /// * [`DevError::BadState`]: the device failed before.
    /// * [`DevError::Unsupported`]: no display is enabled any more. The old one goes on.
    pub fn configuration_changed(&mut self) -> DevResult<bool> {
        self.lifecycle.check()?;
        let events = self.lifecycle.read_config(|transport| {
            transport
                .read_config_space(CONFIG_EVENTS_READ)
                .map(u32::from_le)
        })?;
        if events & EVENT_DISPLAY == 0 {
            return Ok(false);
        }
        self.lifecycle
            .live()?
            .write_config_space(CONFIG_EVENTS_CLEAR, EVENT_DISPLAY.to_le())
            .map_err(crate::as_dev_err)?;
        let Scanout { width, height, .. } = self.find_scanout()?;
        let changed = (width, height) != (self.width, self.height);
        if changed {
            info!("virtio-gpu: the display is {width} x {height} pixels now");
        }
        Ok(changed)
    }
}

/// Returns the low and the high half of an address.
#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn halves(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

impl<H: Hal, T: Transport + Send + Sync> BaseDriverOps for VirtIoGpuDev<H, T> {
    fn device_name(&self) -> &str {
        "virtio-gpu"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Display
    }

    fn acknowledge_interrupt(&mut self) -> DevResult<InterruptCause> {
        let cause = cause(self.lifecycle.transport().ack_interrupt());
        if cause.contains(InterruptCause::CONFIGURATION) && self.lifecycle.is_live() {
            match self.configuration_changed() {
                // No display is enabled any more: the old picture goes on, and the cause is told.
                Ok(_) | Err(DevError::Unsupported) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(cause)
    }

    fn enable_interrupts(&mut self) -> DevResult<bool> {
        self.lifecycle.live()?;
        Ok(self.control.listen())
    }

    fn disable_interrupts(&mut self) -> DevResult {
        self.lifecycle.live()?;
        self.control.silence();
        Ok(())
    }
}

impl<H: Hal, T: Transport + Send + Sync> DisplayDriverOps for VirtIoGpuDev<H, T> {
    fn info(&self) -> DisplayInfo {
        let (width, height) = (self.width, self.height);
        DisplayInfo {
            width,
            height,
            fb_base_vaddr: self.framebuffer.vaddr(),
            fb_size: (width * height * BYTES_PER_PIXEL) as usize,
        }
    }

    fn fb(&mut self) -> FrameBuffer<'_> {
        let len = self.info().fb_size;
        // SAFETY: the device is only ever told to read the framebuffer.
        FrameBuffer::from_slice(unsafe { self.framebuffer.as_mut_slice(len) })
    }

    fn need_flush(&self) -> bool {
        true
    }

    fn flush(&mut self) -> DevResult {
        let (width, height) = (self.width, self.height);
        self.run(&[
            Command::new(
                TRANSFER_TO_HOST_2D,
                &[0, 0, width, height, 0, 0, RESOURCE, 0],
            ),
            Command::new(RESOURCE_FLUSH, &[0, 0, width, height, RESOURCE, 0]),
        ])
    }
}

impl<H: Hal, T: Transport> Drop for VirtIoGpuDev<H, T> {
    fn drop(&mut self) {
        // 3.3.1: reset first, then free.
        if self.lifecycle.stop().is_err() {
            self.control.keep();
            self.commands.keep();
            self.framebuffer.keep();
        }
    }
}
