//! Measures how many answers and pass keys a compressed text contains, and the loss of answers
//! under a model.

use anyhow::Result;
use base_models::{Pretrained, Session};
use candle_core::D;
use candle_nn::ops::log_softmax;
use longctx_core::{Batch, CausalLm, Logits, SeqId};
use prompt_compress::cl100k_tokens;

use crate::sample::Sample;

/// The sequence of every passage.
const SEQ: SeqId = 0;

/// The columns of [`Outcome::row`].
pub const COLUMNS: [&str; 5] = [
    "kept",
    "answers kept",
    "perplexity of the answer",
    "likelier than after random words",
    "pass keys",
];

/// Questions, pass keys, and the model that reads them.
pub struct Trial<'a> {
    pub questions: Vec<Sample>,
    pub keys: Vec<Sample>,
    pub llm: &'a Pretrained,
    pub session: Session,
}

/// The results of a method.
pub struct Outcome {
    /// Tokens kept, and tokens in total.
    kept: (usize, usize),
    /// Number of compressed passages that contain the answer.
    answers: usize,
    /// The loss of each answer in nats, and its number of tokens.
    costs: Vec<(f64, usize)>,
    /// Pass keys kept, and pass keys in total.
    keys: (usize, usize),
}

impl Trial<'_> {
    /// Compresses all passages and measures the results.
    pub fn run(&mut self, mut shorten: impl FnMut(&Sample) -> Result<String>) -> Result<Outcome> {
        let mut outcome =
            Outcome { kept: (0, 0), answers: 0, costs: Vec::new(), keys: (0, self.keys.len()) };
        for sample in &self.questions {
            let short = shorten(sample)?;
            outcome.kept.0 += cl100k_tokens(&short);
            outcome.kept.1 += cl100k_tokens(&sample.text);
            outcome.answers += usize::from(survives(sample, &short));
            outcome.costs.push(cost(self.llm, &mut self.session, sample, &short)?);
        }
        for sample in &self.keys {
            outcome.keys.0 += usize::from(survives(sample, &shorten(sample)?));
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// Returns the columns of a table row. `random` are the results of random words at the same
    /// rate.
    pub fn row(&self, random: Option<&Outcome>) -> String {
        let all = self.costs.len();
        let likelier = random.map_or(String::new(), |random| {
            let pairs = self.costs.iter().zip(&random.costs);
            format!("{}/{all}", pairs.filter(|(own, random)| own.0 < random.0).count())
        });
        let (nats, tokens) =
            self.costs.iter().fold((0.0, 0), |sum, cost| (sum.0 + cost.0, sum.1 + cost.1));
        [
            format!("{:.2}", self.kept.0 as f64 / self.kept.1 as f64),
            format!("{}/{all}", self.answers),
            format!("{:.2}", (nats / tokens as f64).exp()),
            likelier,
            format!("{}/{}", self.keys.0, self.keys.1),
        ]
        .join(" | ")
    }
}

/// Returns whether a text contains the answer's words in sequence.
fn survives(sample: &Sample, text: &str) -> bool {
    plain(text).contains(&plain(&sample.answer))
}

/// Returns the words of a text in lower case, with a space before and after each. Punctuation is
/// ignored because some tokenizers change it.
fn plain(text: &str) -> String {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.fold(" ".to_owned(), |all, word| all + &word.to_lowercase() + " ")
}

/// Returns the loss of the answer after a passage and the question, in nats, and its number of
/// tokens.
fn cost(
    llm: &Pretrained,
    session: &mut Session,
    sample: &Sample,
    passage: &str,
) -> Result<(f64, usize)> {
    let prompt = format!("{passage}\n\nQuestion: {}\nAnswer:", sample.question);
    let prompt = llm.tokenizer.encode(&prompt, true)?;
    let answer = llm.tokenizer.encode(&format!(" {}", sample.answer), false)?;
    let all = [prompt.as_slice(), &answer].concat();
    session.remove(SEQ);
    let (read, asked) = all[..all.len() - 1].split_at(prompt.len() - 1);
    session.forward(&Batch::single(SEQ, read.len())?, read, Logits::Last)?;
    let logits = session.forward(&Batch::single(SEQ, asked.len())?, asked, Logits::All)?;
    let log = log_softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
    let nats = log.iter().zip(&answer).map(|(log, &id)| -f64::from(log[id as usize])).sum();
    Ok((nats, answer.len()))
}
