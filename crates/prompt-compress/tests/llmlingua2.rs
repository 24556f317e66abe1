//! LLMLingua-2 equals the Python package. fixtures/llmlingua2.py made the expected results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use longctx_core::Rate;
use prompt_compress::llmlingua2::{
    Compression, ContextTarget, Family, Request, Settings, WordProbability,
};
use prompt_compress::{LlmLingua2, Target};
use serde::Deserialize;
use sha2::{Digest, Sha256};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn open(family: &str, settings: Settings) -> LlmLingua2 {
    let folder = match family {
        "bert" => "tiny-bert-base-multilingual-cased",
        _ => "tiny-xlm-roberta-large",
    };
    LlmLingua2::from_folder(&fixtures().join(folder), settings, &Device::Cpu).unwrap()
}

fn digest(text: &str) -> String {
    Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Formats a result as one string, like the fixtures.
fn compact(got: &Compression) -> String {
    let texts: Vec<&str> = got.contexts.iter().map(|(_, c)| c.text.as_str()).collect();
    let words: Vec<&str> = got.labels.iter().map(|label| label.word.as_str()).collect();
    let (texts, words) = (digest(&texts.join("\x1e")), digest(&words.join("\x1e")));
    let labels = digest(&labels(got));
    format!("{texts} {words} {labels} {} {}", got.original_tokens, got.compressed_tokens)
}

fn labels(got: &Compression) -> String {
    got.labels.iter().map(|label| if label.kept { '1' } else { '0' }).collect()
}

#[derive(Deserialize)]
struct Case {
    name: String,
    contexts: Option<Vec<String>>,
    options: Options,
    result: Expected,
}

impl Case {
    fn shares_scores(&self, other: &Case) -> bool {
        let texts = (&self.name, &self.contexts) == (&other.name, &other.contexts);
        texts && self.options.settings() == other.options.settings()
    }

    fn texts(&self) -> Vec<String> {
        let name = self.name.as_str();
        match (&self.contexts, name.strip_prefix("50,000 words from ")) {
            (Some(contexts), _) => contexts.clone(),
            (None, Some(seed)) => vec![long_text(50_000, seed.parse().unwrap())],
            (None, None) => panic!("no text for {name}"),
        }
    }

    fn check(&self, family: &str, contexts: &[&str], got: &Compression) {
        let what = format!("{family}, {}, {:?}", self.name, self.options);
        for (i, compressed) in &got.contexts {
            compressed.check(contexts[*i]).unwrap();
        }
        match &self.result {
            Expected::Compact(expected) => assert_eq!(&compact(got), expected, "{what}"),
            Expected::Whole { texts, words, labels: bits, tokens } => {
                let got_texts = got.contexts.iter().map(|(_, c)| c.text.as_str());
                assert_eq!(got_texts.collect::<Vec<_>>(), *texts, "{what}");
                let got_words = got.labels.iter().map(|label| label.word.as_str());
                assert_eq!(got_words.collect::<Vec<_>>(), *words, "{what}");
                assert_eq!(&labels(got), bits, "{what}");
                assert_eq!([got.original_tokens, got.compressed_tokens], *tokens, "{what}");
            }
        }
    }
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Options {
    rate: Option<f64>,
    target_token: Option<usize>,
    #[serde(default)]
    force_tokens: Vec<String>,
    #[serde(default)]
    force_reserve_digit: bool,
    #[serde(default)]
    drop_consecutive: bool,
    token_to_word: Option<String>,
    chunk_end_tokens: Option<Vec<String>>,
    #[serde(default)]
    use_context_level_filter: bool,
    use_token_level_filter: Option<bool>,
    target_context: Option<usize>,
    context_level_rate: Option<f64>,
    context_level_target_token: Option<usize>,
    #[serde(default)]
    force_context_ids: Vec<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Whole { texts: Vec<String>, words: Vec<String>, labels: String, tokens: [usize; 2] },
    Compact(String),
}

impl Options {
    fn settings(&self) -> Settings {
        let defaults = Settings::default();
        Settings {
            force_tokens: self.force_tokens.clone(),
            force_digits: self.force_reserve_digit,
            drop_consecutive: self.drop_consecutive,
            word_probability: match self.token_to_word.as_deref() {
                Some("first") => WordProbability::First,
                _ => WordProbability::Mean,
            },
            window_ends: self.chunk_end_tokens.clone().unwrap_or(defaults.window_ends),
            published: true,
            ..defaults
        }
    }

    fn request(&self) -> Request {
        let rate = |rate| Rate::new(rate).unwrap();
        let target = match self.target_token {
            Some(tokens) => Target::Tokens(tokens),
            None => Target::Rate(rate(self.rate.unwrap_or(0.5))),
        };
        let drop_words = self.use_token_level_filter.unwrap_or(true);
        let request = Request { target, drop_words, filter: None };
        if !self.use_context_level_filter {
            return request;
        }
        let contexts = self.target_context.map(ContextTarget::Contexts);
        let tokens = self.context_level_target_token.map(ContextTarget::Tokens);
        let share = self.context_level_rate.map(|r| ContextTarget::Rate(rate(r)));
        let target = contexts.or(tokens).or(share).unwrap_or(ContextTarget::Auto);
        request.with_filter(target, self.force_context_ids.clone())
    }
}

/// Returns the same words as `long_text` of fixtures/llmlingua2.py.
fn long_text(count: usize, mut seed: u64) -> String {
    const WORDS: [&str; 20] = [
        "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
        "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    ];
    let word = |i: usize| {
        seed = (seed * 1_103_515_245 + 12_345) % (1 << 31);
        let word = WORDS[(seed >> 16) as usize % WORDS.len()];
        if i % 11 == 10 { format!("{word}.") } else { word.to_owned() }
    };
    (0..count).map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn own_texts_equal_the_package() {
    let text = include_str!("fixtures/llmlingua2.json");
    let families: BTreeMap<String, Vec<Case>> = serde_json::from_str(text).unwrap();
    assert_eq!(families.len(), 2);
    for (family, cases) in &families {
        assert!(cases.len() > 100);
        let long = cases.iter().filter(|case| case.contexts.is_none());
        let rates: Vec<f64> = long.filter_map(|case| case.options.rate).collect();
        assert!([0.5, 0.25, 0.17, 0.125].iter().all(|rate| rates.contains(rate)), "{rates:?}");
        for same in cases.chunk_by(|a, b| a.shares_scores(b)) {
            let model = open(family, same[0].options.settings());
            let contexts = same[0].texts();
            let contexts: Vec<&str> = contexts.iter().map(String::as_str).collect();
            let scored = model.score(&contexts).unwrap();
            for case in same {
                let got = scored.compress(&case.options.request()).unwrap();
                case.check(family, &contexts, &got);
            }
        }
    }
}

#[derive(Deserialize)]
struct Wide {
    rates: Vec<f64>,
    passages: Vec<(String, usize, usize, usize)>,
    results: BTreeMap<String, Vec<Vec<Option<String>>>>,
}

#[derive(Deserialize)]
struct Sample {
    context: String,
}

#[test]
fn longbench_passages_equal_the_package() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/longbench-mini");
    if !samples.exists() {
        println!("skipped: {} is not there", samples.display());
        return;
    }
    let wide: Wide =
        serde_json::from_str(include_str!("fixtures/llmlingua2-longbench.json")).unwrap();
    assert!(wide.passages.len() >= 200);
    let mut files: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (file, ..) in &wide.passages {
        files.entry(file).or_insert_with(|| {
            let text = std::fs::read_to_string(samples.join(format!("{file}.jsonl"))).unwrap();
            text.split('\n').map(String::from).collect()
        });
    }
    for (family, rows) in &wide.results {
        let model = open(family, Settings { published: true, ..Settings::paper() });
        let mut compared = 0;
        for ((file, line, from, to), row) in wide.passages.iter().zip(rows) {
            let sample: Sample = serde_json::from_str(&files[file.as_str()][*line]).unwrap();
            let text: String = sample.context.chars().skip(*from).take(to - from).collect();
            let scored = model.score(&[&text]).unwrap();
            for (&rate, expected) in wide.rates.iter().zip(row) {
                let got = scored.compress(&Request::rate(Rate::new(rate).unwrap())).unwrap();
                got.contexts[0].1.check(&text).unwrap();
                let Some(expected) = expected else { continue };
                let what = format!("{family}, {file} line {line} from {from}, rate {rate}");
                assert_eq!(&compact(&got), expected, "{what}");
                compared += 1;
            }
        }
        println!("{family}: {compared} results equal");
        assert!(compared > 930);
    }
}

#[test]
fn families_are_distinguished() {
    assert_eq!(open("bert", Settings::default()).family(), Family::Bert);
    assert_eq!(open("xlm-roberta", Settings::default()).family(), Family::XlmRoberta);
}
