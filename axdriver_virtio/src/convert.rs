//! The two maps between `virtio-drivers` and the axdriver traits: device types and errors.

use axdriver_base::{DevError, DeviceType};
use virtio_drivers::{
    Error, device::socket::SocketError, transport::DeviceType as VirtIoDeviceType,
};

/// Returns what kind of driver a virtio device type needs, or `None` if it is none of ours.
///
/// | virtio device type | result |
/// |---|---|
/// | Block (2) | [`DeviceType::Block`] |
/// | Network (1) | [`DeviceType::Net`] |
/// | GPU (16) | [`DeviceType::Display`] |
/// | all else | `None` |
#[must_use]
pub const fn as_dev_type(device_type: VirtIoDeviceType) -> Option<DeviceType> {
    use VirtIoDeviceType as V;
    match device_type {
        V::Block => Some(DeviceType::Block),
        V::Network => Some(DeviceType::Net),
        V::GPU => Some(DeviceType::Display),
        V::Console
        | V::EntropySource
        | V::MemoryBallooning
        | V::IoMemory
        | V::Rpmsg
        | V::ScsiHost
        | V::_9P
        | V::Mac80211
        | V::RprocSerial
        | V::VirtioCAIF
        | V::MemoryBalloon
        | V::Timer
        | V::Input
        | V::Socket
        | V::Crypto
        | V::SignalDistributionModule
        | V::Pstore
        | V::IOMMU
        | V::Memory
        | V::Sound => None,
    }
}

/// Returns the [`DevError`] that says what a `virtio-drivers` error says.
///
/// | `virtio_drivers::Error` | result |
/// |---|---|
/// | `QueueFull`, `WrongToken`, `ConfigSpaceTooSmall`, `ConfigSpaceMissing` | [`DevError::BadState`] |
/// | `NotReady` | [`DevError::Again`] |
/// | `AlreadyUsed` | [`DevError::AlreadyExists`] |
/// | `InvalidParam` | [`DevError::InvalidParam`] |
/// | `DmaError` | [`DevError::NoMemory`] |
/// | `IoError` | [`DevError::Io`] |
/// | `Unsupported` | [`DevError::Unsupported`] |
/// | `SocketDeviceError(ConnectionExists)` | [`DevError::AlreadyExists`] |
/// | `SocketDeviceError(NotConnected \| RecycledWrongBuffer)` | [`DevError::BadState`] |
/// | `SocketDeviceError(InvalidOperation \| InvalidNumber \| UnknownOperation \| OutputBufferTooShort \| BufferTooShort \| BufferTooLong)` | [`DevError::InvalidParam`] |
/// | `SocketDeviceError(UnexpectedDataInPacket \| PeerSocketShutdown)` | [`DevError::Io`] |
/// | `SocketDeviceError(InsufficientBufferSpaceInPeer)` | [`DevError::Again`] |
#[must_use]
pub const fn as_dev_err(error: Error) -> DevError {
    match error {
        Error::QueueFull
        | Error::WrongToken
        | Error::ConfigSpaceTooSmall
        | Error::ConfigSpaceMissing => DevError::BadState,
        Error::NotReady => DevError::Again,
        Error::AlreadyUsed => DevError::AlreadyExists,
        Error::InvalidParam => DevError::InvalidParam,
        Error::DmaError => DevError::NoMemory,
        Error::IoError => DevError::Io,
        Error::Unsupported => DevError::Unsupported,
        Error::SocketDeviceError(error) => socket_error(error),
    }
}

const fn socket_error(error: SocketError) -> DevError {
    use SocketError as S;
    match error {
        S::ConnectionExists => DevError::AlreadyExists,
        S::NotConnected | S::RecycledWrongBuffer => DevError::BadState,
        S::InvalidOperation
        | S::InvalidNumber
        | S::UnknownOperation(_)
        | S::OutputBufferTooShort(_)
        | S::BufferTooShort
        | S::BufferTooLong(..) => DevError::InvalidParam,
        S::UnexpectedDataInPacket | S::PeerSocketShutdown => DevError::Io,
        S::InsufficientBufferSpaceInPeer => DevError::Again,
    }
}
