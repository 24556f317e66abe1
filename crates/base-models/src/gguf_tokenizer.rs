//! Builds the tokenizer in a GGUF file's metadata, with llama.cpp's rules.

use std::collections::HashSet;

use crate::gguf_file::GgufFile;
use crate::gguf_header::Value;
use crate::pre_tokenizers::{NOT_BYTE_LEVEL, PreTokenizer};
use crate::sentence_piece::{self, Kind, Piece, SpacePrefix};
use longctx_core::{Error, Result};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::{
    PreTokenizerWrapper, byte_level::ByteLevel, sequence::Sequence, split::Split,
    split::SplitPattern,
};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

/// Texts of tokens that end a text or a turn, whatever end token the file names.
const END_TOKENS: [&str; 26] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // Ends of files in models for code.
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The end tokens that are plain markup in some vocabularies (Qwen's), unless the file declares
/// them as control tokens.
const AMBIGUOUS: [&str; 5] = ["</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]"];

/// Builds byte-level BPE ("gpt2": Llama 3, Qwen, SmolLM) or SentencePiece BPE ("llama": Llama 2,
/// Mistral).
pub(crate) fn tokenizer(file: &GgufFile) -> Result<Tokenizer> {
    match file.text("tokenizer.ggml.model")? {
        Some("llama") => sentence_piece(file),
        Some("gpt2") => byte_level(file),
        Some(other) => Err(unsupported(file, format!("tokenizer {other:?} (known: gpt2, llama)"))),
        None => Err(file.bad("tokenizer.ggml.model", "is missing")),
    }
}

/// Returns the tokens that end a text: those that the file names, and those with the text of an end
/// token.
pub(crate) fn end_tokens(file: &GgufFile) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(token_id(file, key)?);
    }
    let tokens = file.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let kinds = declared_kinds(file, tokens.len())?;
    let present: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    // In these two families <|end|> ends a part of an answer.
    let parts = present.contains("<|return|>") && present.contains("<|call|>")
        || present.contains("<|flush|>") && present.contains("<|calls|>");
    for (id, token) in (0u32..).zip(tokens) {
        let ends_part = parts && token == "<|end|>";
        let normal = kinds.as_ref().is_some_and(|kinds| kinds[id as usize] == Kind::Normal);
        let word = normal && AMBIGUOUS.contains(&token.as_str());
        if END_TOKENS.contains(&token.as_str()) && !ends_part && !word {
            ends.push(id);
        }
    }
    let mut seen = HashSet::new();
    ends.retain(|&id| seen.insert(id));
    Ok(ends)
}

/// Returns the token of a key such as "bos_token_id".
pub(crate) fn token_id(file: &GgufFile, key: &str) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{key}");
    match file.get(&key) {
        // Old converters write this for a token that the model lacks.
        Some(Value::Integer(-1 | 0xffff_ffff)) => Ok(None),
        _ => Ok(file.number(&key)?.and_then(|id| u32::try_from(id).ok())),
    }
}

fn sentence_piece(file: &GgufFile) -> Result<Tokenizer> {
    let tokens = tokens(file)?;
    let kinds = kinds(file, &tokens)?;
    let scores = scores(file, tokens.len())?;
    let piece =
        |((text, &kind), score): ((&String, _), _)| Piece { text: text.clone(), score, kind };
    let pieces: Vec<_> = tokens.iter().zip(&kinds).zip(scores).map(piece).collect();
    let prefix = match file.switch("tokenizer.ggml.add_space_prefix")? {
        Some(false) => SpacePrefix::Never,
        _ => SpacePrefix::EachFragment,
    };
    let mut inner = sentence_piece::tokenizer(&pieces, prefix)?;
    surround(file, &mut inner, &tokens, Ends { add_bos: true, bos: Some(1), eos: Some(2) })?;
    Ok(inner)
}

fn byte_level(file: &GgufFile) -> Result<Tokenizer> {
    let pre = match file.text("tokenizer.ggml.pre")? {
        Some(name) => pre_tokenizer(file, name)?,
        None => {
            let reason = "is missing, so the text splitting is unknown; convert the model again";
            return Err(file.bad("tokenizer.ggml.pre", reason));
        }
    };
    let tokens = tokens(file)?;
    let kinds = kinds(file, &tokens)?;
    let key = "tokenizer.ggml.merges";
    let merges = file.texts(key)?.ok_or_else(|| file.bad(key, "is missing"))?;
    let pair = |merge: &String| {
        // The first part has at least one character, which may be a space.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| file.bad(key, format!("has {merge:?}, which is no pair")))?;
        Ok((merge[..at].to_owned(), merge[at + 1..].to_owned()))
    };
    let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let vocab = sentence_piece::vocabulary(tokens.iter().map(String::as_str))?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| unsupported(file, e.to_string()))?;
    let mut inner = Tokenizer::new(bpe);
    if pre.nfc {
        inner.with_normalizer(Some(NFC)).map_err(|e| unsupported(file, e.to_string()))?;
    }
    inner.with_pre_tokenizer(Some(splitter(pre).map_err(|e| unsupported(file, e.to_string()))?));
    inner.with_decoder(Some(ByteLevel::default()));
    let marked = tokens.iter().map(String::as_str).zip(kinds);
    sentence_piece::add_tokens(&mut inner, marked)?;
    surround(file, &mut inner, &tokens, Ends { add_bos: pre.add_bos, bos: None, eos: None })?;
    Ok(inner)
}

fn pre_tokenizer(file: &GgufFile, name: &str) -> Result<&'static PreTokenizer> {
    PreTokenizer::named(name).ok_or_else(|| {
        let known: Vec<_> = PreTokenizer::names().collect();
        let what = match NOT_BYTE_LEVEL.contains(&name) {
            true => format!("pre-tokenizer {name:?} is not byte-level"),
            false => format!("pre-tokenizer {name:?} (known: {})", known.join(", ")),
        };
        unsupported(file, what)
    })
}

/// Splits by the patterns, then maps bytes to the characters that represent them.
pub(crate) fn splitter(pre: &PreTokenizer) -> tokenizers::Result<Sequence> {
    let split = |pattern: &&str| {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from)
    };
    let mut steps = pre.splits.iter().map(split).collect::<tokenizers::Result<Vec<_>>>()?;
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}

/// Returns the texts of all tokens. Empty ones get a name, since each id needs one.
fn tokens(file: &GgufFile) -> Result<Vec<String>> {
    let key = "tokenizer.ggml.tokens";
    let tokens = file.texts(key)?.ok_or_else(|| file.bad(key, "is missing"))?;
    let named = |(id, token): (usize, &String)| match token.is_empty() {
        true => format!("[EMPTY_{id}]"),
        false => token.clone(),
    };
    Ok(tokens.iter().enumerate().map(named).collect())
}

/// Returns the token types that the file declares.
fn declared_kinds(file: &GgufFile, count: usize) -> Result<Option<Vec<Kind>>> {
    let key = "tokenizer.ggml.token_type";
    match file.get(key) {
        None => Ok(None),
        Some(Value::Integers(numbers)) if numbers.len() >= count => {
            Ok(Some(numbers[..count].iter().map(|&n| Kind::from_number(n)).collect()))
        }
        Some(_) => Err(file.bad(key, format!("is no list of {count} numbers"))),
    }
}

/// Returns the type of each token. End tokens are control tokens even if the file does not say so.
fn kinds(file: &GgufFile, tokens: &[String]) -> Result<Vec<Kind>> {
    let mut special = end_tokens(file)?;
    let declared = declared_kinds(file, tokens.len())?;
    if declared.is_none() {
        for key in ["bos_token_id", "unknown_token_id", "padding_token_id", "seperator_token_id"] {
            special.extend(token_id(file, key)?);
        }
    }
    let mut kinds = declared.unwrap_or_else(|| vec![Kind::Normal; tokens.len()]);
    for id in special {
        if let Some(kind @ (Kind::Normal | Kind::Unused)) = kinds.get_mut(id as usize) {
            *kind = Kind::Control;
        }
    }
    Ok(kinds)
}

fn scores(file: &GgufFile, count: usize) -> Result<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    match file.get(key) {
        Some(Value::Floats(scores)) if scores.len() >= count => Ok(scores[..count].to_vec()),
        Some(Value::Integers(scores)) if scores.len() >= count => {
            Ok(scores[..count].iter().map(|&n| n as f32).collect())
        }
        Some(_) => Err(file.bad(key, format!("is no list of {count} numbers"))),
        None => Err(file.bad(key, "is missing")),
    }
}

/// The default tokens that a kind of tokenizer adds around a text, for files that do not specify
/// them.
struct Ends {
    add_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

fn surround(
    file: &GgufFile,
    inner: &mut Tokenizer,
    tokens: &[String],
    default: Ends,
) -> Result<()> {
    let named = |key: &str, id: Option<u32>| {
        let id = token_id(file, key)?.or(id);
        let token = id.and_then(|id| Some((id, tokens.get(id as usize)?.as_str())));
        token.map(Some).ok_or_else(|| {
            file.bad(&format!("tokenizer.ggml.{key}"), "names no token, and one is to be added")
        })
    };
    let adds = |key: &str, default: bool| -> Result<bool> {
        Ok(file.switch(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
    };
    let bos = match adds("add_bos_token", default.add_bos)? {
        true => named("bos_token_id", default.bos)?,
        false => None,
    };
    let eos = match adds("add_eos_token", false)? {
        true => named("eos_token_id", default.eos)?,
        false => None,
    };
    match (bos, eos) {
        (None, None) => Ok(()),
        _ => sentence_piece::surround(inner, bos, eos),
    }
}

fn unsupported(file: &GgufFile, what: String) -> Error {
    Error::Unsupported(format!("{}: {what}", file.path().display()))
}
