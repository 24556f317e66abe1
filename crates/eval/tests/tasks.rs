//! Valid and invalid records, and the needle test's grid.

use std::fs;
use std::sync::Arc;

use longctx_eval::{Category, Haystack, Length, NeedleGrid, Samples, Score, Task, longbench};

fn read(name: &str, lines: &str) -> Samples {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(format!("{name}.jsonl")), lines).unwrap();
    longbench::task(name, folder.path()).unwrap().samples().unwrap()
}

#[test]
fn invalid_records_are_omitted_and_named_by_line_and_field() {
    let good = r#"{"context": "c", "input": "i", "answers": ["a"], "_id": "x"}"#;
    let bad = [
        ("{\"context\": \"c\"", "(line)"),
        ("[1]", "(line)"),
        (r#"{"input": "i", "answers": ["a"]}"#, "context"),
        (r#"{"context": "c", "input": 3, "answers": ["a"]}"#, "input"),
        (r#"{"context": "c", "input": "i", "answers": "a"}"#, "answers"),
        (r#"{"context": "c", "input": "i", "answers": []}"#, "answers"),
        (r#"{"context": "c", "input": "i", "answers": [null]}"#, "answers"),
        (r#"{"context": "c", "input": "i", "answers": ["a"], "all_classes": 1}"#, "all_classes"),
        (r#"{"context": "c", "input": "i", "answers": ["a"], "_id": 1}"#, "_id"),
    ];
    for (line, field) in bad {
        let samples = read("qasper", &format!("{good}\n\n{line}\n{good}"));
        assert_eq!(samples.samples.len(), 2, "{line}");
        assert_ne!(samples.samples[0].id, samples.samples[1].id);
        let [error] = &samples.skipped[..] else { panic!("{:?}", samples.skipped) };
        let told = error.to_string();
        assert!(told.contains(&format!("qasper.jsonl, line 3, field `{field}`")), "{told}");
    }
    assert_eq!(read("trec", good).skipped.len(), 1, "no classes");
    assert_eq!(read("passage_retrieval_en", good).skipped.len(), 1, "no paragraph");
    let broken = "{\"context\": \"\u{fffd}\"}".replace('\u{fffd}', "\\ud800");
    assert_eq!(read("qasper", &broken).skipped.len(), 1);
}

#[test]
fn missing_files_and_unknown_tasks_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = longbench::task("lcc", folder.path()).unwrap().samples().unwrap_err();
    assert!(missing.to_string().contains("lcc.jsonl"), "{missing}");
    let unknown = longbench::task("lc", folder.path()).unwrap_err().to_string();
    assert!(unknown.contains("repobench-p") && unknown.contains("got lc"), "{unknown}");
}

#[test]
fn the_papers_categories_have_their_tasks() {
    let tasks = longbench::tasks("nowhere");
    let count = |category| tasks.iter().filter(|task| task.category() == category).count();
    use Category::*;
    let counts = [SingleDocQa, MultiDocQa, Summarization, FewShot, Synthetic, Code].map(count);
    assert_eq!(counts, [3, 3, 3, 3, 2, 2]);
}

#[test]
fn only_the_first_line_of_a_few_shot_answer_counts() {
    let record = r#"{"context": "c", "input": "i", "answers": ["no", "Paris"]}"#;
    for (name, want) in [("triviaqa", 1.0), ("hotpotqa", 0.4)] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(format!("{name}.jsonl")), record).unwrap();
        let task = longbench::task(name, folder.path()).unwrap();
        let sample = task.samples().unwrap().samples.remove(0);
        let score = task.score(&sample, &["\n\nParis\nLondon, Rome, Bern".to_owned()]).unwrap();
        assert_eq!(score, Score { value: want, ..Score::default() });
        assert!(task.score(&sample, &[]).is_err());
    }
}

#[test]
fn the_needle_grid_is_the_papers() {
    let grid = NeedleGrid::paper(Haystack::generated(0), 64);
    assert_eq!((grid.lengths.len(), grid.depths.len(), grid.repeats), (10, 10, 3));
    assert_eq!((grid.lengths[0], grid.lengths[9]), (512, 20_480));
    let small = NeedleGrid { lengths: vec![512, 700], ..grid };
    let samples = small.samples().unwrap().samples;
    assert_eq!(samples.len(), 60);
    let mut ids: Vec<&str> = samples.iter().map(|sample| sample.id.as_str()).collect();
    let mut keys: Vec<&str> = samples.iter().map(|sample| sample.answers[0].as_str()).collect();
    for all in [&mut ids, &mut keys] {
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 60);
    }
    assert!(samples.iter().all(|sample| sample.turns[0].contains(&sample.answers[0])));
    assert_eq!(samples, small.samples().unwrap().samples);
    // A grid that grows keeps its keys: the same length and depth have the same key.
    let corner = NeedleGrid { lengths: vec![700], depths: vec![0.0, 1.0], ..small.clone() };
    let of_corner = corner.samples().unwrap().samples;
    assert!(of_corner.len() == 6 && of_corner.iter().all(|sample| samples.contains(sample)));
    let half = samples[0].answers[0][..32].to_owned();
    let score = small.score(&samples[0], &[half]).unwrap();
    assert_eq!((score.value, score.partial), (0.0, Some(0.5)));
}

#[test]
fn needles_in_tokens_and_among_others() {
    let grid = NeedleGrid {
        lengths: vec![3000],
        unit: Length::Tokens(Arc::new(|text| Ok(text.len()))),
        distractors: 4,
        repeats: 1,
        ..NeedleGrid::paper(Haystack::generated(0), 7)
    };
    for sample in grid.samples().unwrap().samples {
        assert!((2950..=3000).contains(&sample.turns[0].len()), "{}", sample.turns[0].len());
        assert_eq!(sample.turns[0].matches("Remember it.").count(), 5);
    }
}

#[test]
fn unbounded_sizes_are_refused_before_reading() {
    let grid = || NeedleGrid::paper(Haystack::generated(0), 7);
    let count: longctx_eval::CountTokens = Arc::new(|text: &str| Ok(text.len()));
    let message = |grid: NeedleGrid| grid.samples().unwrap_err().to_string();
    let long = vec![512, usize::MAX];
    assert!(message(NeedleGrid { lengths: long.clone(), ..grid() }).contains("10000000 words"));
    let unit = Length::Tokens(count);
    assert!(message(NeedleGrid { lengths: long, unit, ..grid() }).contains("10000000 tokens"));
    assert!(message(NeedleGrid { repeats: usize::MAX, ..grid() }).contains("1000000 samples"));
    assert!(message(NeedleGrid { digits: usize::MAX, ..grid() }).contains("`digits`"));
    for (items, samples, name) in [(usize::MAX, 1, "items"), (1, usize::MAX, "samples")] {
        for task in longctx_eval::long_generation::tasks(longctx_eval::long_generation::Size {
            items,
            samples,
            seed: 0,
        }) {
            assert!(task.samples().unwrap_err().to_string().contains(name));
        }
    }
}
