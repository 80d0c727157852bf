//! What the pool does when the allocator gives nothing more.

#![cfg(feature = "alloc")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    ptr,
};

use axdriver_net::{DevError, NetBufPool};

/// The system's allocator, which can be made to fail in one thread.
struct Allocator;

thread_local! {
    /// How many allocations of this thread succeed from now on. `None`: all.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Returns whether the next allocation of this thread is to succeed.
fn may_allocate() -> bool {
    LEFT.with(|left| match left.get() {
        None => true,
        Some(0) => false,
        Some(n) => {
            left.set(Some(n - 1));
            true
        }
    })
}

// SAFETY: it is the system's allocator, or null, which every allocator may return.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !may_allocate() {
            return ptr::null_mut();
        }
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same, and what was not null came from there.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Does something with only `allocations` of them to succeed.
fn with_only<T>(allocations: usize, act: impl FnOnce() -> T) -> T {
    LEFT.set(Some(allocations));
    let result = act();
    LEFT.set(None);
    result
}

#[test]
fn a_pool_without_memory_is_refused() {
    // The list of free buffers fails, then the buffers themselves.
    for allocations in [0, 1] {
        let refused = with_only(allocations, || NetBufPool::new(4, 2048).err());
        assert_eq!(refused, Some(DevError::NoMemory));
    }
    assert!(NetBufPool::new(4, 2048).is_ok());
}

#[test]
fn a_buffer_without_memory_for_its_box_goes_back_to_the_pool() {
    let pool = NetBufPool::new(1, 2048).unwrap();
    assert!(with_only(0, || pool.alloc_boxed().is_none()));
    assert_eq!(pool.available(), 1);
    assert!(pool.alloc_boxed().is_some());
}

#[test]
fn a_buffer_without_a_box_needs_no_memory() {
    let pool = NetBufPool::new(1, 2048).unwrap();
    for _ in 0..10 {
        let buf = with_only(0, || pool.alloc());
        assert!(buf.is_some());
    }
}
