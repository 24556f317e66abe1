//! Questions about documents, among documents of other questions.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::fit::{Generate, UpperBound, threefold};
use super::template::QA;
use super::{Prompt, Source};
use crate::python::random::Random;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dataset {
    /// SQuAD 2.0 (Rajpurkar et al.), its answerable questions.
    Squad,
    /// HotpotQA (Yang et al.), each question with ten documents.
    HotpotQa,
}

impl Dataset {
    pub fn file(self) -> &'static str {
        match self {
            Self::Squad => "squad.json",
            Self::HotpotQa => "hotpotqa.json",
        }
    }
}

/// A question and the indices of its documents.
struct Asked {
    question: String,
    answers: Vec<String>,
    documents: Vec<usize>,
    /// Documents of the same article, which are used before others.
    related: Vec<usize>,
}

pub struct Qa {
    asked: Vec<Asked>,
    documents: Vec<String>,
    seed: u32,
    random: Random,
}

impl Qa {
    pub fn read(dataset: Dataset, source: &Source) -> Result<Self> {
        let Some(folder) = &source.folder else {
            let expected = format!("a folder with {}", dataset.file());
            return Err(Error::setting("data of RULER's questions", expected, "none"));
        };
        let path = folder.join(dataset.file());
        let (asked, documents) = match dataset {
            Dataset::Squad => squad(parse(&path)?),
            Dataset::HotpotQa => hotpot_qa(parse(&path)?),
        };
        if asked.is_empty() {
            return Err(Error::setting(path.display().to_string(), "questions", "none"));
        }
        Ok(Self { asked, documents, seed: source.seed, random: Random::new(source.seed) })
    }

    fn chosen(&mut self, asked: usize, count: usize) -> Option<Vec<usize>> {
        let Asked { documents, related, .. } = &self.asked[asked];
        let all = self.documents.len();
        if count >= all {
            return Some((0..all).cycle().take(count).collect());
        }
        let more = count.checked_sub(documents.len())?;
        let drawn = if more > related.len() {
            let own: HashSet<usize> = documents.iter().chain(related).copied().collect();
            let others: Vec<usize> = (0..all).filter(|i| !own.contains(i)).collect();
            let drawn = self.random.sample(others.len(), more - related.len())?;
            related.iter().copied().chain(drawn.into_iter().map(|i| others[i])).collect::<Vec<_>>()
        } else {
            self.random.sample(related.len(), more)?.into_iter().map(|i| related[i]).collect()
        };
        Some(documents.iter().copied().chain(drawn).collect())
    }
}

impl Generate for Qa {
    fn prompt(&mut self, sample: usize, size: usize) -> Option<Prompt> {
        let mut chosen = self.chosen(sample, size)?;
        Random::new(self.seed).shuffle(&mut chosen);
        let numbered = chosen.iter().enumerate();
        let document = |(i, &number): (usize, &usize)| {
            format!("Document {}:\n{}", i + 1, self.documents[number])
        };
        let context = numbered.map(document).collect::<Vec<_>>().join("\n\n");
        let Asked { question, answers, .. } = &self.asked[sample];
        Some(QA.fill(&context, &[("query", question)], answers.clone()))
    }

    fn with_example(&mut self, prompt: Prompt) -> Prompt {
        prompt
    }

    fn example(&self) -> &str {
        ""
    }

    fn max_samples(&self) -> usize {
        self.asked.len()
    }

    fn step(&self) -> usize {
        10
    }

    fn upper_bound(&self) -> UpperBound {
        UpperBound { size: 10, of: threefold }
    }
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Record {
        path: path.to_owned(),
        line: error.line(),
        field: "(file)".into(),
        fault: error.to_string(),
    })
}

/// Returns all distinct documents in order, and their indices.
fn numbered(documents: impl Iterator<Item = String>) -> (Vec<String>, HashMap<String, usize>) {
    let distinct: BTreeSet<String> = documents.collect();
    let documents: Vec<String> = distinct.into_iter().collect();
    let numbers = documents.iter().cloned().enumerate().map(|(i, text)| (text, i)).collect();
    (documents, numbers)
}

#[derive(serde::Deserialize)]
struct Squad {
    data: Vec<Article>,
}
#[derive(serde::Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}
#[derive(serde::Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<SquadQuestion>,
}
#[derive(serde::Deserialize)]
struct SquadQuestion {
    question: String,
    is_impossible: bool,
    #[serde(default)]
    answers: Vec<SquadAnswer>,
}
#[derive(serde::Deserialize)]
struct SquadAnswer {
    text: String,
}

fn squad(Squad { data }: Squad) -> (Vec<Asked>, Vec<String>) {
    let paragraphs = || data.iter().flat_map(|article| &article.paragraphs);
    let (documents, numbers) = numbered(paragraphs().map(|paragraph| paragraph.context.clone()));
    let mut asked = Vec::new();
    for article in &data {
        let all: Vec<usize> = article.paragraphs.iter().map(|own| numbers[&own.context]).collect();
        for paragraph in &article.paragraphs {
            let own = numbers[&paragraph.context];
            for question in paragraph.qas.iter().filter(|question| !question.is_impossible) {
                asked.push(Asked {
                    question: question.question.clone(),
                    answers: question.answers.iter().map(|answer| answer.text.clone()).collect(),
                    documents: vec![own],
                    related: all.iter().copied().filter(|&number| number != own).collect(),
                });
            }
        }
    }
    (asked, documents)
}

#[derive(serde::Deserialize)]
struct HotpotQuestion {
    question: String,
    answer: String,
    /// Titles with their sentences.
    context: Vec<(String, Vec<String>)>,
}

fn hotpot_qa(data: Vec<HotpotQuestion>) -> (Vec<Asked>, Vec<String>) {
    let text =
        |(title, sentences): &(String, Vec<String>)| format!("{title}\n{}", sentences.concat());
    let (documents, numbers) =
        numbered(data.iter().flat_map(|question| &question.context).map(text));
    let one = |question: &HotpotQuestion| Asked {
        question: question.question.clone(),
        answers: vec![question.answer.clone()],
        documents: question.context.iter().map(|document| numbers[&text(document)]).collect(),
        related: Vec::new(),
    };
    (data.iter().map(one).collect(), documents)
}
