//! LongBench-v2 and LongBench-E against the original programs (`fixtures/make_longbench_v2.py`).

use std::fs;

use longctx_eval::{LongBenchV2, Sample, Task, longbench};
use serde_json::{Value, json};
use tempfile::tempdir;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/longbench_v2.json")).unwrap()
}

#[test]
fn questions_with_choices_are_the_originals() {
    let (folder, fixture) = (tempdir().unwrap(), fixture());
    let all = fixture["records"].as_array().unwrap();
    let records: Vec<&Value> = all.iter().map(|one| &one["record"]).collect();
    let list = folder.path().join("data.json");
    fs::write(&list, serde_json::to_string(&records).unwrap()).unwrap();
    let lines = folder.path().join("data.jsonl");
    let text: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(&lines, text).unwrap();
    for file in [list, lines] {
        let samples = LongBenchV2 { file }.samples().unwrap();
        assert!(samples.skipped.is_empty() && samples.samples.len() == 40);
        for (ours, theirs) in samples.samples.iter().zip(all) {
            assert_eq!(ours.turns, [theirs["prompt"].as_str().unwrap()]);
            assert_eq!(ours.answers, [theirs["record"]["answer"].as_str().unwrap()]);
            let context = theirs["record"]["context"].as_str().unwrap().trim();
            assert_eq!(&ours.turns[0][ours.context.clone().unwrap()], context);
        }
        let group = samples.samples[0].group.as_deref().unwrap();
        assert!(group.starts_with("easy, ") || group.starts_with("hard, "), "{group}");
    }
}

#[test]
fn letters_are_the_originals() {
    let task = LongBenchV2 { file: "none".into() };
    let fixture = fixture();
    let all = fixture["predictions"].as_array().unwrap();
    assert!(all.len() >= 500);
    for one in all {
        for answer in ["A", "B", "C", "D"] {
            let sample = Sample { answers: vec![answer.into()], ..Sample::default() };
            let prediction = one["prediction"].as_str().unwrap().to_owned();
            let score = task.score(&sample, std::slice::from_ref(&prediction)).unwrap().value;
            assert_eq!(score == 1.0, one["letter"].as_str() == Some(answer), "{prediction:?}");
        }
    }
}

#[test]
fn broken_records_are_named() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("data.jsonl");
    let mut record = fixture()["records"][0]["record"].clone();
    record["answer"] = json!("E");
    fs::write(&file, format!("{record}\n{{}}\n")).unwrap();
    let samples = LongBenchV2 { file }.samples().unwrap();
    assert!(samples.samples.is_empty());
    let said: Vec<String> = samples.skipped.iter().map(ToString::to_string).collect();
    assert!(said[0].contains("line 1") && said[0].contains("got \"E\""), "{said:?}");
    assert!(said[1].contains("line 2") && said[1].contains("_id"), "{said:?}");
}

#[test]
fn length_groups_are_the_originals() {
    let (folder, fixture) = (tempdir().unwrap(), fixture());
    let lengths = fixture["lengths"].as_array().unwrap();
    let line = |one: &Value| {
        json!({"input": "q", "context": "c", "answers": ["a"], "length": one["length"]}).to_string()
    };
    let text: Vec<String> = lengths.iter().map(line).collect();
    for name in ["qasper", "qasper_e"] {
        fs::write(folder.path().join(format!("{name}.jsonl")), text.join("\n")).unwrap();
    }
    let task = longbench::task("qasper_e", folder.path()).unwrap();
    assert_eq!(task.name(), "qasper_e");
    for (ours, theirs) in task.samples().unwrap().samples.iter().zip(lengths) {
        assert_eq!(ours.group.as_deref(), theirs["group"].as_str(), "{theirs}");
    }
    let plain = longbench::task("qasper", folder.path()).unwrap().samples().unwrap();
    assert!(plain.samples.iter().all(|sample| sample.group.is_none()));
    assert_eq!(longbench::names_e().count(), 13);
    assert!(longbench::task("qmsum_e", folder.path()).is_err());
}
