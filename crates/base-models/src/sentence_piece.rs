//! SentencePiece vocabularies with BPE scores, from a GGUF file or a `tokenizer.model`.

use std::collections::HashMap;

use longctx_core::{Error, Result};
use serde_json::json;
use tokenizers::decoders::{
    byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip,
};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// One entry of a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

/// The type of an entry, with the numbers of SentencePiece and GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal = 1,
    /// Represents text that the vocabulary lacks.
    Unknown = 2,
    /// Never matches text: the begin or end of a sequence, the end of a turn.
    Control = 3,
    /// Text that is always one token.
    UserDefined = 4,
    Unused = 5,
    /// A byte, `<0x0A>`.
    Byte = 6,
}

impl Kind {
    /// Returns the type of a number. Unknown numbers are treated as unused.
    pub fn from_number(number: i64) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Unused,
        }
    }
}

/// Where a space is prepended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpacePrefix {
    Never,
    /// Before the text and after each control or user-defined token, as in llama.cpp and early
    /// SentencePiece models.
    EachFragment,
    /// Only before the text.
    Text,
}

/// Builds a tokenizer that merges the pair whose piece has the best score, and splits unknown
/// characters into bytes.
pub(crate) fn tokenizer(pieces: &[Piece], prefix: SpacePrefix) -> Result<Tokenizer> {
    let vocab = vocabulary(pieces.iter().map(|piece| piece.text.as_str()))?;
    let bytes = (0..=255u8).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")));
    let unknown = pieces.iter().find(|piece| piece.kind == Kind::Unknown);
    let merges = merges(pieces, &vocab);
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .fuse_unk(true)
        .byte_fallback(bytes);
    bpe = match unknown {
        Some(piece) => bpe.unk_token(piece.text.clone()),
        None if bytes => bpe,
        None => {
            return Err(Error::tokenizer(
                "the vocabulary has neither an unknown token nor all bytes",
            ));
        }
    };
    let mut inner = Tokenizer::new(bpe.build().map_err(Error::tokenizer)?);
    let spaces = Replace::new(" ", "▁").map_err(Error::tokenizer)?;
    let mut normalizers = vec![NormalizerWrapper::from(spaces)];
    let mut decoders = vec![
        Replace::new("▁", " ").map_err(Error::tokenizer)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    match prefix {
        SpacePrefix::Never => {}
        SpacePrefix::EachFragment => normalizers.insert(0, Prepend::new("▁".into()).into()),
        SpacePrefix::Text => {
            inner.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::First, false)));
        }
    }
    if prefix != SpacePrefix::Never {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(Error::tokenizer)?;
    inner.with_decoder(Some(Decoders::new(decoders)));
    add_tokens(&mut inner, pieces.iter().map(|piece| (piece.text.as_str(), piece.kind)))?;
    Ok(inner)
}

/// Returns ids by text. Duplicate texts are refused, because one of their ids could not be
/// produced.
pub(crate) fn vocabulary<'a>(
    tokens: impl Iterator<Item = &'a str>,
) -> Result<HashMap<String, u32>> {
    let mut vocab = HashMap::new();
    for (id, text) in tokens.enumerate() {
        let id = u32::try_from(id).map_err(Error::tokenizer)?;
        if let Some(first) = vocab.insert(text.to_owned(), id) {
            return Err(Error::tokenizer(format!("tokens {first} and {id} are both {text:?}")));
        }
    }
    Ok(vocab)
}

/// Registers control, unknown and user-defined tokens, which are matched in a text before anything
/// else.
pub(crate) fn add_tokens<'a>(
    inner: &mut Tokenizer,
    tokens: impl Iterator<Item = (&'a str, Kind)>,
) -> Result<()> {
    let (mut special, mut user) = (Vec::new(), Vec::new());
    for (text, kind) in tokens {
        match kind {
            Kind::Control | Kind::Unknown => special.push(AddedToken::from(text, true)),
            Kind::UserDefined => user.push(AddedToken::from(text, false).normalized(false)),
            Kind::Normal | Kind::Unused | Kind::Byte => {}
        }
    }
    inner.add_special_tokens(special).map_err(Error::tokenizer)?;
    inner.add_tokens(user).map_err(Error::tokenizer)?;
    Ok(())
}

/// Adds tokens around each text that is encoded with special tokens.
pub(crate) fn surround(
    inner: &mut Tokenizer,
    bos: Option<(u32, &str)>,
    eos: Option<(u32, &str)>,
) -> Result<()> {
    let token = |(_, text): (u32, &str)| json!({"SpecialToken": {"id": text, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<_> = bos.map(token).into_iter().chain([text]).chain(eos.map(token)).collect();
    let entry = |(id, text): (u32, &str)| {
        (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}))
    };
    let tokens: serde_json::Map<_, _> = bos.into_iter().chain(eos).map(entry).collect();
    let pair = [single.clone(), single.clone()].concat();
    let template = json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens,
    });
    let processor: PostProcessorWrapper =
        serde_json::from_value(template).map_err(Error::tokenizer)?;
    inner.with_post_processor(Some(processor));
    Ok(())
}

/// Returns all ways to merge a piece from two others, best pieces first.
fn merges(pieces: &[Piece], vocab: &HashMap<String, u32>) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for piece in pieces {
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push((piece.score, l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)).then(a.2.cmp(b.2)));
    merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}
