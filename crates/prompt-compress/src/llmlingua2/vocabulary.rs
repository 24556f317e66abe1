//! The checkpoint's tokenizer, with the package's rules for words and forced tokens.

use std::ops::Range;
use std::path::Path;

use super::checkpoint::Family;
use super::forced_tokens::ForcedTokens;
use longctx_checkpoint::{open_tokenizer, unpanicked};
use longctx_core::{Error, Result};
use tokenizers::{AddedToken, Decoder, Encoding, Tokenizer};

/// Number of placeholder tokens for forced tokens that the vocabulary lacks.
const NUM_PLACEHOLDERS: usize = 100;

/// Python's `string.punctuation`.
const PUNCTUATION: &str = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";

#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    family: Family,
    /// Ids of the first and the last token of a window.
    pub special_ids: (u32, u32),
}

impl Vocabulary {
    pub fn open(path: &Path, family: Family) -> Result<Self> {
        let failed = |e: tokenizers::Error| Error::file(path, e);
        let mut tokenizer = open_tokenizer(path)?;
        if tokenizer.get_decoder().is_none() {
            return Err(Error::file(path, "the tokenizer has no decoder"));
        }
        let added = (0..NUM_PLACEHOLDERS).map(|i| AddedToken::from(placeholder(i), true));
        tokenizer.add_special_tokens(added.collect::<Vec<_>>()).map_err(failed)?;
        // The package uses BERT's names for these tokens with every checkpoint. XLM-RoBERTa's
        // vocabulary lacks them, so its windows begin and end with the unknown token; the published
        // checkpoints are used and were evaluated like this.
        let (first, last) = match family {
            Family::Bert => ("[CLS]", "[SEP]"),
            Family::XlmRoberta => ("<unk>", "<unk>"),
        };
        let id = |token: &str| {
            let missing = || Error::file(path, format!("there is no token {token:?}"));
            tokenizer.token_to_id(token).ok_or_else(missing)
        };
        let special_ids = (id(first)?, id(last)?);
        Ok(Self { tokenizer, family, special_ids })
    }

    pub fn encode(&self, text: &str) -> Result<Encoding> {
        unpanicked(|| self.tokenizer.encode(text, false))
    }

    /// Returns the token's text in the vocabulary; the unknown token for an unknown id.
    pub fn token(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// Returns the largest id, that of the last added token.
    pub fn largest_id(&self) -> u32 {
        self.tokenizer.token_to_id(&placeholder(NUM_PLACEHOLDERS - 1)).unwrap_or(u32::MAX)
    }

    /// Returns the text that each of `tokens` adds to their joint decoding.
    pub fn decode(&self, tokens: Vec<String>) -> Result<Vec<String>> {
        match self.tokenizer.get_decoder() {
            Some(decoder) => unpanicked(|| decoder.decode_chain(tokens)),
            None => Ok(tokens),
        }
    }

    /// Returns whether a token has no text.
    pub fn is_special(&self, token: &str) -> bool {
        match self.family {
            Family::Bert => matches!(token, "[UNK]" | "[SEP]" | "[PAD]" | "[CLS]" | "[MASK]"),
            Family::XlmRoberta => matches!(token, "<s>" | "</s>" | "<unk>" | "<pad>" | "<mask>"),
        }
    }

    /// Returns whether the attention mask excludes a token: BERT's padding, if the text contains it
    /// literally.
    pub fn is_masked(&self, token: &str) -> bool {
        self.family == Family::Bert && token == "[PAD]"
    }

    pub fn begins_word(&self, token: &str, forced: &ForcedTokens) -> bool {
        match self.family {
            Family::Bert => {
                let plain = self.without_marks(token);
                forced.contains(plain) || forced.is_placeholder(plain) || !token.starts_with("##")
            }
            Family::XlmRoberta => {
                PUNCTUATION.contains(token)
                    || forced.contains(token)
                    || forced.is_placeholder(token)
                    || token.starts_with('▁')
            }
        }
    }

    /// Returns the token without the marks of its position in a word.
    pub fn without_marks<'a>(&self, token: &'a str) -> &'a str {
        match self.family {
            Family::Bert => token.trim_start_matches('#'),
            Family::XlmRoberta => token.trim_start_matches('▁'),
        }
    }

    /// Returns a word as the package reports it.
    pub fn label<'a>(&self, word: &'a str) -> &'a str {
        match self.family {
            Family::Bert => word,
            Family::XlmRoberta => word.trim_start_matches('▁'),
        }
    }

    /// Returns the forced tokens, with a placeholder for each that is not exactly one token of the
    /// vocabulary.
    pub fn forced(&self, tokens: &[String]) -> Result<ForcedTokens> {
        if tokens.len() > NUM_PLACEHOLDERS {
            return Err(Error::setting(
                "force_tokens",
                format!("at most {NUM_PLACEHOLDERS}"),
                tokens.len(),
            ));
        }
        if tokens.iter().any(String::is_empty) {
            return Err(Error::setting("force_tokens", "tokens of at least one character", "\"\""));
        }
        let mut placeholders = Vec::new();
        for (i, token) in tokens.iter().enumerate() {
            if self.encode(token)?.len() != 1 {
                placeholders.push((token.clone(), placeholder(i)));
            }
        }
        Ok(ForcedTokens::new(tokens.to_vec(), placeholders))
    }
}

fn placeholder(i: usize) -> String {
    format!("[NEW{i}]")
}

/// Returns the bytes from the first of `ranges` to the last; `None` if there are none.
pub fn span(ranges: impl IntoIterator<Item = Range<usize>>) -> Option<Range<usize>> {
    ranges.into_iter().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}
