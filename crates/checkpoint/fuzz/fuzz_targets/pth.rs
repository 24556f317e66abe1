//! Reads arbitrary bytes as a PyTorch file. Errors are allowed, panics are not. Every described
//! tensor can be read.
//!
//!     cargo +nightly fuzz run pth CORPUS -- -malloc_limit_mb=64 -timeout=10
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use longctx_checkpoint::Pth;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Pth::read(Cursor::new(bytes.to_vec()), "fuzzed.pth") else { return };
    for name in file.names() {
        assert!(file.tensor(name).is_ok(), "{name}");
    }
});
