//! Text to tokens and back.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use longctx_core::{Error, Result};
use tokenizers::decoders::{
    byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip,
};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::{
    byte_level::ByteLevel, digits::Digits, sequence::Sequence as PreTokenizers,
};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer as Inner};

/// A model's tokenizer, from `tokenizer.json` or from a GGUF file's metadata.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let inner = Inner::from_file(path).map_err(|e| Error::file(path, e))?;
        Ok(Self { inner })
    }

    /// Builds the tokenizer that a GGUF file describes: byte-level BPE ("gpt2": Llama 3, Qwen, SmolLM) or SentencePiece BPE ("llama":
    /// Llama 2, Mistral).
    pub(crate) fn from_gguf(path: &Path, content: &Content) -> Result<Self> {
        let text = |key: &str| content.metadata.get(key).and_then(|v| v.to_string().ok());
        let failed = |e: String| Error::file(path, format!("tokenizer: {e}"));
        let inner = match text("tokenizer.ggml.model").map(String::as_str) {
            Some("llama") => sentence_piece(content).map_err(|e| failed(e.to_string()))?,
            _ => {
                let mut inner = Inner::from_gguf(content).map_err(|e| failed(e.to_string()))?;
                let pre = text("tokenizer.ggml.pre").map(String::as_str);
                if let Some(splitter) = splitter(pre) {
                    inner.with_pre_tokenizer(Some(splitter));
                }
                inner
            }
        };
        Ok(Self { inner })
    }

    /// The tokens of a text. `special`: with what the model expects around a text, most often a first token.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the tokenizer's own message.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the tokenizer's own message.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(failed)
    }

    /// The text of one token as it stands in the vocabulary, for special tokens.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token of the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Turns tokens into text one at a time, holding back bytes until they make a character.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, pending: Vec::new(), given: 0 }
    }

    /// The tokenizer of the `tokenizers` crate behind it.
    pub fn inner(&self) -> &Inner {
        &self.inner
    }
}

/// Text that grows with each token.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u32>,
    /// Bytes of the pending tokens' text that have been given out.
    given: usize,
}

impl TextStream<'_> {
    /// The text that `token` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.pending.push(token);
        let text = self.tokenizer.decode(&self.pending)?;
        if text.ends_with('\u{fffd}') || !text.is_char_boundary(self.given) {
            return Ok(String::new());
        }
        let new = text[self.given..].to_owned();
        self.given = text.len();
        // A line's end is a safe place to forget what went before: nothing decodes differently across it.
        if text.ends_with('\n') {
            self.pending.clear();
            self.given = 0;
        }
        Ok(new)
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::Unsupported(format!("tokenizer: {e}"))
}

/// How text is cut before byte-level BPE, for the names that candle cuts in GPT-2's way with a space put in front.
fn splitter(pre: Option<&str>) -> Option<PreTokenizers> {
    let bytes = ByteLevel::new(false, true, true);
    match pre {
        Some("smollm") => Some(PreTokenizers::new(vec![Digits::new(true).into(), bytes.into()])),
        Some("qwen2" | "llama3" | "llama-bpe" | "smaug-bpe" | "lfm2") => None,
        _ => Some(PreTokenizers::new(vec![bytes.into()])),
    }
}

/// SentencePiece's BPE: pairs merge in the order of the merged piece's score; unknown characters fall apart into bytes.
fn sentence_piece(content: &Content) -> tokenizers::Result<Inner> {
    let list = |key: &str| match content.metadata.get(key) {
        Some(Value::Array(values)) => Ok(values),
        _ => Err(format!("there is no list {key:?}")),
    };
    let pieces: Vec<String> = list("tokenizer.ggml.tokens")?
        .iter()
        .map(|v| v.to_string().cloned())
        .collect::<Result<_, _>>()?;
    let scores: Vec<f32> =
        list("tokenizer.ggml.scores")?.iter().map(Value::to_f32).collect::<Result<_, _>>()?;
    let vocab: HashMap<String, u32> = pieces.iter().cloned().zip(0..).collect();
    let merges = merges(&pieces, &scores, &vocab);
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token("<unk>".into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()?;
    let mut inner = Inner::new(bpe);
    let spaces = Replace::new(" ", "▁")?;
    inner.with_normalizer(Some(Normalizers::new(vec![
        Prepend::new("▁".into()).into(),
        spaces.into(),
    ])))?;
    inner.with_decoder(Some(Decoders::new(vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
        Strip::new(' ', 1, 0).into(),
    ])));
    let special = |id: &Value| {
        id.to_u32().ok().and_then(|id| pieces.get(id as usize).cloned().map(|t| (t, id)))
    };
    let of = |key: &str| content.metadata.get(key).and_then(special);
    let (bos, eos) = (of("tokenizer.ggml.bos_token_id"), of("tokenizer.ggml.eos_token_id"));
    let specials =
        [&bos, &eos].into_iter().flatten().map(|(t, _)| AddedToken::from(t.clone(), true));
    inner.add_special_tokens(specials.collect::<Vec<_>>())?;
    let adds = content.metadata.get("tokenizer.ggml.add_bos_token").and_then(|v| v.to_bool().ok());
    if let Some((token, id)) = bos.filter(|_| adds.unwrap_or(true)) {
        let template = TemplateProcessing::builder()
            .try_single(format!("{token} $A"))?
            .special_tokens(vec![(token, id)])
            .build()
            .map_err(|e| e.to_string())?;
        inner.with_post_processor(Some(template));
    }
    Ok(inner)
}

/// All ways to put a piece together from two others, best pieces first.
fn merges(
    pieces: &[String],
    scores: &[f32],
    vocab: &HashMap<String, u32>,
) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (piece, &score) in pieces.iter().zip(scores) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push((score, l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)).then(a.2.cmp(b.2)));
    merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}
