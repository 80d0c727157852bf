//! A GPU device (5.7) in 2D, with one display whose picture can be looked at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Device, Field, Model};
use super::queue::Chain;
use super::state::State;
use super::watch::{Range, overlap};
use crate::hostile::{Fault, Occasion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Feature bits of GPU devices (5.7.3).
pub mod features {
    /// The display says what it is.
    pub const EDID: u64 = 1 << 1;
}

const CONTROL: u16 = 0;
const EVENT_DISPLAY: u32 = 1;
/// Bytes of a command or response header.
const HEADER: usize = 24;
const FLAG_FENCE: u32 = 1;

const FIELDS: &[Field] = &[
    Field::new(0, 4, 0),
    Field::new(4, 4, 0).writable(),
    Field::new(8, 4, 0),
    Field::new(12, 4, 0),
];

mod command {
    pub(super) const GET_DISPLAY_INFO: u32 = 0x100;
    pub(super) const RESOURCE_CREATE_2D: u32 = 0x101;
    pub(super) const RESOURCE_UNREF: u32 = 0x102;
    pub(super) const SET_SCANOUT: u32 = 0x103;
    pub(super) const RESOURCE_FLUSH: u32 = 0x104;
    pub(super) const TRANSFER_TO_HOST_2D: u32 = 0x105;
    pub(super) const RESOURCE_ATTACH_BACKING: u32 = 0x106;
    pub(super) const RESOURCE_DETACH_BACKING: u32 = 0x107;
    pub(super) const GET_EDID: u32 = 0x10a;
    pub(super) const UPDATE_CURSOR: u32 = 0x300;
    pub(super) const MOVE_CURSOR: u32 = 0x301;
}

mod response {
    pub(super) const OK_NODATA: u32 = 0x1100;
    pub(super) const OK_DISPLAY_INFO: u32 = 0x1101;
    pub(super) const OK_EDID: u32 = 0x1104;
    pub(super) const ERR_UNSPEC: u32 = 0x1200;
    pub(super) const ERR_OUT_OF_MEMORY: u32 = 0x1201;
    pub(super) const ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
    pub(super) const ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
    pub(super) const ERR_INVALID_PARAMETER: u32 = 0x1205;
}

/// The most bytes that a resource may have.
const MOST: u64 = 256 << 20;

/// A picture: rows from the top, pixels from the left, each red, green, blue, alpha.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Image {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `width * height * 4` bytes.
    pub rgba: Vec<u8>,
}

impl Image {
    /// Returns the red, green, blue and alpha of the pixel at `x`, `y`, if it is in the picture.
    pub fn pixel(&self, x: u32, y: u32) -> Option<[u8; 4]> {
        if x >= self.width || y >= self.height {
            return None;
        }
        let at = (u64::from(y) * u64::from(self.width) + u64::from(x)) * 4;
        let at = usize::try_from(at).ok()?;
        self.rgba.get(at..at + 4)?.try_into().ok()
    }

    /// Writes the picture as PNG to `path`.
    ///
    /// # Errors
    ///
    /// * `InvalidInput`: the picture is empty.
    /// * Whatever the host says when it writes the file.
    pub fn save(&self, path: impl AsRef<Path>) -> io::Result<()> {
        if self.width == 0 || self.height == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let file = BufWriter::new(File::create(path)?);
        let mut encoder = png::Encoder::new(file, self.width, self.height);
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(io::Error::other)?;
        writer
            .write_image_data(&self.rgba)
            .map_err(io::Error::other)?;
        writer.finish().map_err(io::Error::other)
    }
}

/// The pointer on a display.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Cursor {
    /// The resource that it looks like; 0: none.
    pub resource: u32,
    /// Pixels from the left.
    pub x: u32,
    /// Pixels from the top.
    pub y: u32,
    /// The pixel of the resource that points, from its left.
    pub hot_x: u32,
    /// The pixel of the resource that points, from its top.
    pub hot_y: u32,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Rect {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

impl Rect {
    fn inside(&self, width: u32, height: u32) -> bool {
        let fits =
            |start: u32, len: u32, most: u32| start.checked_add(len).is_some_and(|end| end <= most);
        fits(self.x, self.width, width) && fits(self.y, self.height, height)
    }
}

#[derive(Debug)]
struct Resource {
    width: u32,
    height: u32,
    format: u32,
    /// Address and length of each piece of guest memory.
    backing: Vec<(u64, u32)>,
    /// The device's copy, 4 bytes a pixel in the resource's format.
    pixels: Vec<u8>,
    /// Whether anything was transferred.
    transferred: bool,
}

#[derive(Debug, Default)]
struct DisplayState {
    width: u32,
    height: u32,
    edid: bool,
    events: u32,
    changed: bool,
    resources: BTreeMap<u32, Resource>,
    /// Resource and rectangle of the scanout.
    scanout: Option<(u32, Rect)>,
    shown: Image,
    cursor: Cursor,
    flushes: u64,
    commands: u64,
}

/// A display. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Display {
    state: Arc<Mutex<DisplayState>>,
}

impl Display {
    /// Returns a display that prefers `width` by `height` pixels.
    pub fn new(width: u32, height: u32) -> Self {
        Self {
            state: Arc::new(Mutex::new(DisplayState {
                width,
                height,
                ..DisplayState::default()
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, DisplayState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers EDID.
    #[must_use]
    pub fn with_edid(self) -> Self {
        self.lock().edid = true;
        self
    }

    /// Prefers another size from now on, and tells the driver.
    pub fn resize(&self, width: u32, height: u32) {
        let mut state = self.lock();
        state.width = width;
        state.height = height;
        state.events |= EVENT_DISPLAY;
        state.changed = true;
    }

    /// Returns what the display shows; an empty picture while it is off.
    pub fn image(&self) -> Image {
        self.lock().shown.clone()
    }

    /// Saves what the display shows.
    ///
    /// # Errors
    ///
    /// As [`Image::save`]; `InvalidInput` also while the display is off.
    pub fn png(&self, path: impl AsRef<Path>) -> io::Result<()> {
        self.image().save(path)
    }

    /// Returns whether the driver still has to clear the event of a change.
    pub fn event_pending(&self) -> bool {
        self.lock().events & EVENT_DISPLAY != 0
    }

    /// Returns where the pointer is.
    pub fn cursor(&self) -> Cursor {
        self.lock().cursor
    }

    /// Returns how often the driver asked to show what it had drawn.
    pub fn flushes(&self) -> u64 {
        self.lock().flushes
    }

    /// Returns how many commands the driver sent.
    pub fn commands(&self) -> u64 {
        self.lock().commands
    }

    /// Returns how many resources the driver has made and not taken back.
    pub fn resources(&self) -> usize {
        self.lock().resources.len()
    }
}

impl From<&Display> for Device {
    fn from(display: &Display) -> Self {
        Device::new(display.clone())
    }
}

impl From<Display> for Device {
    fn from(display: Display) -> Self {
        Device::new(display)
    }
}

/// A command, read word by word.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    fn rect(&self, at: usize) -> Rect {
        Rect {
            x: self.u32(at),
            y: self.u32(at + 4),
            width: self.u32(at + 8),
            height: self.u32(at + 12),
        }
    }
}

/// Returns where red, green, blue and alpha are in a pixel of a format (5.7.6.8), and whether alpha counts.
fn order(format: u32) -> Option<([usize; 4], bool)> {
    Some(match format {
        1 => ([2, 1, 0, 3], true),
        2 => ([2, 1, 0, 3], false),
        3 => ([1, 2, 3, 0], true),
        4 => ([1, 2, 3, 0], false),
        67 => ([0, 1, 2, 3], true),
        68 => ([3, 2, 1, 0], false),
        121 => ([3, 2, 1, 0], true),
        134 => ([0, 1, 2, 3], false),
        _ => return None,
    })
}

impl DisplayState {
    /// Does a command. Returns the type of the response and what follows its header.
    fn handle(&mut self, words: &Words<'_>, device: &mut State) -> (u32, Vec<u8>) {
        self.commands += 1;
        let none = Vec::new();
        match words.u32(0) {
            command::GET_DISPLAY_INFO => {
                let (mut width, mut height) = (self.width, self.height);
                match device.fault(Occasion::DisplayInfo) {
                    Some(Fault::DisplayEmpty) => (width, height) = (0, 0),
                    Some(Fault::DisplayHuge) => (width, height) = (65536, 16385),
                    _ => {}
                }
                let mut info = vec![0; 16 * 24];
                info[8..12].copy_from_slice(&width.to_le_bytes());
                info[12..16].copy_from_slice(&height.to_le_bytes());
                info[16] = 1;
                (response::OK_DISPLAY_INFO, info)
            }
            command::RESOURCE_CREATE_2D => (self.create(words, device), none),
            command::RESOURCE_UNREF => (self.unref(words.u32(24)), none),
            command::SET_SCANOUT => (self.set_scanout(words, device), none),
            command::RESOURCE_FLUSH => (self.flush(words), none),
            command::TRANSFER_TO_HOST_2D => (self.transfer(words, device), none),
            command::RESOURCE_ATTACH_BACKING => (self.attach(words, device), none),
            command::RESOURCE_DETACH_BACKING => match self.resources.get_mut(&words.u32(24)) {
                Some(resource) => {
                    resource.backing.clear();
                    (response::OK_NODATA, none)
                }
                None => (response::ERR_INVALID_RESOURCE_ID, none),
            },
            command::GET_EDID if device.has(features::EDID) => {
                if words.u32(24) != 0 {
                    return (response::ERR_INVALID_SCANOUT_ID, none);
                }
                let mut body = vec![0; 8 + 1024];
                body[..4].copy_from_slice(&128_u32.to_le_bytes());
                body[8..136].copy_from_slice(&edid(self.width, self.height));
                (response::OK_EDID, body)
            }
            command::UPDATE_CURSOR => (self.update_cursor(words, device), none),
            command::MOVE_CURSOR => {
                self.cursor.x = words.u32(28);
                self.cursor.y = words.u32(32);
                (response::OK_NODATA, none)
            }
            _ => (response::ERR_UNSPEC, none),
        }
    }

    fn create(&mut self, words: &Words<'_>, device: &State) -> u32 {
        let (id, format) = (words.u32(24), words.u32(28));
        let (width, height) = (words.u32(32), words.u32(36));
        if order(format).is_none() {
            device.violation("GPU-08", format!("a resource of format {format}"));
            return response::ERR_INVALID_PARAMETER;
        }
        if id == 0 || self.resources.contains_key(&id) {
            return response::ERR_INVALID_RESOURCE_ID;
        }
        let size = u64::from(width) * u64::from(height) * 4;
        let (Ok(len), true) = (usize::try_from(size), size <= MOST) else {
            return response::ERR_OUT_OF_MEMORY;
        };
        if len == 0 {
            return response::ERR_INVALID_PARAMETER;
        }
        self.resources.insert(
            id,
            Resource {
                width,
                height,
                format,
                backing: Vec::new(),
                pixels: vec![0; len],
                transferred: false,
            },
        );
        response::OK_NODATA
    }

    fn unref(&mut self, id: u32) -> u32 {
        if self.resources.remove(&id).is_none() {
            return response::ERR_INVALID_RESOURCE_ID;
        }
        if self.scanout.is_some_and(|(shown, _)| shown == id) {
            self.scanout = None;
            self.shown = Image::default();
        }
        response::OK_NODATA
    }

    fn set_scanout(&mut self, words: &Words<'_>, device: &State) -> u32 {
        let rect = words.rect(24);
        let (scanout, id) = (words.u32(40), words.u32(44));
        if scanout != 0 {
            return response::ERR_INVALID_SCANOUT_ID;
        }
        if id == 0 {
            self.scanout = None;
            self.shown = Image::default();
            return response::OK_NODATA;
        }
        let Some(resource) = self.resources.get(&id) else {
            return response::ERR_INVALID_RESOURCE_ID;
        };
        if !rect.inside(resource.width, resource.height) || rect.width == 0 || rect.height == 0 {
            device.violation(
                "GPU-07",
                format!(
                    "a scanout of {}x{} from a resource of {}x{}",
                    rect.width, rect.height, resource.width, resource.height
                ),
            );
            return response::ERR_INVALID_PARAMETER;
        }
        self.scanout = Some((id, rect));
        let len = usize::try_from(u64::from(rect.width) * u64::from(rect.height) * 4).unwrap_or(0);
        self.shown = Image {
            width: rect.width,
            height: rect.height,
            rgba: [0, 0, 0, 255].repeat(len / 4),
        };
        response::OK_NODATA
    }

    fn flush(&mut self, words: &Words<'_>) -> u32 {
        let rect = words.rect(24);
        let id = words.u32(40);
        let Some(resource) = self.resources.get(&id) else {
            return response::ERR_INVALID_RESOURCE_ID;
        };
        if !rect.inside(resource.width, resource.height) {
            return response::ERR_INVALID_PARAMETER;
        }
        self.flushes += 1;
        let Some((shown, scanout)) = self.scanout else {
            return response::OK_NODATA;
        };
        let Some((order, alpha)) = order(resource.format).filter(|_| shown == id) else {
            return response::OK_NODATA;
        };
        for y in rect.y.max(scanout.y)..(rect.y + rect.height).min(scanout.y + scanout.height) {
            for x in rect.x.max(scanout.x)..(rect.x + rect.width).min(scanout.x + scanout.width) {
                let from = (y as usize * resource.width as usize + x as usize) * 4;
                let to = ((y - scanout.y) as usize * scanout.width as usize
                    + (x - scanout.x) as usize)
                    * 4;
                let pixel = &resource.pixels[from..from + 4];
                let mut rgba = order.map(|at| pixel[at]);
                if !alpha {
                    rgba[3] = 255;
                }
                self.shown.rgba[to..to + 4].copy_from_slice(&rgba);
            }
        }
        response::OK_NODATA
    }

    fn transfer(&mut self, words: &Words<'_>, device: &State) -> u32 {
        let rect = words.rect(24);
        let (offset, id) = (words.u64(40), words.u32(48));
        let Some(resource) = self.resources.get_mut(&id) else {
            return response::ERR_INVALID_RESOURCE_ID;
        };
        if resource.backing.is_empty() {
            device.violation(
                "GPU-03",
                format!("a transfer of resource {id} without backing"),
            );
            return response::ERR_UNSPEC;
        }
        if !rect.inside(resource.width, resource.height) {
            return response::ERR_INVALID_PARAMETER;
        }
        let memory = device.guest();
        let stride = u64::from(resource.width) * 4;
        let row = rect.width as usize * 4;
        for line in 0..rect.height {
            let from = offset.saturating_add(u64::from(line) * stride);
            let to = ((rect.y + line) as usize * resource.width as usize + rect.x as usize) * 4;
            if !gather(
                memory.guest(),
                &resource.backing,
                from,
                &mut resource.pixels[to..to + row],
            ) {
                return response::ERR_INVALID_PARAMETER;
            }
        }
        resource.transferred = true;
        response::OK_NODATA
    }

    fn attach(&mut self, words: &Words<'_>, device: &State) -> u32 {
        let (id, count) = (words.u32(24), words.u32(28));
        let Some(resource) = self.resources.get_mut(&id) else {
            return response::ERR_INVALID_RESOURCE_ID;
        };
        if !resource.backing.is_empty() || count > 16384 {
            return response::ERR_UNSPEC;
        }
        if words.0.len() < 32 + 16 * count as usize {
            return response::ERR_INVALID_PARAMETER;
        }
        for entry in 0..count as usize {
            let (address, len) = (words.u64(32 + 16 * entry), words.u32(40 + 16 * entry));
            if device.memory.host_address(address, len as usize).is_none() {
                device.violation(
                    "GEN-31",
                    format!("backing of {len} bytes at {address:#x} is not memory"),
                );
                resource.backing.clear();
                return response::ERR_INVALID_PARAMETER;
            }
            resource.backing.push((address, len));
        }
        response::OK_NODATA
    }

    fn update_cursor(&mut self, words: &Words<'_>, device: &State) -> u32 {
        let id = words.u32(40);
        if id != 0 {
            let Some(resource) = self.resources.get(&id) else {
                return response::ERR_INVALID_RESOURCE_ID;
            };
            if (resource.width, resource.height) != (64, 64) {
                device.violation(
                    "GPU-05",
                    format!("a pointer of {}x{}", resource.width, resource.height),
                );
            }
            if !resource.transferred {
                device.violation("GPU-04", "a pointer whose picture was not transferred");
            }
        }
        self.cursor = Cursor {
            resource: id,
            x: words.u32(28),
            y: words.u32(32),
            hot_x: words.u32(44),
            hot_y: words.u32(48),
        };
        response::OK_NODATA
    }
}

/// Reads from the pieces of a backing, from byte `offset` on. Returns whether they hold so much.
fn gather(
    memory: &GuestMemoryMmap,
    backing: &[(u64, u32)],
    mut offset: u64,
    mut bytes: &mut [u8],
) -> bool {
    for (address, len) in backing {
        let len = u64::from(*len);
        if offset >= len {
            offset -= len;
            continue;
        }
        let here = usize::try_from(len - offset).map_or(bytes.len(), |rest| rest.min(bytes.len()));
        let (part, rest) = bytes.split_at_mut(here);
        if memory
            .read_slice(part, GuestAddress(address.wrapping_add(offset)))
            .is_err()
        {
            return false;
        }
        bytes = rest;
        offset = 0;
        if bytes.is_empty() {
            break;
        }
    }
    bytes.is_empty()
}

/// Returns what a display of this size says of itself (VESA E-EDID 1.4, a base block with one detailed timing).
fn edid(width: u32, height: u32) -> [u8; 128] {
    let mut block = [0; 128];
    block[..8].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    block[8..10].copy_from_slice(&[0x35, 0xa8]);
    block[18..20].copy_from_slice(&[1, 4]);
    block[20] = 0xa5;
    block[38..54].fill(1);
    let low = |value: u32| (value & 0xff) as u8;
    let high = |value: u32| ((value >> 8) & 0xf) as u8;
    let clock = (u64::from(width + 160) * u64::from(height + 40) * 60 / 10_000).min(0xffff);
    block[54..56].copy_from_slice(&((clock & 0xffff) as u16).to_le_bytes());
    block[56] = low(width);
    block[57] = 160;
    block[58] = high(width) << 4;
    block[59] = low(height);
    block[60] = 40;
    block[61] = high(height) << 4;
    let sum = block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    block[127] = sum.wrapping_neg();
    block
}

impl Display {
    /// Answers one command. Returns how many bytes the response has.
    fn answer(&self, chain: &Chain, device: &mut State) -> u32 {
        let memory = device.guest();
        let len = usize::try_from(chain.readable_len())
            .unwrap_or(0)
            .min(1 << 20);
        let mut request = vec![0; len];
        let read = chain.read(memory.guest(), 0, &mut request);
        request.truncate(read);
        let words = Words(&request);
        let (mut kind, body) = if request.len() < HEADER {
            (response::ERR_UNSPEC, Vec::new())
        } else {
            self.lock().handle(&words, device)
        };
        let fault = device.fault(Occasion::GpuResponse);
        if fault == Some(Fault::GpuResponseType) {
            kind = if kind == response::OK_NODATA {
                response::ERR_UNSPEC
            } else {
                response::OK_NODATA
            };
        }
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        if words.u32(4) & FLAG_FENCE != 0 {
            bytes[4] = 1;
            bytes[8..16].copy_from_slice(&words.u64(8).to_le_bytes());
            bytes[16..20].copy_from_slice(&words.u32(16).to_le_bytes());
        }
        bytes.extend(body);
        if fault == Some(Fault::GpuResponseGarbage) {
            let garbage = device.options.hostile.number().to_le_bytes();
            for (byte, lie) in bytes[HEADER..].iter_mut().zip(garbage.iter().cycle()) {
                *byte = *lie;
            }
        }
        if fault == Some(Fault::GpuResponseShort) {
            bytes.truncate(8);
        }
        let written = chain.write(memory.guest(), 0, &bytes);
        u32::try_from(written).unwrap_or(0)
    }
}

impl Model for Display {
    fn kind(&self) -> u32 {
        16
    }

    fn features(&self) -> u64 {
        if self.lock().edid { features::EDID } else { 0 }
    }

    fn queues(&self) -> &'static [u16] {
        &[64, 16]
    }

    fn fields(&self) -> &'static [Field] {
        FIELDS
    }

    fn config(&mut self, _device: &mut State) -> Vec<u8> {
        let mut config = vec![0; 16];
        config[..4].copy_from_slice(&self.lock().events.to_le_bytes());
        config[8] = 1;
        config
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        if offset == 4
            && let Ok(clear) = bytes.try_into()
        {
            self.lock().events &= !u32::from_le_bytes(clear);
        }
    }

    fn changed(&mut self) -> bool {
        std::mem::take(&mut self.lock().changed)
    }

    fn serve(&mut self, queue: u16, device: &mut State) {
        while let Some(chain) = device.pop(queue) {
            let len = self.answer(&chain, device);
            if queue == CONTROL && len == 0 {
                device.violation("GPU-11", "a command without room for its response");
            }
            device.complete(queue, chain.head, len);
        }
    }

    fn reset(&mut self) {
        let mut state = self.lock();
        state.resources.clear();
        state.scanout = None;
        state.shown = Image::default();
        state.cursor = Cursor::default();
    }

    fn ranges(&self) -> Vec<Range> {
        self.lock()
            .resources
            .values()
            .flat_map(|resource| &resource.backing)
            .map(|(address, len)| (*address, u64::from(*len)))
            .filter(|range| overlap(*range, *range))
            .collect()
    }
}
