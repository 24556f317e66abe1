//! LongBench-v2 (Bai et al., arXiv 2412.15204): 503 questions with four choices each, with its
//! authors' prompts and scores without chain of thought.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::one_prediction;
use crate::{Category, Error, Result, Sample, Samples, Score, Task, python};

const MAX_NEW_TOKENS: usize = 128;

/// The task `longbench-v2`. Scores are grouped by difficulty and length: "easy, short".
#[derive(Debug, Clone)]
pub struct LongBenchV2 {
    /// The authors' `data.json`, a list of records, or a file of JSON lines.
    pub file: PathBuf,
}

#[derive(serde::Deserialize)]
struct Record {
    #[serde(rename = "_id")]
    id: String,
    difficulty: String,
    length: String,
    question: String,
    #[serde(rename = "choice_A")]
    a: String,
    #[serde(rename = "choice_B")]
    b: String,
    #[serde(rename = "choice_C")]
    c: String,
    #[serde(rename = "choice_D")]
    d: String,
    answer: String,
    context: String,
}

impl Task for LongBenchV2 {
    fn name(&self) -> &str {
        "longbench-v2"
    }

    fn category(&self) -> Category {
        Category::MultipleChoice
    }

    fn samples(&self) -> Result<Samples> {
        let text = fs::read_to_string(&self.file).map_err(Error::io(&self.file))?;
        let broken = |line: usize, error: serde_json::Error| Error::Record {
            path: self.file.clone(),
            line,
            field: "(record)".into(),
            fault: error.to_string(),
        };
        let records: Vec<Result<Value>> = if text.trim_start().starts_with('[') {
            let all: Vec<Value> = serde_json::from_str(&text).map_err(|e| broken(e.line(), e))?;
            all.into_iter().map(Ok).collect()
        } else {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let parse = |(i, line)| serde_json::from_str(line).map_err(|e| broken(i + 1, e));
            lines.map(parse).collect()
        };
        let mut samples = Samples::default();
        for (i, record) in records.into_iter().enumerate() {
            let record = record.and_then(|value| {
                serde_json::from_value::<Record>(value).map_err(|e| broken(i + 1, e))
            });
            match record.and_then(|record| self.sample(&record, i + 1)) {
                Ok(sample) => samples.samples.push(sample),
                Err(error) => samples.skipped.push(error),
            }
        }
        Ok(samples)
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let chosen = chosen(one_prediction(sample, predictions)?);
        let right = chosen.is_some_and(|letter| sample.answers.contains(&letter));
        Ok(Score { value: f64::from(u8::from(right)), ..Score::default() })
    }
}

impl LongBenchV2 {
    fn sample(&self, record: &Record, line: usize) -> Result<Sample> {
        if !["A", "B", "C", "D"].contains(&record.answer.as_str()) {
            return Err(Error::Record {
                path: self.file.clone(),
                line,
                field: "answer".into(),
                fault: format!("expected A, B, C or D, got {:?}", record.answer),
            });
        }
        let before = "Please read the following text and answer the question below.\n\n<text>\n";
        let [context, question, a, b, c, d] =
            [&record.context, &record.question, &record.a, &record.b, &record.c, &record.d]
                .map(|text| python::strip(text));
        let after = format!(
            "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {a}\n(B) {b}\n(C) {c}\n(D) {d}\n\n\
             Format your response as follows: \"The correct answer is (insert answer here)\"."
        );
        Ok(Sample {
            id: record.id.clone(),
            turns: vec![[before, context, &after].concat()],
            context: Some(before.len()..before.len() + context.len()),
            question: Some(question.to_owned()),
            answers: vec![record.answer.clone()],
            max_new_tokens: MAX_NEW_TOKENS,
            chat: true,
            group: Some(format!("{}, {}", record.difficulty, record.length)),
            ..Sample::default()
        })
    }
}

/// Returns the letter that an answer names.
fn chosen(response: &str) -> Option<String> {
    static FORMS: LazyLock<[Regex; 2]> = LazyLock::new(|| {
        [r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"]
            .map(|form| Regex::new(form).expect("the pattern is valid"))
    });
    let response = python::strip(response).replace('*', "");
    FORMS.iter().find_map(|form| Some(form.captures(&response)?[1].to_owned()))
}
