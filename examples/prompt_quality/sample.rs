//! Questions with passages that contain the answers, and pass keys in generated text.

use std::path::Path;

use anyhow::{Context, Result};
use longctx_eval::Haystack;
use serde::Deserialize;

/// LongBench's question answering tasks.
const TASKS: [&str; 7] =
    ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"];

/// A text, a question about it, and the answer.
pub struct Sample {
    pub text: String,
    pub question: String,
    pub answer: String,
}

#[derive(Deserialize)]
struct Record {
    input: String,
    context: String,
    answers: Vec<String>,
}

/// Returns up to `per_task` questions of each task whose answer is literally in the text, with
/// about `words` words around it. Answers "yes" and "no" are skipped.
pub fn questions(folder: &Path, per_task: usize, words: usize) -> Result<Vec<Sample>> {
    let mut all = Vec::new();
    for task in TASKS {
        let path = folder.join(format!("{task}.jsonl"));
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut found = Vec::new();
        for line in text.split('\n').filter(|line| !line.is_empty()) {
            let record: Record = serde_json::from_str(line).with_context(|| task)?;
            found.extend(passage(&record, words));
        }
        all.extend(found.into_iter().take(per_task));
    }
    Ok(all)
}

fn passage(record: &Record, words: usize) -> Option<Sample> {
    // "yes" and "no" are in a text by chance.
    let telling = record.answers.iter().filter(|answer| !["yes", "no"].contains(&answer.as_str()));
    let mut places = telling.map(|answer| (answer, find(&record.context, answer)));
    let (answer, at) = places.find_map(|(answer, at)| Some((answer, at?)))?;
    // In a triviaqa prompt the question is the part before "Answer:".
    let question = record.input.trim().trim_end_matches("Answer:").trim();
    let question = question.rsplit("Question:").next().unwrap_or(question).trim();
    // A third of the passage is before the answer.
    let before = words_back(&record.context[..at], words / 3);
    let text: Vec<&str> = record.context[before..].split_inclusive(' ').take(words).collect();
    Some(Sample { text: text.concat(), question: question.into(), answer: answer.clone() })
}

/// Returns the first position of `answer` in `text` at word boundaries.
fn find(text: &str, answer: &str) -> Option<usize> {
    let inside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let mut places = text.match_indices(answer).map(|(at, _)| at);
    places.find(|&at| {
        let (before, after) = (&text[..at], &text[at + answer.len()..]);
        !inside(before.chars().next_back()) && !inside(after.chars().next())
    })
}

/// Returns the position where the last `words` words of `text` begin.
fn words_back(text: &str, words: usize) -> usize {
    text.rmatch_indices(' ').nth(words).map_or(0, |(at, _)| at + 1)
}

/// Returns texts with one pass key each, at depths from the start to the end.
pub fn needles(haystack: &Haystack, count: usize, words: usize) -> Result<Vec<Sample>> {
    let hay = haystack.words(words)?;
    let hay: Vec<&str> = hay.split_inclusive(' ').collect();
    let sample = |i: usize| {
        let key = 1_000_000 + 7_919_191 * (i + 1) % 9_000_000;
        let depth = hay.len() * (2 * i + 1) / (2 * count);
        let needle = format!("The pass key is {key}. Remember it. ");
        let text = [hay[..depth].concat(), needle, hay[depth..].concat()].concat();
        Sample { text, question: "What is the pass key?".into(), answer: key.to_string() }
    };
    Ok((0..count).map(sample).collect())
}
