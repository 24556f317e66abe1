//! Reads arbitrary bytes as a `tokenizer.json`, and encodes a text with it.
//!
//!     cargo +nightly fuzz run tokenizer CORPUS -- -malloc_limit_mb=64 -timeout=10
#![no_main]

use libfuzzer_sys::fuzz_target;
use longctx_checkpoint::read_tokenizer;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = read_tokenizer(bytes) {
        let _ = tokenizer.encode("A text, 1 or 2 \u{4f60}\u{597d}.", true);
    }
});
