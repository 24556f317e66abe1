//! Damaged records and results: none panics, hangs or needs more memory than a multiple of its
//! size.

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::record;
use longctx_eval::{Agreement, Category, Record, Task, longbench, records, report};
use longctx_mutate::{Counting, Trial};

#[global_allocator]
static MEMORY: Counting = Counting;

/// Records of LongBench's tasks.
const RECORDS: &str = concat!(
    r#"{"context": "c \u00e9", "input": "i", "answers": ["a", "b"], "_id": "x", "all_classes": ["a"], "length": 7}"#,
    "\n",
    r#"{"context": "Paragraph 1: {input}", "input": "", "answers": ["Paragraph 3"], "all_classes": null}"#,
    "\n"
);

/// Returns a line of results for each of a few settings and categories.
fn results() -> Vec<u8> {
    let mut lines = String::new();
    for (setting, kv_bytes) in [("dense-f16", 1000), ("h2o-2x", 500), ("h2o-4x", 0)] {
        for (task, category, sample) in [
            ("qasper", Category::SingleDocQa, "1"),
            ("trec", Category::FewShot, "1"),
            ("lcc", Category::Code, "1"),
            ("needle", Category::Needle, "600-words-0.250-0"),
        ] {
            let record = Record {
                question: Some("5f".into()),
                kv_bytes: Some(kv_bytes),
                ..record(setting, task, category, sample, 0.5)
            };
            lines += &(serde_json::to_string(&record).unwrap() + "\n");
        }
    }
    lines.into_bytes()
}

fn agreements() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let agreement = Agreement {
        tokens: 9,
        perplexity: 4.5,
        dense_perplexity: 4.25,
        top1: 0.875,
        kl: 0.0625,
        ratio: Some(4.0),
    };
    let none = BTreeMap::new();
    for setting in ["h2o-2x", "h2o-4x", "kivi-2"] {
        report::add_agreement(folder.path(), setting, "essay", &none, &agreement).unwrap();
    }
    fs::read(folder.path().join("agreement.jsonl")).unwrap()
}

/// A single test, because memory is counted for the whole process.
#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let memory = |bytes| 64 * bytes + (1 << 16);

    let corpus = [RECORDS.as_bytes().to_vec()];
    let tasks = ["qasper", "trec", "passage_retrieval_en"];
    let tasks = tasks
        .map(|name| (at(&format!("{name}.jsonl")), longbench::task(name, folder.path()).unwrap()));
    let tried = Trial { name: "records", corpus: &corpus, memory }.run(|bytes| {
        for (path, task) in &tasks {
            fs::write(path, bytes).unwrap();
            for sample in task.samples().unwrap().samples {
                let predictions = vec!["a\nParagraph 3".to_owned()];
                let score = task.score(&sample, &predictions).unwrap().value;
                assert!((0.0..=1.0).contains(&score), "{score}");
            }
        }
    });
    println!("{tried} files of records");

    let corpus = [results()];
    let path = at("results-1-of-1.jsonl");
    let tried = Trial { name: "results", corpus: &corpus, memory }.run(|bytes| {
        fs::write(&path, bytes).unwrap();
        drop(records(folder.path()));
    });
    println!("{tried} files of results");

    // A report takes longer: one of ten results, with every agreement.
    let corpus = [results(), agreements()];
    let mut turn = 0;
    let memory = |bytes| 256 * bytes + (1 << 21);
    Trial { name: "report", corpus: &corpus, memory }.run(|bytes| {
        turn += 1;
        if turn % 10 != 0 {
            return;
        }
        fs::write(&path, bytes).unwrap();
        if records(folder.path()).map_or(true, |records| records.is_empty()) {
            fs::write(&path, &corpus[0]).unwrap();
        }
        fs::write(at("agreement.jsonl"), bytes).unwrap();
        if report::has_agreement(folder.path(), "", "", &BTreeMap::new()).is_err() {
            fs::write(at("agreement.jsonl"), &corpus[1]).unwrap();
        }
        // Results that can be read give a report.
        report::write(folder.path()).unwrap();
    });
    println!("{} reports", turn / 10);
}
