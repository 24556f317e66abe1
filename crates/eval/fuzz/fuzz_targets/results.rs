//! Reads arbitrary bytes as a run's results and agreements. Errors are allowed, panics are not. A
//! report is written of valid results.
//!
//!     cargo +nightly fuzz run results CORPUS -- -malloc_limit_mb=64 -timeout=10
#![no_main]

use libfuzzer_sys::fuzz_target;
use longctx_eval::{records, report};

fuzz_target!(|bytes: &[u8]| {
    let folder = std::env::temp_dir().join(format!("longctx-fuzz-results-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the results");
    for name in ["results-1-of-1.jsonl", "agreement.jsonl"] {
        std::fs::write(folder.join(name), bytes).expect("a file of results");
    }
    if records(&folder).is_ok_and(|records| !records.is_empty()) {
        let _ = std::fs::remove_file(folder.join("agreement.jsonl"));
        report::write(&folder).expect("results that are read make a report");
    } else {
        let _ = report::has_agreement(&folder, "", "", &Default::default());
    }
});
