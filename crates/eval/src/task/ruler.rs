//! RULER (Hsieh et al., arXiv 2404.06654): 13 tasks of any length in tokens, generated as
//! NVIDIA/RULER does.
//!
//! A seed gives the original's samples for the same tokenizer. The random streams of Python and
//! numpy are reproduced, and NLTK's sentence segmentation, because needles are inserted between
//! sentences of essays.

mod fit;
mod niah;
mod qa;
mod template;
mod variables;
mod words;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use self::fit::Generate;
use self::niah::Niah;
use self::qa::{Dataset, Qa};
use self::variables::Variables;
use self::words::{CommonWords, frequent_words};
use super::{CountTokens, one_prediction};
use crate::{Category, Error, Haystack, Result, Sample, Samples, Score, Task, python};

/// The lengths with published results.
pub const LENGTHS: [usize; 6] = [4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// The data that samples are generated from.
#[derive(Clone)]
pub struct Source {
    /// The largest number of tokens of a prompt and its answer together, for each length.
    pub lengths: Vec<usize>,
    /// Counts the tokens of a text, without special tokens at its start.
    pub count: CountTokens,
    /// Number of tokens of each length reserved for a chat template.
    pub reserved: usize,
    /// The essays of the needle tasks.
    pub essays: Haystack,
    /// The folder of the data files:
    ///
    /// - `squad.json` (SQuAD 2.0) and `hotpotqa.json` (HotpotQA, distractor setting), for the tasks
    ///   `qa_1` and `qa_2`.
    /// - `english_words.json`, for `cwe` with more than 8,169 distinct words.
    pub folder: Option<PathBuf>,
    /// Samples per task and length; 500 in the original.
    pub samples: usize,
    /// Seed; 42 in the original.
    pub seed: u32,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lengths, reserved, folder, samples, seed, .. } = self;
        f.debug_struct("Source")
            .field("lengths", lengths)
            .field("reserved", reserved)
            .field("folder", folder)
            .field("samples", samples)
            .field("seed", seed)
            .finish_non_exhaustive()
    }
}

/// One of RULER's 13 tasks.
#[derive(Debug, Clone)]
pub struct Ruler {
    name: &'static str,
    kind: Kind,
    source: Arc<Source>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Needles(Niah),
    Variables,
    CommonWords,
    FrequentWords,
    Qa(Dataset),
}

const TASKS: [(&str, Kind); 13] = [
    ("niah_single_1", Kind::Needles(niah::SINGLE_1)),
    ("niah_single_2", Kind::Needles(niah::SINGLE_2)),
    ("niah_single_3", Kind::Needles(niah::SINGLE_3)),
    ("niah_multikey_1", Kind::Needles(niah::MULTIKEY_1)),
    ("niah_multikey_2", Kind::Needles(niah::MULTIKEY_2)),
    ("niah_multikey_3", Kind::Needles(niah::MULTIKEY_3)),
    ("niah_multivalue", Kind::Needles(niah::MULTIVALUE)),
    ("niah_multiquery", Kind::Needles(niah::MULTIQUERY)),
    ("vt", Kind::Variables),
    ("cwe", Kind::CommonWords),
    ("fwe", Kind::FrequentWords),
    ("qa_1", Kind::Qa(Dataset::Squad)),
    ("qa_2", Kind::Qa(Dataset::HotpotQa)),
];

/// Returns RULER's names of the 13 tasks.
pub fn names() -> impl Iterator<Item = &'static str> {
    TASKS.iter().map(|(name, _)| *name)
}

/// Returns the task `name`.
///
/// # Errors
/// [`Error::Setting`] if there is no such task. Its data are read when the samples are requested.
///
/// ```
/// use std::sync::Arc;
/// use longctx_eval::{Haystack, Task, ruler};
///
/// let source = ruler::Source {
///     lengths: vec![1000],
///     // Words for tokens, in place of a model's tokenizer.
///     count: Arc::new(|text: &str| Ok(text.split_whitespace().count())),
///     reserved: 0,
///     essays: Haystack::generated(0),
///     folder: None,
///     samples: 2,
///     seed: 42,
/// };
/// let task = ruler::task("niah_multikey_1", &Arc::new(source))?;
/// let sample = task.samples()?.samples.remove(0);
/// assert!(sample.turns[0].starts_with("A special magic number is hidden"));
/// assert_eq!(task.score(&sample, &[format!(" {}.", sample.answers[0])])?.value, 1.0);
/// # Ok::<(), longctx_eval::Error>(())
/// ```
pub fn task(name: &str, source: &Arc<Source>) -> Result<Ruler> {
    let known = || format!("one of {}", names().collect::<Vec<_>>().join(", "));
    let found = TASKS.iter().find(|(known, _)| *known == name);
    let &(name, kind) = found.ok_or_else(|| Error::setting("task", known(), name))?;
    Ok(Ruler { name, kind, source: Arc::clone(source) })
}

/// A prompt: `input` is the question with its context, `prefix` begins the answer.
struct Prompt {
    input: String,
    prefix: String,
    /// The byte range of the long context in `input`.
    context: Range<usize>,
    question: String,
    answers: Vec<String>,
}

impl Prompt {
    fn text(&self) -> String {
        self.input.clone() + &self.prefix
    }

    /// Returns the prompt with an example before it.
    fn after(self, example: &str) -> Self {
        let (start, end) = (self.context.start + example.len(), self.context.end + example.len());
        Self { input: example.to_owned() + &self.input, context: start..end, ..self }
    }
}

impl Kind {
    /// Returns the largest number of new tokens of an answer.
    fn new_tokens(self) -> usize {
        match self {
            Self::Needles(_) => 128,
            Self::Variables => 30,
            Self::CommonWords => 120,
            Self::FrequentWords => 50,
            Self::Qa(_) => 32,
        }
    }

    fn prompts(self, source: &Source, length: usize) -> Result<Vec<Prompt>> {
        let room = fit::LengthLimit {
            count: source.count.as_ref(),
            tokens: length.saturating_sub(source.reserved),
            new_tokens: self.new_tokens(),
        };
        let mut generator: Box<dyn Generate> = match self {
            Self::Needles(niah) => Box::new(niah.generator(source, length)),
            Self::Variables => Box::new(Variables::new(source, length)?),
            Self::CommonWords => Box::new(CommonWords::new(source, length)?),
            Self::FrequentWords => return frequent_words(source, &room),
            Self::Qa(dataset) => Box::new(Qa::read(dataset, source)?),
        };
        fit::prompts(generator.as_mut(), &room, source.samples)
    }
}

impl Task for Ruler {
    fn name(&self) -> &str {
        self.name
    }

    fn category(&self) -> Category {
        Category::Ruler
    }

    fn samples(&self) -> Result<Samples> {
        let mut samples = Vec::new();
        for &length in &self.source.lengths {
            let prompts = self.kind.prompts(&self.source, length)?;
            let id = |i: usize| format!("{length}-{}-{i}", self.source.seed);
            samples.extend(prompts.into_iter().enumerate().map(|(i, prompt)| Sample {
                id: id(i),
                turns: vec![prompt.input],
                context: Some(prompt.context),
                question: Some(prompt.question),
                answers: prompt.answers,
                classes: Vec::new(),
                max_new_tokens: self.kind.new_tokens(),
                chat: true,
                answer_prefix: Some(prompt.prefix),
                group: Some(length.to_string()),
            }));
        }
        Ok(Samples { samples, skipped: Vec::new() })
    }

    /// Returns the share of the answers that the prediction contains; for question answering, 1 if
    /// it contains any of them. Case is ignored.
    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let prediction = one_prediction(sample, predictions)?;
        let line = |c: char| if c <= '\x1f' { '\n' } else { c };
        let cleaned: String = python::strip(prediction).chars().map(line).collect();
        let prediction = python::strip(&cleaned).to_lowercase();
        let found =
            sample.answers.iter().filter(|answer| prediction.contains(&answer.to_lowercase()));
        let value = match (self.kind, found.count()) {
            (Kind::Qa(_), found) => f64::from(u8::from(found > 0)),
            (_, found) => found as f64 / sample.answers.len().max(1) as f64,
        };
        Ok(Score { value, ..Score::default() })
    }
}
