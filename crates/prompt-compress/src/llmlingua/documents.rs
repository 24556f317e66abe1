//! A prompt as documents, with the mapping of the kept text to its source.

use std::ops::Range;

use longctx_core::{Compressed, Piece};

/// A text and its documents: byte ranges that do not overlap.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Documents {
    /// The whole text.
    pub text: String,
    /// Byte ranges of the documents, in any order.
    pub ranges: Vec<Range<usize>>,
}

impl Documents {
    /// Joins documents to one text, separated by empty lines.
    pub fn join<S: AsRef<str>>(documents: &[S]) -> Self {
        let mut joined = Self::default();
        for document in documents {
            if !joined.text.is_empty() {
                joined.text.push_str("\n\n");
            }
            let start = joined.text.len();
            joined.text.push_str(document.as_ref());
            joined.ranges.push(start..joined.text.len());
        }
        joined
    }

    /// Makes one document of each paragraph of `text`. Empty lines separate paragraphs.
    pub fn paragraphs(text: &str) -> Self {
        let mut ranges = Vec::new();
        let mut start = 0;
        for part in text.split("\n\n") {
            if !part.trim().is_empty() {
                ranges.push(start..start + part.len());
            }
            start += part.len() + 2;
        }
        Self { text: text.to_owned(), ranges }
    }
}

/// The kept part of a document: ranges of the text, in order.
#[derive(Debug, Clone)]
pub struct KeptRanges {
    pub ranges: Vec<Range<usize>>,
    /// Added to the ratio of its tokens.
    pub ratio_offset: f64,
}

impl KeptRanges {
    pub fn text(&self, source: &str) -> String {
        self.ranges.iter().map(|range| &source[range.clone()]).collect()
    }
}

/// A text joined from others, with the mapping of its bytes to the documents' text.
#[derive(Debug, Default)]
pub struct JoinedText {
    pub text: String,
    /// Ranges of the text, each with its start in the documents' text.
    parts: Vec<(Range<usize>, usize)>,
}

impl JoinedText {
    /// Joins a prefix that has no source and documents, separated by empty lines.
    pub fn new(prefix: Option<&str>, documents: &[KeptRanges], source: &str) -> Self {
        let mut joined = Self::default();
        joined.text.push_str(prefix.unwrap_or(""));
        for (i, document) in documents.iter().enumerate() {
            if i > 0 || prefix.is_some() {
                joined.text.push_str("\n\n");
            }
            for range in &document.ranges {
                let start = joined.text.len();
                joined.text.push_str(&source[range.clone()]);
                joined.parts.push((start..joined.text.len(), range.start));
            }
        }
        joined
    }

    /// Returns the bytes of the documents' text for a range of this text: several ranges if it
    /// crosses a boundary.
    fn sources(&self, range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let first = self.parts.partition_point(|(part, _)| part.end <= range.start);
        let (from, to) = (range.start, range.end);
        self.parts[first..].iter().take_while(move |(part, _)| part.start < to).map(
            move |(part, source)| {
                let (from, to) = (from.max(part.start), to.min(part.end));
                source + from - part.start..source + to - part.start
            },
        )
    }

    /// Returns the pieces of `output`, which consists of the tokens with the ranges `kept` of this
    /// text, in order.
    ///
    /// A token that is not in the output as it was in the text gives no piece: half of a character,
    /// or a separator.
    pub fn to_compressed(&self, kept: &[Range<usize>], source: &str, output: String) -> Compressed {
        let mut compressed = Compressed { text: output, pieces: Vec::new() };
        let mut at = 0;
        let mut done: Vec<Range<usize>> = Vec::new();
        for range in kept.iter().flat_map(|range| self.sources(range)) {
            if range.is_empty() || done.last() == Some(&range) {
                continue;
            }
            let Some(found) = find(&compressed.text, at, &source[range.clone()]) else { continue };
            let whole = &source[range.clone()];
            let source = range.end - found.len()..range.end;
            debug_assert!(whole.ends_with(&compressed.text[found.clone()]));
            at = found.end;
            done.push(range);
            match compressed.pieces.last_mut() {
                Some(last) if last.source.end == source.start && last.output.end == found.start => {
                    (last.source.end, last.output.end) = (source.end, found.end);
                }
                _ => compressed.pieces.push(Piece { source, output: found }),
            }
        }
        compressed
    }
}

/// Finds `token` in `text` from `at` on, after white space and replacement characters. Also finds
/// the token without its leading white space.
fn find(text: &str, mut at: usize, token: &str) -> Option<Range<usize>> {
    loop {
        for token in [token, token.trim_start()] {
            if !token.is_empty() && text[at..].starts_with(token) {
                return Some(at..at + token.len());
            }
        }
        let skipped = text[at..].chars().next()?;
        if !(skipped.is_whitespace() || skipped == '\u{fffd}') {
            return None;
        }
        at += skipped.len_utf8();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_and_joined_documents() {
        let documents = Documents::paragraphs("one\n\n\n\ntwo\nthree\n\n");
        assert_eq!(documents.ranges, [0..3, 7..16]);
        let documents = Documents::join(&["one", "two"]);
        assert_eq!((documents.text.as_str(), &documents.ranges[1]), ("one\n\ntwo", &(5..8)));
    }

    #[test]
    fn pieces_span_documents_and_skip_broken_characters() {
        let source = "alpha beta gamma é";
        let kept = [KeptRanges { ranges: vec![0..6, 11..19], ratio_offset: 0.0 }];
        let joined = JoinedText::new(Some("q"), &kept, source);
        assert_eq!(joined.text, "q\n\nalpha gamma é");
        // "alpha", " gam" across the boundary, half of "é".
        let ranges = [3..8, 8..12, 14..17];
        let record = joined.to_compressed(&ranges, source, "alpha gam\u{fffd}".into());
        record.check(source).unwrap();
        assert_eq!(record.kept_text(source), "alpha gam");
        assert_eq!(record.pieces.len(), 2);
    }
}
