//! The needle test against the original program's prompts and scores (`fixtures/make_needle.py`).

use std::fs;

use longctx_eval::needle::{self, MultiNeedle, Needle};
use longctx_eval::{Error, Haystack};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    document: String,
    prompts: Vec<Prompt>,
    pairs: Vec<Pair>,
    lengths: Vec<usize>,
    depths: Vec<f64>,
}

#[derive(Deserialize)]
struct Prompt {
    words: usize,
    depth: f64,
    prompt: String,
}

#[derive(Deserialize)]
struct Pair {
    prediction: String,
    answer: String,
    exact: f64,
    partial: f64,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/needle.json")).unwrap()
}

#[test]
fn prompts_equal_the_originals() {
    let fixture = fixture();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("document.txt"), &fixture.document).unwrap();
    let haystack = Haystack::from_path(folder.path()).unwrap();
    for want in fixture.prompts {
        let needle = Needle { depth: want.depth, digits: 7, seed: 5 };
        let sample = needle.in_words(&haystack, want.words).unwrap();
        assert_eq!(sample.prompt.replace(&sample.answer, "<KEY>"), want.prompt);
    }
}

#[test]
fn scores_equal_the_originals() {
    for pair in fixture().pairs {
        let score = needle::score(&pair.prediction, &pair.answer);
        let place = format!("{:?} for {:?}", pair.prediction, pair.answer);
        assert_eq!(score.exact, pair.exact, "exact match of {place}");
        assert!((score.partial - pair.partial).abs() < 1e-12, "partial match of {place}");
    }
}

#[test]
fn the_grid_is_the_papers() {
    let (from, to) = needle::PAPER_WORDS;
    let lengths = needle::spaced(from as f64, to as f64, 10);
    assert_eq!(lengths.iter().map(|&x| x as usize).collect::<Vec<_>>(), fixture().lengths);
    assert_eq!(needle::spaced(0.0, 1.0, 10), fixture().depths);
}

#[test]
fn bad_settings_are_named() {
    let haystack = Haystack::generated(0);
    let message = |needle: Needle| needle.in_words(&haystack, 10).unwrap_err().to_string();
    assert!(message(Needle { depth: 1.5, digits: 7, seed: 0 }).contains("depth"));
    assert!(message(Needle { depth: f64::NAN, digits: 7, seed: 0 }).contains("depth"));
    assert!(message(Needle { depth: 0.5, digits: 0, seed: 0 }).contains("digits"));
    let needle = Needle { depth: 0.5, digits: 1, seed: 0 };
    for distractors in [10, 24] {
        assert!(MultiNeedle { needle, distractors }.in_words(&haystack, 10).is_err());
    }
    let count = |text: &str| Ok::<_, Error>(text.len());
    let short = needle.in_tokens(&haystack, 10, count).unwrap_err().to_string();
    assert!(short.contains("`tokens`"), "{short}");
}

#[test]
fn a_prompt_has_many_keys_and_asks_for_one() {
    let haystack = Haystack::generated(0);
    for depth in [0.0, 0.3, 0.5, 1.0] {
        let needle = Needle { depth, digits: 7, seed: 2 };
        let sample = MultiNeedle { needle, distractors: 8 }.in_words(&haystack, 800).unwrap();
        assert_eq!(sample.prompt.matches("Remember it.").count(), 9);
        let (text, question) = sample.prompt.rsplit_once("\nWhat is the pass key of ").unwrap();
        let city = question.split_once('?').unwrap().0;
        let sentence = format!("The pass key of {city} is {}.", sample.answer);
        let at = text.find(&sentence).unwrap() as f64 / text.len() as f64;
        assert!((at - depth).abs() < 0.2, "asked for depth {depth}, found at {at}");
    }
}

proptest! {
    #[test]
    fn prompts_are_as_long_as_asked(limit in 400_usize..6000, depth in 0.0..=1.0, seed: u64) {
        let count = |text: &str| Ok::<_, Error>(text.chars().count());
        let needle = Needle { depth, digits: 7, seed };
        let sample = needle.in_tokens(&Haystack::generated(1), limit, count).unwrap();
        let length = sample.prompt.chars().count();
        prop_assert!(length <= limit && length + 30 > limit, "{length} of {limit}");
        prop_assert_eq!(sample.prompt.matches(&sample.answer).count(), 2);
    }

    #[test]
    fn scores_keep_to_their_range(prediction in "\\PC{0,40}", answer in "[0-9]{1,64}") {
        let score = needle::score(&prediction, &answer);
        prop_assert!((0.0..=1.0).contains(&score.partial));
        prop_assert_eq!(needle::score(&format!("{prediction} {answer}"), &answer).exact, 1.0);
    }
}
