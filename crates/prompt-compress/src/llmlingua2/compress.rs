//! From word probabilities to compressed texts: rates, token targets and context filters.

use std::ops::Range;
use std::sync::LazyLock;

use super::LlmLingua2;
use super::forced_tokens::ForcedTokens;
use super::windows::Window;
use super::words::{Word, select};
use crate::Target;
use crate::percentile::{Number, percentile};
use crate::tokens::cl100k_tokens;
use longctx_core::{Compressed, Error, Piece, Rate, Result};
use regex::Regex;

/// How many contexts are kept and compressed.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ContextTarget {
    /// A number such that about half of the reduction comes from dropped contexts, and the rest
    /// from dropped words.
    Auto,
    /// A share of the contexts.
    Rate(Rate),
    /// About this number of contexts.
    Contexts(usize),
    /// About this number of tokens.
    Tokens(usize),
}

/// Drops the contexts whose words have the lowest probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextFilter {
    /// How many contexts are kept.
    pub target: ContextTarget,
    /// Indices of contexts that are always kept.
    pub force: Vec<usize>,
}

/// How to compress scored contexts.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The target, in tokens of `cl100k_base`.
    pub target: Target,
    /// Whether words are dropped. If not, only the filter applies.
    pub drop_words: bool,
    /// Whether whole contexts are dropped first. No effect on a single context.
    pub filter: Option<ContextFilter>,
}

impl Request {
    /// Drops words to meet a rate.
    pub fn rate(rate: Rate) -> Self {
        Self { target: Target::Rate(rate), drop_words: true, filter: None }
    }

    /// Drops words until `tokens` tokens are left.
    pub fn tokens(tokens: usize) -> Self {
        Self { target: Target::Tokens(tokens), drop_words: true, filter: None }
    }

    /// Adds a context filter, applied first.
    pub fn with_filter(self, target: ContextTarget, force: Vec<usize>) -> Self {
        Self { filter: Some(ContextFilter { target, force }), ..self }
    }
}

/// A word of the prompt, and whether it was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Label {
    /// The word.
    pub word: String,
    /// Whether it was kept.
    pub kept: bool,
    /// Whether all of its tokens were forced.
    pub forced: bool,
}

/// Compressed contexts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Compression {
    /// The kept contexts, each with its index.
    pub contexts: Vec<(usize, Compressed)>,
    /// Every word of every context.
    pub labels: Vec<Label>,
    /// Tokens of `cl100k_base` before compression.
    pub original_tokens: usize,
    /// Tokens of `cl100k_base` after compression.
    pub compressed_tokens: usize,
}

impl Compression {
    /// Returns the kept contexts, separated by empty lines.
    pub fn text(&self) -> String {
        let texts: Vec<&str> = self.contexts.iter().map(|(_, c)| c.text.as_str()).collect();
        texts.join("\n\n")
    }
}

/// Contexts with word probabilities.
#[derive(Debug)]
pub struct Scored<'a> {
    model: &'a LlmLingua2,
    forced: ForcedTokens,
    contexts: Vec<Context>,
    tokens: usize,
}

/// The windows of a context, and the words of each window.
type Context = (Vec<Window>, Vec<Vec<Word>>);

impl<'a> Scored<'a> {
    pub(super) fn new(
        model: &'a LlmLingua2,
        forced: ForcedTokens,
        contexts: Vec<Context>,
        tokens: usize,
    ) -> Self {
        Self { model, forced, contexts, tokens }
    }

    /// Returns the number of `cl100k_base` tokens of all contexts.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the compressed contexts.
    ///
    /// # Errors
    /// [`Error::Setting`] if the target is 0 tokens or fewer than the forced tokens, or if a forced
    /// context does not exist.
    pub fn compress(&self, request: &Request) -> Result<Compression> {
        if request.target == Target::Tokens(0) {
            return Err(Error::setting("target", "at least 1 token", 0));
        }
        let filter = request.filter.as_ref().filter(|_| self.contexts.len() > 1);
        let stays = match filter {
            Some(filter) => self.filter(filter, request)?,
            None => vec![true; self.contexts.len()],
        };
        let rate = match request.target {
            _ if !request.drop_words => 1.0,
            Target::Rate(rate) => rate.get(),
            Target::Tokens(target) if filter.is_none() => ratio(target, self.tokens),
            Target::Tokens(target) => {
                let staying = self.contexts.iter().zip(&stays).filter(|(_, stays)| **stays);
                let windows = staying.flat_map(|((windows, _), _)| windows);
                ratio(target, windows.map(|window| cl100k_tokens(&window.text)).sum())
            }
        };
        let mut done = Compression { original_tokens: self.tokens, ..Default::default() };
        for (i, context) in self.contexts.iter().enumerate() {
            let compressed = match stays[i] {
                false => {
                    done.labels.extend(self.dropped(context));
                    continue;
                }
                true if rate < 1.0 => {
                    self.compress_context(context, 1.0 - rate, &mut done.labels)?
                }
                true => self.reencode(context, &mut done.labels),
            };
            done.compressed_tokens += cl100k_tokens(&compressed.text);
            done.contexts.push((i, compressed));
        }
        self.check_forced(request.target, &done.labels)?;
        Ok(done)
    }

    /// Returns which contexts are kept: those whose mean probability is at least the percentile of
    /// the filter.
    fn filter(&self, filter: &ContextFilter, request: &Request) -> Result<Vec<bool>> {
        let count = self.contexts.len();
        if let Some(&bad) = filter.force.iter().find(|&&i| i >= count) {
            return Err(Error::setting("forced contexts", format!("numbers below {count}"), bad));
        }
        let halves = request.drop_words;
        let rate = match (filter.target, request.target) {
            (ContextTarget::Rate(rate), _) if rate < Rate::ONE => rate.get(),
            (ContextTarget::Contexts(n), _) => ratio(n, count),
            (ContextTarget::Tokens(n), _) => ratio(n, self.tokens),
            (_, Target::Rate(rate)) if halves => (rate.get() + 1.0) / 2.0,
            (_, Target::Rate(rate)) => rate.get(),
            (_, Target::Tokens(n)) => ratio(if halves { n * 2 } else { n }, self.tokens),
        };
        let mean = |(_, windows): &Context| {
            let words: Vec<f32> =
                windows.iter().flatten().map(|word| word.unforced_probability).collect();
            Number::F32(words.iter().sum::<f32>() / words.len().max(1) as f32)
        };
        let means: Vec<Number> = self.contexts.iter().map(mean).collect();
        let q = (100.0 * (1.0 - rate)) as u32;
        let threshold = percentile(&means, q).unwrap_or(0.0);
        let stays =
            |(i, mean): (usize, &Number)| mean.get() >= threshold || filter.force.contains(&i);
        Ok(means.iter().enumerate().map(stays).collect())
    }

    /// Joins the kept words, window by window.
    fn compress_context(
        &self,
        (_, windows): &Context,
        reduce: f64,
        labels: &mut Vec<Label>,
    ) -> Result<Compressed> {
        let (vocabulary, settings) = (&self.model.vocabulary, &self.model.settings);
        let mut compressed = Compressed::default();
        let select_words =
            |words: &Vec<Word>| select(words, &self.forced, settings.drop_consecutive, reduce);
        let mut choice: Vec<Vec<bool>> = windows.iter().map(select_words).collect();
        if !settings.published {
            keep_one(windows, &mut choice);
        }
        for (words, stays) in windows.iter().zip(choice) {
            labels.extend(words.iter().zip(&stays).map(|(word, &kept)| self.label(word, kept)));
            let kept: Vec<&Word> =
                words.iter().zip(&stays).filter(|(_, stays)| **stays).map(|(w, _)| w).collect();
            let written = vocabulary.decode(kept.iter().map(|word| word.text.clone()).collect())?;
            for (word, written) in kept.iter().zip(&written) {
                append(&mut compressed, written, &word.source);
            }
        }
        Ok(compressed)
    }

    /// Returns a context in which no word is dropped; like the package, re-encoded with the
    /// tokenizer.
    fn reencode(&self, (windows, _): &Context, labels: &mut Vec<Label>) -> Compressed {
        let mut compressed = Compressed::default();
        for window in windows {
            for (at, source) in &window.parts {
                let written = self.forced.restore(&window.text[at.clone()]);
                append(&mut compressed, &written, source);
            }
            let text = self.forced.restore(&window.text);
            let words = plain_words(&text).into_iter();
            labels.extend(words.map(|word| Label { word, kept: true, forced: false }));
        }
        compressed
    }

    fn dropped(&self, (_, windows): &'a Context) -> impl Iterator<Item = Label> {
        windows.iter().flatten().map(|word| self.label(word, false))
    }

    fn label(&self, word: &Word, kept: bool) -> Label {
        let forced = word.probability == Number::F64(1.0);
        Label { word: self.model.vocabulary.label(&word.text).to_owned(), kept, forced }
    }

    fn check_forced(&self, target: Target, labels: &[Label]) -> Result<()> {
        let forced = labels.iter().filter(|label| label.kept && label.forced);
        let forced: usize = forced.map(|label| cl100k_tokens(&label.word)).sum();
        match target {
            Target::Tokens(target) if target < forced => {
                let expected = format!("at least {forced}, what the forced tokens take");
                Err(Error::setting("target", expected, target))
            }
            _ => Ok(()),
        }
    }
}

/// Keeps the most probable word if none is kept.
fn keep_one(windows: &[Vec<Word>], choice: &mut [Vec<bool>]) {
    if choice.iter().flatten().any(|&stays| stays) {
        return;
    }
    let words = windows.iter().zip(choice).flat_map(|(words, stays)| words.iter().zip(stays));
    let likelier = |best: &(&Word, &mut bool), next: &(&Word, &mut bool)| {
        next.0.probability.get() > best.0.probability.get()
    };
    let best = words.reduce(|best, next| if likelier(&best, &next) { next } else { best });
    if let Some((_, stays)) = best {
        *stays = true;
    }
}

/// Returns `part / total`, at most 1.
fn ratio(part: usize, total: usize) -> f64 {
    (part as f64 / total.max(1) as f64).min(1.0)
}

/// Appends a word in its output form. Leading white space belongs to no piece. A word that shares
/// bytes with another joins its piece.
fn append(compressed: &mut Compressed, written: &str, source: &Range<usize>) {
    let space = written.len() - written.trim_start_matches(' ').len();
    let output = compressed.text.len() + space..compressed.text.len() + written.len();
    compressed.text.push_str(written);
    match compressed.pieces.last_mut() {
        _ if output.is_empty() => {}
        Some(last) if source.start < last.source.end => {
            last.source.end = last.source.end.max(source.end);
            last.output.end = output.end;
        }
        _ if source.is_empty() => {}
        _ => compressed.pieces.push(Piece { source: source.clone(), output }),
    }
}

/// Returns the words and punctuation marks of a text from which nothing is dropped, as the
/// package's pattern finds them.
fn plain_words(text: &str) -> Vec<String> {
    static PATTERN: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r#"[\p{L}\p{N}_]+|[<>=/!@#$%^&*()?":{}|\\`~;+-]"#).ok());
    let Some(pattern) = PATTERN.as_ref() else { return Vec::new() };
    pattern.find_iter(text).map(|found| found.as_str().to_owned()).collect()
}
