//! Reads arbitrary bytes as a task's records. Bad records are skipped and reported, panics are not
//! allowed, and every score is between 0 and 1.
//!
//!     cargo +nightly fuzz run records CORPUS -- -malloc_limit_mb=64 -timeout=10
#![no_main]

use libfuzzer_sys::fuzz_target;
use longctx_eval::{Task, longbench};

fuzz_target!(|bytes: &[u8]| {
    let folder = std::env::temp_dir().join(format!("longctx-fuzz-records-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the records");
    for name in ["qasper", "trec", "passage_retrieval_en"] {
        std::fs::write(folder.join(format!("{name}.jsonl")), bytes).expect("a file of records");
        let task = longbench::task(name, &folder).expect("a known task");
        for sample in task.samples().expect("a file that can be read").samples {
            let score =
                task.score(&sample, &["a\nParagraph 3".to_owned()]).expect("one turn").value;
            assert!((0.0..=1.0).contains(&score), "{score}");
        }
    }
});
