//! RULER's samples and scores against those of the original programs (`fixtures/ruler/make.py`).

use std::path::Path;
use std::sync::Arc;

use longctx_eval::ruler::{self, Source};
use longctx_eval::{Haystack, Sample, Task};
use regex::Regex;
use sha2::{Digest, Sha256};

#[derive(serde::Deserialize)]
struct Made {
    task: String,
    length: usize,
    seed: u32,
    samples: Vec<MadeSample>,
}

#[derive(serde::Deserialize)]
struct MadeSample {
    input: String,
    prefix: String,
    outputs: Vec<String>,
    length: usize,
}

#[derive(serde::Deserialize)]
struct Scored {
    task: String,
    prediction: String,
    answers: Vec<String>,
    score: f64,
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ruler"))
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(folder().join(name)).unwrap()).unwrap()
}

fn count(text: &str) -> usize {
    static TOKEN: std::sync::LazyLock<Regex> =
        std::sync::LazyLock::new(|| Regex::new(r"[A-Za-z0-9]+|[^A-Za-z0-9\s]").unwrap());
    TOKEN.find_iter(text).count()
}

fn source(length: usize, seed: u32, samples: usize) -> Arc<Source> {
    Arc::new(Source {
        lengths: vec![length],
        count: Arc::new(|text: &str| Ok(count(text))),
        reserved: 0,
        essays: Haystack::from_path(folder().join("essays.txt")).unwrap(),
        folder: Some(folder().into()),
        samples,
        seed,
    })
}

fn hex(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn samples_are_the_originals() {
    let all: Vec<Made> = read("samples.json");
    assert_eq!(all.len(), 13 * 3);
    for made in all {
        let task = ruler::task(&made.task, &source(made.length, made.seed, 4)).unwrap();
        let ours = task.samples().unwrap().samples;
        assert_eq!(ours.len(), made.samples.len());
        for (i, (ours, theirs)) in ours.iter().zip(&made.samples).enumerate() {
            let name = format!("{} {} {} {i}", made.task, made.length, made.seed);
            let prefix = ours.answer_prefix.as_deref().unwrap();
            assert_eq!(ours.answers, theirs.outputs, "{name}");
            assert_eq!(prefix, theirs.prefix, "{name}");
            let tokens = count(&format!("{}{prefix}", ours.turns[0])) + ours.max_new_tokens;
            assert_eq!(tokens, theirs.length, "{name}");
            assert_eq!(hex(&ours.turns[0]), theirs.input, "{name}: {}", ours.turns[0]);
            assert!(tokens <= made.length, "{name}");
        }
    }
}

#[test]
fn scores_are_the_originals() {
    let all: Vec<Scored> = read("scores.json");
    assert!(all.len() >= 500);
    for one in all {
        let task = ruler::task(&one.task, &source(4096, 42, 1)).unwrap();
        let sample = Sample { answers: one.answers.clone(), ..Sample::default() };
        let score = task.score(&sample, std::slice::from_ref(&one.prediction)).unwrap().value;
        // The original rounds a percentage to two digits.
        assert!((100.0 * score - one.score).abs() <= 0.005 + 1e-9, "{:?} {score}", one.prediction);
    }
}

/// The context is the part that a prompt compressor may compress.
#[test]
fn contexts_lie_within_prompts() {
    for name in ruler::names() {
        let sample =
            ruler::task(name, &source(2000, 1, 1)).unwrap().samples().unwrap().samples.remove(0);
        let context = &sample.turns[0][sample.context.clone().unwrap()];
        assert!(context.len() > sample.turns[0].len() / 4, "{name}");
        let answer = &sample.answers[0];
        assert!(
            context.contains(answer) || name.starts_with("qa"),
            "{name}: {answer} in {context}"
        );
    }
}

/// A question with ten long documents gets these alone if ten fit and more do not, whatever size
/// the first question's short documents gave.
#[test]
fn a_question_with_long_documents_gets_its_own_ones() {
    let question = |name: &str, words: usize| {
        let document = |i: usize| (format!("{name}{i}"), vec!["word ".repeat(words)]);
        serde_json::json!({
            "question": format!("Which {name}?"),
            "answer": name,
            "context": (0..10).map(document).collect::<Vec<_>>(),
        })
    };
    let questions = [question("short", 20), question("long", 80)];
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("hotpotqa.json"), serde_json::to_vec(&questions).unwrap())
        .unwrap();
    let source = Source { folder: Some(data.path().into()), ..(*source(1000, 42, 2)).clone() };
    let samples = ruler::task("qa_2", &Arc::new(source)).unwrap().samples().unwrap().samples;
    let titles = |sample: &Sample, name: &str| {
        sample.turns[0].lines().filter(|line| line.starts_with(name)).count()
    };
    assert!(titles(&samples[0], "short") == 10 && titles(&samples[0], "long") > 0);
    assert_eq!((titles(&samples[1], "long"), titles(&samples[1], "short")), (10, 0));
}

#[test]
fn missing_data_and_short_lengths_are_errors() {
    for name in ruler::names() {
        let error = ruler::task(name, &source(100, 1, 1)).unwrap().samples().unwrap_err();
        assert!(error.to_string().contains("length"), "{name}: {error}");
    }
    let without = Source { folder: None, ..(*source(4000, 1, 1)).clone() };
    let error = ruler::task("qa_1", &Arc::new(without)).unwrap().samples().unwrap_err().to_string();
    assert!(error.contains("squad.json"), "{error}");
    assert!(
        ruler::task("niah", &source(1, 1, 1)).unwrap_err().to_string().contains("niah_single_1")
    );
}
