//! SentencePiece's file `tokenizer.model`, with the files that `transformers` writes beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use crate::json::Fields;
use crate::sentence_piece::{self, Kind, Piece, SpacePrefix};
use longctx_checkpoint::files;
use longctx_core::{Error, Result};
use prost::Message;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

const BPE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// Builds the tokenizer of a folder with a `tokenizer.model`, as `transformers` does for Llama.
///
/// # Errors
/// [`Error::File`] if a file is invalid; [`Error::Unsupported`] if the model is not BPE or
/// normalizes its text.
pub(crate) fn tokenizer(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.model");
    let mut bytes = Vec::new();
    files::open(&path)?.read_to_end(&mut bytes).map_err(|e| Error::file(&path, e))?;
    let model = ModelProto::decode(bytes.as_slice()).map_err(|e| Error::file(&path, e))?;
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    check(&path, &trainer, &normalizer)?;

    let config_path = folder.join("tokenizer_config.json");
    let config = match files::read_text_if_present(&config_path)? {
        Some(text) => serde_json::from_str(&text).map_err(|e| Error::file(&config_path, e))?,
        None => Value::Object(Map::new()),
    };
    let config = Fields::new(&config_path, &config)?;
    let prefix = match (normalizer.add_dummy_prefix(), config.switch("legacy")?) {
        (false, _) => SpacePrefix::Never,
        (true, Some(false)) => SpacePrefix::Text,
        (true, _) => SpacePrefix::EachFragment,
    };
    let piece = |p: &PieceProto| Piece {
        text: p.piece().to_owned(),
        score: p.score(),
        kind: Kind::from_number(p.kind().into()),
    };
    let pieces: Vec<_> = model.pieces.iter().map(piece).collect();
    let mut inner = sentence_piece::tokenizer(&pieces, prefix)?;
    for (id, token) in added_tokens(folder, &config)? {
        add(&config_path, &mut inner, id, token)?;
    }
    let token = |id: i32| {
        let id = u32::try_from(id).ok()?;
        Some((id, pieces.get(id as usize)?.text.as_str()))
    };
    let adds_bos = config.switch("add_bos_token")?.unwrap_or(true);
    let adds_eos = config.switch("add_eos_token")?.unwrap_or(false);
    let bos = token(trainer.bos_id()).filter(|_| adds_bos);
    let eos = token(trainer.eos_id()).filter(|_| adds_eos);
    if bos.is_some() || eos.is_some() {
        sentence_piece::surround(&mut inner, bos, eos)?;
    }
    Ok(inner)
}

fn check(path: &Path, trainer: &TrainerSpec, normalizer: &NormalizerSpec) -> Result<()> {
    let unsupported = |what: &str| {
        Err(Error::Unsupported(format!("{}: a SentencePiece model {what}", path.display())))
    };
    if trainer.model_type() != BPE {
        return unsupported("that is not of type BPE");
    }
    if !normalizer.precompiled_charsmap().is_empty() {
        return unsupported("that replaces characters (precompiled_charsmap)");
    }
    if normalizer.remove_extra_whitespaces() {
        return unsupported("with remove_extra_whitespaces");
    }
    if !normalizer.escape_whitespaces() || trainer.treat_whitespace_as_suffix() {
        return unsupported("that treats spaces in an unusual way");
    }
    Ok(())
}

/// Returns tokens besides the model's own: `added_tokens_decoder` of the configuration, or
/// `added_tokens.json`.
fn added_tokens(folder: &Path, config: &Fields) -> Result<BTreeMap<u32, AddedToken>> {
    let path = folder.join("added_tokens.json");
    let mut added = BTreeMap::new();
    if let Some(text) = files::read_text_if_present(&path)? {
        let json: BTreeMap<String, u32> =
            serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        let special = special_tokens(config)?;
        for (token, id) in json {
            let is_special = special.contains(&token);
            added.insert(id, AddedToken::from(token, is_special).normalized(false));
        }
    }
    let Some(decoder) = config.object("added_tokens_decoder")? else { return Ok(added) };
    for (id, token) in decoder {
        let bad = |e: &dyn std::fmt::Display| config.error("added_tokens_decoder", e);
        let id: u32 = id.parse().map_err(|e| bad(&format!("{id:?}: {e}")))?;
        added.insert(id, serde_json::from_value(token.clone()).map_err(|e| bad(&e))?);
    }
    Ok(added)
}

/// Returns the texts of fields such as "pad_token".
fn special_tokens(config: &Fields) -> Result<BTreeSet<String>> {
    let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token"];
    Ok(names.iter().filter_map(|name| config.token(name)).collect())
}

fn add(path: &Path, inner: &mut Tokenizer, id: u32, token: AddedToken) -> Result<()> {
    let next = inner.get_vocab_size(true) as u32;
    let text = token.content.clone();
    if inner.token_to_id(&text).unwrap_or(next) != id {
        let reason = format!("added token {text:?} has the id {id}, where {next} is free");
        return Err(Error::file(path, reason));
    }
    inner.add_tokens([token]).map_err(|e| Error::file(path, e))?;
    Ok(())
}
