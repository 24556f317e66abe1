//! LLMLingua, LongLLMLingua and Selective-Context equal the Python package and the published
//! algorithm with the same tiny Llama. fixtures/causal.py made the expected results.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use base_models::{LoadOptions, Session, Transformer};
use candle_core::DType;
use longctx_core::{DenseCache, Prompt, PromptCompressor, Rate};
use prompt_compress::llmlingua::{
    Budget, Compression, Documents, Order, QuestionPosition, Rank, Sentences, Settings, TokenScore,
};
use prompt_compress::{LlmLingua, SelectiveContext, Target, Unit};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
}

fn model() -> Session {
    let model = Transformer::from_folder(&folder(), &LoadOptions::default()).unwrap();
    model.session(|layer| DenseCache::new(layer.clone(), DType::F32)).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(folder().join("tokenizer.json")).unwrap()
}

fn digest(text: &str) -> String {
    Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Splits sentences as fixtures/causal.py does, each with the white space after it.
fn plain_sentences(text: &str) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut ended, mut space) = (0, false, false);
    for (at, c) in text.char_indices() {
        if !c.is_whitespace() && ended && space {
            ranges.push(start..at);
            start = at;
        }
        match c.is_whitespace() {
            true => space = true,
            false => (ended, space) = (matches!(c, '.' | '!' | '?'), false),
        }
    }
    ranges.push(start..text.len());
    ranges
}

struct Variant {
    settings: Settings,
    rate: f64,
    split: bool,
    asks: bool,
    instructs: bool,
}

/// Returns a variant of fixtures/causal.py by name.
fn variant(name: &str) -> Variant {
    let plain = Settings { append_question: true, published: true, ..Settings::llmlingua() };
    let long = Settings { rank: Rank::Question(QuestionPosition::After), ..plain.clone() };
    let sentences = Sentences { split: plain_sentences, ..Sentences::default() };
    let (settings, rate, split, asks, instructs) = match name {
        "plain" => (Settings { segment: 100, ..plain }, 0.5, false, false, false),
        "tight" => (Settings { segment: 64, ..plain }, 0.2, false, false, false),
        "contexts" => {
            let document_budget = Budget::Times(1.3);
            (Settings { segment: 50, document_budget, ..plain }, 0.4, true, true, true)
        }
        "sentences" => {
            let document_budget = Budget::Plus(300.0);
            let sentences = Some(sentences);
            (Settings { segment: 60, document_budget, sentences, ..plain }, 0.5, true, true, false)
        }
        "keep split" => {
            let document_budget = Budget::Times(1.2);
            let separator = Some(13);
            (Settings { segment: 50, document_budget, separator, ..plain }, 0.4, true, false, false)
        }
        "long" => {
            let (order, token_score) = (Order::Ranked, TokenScore::Contrastive);
            let settings = Settings { segment: 50, order, token_score, dynamic_ratio: 0.3, ..long };
            (settings, 0.5, true, true, false)
        }
        "long before" => {
            let settings = Settings {
                rank: Rank::Question(QuestionPosition::Before),
                segment: 80,
                order: Order::BestAtBothEnds,
                dynamic_ratio: 0.4,
                document_budget: Budget::Times(1.5),
                append_question: false,
                ..long
            };
            (settings, 0.4, true, true, true)
        }
        "long sentences" => {
            let settings = Settings {
                segment: 70,
                sentences: Some(Sentences { first: 1, last: 1, ..sentences }),
                document_budget: Budget::Plus(300.0),
                force_documents: vec![3],
                ..long
            };
            (settings, 0.5, true, true, false)
        }
        "contexts alone" => {
            let document_budget = Budget::Times(1.0);
            (Settings { drop_tokens: false, document_budget, ..long }, 0.4, true, true, false)
        }
        other => panic!("no variant {other}"),
    };
    Variant { settings, rate, split, asks, instructs }
}

#[derive(Deserialize)]
struct Own {
    contexts: Vec<String>,
    question: String,
    instruction: String,
    results: BTreeMap<String, Option<(String, usize, usize)>>,
}

fn own() -> Own {
    serde_json::from_str(include_str!("fixtures/llmlingua-own.json")).unwrap()
}

/// One model for each variant, and its results.
struct Runner {
    lingua: LlmLingua<Session>,
    variant: Variant,
    own: Own,
}

impl Runner {
    fn new(name: &str) -> Self {
        let variant = variant(name);
        let lingua = LlmLingua::new(model(), tokenizer(), variant.settings.clone()).unwrap();
        Self { lingua: lingua.with_second(model()), variant, own: own() }
    }

    fn run(&mut self, contexts: &[String]) -> Compression {
        let documents = Documents::join(contexts);
        let question = if self.variant.asks { self.own.question.as_str() } else { "" };
        let instruction = if self.variant.instructs { self.own.instruction.as_str() } else { "" };
        let target = Target::Rate(Rate::new(self.variant.rate).unwrap());
        let got =
            self.lingua.compress_documents(&documents, instruction, question, target).unwrap();
        got.compressed.check(&documents.text).unwrap();
        // Every output byte has a source, except text that is not of the documents and broken
        // characters.
        for piece in &got.compressed.pieces {
            let (source, output) = (piece.source.clone(), piece.output.clone());
            assert_eq!(documents.text[source], got.compressed.text[output]);
        }
        got
    }
}

#[test]
fn own_text_equals_the_package() {
    let own = own();
    for (name, expected) in &own.results {
        let (text, before, after) = expected.as_ref().expect("a result for each variant");
        let mut runner = Runner::new(name);
        let whole = [own.contexts.join("\n\n")];
        let got = runner.run(if runner.variant.split { &own.contexts } else { &whole });
        assert_eq!(&got.compressed.text, text, "{name}");
        assert_eq!((got.original_tokens, got.compressed_tokens), (*before, *after), "{name}");
    }
}

#[derive(Deserialize)]
struct Wide {
    passages: Vec<(String, usize, usize, usize)>,
    results: BTreeMap<String, Vec<Option<String>>>,
    selective: BTreeMap<String, Vec<Option<String>>>,
    published: BTreeMap<String, Vec<Option<String>>>,
}

#[derive(Deserialize)]
struct Sample {
    context: String,
}

/// Returns the passages that the fixtures name; `None` if the samples are missing.
fn passages(wide: &Wide) -> Option<Vec<String>> {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/longbench-mini");
    if !samples.exists() {
        println!("skipped: {} is not there", samples.display());
        return None;
    }
    let read = |(file, line, from, to): &(String, usize, usize, usize)| {
        let text = std::fs::read_to_string(samples.join(format!("{file}.jsonl"))).unwrap();
        let line = text.split('\n').nth(*line).unwrap().to_owned();
        let sample: Sample = serde_json::from_str(&line).unwrap();
        sample.context.chars().skip(*from).take(to - from).collect()
    };
    Some(wide.passages.iter().map(read).collect())
}

/// Returns the passage, or its four quarters.
fn contexts(passage: &str, split: bool) -> Vec<String> {
    if !split {
        return vec![passage.to_owned()];
    }
    let chars: Vec<char> = passage.chars().collect();
    let quarter = |i: usize| -> String {
        let part = &chars[chars.len() * i / 4..chars.len() * (i + 1) / 4];
        part.iter().collect::<String>().trim().to_owned()
    };
    (0..4).map(quarter).filter(|quarter| !quarter.is_empty()).collect()
}

#[test]
fn longbench_passages_equal_the_package() {
    let wide: Wide = serde_json::from_str(include_str!("fixtures/llmlingua.json")).unwrap();
    assert!(wide.passages.len() >= 50);
    let Some(passages) = passages(&wide) else { return };
    for (name, expected) in &wide.results {
        let mut runner = Runner::new(name);
        let mut compared = 0;
        for ((passage, at), expected) in passages.iter().zip(&wide.passages).zip(expected) {
            let Some(expected) = expected else { continue };
            let got = runner.run(&contexts(passage, runner.variant.split));
            let text = digest(&got.compressed.text);
            let got = format!("{text} {} {}", got.original_tokens, got.compressed_tokens);
            assert_eq!(&got, expected, "{name}, {at:?}");
            compared += 1;
        }
        println!("{name}: {compared} passages equal");
        assert!(compared >= 50, "{name}: {compared}");
    }
}

/// Compresses the passages at each rate, and compares the results with the expected ones.
fn check_selective(
    mut selective: SelectiveContext<Session>,
    passages: &[String],
    expected: &BTreeMap<String, Vec<Option<String>>>,
) {
    assert_eq!(expected.len(), 2);
    for (rate, expected) in expected {
        let rate = Rate::new(rate.parse().unwrap()).unwrap();
        let mut compared = 0;
        for (passage, expected) in passages.iter().zip(expected) {
            let Some(expected) = expected else { continue };
            let got = selective.compress(Prompt::new(passage).unwrap(), rate).unwrap();
            assert_eq!(&digest(&got.text), expected, "{passage}");
            compared += 1;
        }
        println!("rate {}: {compared} passages equal", rate.get());
        assert!(compared >= 50);
    }
}

#[test]
fn selective_context_equals_the_published_algorithm() {
    let wide: Wide = serde_json::from_str(include_str!("fixtures/llmlingua.json")).unwrap();
    let Some(passages) = passages(&wide) else { return };
    let passages: Vec<String> = passages.iter().map(|text| text.trim_end().to_owned()).collect();
    let selective = SelectiveContext::new(model(), tokenizer(), 0, Unit::Word);
    check_selective(selective, &passages, &wide.selective);
}

/// Splits sentences as the authors' program does, for ASCII text with single spaces: at a space
/// after a full stop or question mark, except after abbreviations,
/// `(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s`.
fn authors_sentences(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut ranges = Vec::new();
    let mut start = 0;
    for at in (1..bytes.len()).filter(|&at| bytes[at] == b' ' && b".?".contains(&bytes[at - 1])) {
        let dotted = matches!(bytes[..at], [.., a, b'.', b, _] if word(a) && word(b));
        let title = matches!(bytes[..at], [.., b'A'..=b'Z', b'a'..=b'z', b'.']);
        if !dotted && !title {
            ranges.push(start..at + 1);
            start = at + 1;
        }
    }
    ranges.push(start..text.len());
    ranges
}

#[test]
fn selective_context_equals_the_authors_program() {
    let wide: Wide = serde_json::from_str(include_str!("fixtures/llmlingua.json")).unwrap();
    let Some(passages) = passages(&wide) else { return };
    let plain = |text: &String| {
        let ascii: String = text.chars().filter(char::is_ascii).collect();
        ascii.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let passages: Vec<String> = passages.iter().map(plain).collect();
    let selective = SelectiveContext::new(model(), tokenizer(), 0, Unit::Word);
    check_selective(selective.sentence_by_sentence(authors_sentences), &passages, &wide.published);
}
