//! An allocator that never has anything: the program is linked, not run.

use core::{
    alloc::{GlobalAlloc, Layout},
    hint::black_box,
    ptr,
};

struct Empty;

// SAFETY: it hands out no memory.
unsafe impl GlobalAlloc for Empty {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        black_box(ptr::null_mut())
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static HEAP: Empty = Empty;
