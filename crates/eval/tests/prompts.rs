//! Prompts, limits, chat exceptions and truncation against the original program
//! (`fixtures/make_prompts.py`).

use std::fs;

use longctx_eval::{Error, longbench, truncate_middle};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    record: serde_json::Value,
    tasks: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    task: String,
    limit: usize,
    chat: bool,
    prompt: String,
    max_new_tokens: usize,
    stops_at_newline: bool,
}

#[test]
fn prompts_equal_the_originals() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/prompts.json")).unwrap();
    let mut record = fixture.record;
    let encode = |text: &str| Ok::<_, Error>(text.chars().map(u32::from).collect());
    let decode = |tokens: &[u32]| Ok(tokens.iter().filter_map(|&c| char::from_u32(c)).collect());
    for want in &fixture.tasks {
        record["all_classes"] = serde_json::Value::Null;
        match want.task.as_str() {
            "trec" => record["all_classes"] = vec!["x"].into(),
            "passage_retrieval_en" => record["answers"] = vec!["Paragraph 1"].into(),
            _ => (),
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(format!("{}.jsonl", want.task));
        fs::write(file, format!("{record}\n")).unwrap();
        let tasks = longbench::tasks(folder.path());
        let task = tasks.iter().find(|task| task.name() == want.task).unwrap();
        let samples = task.samples().unwrap();
        assert!(samples.skipped.is_empty(), "{:?}", samples.skipped);
        let [sample] = &samples.samples[..] else { panic!("{} samples", samples.samples.len()) };
        let prompt = truncate_middle(&sample.turns[0], want.limit, encode, decode).unwrap();
        assert_eq!(prompt, want.prompt, "{} at {}", want.task, want.limit);
        assert_eq!(
            (sample.chat, sample.max_new_tokens, task.stops_at_newline()),
            (want.chat, want.max_new_tokens, want.stops_at_newline),
            "{}",
            want.task
        );
    }
    let mut seen: Vec<&str> = fixture.tasks.iter().map(|prompt| prompt.task.as_str()).collect();
    seen.dedup();
    let mut names: Vec<&str> = longbench::names().collect();
    names.sort_unstable();
    assert_eq!(names, seen);
}

#[test]
fn a_limit_without_room_is_refused() {
    let encode = |text: &str| Ok::<_, Error>(text.chars().map(u32::from).collect());
    let cut = truncate_middle("abc", 1, encode, |_| Ok(String::new()));
    assert!(cut.unwrap_err().to_string().contains("model_max_len"));
}
