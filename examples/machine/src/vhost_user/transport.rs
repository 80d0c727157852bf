//! The `Transport` over a connection: what a driver does to registers becomes requests to the back end.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VHOST_USER_MAX_VRINGS, VhostUserConfigFlags, VhostUserHeaderFlag,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::link::{Link, Loss, News};
use super::screen::{HEADS, Monitor, Screen};
use super::{Socket, VhostUserError};
use crate::{Image, Memory};

/// `VHOST_USER_F_PROTOCOL_FEATURES`, which is between the two ends and not the driver's.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Features that only hold between the two ends, or that need what is not here: logging of writes, translation of addresses,
/// packed rings, and the reset of a single queue.
const NEVER_OFFERED: u64 = 1 << 26 | PROTOCOL_FEATURES | 1 << 33 | 1 << 34 | 1 << 40;

/// What a device has that differs by its type.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum VhostUserDevice {
    /// A disk. Its configuration is the back end's.
    Block,
    /// A NIC with one pair of queues. The back end has no configuration, so that its address is given here.
    Network {
        /// The MAC address.
        mac: [u8; 6],
    },
    /// A display without 3D, of the programs that speak QEMU's vhost-user-gpu protocol. It shows its pictures
    /// [here](VhostUserHandle::image).
    Display {
        /// The width that the driver is asked for, in pixels.
        width: u32,
        /// The height that the driver is asked for, in pixels.
        height: u32,
    },
}

impl VhostUserDevice {
    fn device_type(self) -> DeviceType {
        match self {
            Self::Block => DeviceType::Block,
            Self::Network { .. } => DeviceType::Network,
            Self::Display { .. } => DeviceType::GPU,
        }
    }

    /// Features that are made here and not by the back end.
    fn local_features(self) -> u64 {
        match self {
            Self::Block | Self::Display { .. } => 0,
            // VIRTIO_NET_F_MAC and VIRTIO_NET_F_STATUS.
            Self::Network { .. } => 1 << 5 | 1 << 16,
        }
    }

    /// Features of the back end's that only go with what is not here.
    fn unserved_features(self) -> u64 {
        match self {
            Self::Block => 0,
            // The control queue and all that is said over it (17 to 22, and 23), and the MTU field.
            Self::Network { .. } => 0x7f << 17 | 1 << 3,
            // 3D and EDID, and blobs with what belongs to them.
            Self::Display { .. } => 0x1f,
        }
    }

    /// The size of the configuration space, in bytes.
    fn configuration_size(self) -> usize {
        match self {
            // Up to the limits of discarding and writing zeroes; programs differ about the fields after.
            Self::Block => 60,
            Self::Network { .. } => 8,
            Self::Display { .. } => 16,
        }
    }

    /// Whether a back end keeps what the driver told it, until its connection ends.
    fn is_reset_by_connecting(self) -> bool {
        // `vhost-user-gpu` keeps its resources when the rings stop.
        matches!(self, Self::Display { .. })
    }
}

/// How a device is used.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    device: VhostUserDevice,
    queue_size: u16,
    withheld: u64,
    limit: Duration,
}

impl VhostUserOptions {
    /// Queues of 256, all features of the back end's, and 5 seconds for each of its answers.
    pub fn new(device: VhostUserDevice) -> Self {
        Self {
            device,
            queue_size: 256,
            withheld: 0,
            limit: Duration::from_secs(5),
        }
    }

    /// Sets the greatest size of a queue that the driver is offered, which the protocol does not tell.
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// Withholds features from the driver, by their bits.
    pub fn without_features(mut self, bits: u64) -> Self {
        self.withheld |= bits;
        self
    }

    /// Sets how long the back end may take for an answer.
    pub fn answer_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// A queue as the driver set it up.
#[derive(Clone, Copy, Debug)]
struct Queue {
    size: u16,
    descriptors: PhysAddr,
    driver_area: PhysAddr,
    device_area: PhysAddr,
}

/// The eventfds between the two ends, which outlive a connection.
#[derive(Debug)]
struct Doorbells {
    /// Written by the driver, one for each queue.
    kicks: Vec<EventFd>,
    /// Written by the back end, one for each queue.
    calls: Vec<EventFd>,
    news: Arc<News>,
}

/// What is known of a device as long as its connection lasts.
#[derive(Debug)]
struct Session {
    link: Link,
    /// The back end's features, without those that are not the driver's.
    features: u64,
    queues: u16,
}

/// What a device is made of, for its driver's side and its [`VhostUserHandle`].
#[derive(Debug)]
struct Common {
    socket: Socket,
    options: VhostUserOptions,
    memory: Arc<Memory>,
    doorbells: Doorbells,
    /// That of a display.
    monitor: Option<Arc<Monitor>>,
    /// `None` while there is no connection that ever worked, between the reset of a display and its next start, and once the
    /// transport is dropped.
    session: Mutex<Option<Arc<Session>>>,
}

impl Common {
    fn session(&self) -> Option<Arc<Session>> {
        self.session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn loss(&self) -> Option<Loss> {
        match self.session() {
            Some(session) => session.link.loss(),
            None => Some(Loss::Closed),
        }
    }

    /// Closes the connection from this side.
    fn disconnect(&self) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Connects anew. The session before is closed.
    fn reconnect(&self) -> Result<Arc<Session>, VhostUserError> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        *current = None;
        let stream = self.socket.connect()?;
        let news = self.doorbells.news.clone();
        let session = Arc::new(greet(stream, &self.options, news, self.monitor.clone())?);
        *current = Some(session.clone());
        Ok(session)
    }
}

/// Agrees with the back end about the protocol.
fn greet(
    stream: UnixStream,
    options: &VhostUserOptions,
    news: Arc<News>,
    monitor: Option<Arc<Monitor>>,
) -> Result<Session, VhostUserError> {
    /// Where a display is to show its pictures, see QEMU's documentation, "Vhost-user Protocol".
    const GPU_SET_SOCKET: u32 = 33;

    let device = options.device;
    let (screen, far_screen) = monitor.map(Screen::new).transpose()?.unzip();
    let (link, requests) = Link::new(stream, 2, options.limit, news, screen)?;
    link.ask("SET_OWNER", |frontend| frontend.set_owner())?;
    let features = link.ask("GET_FEATURES", |frontend| frontend.get_features())?;
    if features & PROTOCOL_FEATURES == 0 {
        return Err(VhostUserError::Unsuitable {
            message: "it lacks VHOST_USER_F_PROTOCOL_FEATURES",
        });
    }
    let offered = link.ask("GET_PROTOCOL_FEATURES", |frontend| {
        frontend.get_protocol_features()
    })?;
    let block = device == VhostUserDevice::Block;
    let mut wanted = VhostUserProtocolFeatures::REPLY_ACK;
    if block {
        // Not MQ elsewhere: `vhost` takes the number of queue pairs for the number of queues.
        wanted |= VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::BACKEND_REQ;
    }
    let protocol = wanted & offered;
    if block && !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(VhostUserError::Unsuitable {
            message: "it lacks VHOST_USER_PROTOCOL_F_CONFIG, without which a disk tells no size",
        });
    }
    link.ask("SET_PROTOCOL_FEATURES", |frontend| {
        frontend.set_protocol_features(protocol)
    })?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        link.ask("nothing", |frontend| {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            Ok(())
        })?;
    }
    if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
        link.ask("SET_BACKEND_REQ_FD", |frontend| {
            frontend.set_backend_request_fd(&requests)
        })?;
    }
    if let Some(socket) = far_screen {
        link.hand_over("GPU_SET_SOCKET", GPU_SET_SOCKET, &socket)?;
    }
    let queues = match device {
        VhostUserDevice::Block if protocol.contains(VhostUserProtocolFeatures::MQ) => {
            link.ask("GET_QUEUE_NUM", |frontend| frontend.get_queue_num())?
        }
        VhostUserDevice::Block => 1,
        VhostUserDevice::Network { .. } | VhostUserDevice::Display { .. } => 2,
    };
    let queues = u16::try_from(queues.min(VHOST_USER_MAX_VRINGS)).unwrap_or(u16::MAX);
    Ok(Session {
        link,
        features: (features & !NEVER_OFFERED & !device.unserved_features()
            | device.local_features())
            & !options.withheld,
        queues: queues.min(MAX_QUEUES),
    })
}

/// The most queues of a device that are used.
const MAX_QUEUES: u16 = 64;

/// A virtio device behind a vhost-user socket, for a driver.
///
/// A back end that dies, hangs or answers wrongly shows as `DEVICE_NEEDS_RESET`, and in a request to it as an error, each
/// within the [answer limit](VhostUserOptions::answer_limit). A reset connects anew; the status reads 0 only when that
/// succeeded or the back end has certainly given up the memory.
#[derive(Debug)]
pub struct VhostUserTransport {
    common: Arc<Common>,
    status: DeviceStatus,
    driver_features: u64,
    queues: Vec<Option<Queue>>,
    /// How many queues the back end has been told of; they are its first.
    running: bool,
    /// The configuration as it was read last, and how often it had changed.
    configuration: Mutex<(Vec<u8>, u32)>,
}

impl VhostUserTransport {
    /// Connects to the back end that listens at `socket`, and shares `memory` with it.
    ///
    /// # Errors
    ///
    /// Any of [`VhostUserError`], within the answer limit for each request. Nothing is left behind.
    pub fn connect(
        socket: Socket,
        memory: Arc<Memory>,
        options: VhostUserOptions,
    ) -> Result<Self, VhostUserError> {
        let news = Arc::new(News::new()?);
        let monitor = match options.device {
            VhostUserDevice::Display { width, height } => {
                Some(Arc::new(Monitor::new(width, height)))
            }
            _ => None,
        };
        let stream = socket.connect()?;
        let session = greet(stream, &options, news.clone(), monitor.clone())?;
        let eventfds = || {
            (0..session.queues)
                .map(|_| EventFd::new(EFD_NONBLOCK))
                .collect::<Result<Vec<_>, _>>()
        };
        let doorbells = Doorbells {
            kicks: eventfds()?,
            calls: eventfds()?,
            news,
        };
        Ok(Self {
            status: DeviceStatus::empty(),
            driver_features: 0,
            queues: vec![None; session.queues.into()],
            running: false,
            configuration: Mutex::new((Vec::new(), 0)),
            common: Arc::new(Common {
                socket,
                options,
                memory,
                doorbells,
                monitor,
                session: Mutex::new(Some(Arc::new(session))),
            }),
        })
    }

    /// Returns a handle that stays here when the transport goes to a driver.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle {
            common: self.common.clone(),
        }
    }

    /// Stops the rings, so that the back end leaves the memory alone.
    fn stop(&mut self) -> Result<(), VhostUserError> {
        let session = self.common.session().ok_or(VhostUserError::Disconnected)?;
        if !self.running {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.is_some() {
                session.link.ask("SET_VRING_ENABLE", |frontend| {
                    frontend.set_vring_enable(index, false)
                })?;
                // The back end stops the ring before it answers.
                session
                    .link
                    .ask("GET_VRING_BASE", |frontend| frontend.get_vring_base(index))?;
            }
        }
        self.running = false;
        Ok(())
    }

    /// Resets the device: by its protocol where the connection lives, by a new connection where it does not.
    fn reset(&mut self) {
        let stale = self.running && self.common.options.device.is_reset_by_connecting();
        let stopped = self.stop();
        let loss = self.common.loss();
        if let (Err(error), None) = (&stopped, &loss) {
            log::warn!("vhost-user: not stopped: {error}");
        }
        let certain = match loss {
            None => stopped.is_ok(),
            Some(Loss::Closed) => true,
            Some(Loss::Silent { .. } | Loss::Wrong { .. }) => false,
        };
        if stale && loss.is_none() && stopped.is_ok() {
            // The next connection is made when it is needed: after its last reset a device needs none.
            self.common.disconnect();
            self.forget();
        } else if loss.is_some() || stopped.is_err() {
            match self.common.reconnect() {
                // It serves one at a time: if it serves this connection, it is done with the one before.
                Ok(session) => {
                    self.queues = vec![None; session.queues.into()];
                    self.forget();
                }
                Err(error) => {
                    log::warn!("{error}");
                    if certain {
                        self.forget();
                    }
                }
            }
        } else {
            self.forget();
        }
        // What came before the reset is not news after it.
        let _ = self.ack_interrupt();
        if let Some(monitor) = &self.common.monitor {
            monitor.acknowledge();
        }
    }

    /// Goes back to the state after power-on, on this side.
    fn forget(&mut self) {
        self.status = DeviceStatus::empty();
        self.driver_features = 0;
        self.running = false;
        self.queues.fill(None);
    }

    /// Tells the back end all that the driver has set up, and lets it go.
    fn start(&mut self) -> Result<(), VhostUserError> {
        let Common {
            memory,
            doorbells,
            options,
            ..
        } = &*self.common;
        let session = self.common.session().ok_or(VhostUserError::Disconnected)?;
        let link = &session.link;
        let features = self.driver_features & !options.device.local_features();
        link.ask("SET_FEATURES", |frontend| {
            frontend.set_features(features | PROTOCOL_FEATURES)
        })?;
        let regions = memory
            .guest()
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| VhostUserError::Host(std::io::Error::other(error.to_string())))?;
        link.ask("SET_MEM_TABLE", |frontend| {
            frontend.set_mem_table(&regions).map(|_| ())
        })?;
        self.running = true;
        for (index, queue) in self.queues.iter().enumerate() {
            let Some(queue) = queue else {
                continue;
            };
            let addresses = addresses(memory, *queue).ok_or(VhostUserError::Unsuitable {
                message: "a ring is not in the machine's memory",
            })?;
            let (Some(kick), Some(call)) = (doorbells.kicks.get(index), doorbells.calls.get(index))
            else {
                continue;
            };
            link.ask("SET_VRING_NUM", |frontend| {
                frontend.set_vring_num(index, queue.size)
            })?;
            link.ask("SET_VRING_BASE", |frontend| {
                frontend.set_vring_base(index, 0)
            })?;
            link.ask("SET_VRING_ADDR", |frontend| {
                frontend.set_vring_addr(index, &addresses)
            })?;
            link.ask("SET_VRING_CALL", |frontend| {
                frontend.set_vring_call(index, call)
            })?;
            link.ask("SET_VRING_KICK", |frontend| {
                frontend.set_vring_kick(index, kick)
            })?;
            link.ask("SET_VRING_ENABLE", |frontend| {
                frontend.set_vring_enable(index, true)
            })?;
        }
        Ok(())
    }

    /// Reads the whole configuration space.
    fn configuration(&self) -> Result<Vec<u8>, VhostUserError> {
        let device = self.common.options.device;
        if let VhostUserDevice::Network { mac } = device {
            // VirtIO 1.3, 5.1.4: the MAC address, and a status whose bit 0 is the link.
            let link = u16::from(self.common.loss().is_none());
            return Ok([&mac[..], &link.to_le_bytes()].concat());
        }
        if let Some(monitor) = &self.common.monitor {
            // VirtIO 1.3, 5.7.4: events_read, events_clear, num_scanouts and num_capsets. All but the last, which belongs
            // to 3D, are for this side to say.
            let events = u32::from(monitor.is_new());
            return Ok([events, 0, HEADS, 0].map(u32::to_le_bytes).concat());
        }
        let session = self.common.session().ok_or(VhostUserError::Disconnected)?;
        read_configuration(&session.link, device)
    }
}

/// Reads the whole configuration space from the back end.
fn read_configuration(link: &Link, device: VhostUserDevice) -> Result<Vec<u8>, VhostUserError> {
    // From the start, since `libvhost-user` takes no notice of the offset.
    let empty = vec![0; device.configuration_size()];
    let size = u32::try_from(empty.len()).unwrap_or(u32::MAX);
    let (_, bytes) = link.ask("GET_CONFIG", |frontend| {
        frontend.get_config(0, size, VhostUserConfigFlags::empty(), &empty)
    })?;
    Ok(bytes)
}

/// Returns where a queue is, as the protocol wants it: at addresses of this process.
fn addresses(memory: &Memory, queue: Queue) -> Option<VringConfigData> {
    let size = usize::from(queue.size);
    let host = |address, length| {
        let pointer = memory.host_address(address, length)?;
        Some(pointer.addr().get() as u64)
    };
    Some(VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        // VirtIO 1.3, 2.7: 16 bytes a descriptor; the rings have 6 bytes beside their elements.
        desc_table_addr: host(queue.descriptors, 16 * size)?,
        avail_ring_addr: host(queue.driver_area, 6 + 2 * size)?,
        used_ring_addr: host(queue.device_area, 6 + 8 * size)?,
        log_addr: None,
    })
}

impl Transport for VhostUserTransport {
    fn device_type(&self) -> DeviceType {
        self.common.options.device.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.common.session().map_or(0, |session| session.features)
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.driver_features = driver_features;
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if usize::from(queue) < self.queues.len() {
            self.common.options.queue_size.into()
        } else {
            0
        }
    }

    fn notify(&mut self, queue: u16) {
        if let Some(kick) = self.common.doorbells.kicks.get(usize::from(queue)) {
            // A counter that is full has not been read yet, so that it is seen all the same.
            let _ = kick.write(1);
        }
    }

    fn get_status(&self) -> DeviceStatus {
        if self.status.is_empty() || self.common.loss().is_none() {
            self.status
        } else {
            self.status | DeviceStatus::DEVICE_NEEDS_RESET
        }
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if status.is_empty() {
            self.reset();
            return;
        }
        if self.status.is_empty() && self.common.session().is_none() {
            match self.common.reconnect() {
                Ok(session) => self.queues = vec![None; session.queues.into()],
                // The status says from here on that the device needs a reset.
                Err(error) => log::warn!("{error}"),
            }
        }
        let newly = |bit| status.contains(bit) && !self.status.contains(bit);
        let (negotiated, live) = (
            newly(DeviceStatus::FEATURES_OK),
            newly(DeviceStatus::DRIVER_OK),
        );
        self.status = status | self.status & DeviceStatus::DEVICE_NEEDS_RESET;
        let offered = self.read_device_features();
        if negotiated && self.driver_features & !offered != 0 {
            self.status.remove(DeviceStatus::FEATURES_OK);
        }
        if live && let Err(error) = self.start() {
            log::warn!("vhost-user: not started: {error}");
            self.status |= DeviceStatus::DEVICE_NEEDS_RESET;
        }
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        if let (Some(slot), Ok(size)) = (self.queues.get_mut(usize::from(queue)), size.try_into()) {
            *slot = Some(Queue {
                size,
                descriptors,
                driver_area,
                device_area,
            });
        }
    }

    fn queue_unset(&mut self, queue: u16) {
        let index = usize::from(queue);
        if self.running
            && self.queues.get(index).is_some_and(Option::is_some)
            && let Some(session) = self.common.session()
        {
            // An answer that does not come has the connection marked as lost.
            let _ = session
                .link
                .ask("GET_VRING_BASE", |frontend| frontend.get_vring_base(index));
        }
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = None;
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.queues
            .get(usize::from(queue))
            .is_some_and(Option::is_some)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.handle().acknowledge()
    }

    fn read_config_generation(&self) -> u32 {
        let now = self.configuration();
        let mut last = self
            .configuration
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Ok(now) = now
            && now != last.0
        {
            *last = (now, last.1.wrapping_add(1));
        }
        last.1
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let size = self.common.options.device.configuration_size();
        let end = offset
            .checked_add(size_of::<T>())
            .filter(|&end| end <= size)
            .ok_or(Error::ConfigSpaceTooSmall)?;
        let bytes = self.configuration().map_err(|error| {
            log::warn!("{error}");
            Error::IoError
        })?;
        let field = bytes.get(offset..end).ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_bytes(field).map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        if let Some(monitor) = &self.common.monitor {
            // VirtIO 1.3, 5.7.4: only events_clear is written, and VIRTIO_GPU_EVENT_DISPLAY is the only event.
            let clear = u32::read_from_bytes(value.as_bytes()).map(u32::from_le);
            let (4, Ok(events)) = (offset, clear) else {
                return Err(Error::ConfigSpaceTooSmall);
            };
            if events & 1 != 0 {
                monitor.acknowledge();
            }
            return Ok(());
        }
        let device = self.common.options.device;
        let fits = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= device.configuration_size());
        let (true, VhostUserDevice::Block, Ok(offset)) = (fits, device, u32::try_from(offset))
        else {
            return Err(Error::ConfigSpaceTooSmall);
        };
        let session = self.common.session().ok_or(Error::IoError)?;
        session
            .link
            .ask("SET_CONFIG", |frontend| {
                frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, value.as_bytes())
            })
            .map_err(|error| {
                log::warn!("{error}");
                Error::IoError
            })
    }
}

impl Drop for VhostUserTransport {
    fn drop(&mut self) {
        // The memory is about to be freed. A device that does not stop is cut off by the end of its connection, which is all
        // that can be done to it from here.
        if self.running && self.common.loss().is_none() && self.stop().is_err() {
            log::warn!("vhost-user: the device was not stopped");
        }
        // Handles that are left do not keep the connection.
        self.common.disconnect();
    }
}

/// A handle of a device, beside its driver: it waits for interrupts and tells of the connection.
#[derive(Clone, Debug)]
pub struct VhostUserHandle {
    common: Arc<Common>,
}

impl VhostUserHandle {
    /// Returns why the back end has gone.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Disconnected`], [`VhostUserError::Silent`] or [`VhostUserError::Protocol`]: it has. The first also
    /// between the reset of a display and its next start, and after the transport was dropped.
    pub fn check(&self) -> Result<(), VhostUserError> {
        match self.common.loss() {
            None => Ok(()),
            Some(loss) => Err(loss.as_error()),
        }
    }

    /// Returns what a head of the display shows, with all that was flushed by now: an empty picture while it is off, and of
    /// what is no display.
    pub fn image(&self, head: u32) -> Image {
        let session = self.common.session();
        session.map_or_else(Image::default, |session| session.link.image(head))
    }

    /// Asks the driver of a display for another size from now on, in pixels, and tells it so by an interrupt.
    pub fn resize(&self, width: u32, height: u32) {
        if let Some(monitor) = &self.common.monitor {
            monitor.resize(width, height);
            let news = &self.common.doorbells.news;
            news.configuration_changed.store(true, Ordering::Release);
            news.tell();
        }
    }

    /// Waits for an interrupt, at most `limit`. Returns whether there is one to be acknowledged, or the back end has gone.
    ///
    /// # Errors
    ///
    /// * [`VhostUserError::Host`]: the operating system has nothing to wait with.
    pub fn wait_for_interrupt(&self, limit: Duration) -> Result<bool, VhostUserError> {
        let doorbells = &self.common.doorbells;
        let epoll = Epoll::new()?;
        for event in doorbells.calls.iter().chain([&doorbells.news.event]) {
            epoll.ctl(
                ControlOperation::Add,
                event.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            )?;
        }
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now()).as_millis();
            let timeout = i32::try_from(left).unwrap_or(i32::MAX);
            match epoll.wait(timeout, &mut [EpollEvent::default()]) {
                Ok(0) if Instant::now() >= end => return Ok(false),
                Ok(0) => {}
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Acknowledges interrupts, as [`Transport::ack_interrupt`] does, without the driver.
    pub fn acknowledge(&self) -> InterruptStatus {
        let Doorbells { calls, news, .. } = &self.common.doorbells;
        let mut status = InterruptStatus::empty();
        // An eventfd that was not written cannot be read, and says so.
        let mut any = false;
        for call in calls {
            any |= call.read().is_ok();
        }
        if any {
            status |= InterruptStatus::QUEUE_INTERRUPT;
        }
        let told = news.event.read().is_ok();
        let changed = news.configuration_changed.swap(false, Ordering::AcqRel);
        // VirtIO 1.3, 2.1.2: a device that needs a reset says so by a change of its configuration.
        if changed || told {
            status |= InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT;
        }
        status
    }
}
