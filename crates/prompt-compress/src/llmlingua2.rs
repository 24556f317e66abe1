//! LLMLingua-2: an encoder classifies each token as kept or dropped.
//!
//! Pan et al., *LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt
//! Compression*, arXiv 2403.12968. Texts, labels and counts equal those of the Python package
//! `llmlingua` 0.2.2 (`compress_prompt_llmlingua2`), except that at least one word of a text is
//! kept ([`Settings::published`]).

mod checkpoint;
mod compress;
mod encoder;
mod forced_tokens;
mod gelu;
mod vocabulary;
mod windows;
mod words;

use std::path::Path;

pub use checkpoint::Family;
pub use compress::{Compression, ContextFilter, ContextTarget, Label, Request, Scored};

use candle_core::Device;
use checkpoint::{Config, Weights};
use encoder::{Encoder, EncoderInput};
use longctx_core::{Compressed, Error, Prompt, PromptCompressor, Rate, Result};
use vocabulary::Vocabulary;
use windows::{Token, split};
use words::merge;

use crate::tokens::cl100k_tokens;

/// The settings of arXiv 2407.01527: names and rates.
pub const PAPER_RATES: [(&str, f64); 4] = [
    ("llmlingua2-2x", 0.5),
    ("llmlingua2-4x", 0.25),
    ("llmlingua2-6x", 0.17),
    ("llmlingua2-8x", 0.125),
];

/// Returns the rate of one of the paper's settings by name. Use it with [`Settings::paper`].
///
/// ```
/// use prompt_compress::llmlingua2::paper_rate;
///
/// assert_eq!(paper_rate("llmlingua2-4x").map(|rate| rate.get()), Some(0.25));
/// assert!(paper_rate("llmlingua2-5x").is_none());
/// ```
pub fn paper_rate(name: &str) -> Option<Rate> {
    let (_, rate) = PAPER_RATES.iter().find(|(known, _)| *known == name)?;
    Rate::new(*rate).ok()
}

/// How the probability of a word is computed from those of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WordProbability {
    /// The mean.
    #[default]
    Mean,
    /// The probability of the first token.
    First,
}

/// Tokens that are always kept, and the windowing of long texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Tokens that are always kept, at most 100.
    pub force_tokens: Vec<String>,
    /// Whether tokens that contain a digit are always kept.
    pub force_digits: bool,
    /// Whether only one of adjacent equal forced tokens is kept.
    pub drop_consecutive: bool,
    /// How the probability of a word is computed from those of its tokens.
    pub word_probability: WordProbability,
    /// Tokens after which a text may be cut into windows.
    pub window_ends: Vec<String>,
    /// Number of windows of 512 tokens per encoder call. It bounds the memory.
    pub batch: usize,
    /// Whether a text may lose its last word, as in the package. For comparison only.
    pub published: bool,
}

impl Default for Settings {
    /// The package's defaults; eight windows at a time.
    fn default() -> Self {
        Self {
            force_tokens: Vec::new(),
            force_digits: false,
            drop_consecutive: false,
            word_probability: WordProbability::Mean,
            window_ends: vec![".".into(), "\n".into()],
            batch: 8,
            published: false,
        }
    }
}

impl Settings {
    /// The settings of arXiv 2407.01527: line ends, full stops, exclamation marks, question marks
    /// and commas are kept, adjacent equal ones once.
    pub fn paper() -> Self {
        let force_tokens = ["\n", ".", "!", "?", ","].map(String::from).to_vec();
        Self { force_tokens, drop_consecutive: true, ..Self::default() }
    }
}

/// A checkpoint with settings.
///
/// The published checkpoints are `microsoft/llmlingua-2-xlm-roberta-large-meetingbank` and
/// `microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank`.
#[derive(Debug)]
pub struct LlmLingua2 {
    encoder: Encoder,
    config: Config,
    vocabulary: Vocabulary,
    settings: Settings,
}

impl LlmLingua2 {
    /// Loads a folder with `config.json`, `tokenizer.json` and `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::File`] for a missing or invalid file; [`Error::Mismatch`] for a head without two
    /// classes or a tensor of another shape; [`Error::Unsupported`] naming settings or tensors of
    /// another architecture; [`Error::Setting`] for a batch of 0.
    pub fn from_folder(folder: &Path, settings: Settings, device: &Device) -> Result<Self> {
        if settings.batch == 0 {
            return Err(Error::setting("batch", "at least 1 window", 0));
        }
        let config = Config::from_file(&folder.join("config.json"))?;
        let vocabulary = Vocabulary::open(&folder.join("tokenizer.json"), config.model_type)?;
        let mut weights = Weights::open(&folder.join("model.safetensors"), device)?;
        let encoder = Encoder::load(config.clone(), &mut weights, device)?;
        weights.check_all_read()?;
        Ok(Self { encoder, config, vocabulary, settings })
    }

    /// Loads a checkpoint by name from the Hugging Face Hub. Files that are not cached are
    /// downloaded.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be downloaded; as [`from_folder`](Self::from_folder).
    #[cfg(feature = "hub")]
    pub fn from_hub(name: &str, settings: Settings, device: &Device) -> Result<Self> {
        Self::from_folder(&crate::hub::download(name)?, settings, device)
    }

    /// Returns the encoder family of the checkpoint.
    pub fn family(&self) -> Family {
        self.config.model_type
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Runs the encoder over `contexts` once. Any number of rates and filters can be applied to the
    /// result.
    ///
    /// # Errors
    /// [`Error::Mismatch`] without contexts, or for a context of only white space;
    /// [`Error::Setting`] for empty or too many forced tokens; [`Error::Unsupported`] if a forced
    /// token needs an added token for which the checkpoint has no embedding.
    pub fn score(&self, contexts: &[&str]) -> Result<Scored<'_>> {
        if contexts.is_empty() {
            return Err(Error::mismatch("contexts", "at least one", 0));
        }
        let forced = self.vocabulary.forced(&self.settings.force_tokens)?;
        let rows = self.encoder.vocab_size();
        if forced.has_placeholders() && self.vocabulary.largest_id() as usize >= rows {
            let what = format!(
                "forced tokens that are not in the vocabulary: the checkpoint's embedding has {rows} rows, none for added tokens"
            );
            return Err(Error::Unsupported(what));
        }
        let mut scored = Vec::with_capacity(contexts.len());
        for text in contexts {
            Prompt::new(text)?;
            let windows = split(&self.vocabulary, &forced, &self.settings.window_ends, text)?;
            let mut words = Vec::with_capacity(windows.len());
            for batch in windows.chunks(self.settings.batch) {
                let encoder_input = |window: &windows::Window| {
                    window.encoder_input(&self.vocabulary, |ids| self.config.positions(ids))
                };
                let input = batch.iter().map(encoder_input).collect::<Result<Vec<_>>>()?;
                let (input, tokens): (Vec<EncoderInput>, Vec<Vec<Token>>) =
                    input.into_iter().unzip();
                for (tokens, probabilities) in
                    tokens.iter().zip(self.encoder.keep_probabilities(&input)?)
                {
                    let merged =
                        merge(&self.vocabulary, &forced, &self.settings, tokens, &probabilities);
                    words.push(merged);
                }
            }
            scored.push((windows, words));
        }
        let tokens = contexts.iter().map(|text| cl100k_tokens(text)).sum();
        Ok(Scored::new(self, forced, scored, tokens))
    }
}

impl PromptCompressor for LlmLingua2 {
    /// Ignores the question. Rate 1 returns the text unchanged; the package would re-encode it with
    /// the tokenizer.
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        if rate == Rate::ONE {
            return Compressed::copy(prompt.text, std::iter::once(0..prompt.text.len()));
        }
        let scored = self.score(&[prompt.text])?;
        let mut compression = scored.compress(&Request::rate(rate))?;
        Ok(compression.contexts.pop().map(|(_, compressed)| compressed).unwrap_or_default())
    }
}
