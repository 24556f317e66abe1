//! LLMLingua and LongLLMLingua: keeps the tokens with the highest loss under a small causal model.
//!
//! Jiang et al., *LLMLingua: Compressing Prompts for Accelerated Inference of Large Language
//! Models*, arXiv 2310.05736, and *LongLLMLingua: Accelerating and Enhancing LLMs in Long Context
//! Scenarios via Prompt Compression*, arXiv 2310.06839.
//!
//! The output equals that of the Python package `llmlingua` 0.2.2 (`compress_prompt`) if the kept
//! text fits the model's context and no character is split into several tokens. Two differences:
//!
//! - Tokens that share a character are kept or dropped together. The package cuts them one by one
//!   ([`Settings::published`]).
//! - Beyond the context, the package cuts its cache in the middle and continues with positions and
//!   losses that no longer match. Here the model reads the newer half of its context again.

mod budget;
mod documents;
mod ratios;
mod segments;
mod token_selection;

use std::ops::Range;

pub use documents::Documents;

use crate::loss::{LossModel, count, encode};
use crate::tokens::cl100k_tokens;
use crate::{Target, sentences};
use documents::{JoinedText, KeptRanges};
use longctx_checkpoint::unpanicked;
use longctx_core::{CausalLm, Compressed, Error, Prompt, PromptCompressor, Rate, Result};
use ratios::ratios;
use segments::{Plan, compress};
use tokenizers::Tokenizer;

/// The smallest number of segments that [`PromptCompressor::compress`] cuts a text into. Up to one
/// segment at the end of the text stays whole.
const SEGMENTS: usize = 16;

/// The position of the question when a document is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuestionPosition {
    /// Before the document: how well the question predicts the document.
    Before,
    /// After the document: how well the document predicts the question.
    After,
}

/// How documents and sentences are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rank {
    /// By their own perplexity, the highest first (LLMLingua).
    Perplexity,
    /// By their relevance to the question (LongLLMLingua).
    Question(QuestionPosition),
}

/// The score of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenScore {
    /// Its loss.
    Loss,
    /// Its loss with the question before the text.
    ConditionalLoss,
    /// The reduction of its loss by the question (contrastive perplexity).
    Contrastive,
}

/// The order of the documents in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// The original order.
    Original,
    /// Best first.
    Ranked,
    /// The best at both ends, the worst in the middle.
    BestAtBothEnds,
}

/// The number of tokens of whole documents that are kept before sentences and tokens are selected,
/// relative to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// The target plus this number.
    Plus(f64),
    /// The target times this factor.
    Times(f64),
}

impl Budget {
    fn of(self, target: f64) -> f64 {
        match self {
            Budget::Plus(tokens) => target + tokens,
            Budget::Times(factor) => target * factor,
        }
    }
}

/// Sentence selection.
#[derive(Debug, Clone)]
pub struct Sentences {
    /// The number of tokens of sentences to keep, relative to the target.
    pub budget: f64,
    /// Splits a document into consecutive ranges that cover it.
    pub split: fn(&str) -> Vec<Range<usize>>,
    /// Sentences at the start of the prompt that get the bonus; only with ranking by question.
    pub first: usize,
    /// Sentences at the end of the prompt that get the bonus; only with ranking by question.
    pub last: usize,
    /// The bonus, added to their mean loss. With ranking by question it moves a sentence behind
    /// others, as in the package.
    pub bonus: f32,
}

impl Default for Sentences {
    /// The package's numbers, with sentences by the Unicode rules; the package uses NLTK's.
    fn default() -> Self {
        Self { budget: 1.4, split: sentences, first: 0, last: 0, bonus: 100.0 }
    }
}

/// Settings of the compression.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How documents and sentences are ranked.
    pub rank: Rank,
    /// Whether whole documents are dropped first. No effect on a single document.
    pub drop_documents: bool,
    /// The number of document tokens to keep.
    pub document_budget: Budget,
    /// Indices of documents that are always kept.
    pub force_documents: Vec<usize>,
    /// The order of the documents in the output.
    pub order: Order,
    /// The difference between the kept shares of the best and the middle document.
    pub dynamic_ratio: f64,
    /// Whether and how sentences are dropped.
    pub sentences: Option<Sentences>,
    /// Whether tokens are dropped.
    pub drop_tokens: bool,
    /// The score of a token.
    pub token_score: TokenScore,
    /// Tokens per segment: the number of tokens cut at a time.
    pub segment: usize,
    /// The token that separates documents, if pairs of it are kept.
    pub separator: Option<u32>,
    /// Whether the output ends with the question.
    pub append_question: bool,
    /// Whether tokens that share a character are cut one by one, as in the package. This leaves
    /// halves of characters and joins them to others. For comparison only.
    pub published: bool,
}

impl Settings {
    /// LLMLingua with the package's defaults.
    pub fn llmlingua() -> Self {
        Self {
            rank: Rank::Perplexity,
            drop_documents: true,
            document_budget: Budget::Plus(100.0),
            force_documents: Vec::new(),
            order: Order::Original,
            dynamic_ratio: 0.0,
            sentences: None,
            drop_tokens: true,
            token_score: TokenScore::Loss,
            segment: 200,
            separator: None,
            append_question: false,
            published: false,
        }
    }

    /// LongLLMLingua with the settings recommended by its authors.
    pub fn long() -> Self {
        Self {
            rank: Rank::Question(QuestionPosition::After),
            order: Order::Ranked,
            dynamic_ratio: 0.3,
            token_score: TokenScore::Contrastive,
            ..Self::llmlingua()
        }
    }
}

/// A compressed prompt with its token counts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compression {
    /// The compressed text. Its source ranges refer to the text of the documents.
    pub compressed: Compressed,
    /// Tokens of `cl100k_base` before compression, with the instruction and the question.
    pub original_tokens: usize,
    /// Tokens of `cl100k_base` after compression.
    pub compressed_tokens: usize,
}

/// A compressor based on a causal model.
#[derive(Debug)]
pub struct LlmLingua<M> {
    loss_model: LossModel<M>,
    unconditional: Option<LossModel<M>>,
    tokenizer: Tokenizer,
    settings: Settings,
}

impl<M: CausalLm> LlmLingua<M> {
    /// Creates a compressor from a model and its tokenizer.
    ///
    /// # Errors
    /// [`Error::Setting`] for a segment of 0 tokens.
    pub fn new(model: M, tokenizer: Tokenizer, settings: Settings) -> Result<Self> {
        if settings.segment == 0 {
            return Err(Error::setting("segment", "at least 1 token", 0));
        }
        Ok(Self { loss_model: LossModel::new(model), unconditional: None, tokenizer, settings })
    }

    /// Sets a second session of the same model. Contrastive perplexity reads the text with and
    /// without the question; a single session would read all of it again for every segment.
    pub fn with_second(mut self, model: M) -> Self {
        self.unconditional = Some(LossModel::new(model));
        self
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Compresses documents. Targets are in the model's own tokens and include the instruction and
    /// the question, as in the package.
    ///
    /// # Errors
    /// [`Error::Mismatch`] without documents, or without a question if the settings need one;
    /// [`Error::Setting`] if the question is so long that two segments do not fit the context
    /// beside it; errors of the model.
    pub fn compress_documents(
        &mut self,
        documents: &Documents,
        instruction: &str,
        question: &str,
        target: Target,
    ) -> Result<Compression> {
        self.run(documents, instruction, question, target, 1)
    }

    /// As [`compress_documents`](Self::compress_documents), with shorter segments if there would be
    /// fewer than `segments`.
    fn run(
        &mut self,
        documents: &Documents,
        instruction: &str,
        question: &str,
        target: Target,
        segments: usize,
    ) -> Result<Compression> {
        let needs_question =
            self.settings.rank != Rank::Perplexity || self.settings.token_score != TokenScore::Loss;
        if needs_question && question.trim().is_empty() {
            return Err(Error::mismatch("prompt", "a question", "none"));
        }
        let source = documents.text.as_str();
        let texts: Vec<&str> =
            documents.ranges.iter().filter_map(|r| source.get(r.clone())).collect();
        if texts.is_empty() || texts.len() < documents.ranges.len() {
            let got = format!("{:?}", documents.ranges);
            return Err(Error::mismatch("documents", "at least one, on character boundaries", got));
        }
        let target = self.target_tokens(&texts, instruction, question, target)?;
        let kept = self.select_coarse(documents, question, target)?;
        let compressed = match self.settings.drop_tokens {
            true => self.select_tokens(&kept, source, question, target, segments)?,
            false => {
                let joined = JoinedText::new(None, &kept, source);
                let whole = 0..joined.text.len();
                joined.to_compressed(std::slice::from_ref(&whole), source, joined.text.clone())
            }
        };
        let before = [&[instruction], &texts[..], &[question]].concat().join("\n\n");
        let question = if self.settings.append_question { question } else { "" };
        let compressed = with_instruction_and_question(compressed, instruction, question);
        let compressed_tokens = cl100k_tokens(&compressed.text);
        Ok(Compression {
            compressed,
            original_tokens: cl100k_tokens(before.trim()),
            compressed_tokens,
        })
    }

    /// Returns the number of document tokens to keep: the target, for a rate without the tokens of
    /// the instruction and the question.
    fn target_tokens(
        &self,
        texts: &[&str],
        instruction: &str,
        question: &str,
        target: Target,
    ) -> Result<f64> {
        let rate = match target {
            Target::Tokens(tokens) => return Ok(tokens as f64),
            Target::Rate(rate) => rate.get(),
        };
        let (before, after) =
            (count(&self.tokenizer, instruction)?, count(&self.tokenizer, question)?);
        let mut all = before + after;
        for text in texts {
            all += count(&self.tokenizer, text)?;
        }
        let after = if self.settings.append_question { after } else { 0 };
        Ok(all as f64 * rate - before as f64 - after as f64)
    }

    /// Coarse selection: documents, then sentences.
    fn select_coarse(
        &mut self,
        documents: &Documents,
        question: &str,
        target: f64,
    ) -> Result<Vec<KeptRanges>> {
        let source = documents.text.as_str();
        let kept = match self.settings.drop_documents && documents.ranges.len() > 1 {
            true => self.select_documents(&documents.ranges, source, question, target)?,
            false => {
                let whole = |range: &Range<usize>| KeptRanges {
                    ranges: vec![range.clone()],
                    ratio_offset: 0.0,
                };
                documents.ranges.iter().map(whole).collect()
            }
        };
        match self.settings.sentences.clone() {
            Some(sentences) => self.select_sentences(kept, source, question, target, &sentences),
            None => Ok(kept),
        }
    }

    fn select_tokens(
        &mut self,
        kept: &[KeptRanges],
        source: &str,
        question: &str,
        target: f64,
        segments: usize,
    ) -> Result<Compressed> {
        let prefix = Some(question).filter(|_| self.settings.token_score != TokenScore::Loss);
        let joined = JoinedText::new(prefix, kept, source);
        let tokens = encode(&self.tokenizer, &joined.text, false)?;
        let front = prefix.map_or(0, |prefix| prefix.len() + 2);
        let start = tokens.offsets.partition_point(|offset| offset.start < front);
        let context = self.loss_model.context_length();
        let size = match segments {
            1 => self.settings.segment,
            _ => self.settings.segment.min(((tokens.ids.len() - start) / segments).max(2)),
        };
        if start + 2 * size > context {
            let expected =
                format!("a question of at most {} tokens", context.saturating_sub(2 * size));
            return Err(Error::setting("question", expected, start));
        }
        let mut lengths = Vec::with_capacity(kept.len());
        for document in kept {
            lengths.push(encode(&self.tokenizer, &document.text(source), false)?.ids.len() + 2);
        }
        let ratio_offsets: Vec<f64> = kept.iter().map(|document| document.ratio_offset).collect();
        let continues_character = match self.settings.published {
            true => vec![false; tokens.ids.len()],
            false => continues_character(&joined.text, &tokens.offsets),
        };
        let plan = Plan {
            size,
            start,
            continues_character: &continues_character,
            steps: &ratios(&lengths, &ratio_offsets, target, size),
            separator: self.settings.separator,
            contrastive: self.settings.token_score == TokenScore::Contrastive,
        };
        let left = compress(&mut self.loss_model, self.unconditional.as_mut(), tokens.ids, &plan)?;
        let text = unpanicked(|| self.tokenizer.decode(&left.ids, false))?;
        let ranges: Vec<Range<usize>> =
            left.origin.iter().map(|&i| tokens.offsets[i].clone()).collect();
        Ok(joined.to_compressed(&ranges, source, text))
    }
}

/// Returns for each token whether it shares a character with the previous one.
fn continues_character(text: &str, tokens: &[Range<usize>]) -> Vec<bool> {
    let mut end = 0;
    let continues = |token: &Range<usize>| {
        let inside =
            !token.is_empty() && (token.start < end || !text.is_char_boundary(token.start));
        end = token.end;
        inside
    };
    tokens.iter().map(continues).collect()
}

/// Adds the instruction before and the question after, with empty lines between. Parts of only
/// white space are omitted, as in the package.
fn with_instruction_and_question(
    compressed: Compressed,
    instruction: &str,
    question: &str,
) -> Compressed {
    let Compressed { text, mut pieces } = compressed;
    let mut body = text.as_str();
    if body.trim().is_empty() {
        body = "";
        pieces.clear();
    }
    let parts = [instruction, body, question];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let shift = if instruction.is_empty() { 0 } else { instruction.len() + 2 };
    for piece in &mut pieces {
        piece.output = piece.output.start + shift..piece.output.end + shift;
    }
    Compressed { text: parts.join("\n\n"), pieces }
}

impl<M: CausalLm> PromptCompressor for LlmLingua<M> {
    /// Paragraphs are the documents. The segment length is that of the settings, or for a short
    /// text a sixteenth of the selected documents: the package hardly cuts a text shorter than a
    /// segment. Rate 1 returns the text unchanged.
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        if rate == Rate::ONE {
            return Compressed::copy(prompt.text, std::iter::once(0..prompt.text.len()));
        }
        let documents = Documents::paragraphs(prompt.text);
        let question = prompt.question.unwrap_or("");
        Ok(self.run(&documents, "", question, Target::Rate(rate), SEGMENTS)?.compressed)
    }
}
