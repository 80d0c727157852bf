//! The heap: pages in a row for the processor, scattered for a device.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;

use linked_list_allocator::Heap;
use spin::Mutex;

use crate::error::Result;
use crate::frames::FRAME;
use crate::paging;

/// How many pages the heap has: 8 MiB.
const PAGES: usize = (8 << 20) / FRAME;

#[global_allocator]
static HEAP: KernelHeap = KernelHeap(Mutex::new(Heap::empty()));

/// The allocator behind `Box` and `Vec`. Interrupt handlers must not use it: they could find it locked.
struct KernelHeap(Mutex<Heap>);

// SAFETY: `Heap` gives out blocks that fit the layout and do not overlap, and keeps them until they
// are given back; the lock makes each call whole.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate_first_fit(layout)
            .map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller promises that `block` came from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(block, layout) };
        }
    }
}

/// Starts the heap.
///
/// # Errors
///
/// Those of [`paging::map_heap`].
pub(crate) fn start() -> Result {
    let first = paging::map_heap(PAGES)?;
    // SAFETY: the pages were mapped for the heap alone, and stay; this is the only call, since
    // `map_heap` fails when it is called again.
    unsafe { HEAP.0.lock().init(first, PAGES * FRAME) };
    Ok(())
}
