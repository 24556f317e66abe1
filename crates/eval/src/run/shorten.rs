//! Shortens a turn: truncated in the middle to the limit, then compressed.

use std::ops::Range;
use std::time::{Duration, Instant};

use longctx_core::{Prompt, PromptCompressor, Rate};

use super::reader::Text;
use super::subject::SubjectError;
use crate::truncate_middle;

/// A prompt compressor and its rate.
pub(super) type Compressor = (Box<dyn PromptCompressor>, Rate);

/// A shortened turn.
pub(super) struct ShortenedTurn {
    pub text: String,
    /// Tokens removed by compression.
    pub saved: usize,
    /// Time within the compressor.
    pub spent: Duration,
}

/// Truncates `turn` to `limit` tokens and compresses it, or only its part `context`.
pub(super) fn shorten(
    turn: &str,
    context: Option<&Range<usize>>,
    question: Option<&str>,
    (text, limit): (&dyn Text, usize),
    compressor: Option<&mut Compressor>,
) -> Result<ShortenedTurn, SubjectError> {
    let encode = |x: &str| text.encode(x, false);
    let cut = truncate_middle(turn, limit, encode, |tokens| text.decode(tokens))?;
    let whole = |text| ShortenedTurn { text, saved: 0, spent: Duration::ZERO };
    let Some((compressor, rate)) = compressor else { return Ok(whole(cut)) };
    let (before, inner, after) = context
        .and_then(|place| split_context(&cut, turn.get(..place.start)?, turn.get(place.end..)?))
        .unwrap_or(("", &cut, ""));
    if inner.trim().is_empty() {
        return Ok(whole(cut));
    }
    let started = Instant::now();
    let prompt = Prompt { question, ..Prompt::new(inner)? };
    let short = compressor.compress(prompt, *rate)?.text;
    let spent = started.elapsed();
    let short = [before, &short, after].concat();
    let saved = encode(&cut)?.len().saturating_sub(encode(&short)?.len());
    Ok(ShortenedTurn { text: short, saved, spent })
}

/// Splits `text` into the part before the context, the context, and the part after it; `None` if
/// the truncation reached into the parts around the context.
fn split_context<'a>(
    text: &'a str,
    before: &str,
    after: &str,
) -> Option<(&'a str, &'a str, &'a str)> {
    let inner = text.strip_prefix(before)?.strip_suffix(after)?;
    let start = before.len();
    Some((&text[..start], inner, &text[start + inner.len()..]))
}
