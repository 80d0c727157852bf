#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| axdriver_virtio_fuzz::buses::search(bytes));
