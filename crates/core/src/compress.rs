//! Prompt compression: text in, shorter text out, with a record of the pieces that were kept.

use crate::{Error, Result};
use std::ops::Range;

/// A compression rate: compressed size divided by original size, in (0, 1].
///
/// ```
/// use longctx_core::Rate;
///
/// assert_eq!(Rate::new(0.25)?.get(), 0.25);
/// assert!(Rate::new(0.0).unwrap_err().to_string().contains("(0, 1]"));
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Rate(f64);

impl Rate {
    /// Keeps everything.
    pub const ONE: Rate = Rate(1.0);

    /// Creates a rate in (0, 1].
    ///
    /// # Errors
    /// [`Error::Setting`] for any other number, NaN included.
    pub fn new(rate: f64) -> Result<Self> {
        if rate > 0.0 && rate <= 1.0 {
            Ok(Self(rate))
        } else {
            Err(Error::setting("rate", "a number in (0, 1]", rate))
        }
    }

    /// Returns the rate as a number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Returns `total` times the rate, rounded to the nearest integer, and at least 1 if `total` is
    /// not 0.
    pub fn apply(self, total: usize) -> usize {
        ((self.0 * total as f64).round() as usize).clamp(total.min(1), total)
    }
}

/// The input of a compressor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt<'a> {
    /// The text to compress.
    pub text: &'a str,
    /// A question about the text, for compressors that condition on it. It is never part of the
    /// output.
    pub question: Option<&'a str>,
}

impl<'a> Prompt<'a> {
    /// Creates a prompt without a question.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the text is empty or only white space.
    pub fn new(text: &'a str) -> Result<Self> {
        if text.trim().is_empty() {
            return Err(Error::mismatch("prompt", "text", "nothing but white space"));
        }
        Ok(Self { text, question: None })
    }

    /// Returns the prompt with a question.
    pub fn with_question(self, question: &'a str) -> Self {
        Self { question: Some(question), ..self }
    }
}

/// A piece of the prompt that was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Byte range in the prompt.
    pub source: Range<usize>,
    /// Byte range in the compressed text.
    pub output: Range<usize>,
}

/// A compressed prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Compressed {
    /// The compressed text.
    pub text: String,
    /// The pieces that were kept, in the order of the output. Source ranges do not overlap; neither
    /// do output ranges.
    ///
    /// If a compressor copies bytes, the pieces cover its whole output. If it decodes tokens
    /// through a tokenizer, there may be separators between pieces that match no byte of the
    /// prompt, and a piece may be in normalised form.
    pub pieces: Vec<Piece>,
}

impl Compressed {
    /// Concatenates `ranges` of `source`. Adjacent ranges become one piece.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if a range does not lie on character boundaries of `source`, or overlaps
    /// an earlier range.
    pub fn copy(source: &str, ranges: impl IntoIterator<Item = Range<usize>>) -> Result<Self> {
        let mut compressed = Self::default();
        for range in ranges {
            let Some(bytes) = source.get(range.clone()) else {
                let expected = format!("character boundaries within {} bytes", source.len());
                return Err(Error::mismatch("kept range", expected, format!("{range:?}")));
            };
            let start = compressed.text.len();
            compressed.text.push_str(bytes);
            match compressed.pieces.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.source.end == range.start => {
                    last.source.end = range.end;
                    last.output.end = compressed.text.len();
                }
                _ => {
                    let output = start..compressed.text.len();
                    compressed.pieces.push(Piece { source: range, output });
                }
            }
        }
        compressed.check(source)?;
        Ok(compressed)
    }

    /// Checks the pieces: ranges on character boundaries, outputs in order, sources disjoint.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the first invalid piece.
    pub fn check(&self, source: &str) -> Result<()> {
        let broken = |piece: &Piece, rule: &str| {
            Err(Error::mismatch("record of a compressed prompt", rule, format!("{piece:?}")))
        };
        let mut end = 0;
        for piece in &self.pieces {
            if source.get(piece.source.clone()).is_none() {
                return broken(piece, "source ranges on character boundaries of the prompt");
            }
            if self.text.get(piece.output.clone()).is_none() {
                return broken(piece, "output ranges on character boundaries of the output");
            }
            if piece.output.start < end {
                return broken(piece, "output ranges in order");
            }
            end = piece.output.end;
        }
        let mut by_source: Vec<&Piece> = self.pieces.iter().collect();
        by_source.sort_by_key(|piece| piece.source.start);
        match by_source.windows(2).find(|pair| pair[0].source.end > pair[1].source.start) {
            Some(pair) => broken(pair[1], "disjoint source ranges"),
            None => Ok(()),
        }
    }

    /// Concatenates the source bytes of all pieces. Equal to the output if the compressor copies
    /// bytes.
    ///
    /// # Panics
    /// If `source` is not the prompt that was compressed.
    pub fn kept_text(&self, source: &str) -> String {
        self.pieces.iter().map(|piece| &source[piece.source.clone()]).collect()
    }
}

/// A prompt compressor.
pub trait PromptCompressor {
    /// Compresses `prompt.text` to about `rate` of its size, in the compressor's own unit (words or
    /// tokens).
    ///
    /// # Errors
    /// If the compressor needs a question and there is none; errors of its model.
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed>;
}

impl<C: PromptCompressor + ?Sized> PromptCompressor for Box<C> {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        (**self).compress(prompt, rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_ranges_and_joins_those_that_touch() {
        let source = "one two three four";
        let kept = Compressed::copy(source, [0..4, 4..8, 14..18]).unwrap();
        assert_eq!(kept.text, "one two four");
        assert_eq!(kept.pieces.len(), 2);
        assert_eq!(kept.pieces[1], Piece { source: 14..18, output: 8..12 });
        assert_eq!(kept.kept_text(source), kept.text);
    }

    #[test]
    fn bad_ranges_are_named() {
        let message = |ranges: &[Range<usize>]| {
            Compressed::copy("aé", ranges.iter().cloned()).unwrap_err().to_string()
        };
        assert!(message(std::slice::from_ref(&(1..2))).contains("character boundaries"));
        assert!(message(std::slice::from_ref(&(0..9))).contains("within 3 bytes"));
        assert!(message(&[1..3, 0..3]).contains("disjoint"));
    }

    #[test]
    fn rates_and_prompts_are_checked() {
        for bad in [0.0, -0.5, 1.01, f64::NAN] {
            assert!(Rate::new(bad).is_err());
        }
        assert_eq!(Rate::new(0.5).unwrap().apply(7), 4);
        assert_eq!(Rate::new(0.01).unwrap().apply(7), 1);
        assert_eq!(Rate::ONE.apply(0), 0);
        assert!(Prompt::new(" \n").is_err());
    }
}
