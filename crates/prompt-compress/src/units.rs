//! Cutting a text into words and sentences that tile it.

use std::ops::Range;
use unicode_segmentation::UnicodeSegmentation;

/// The words of `text` (Unicode Standard Annex 29), each with the white space after it; the ranges tile the text.
///
/// Punctuation counts as a word, as does a Chinese character. White space before the first word goes to the first word.
///
/// ```
/// let text = "Hello,  world!";
/// let words: Vec<&str> = prompt_compress::words(text).into_iter().map(|r| &text[r]).collect();
/// assert_eq!(words, ["Hello", ",  ", "world", "!"]);
/// ```
pub fn words(text: &str) -> Vec<Range<usize>> {
    let mut words: Vec<Range<usize>> = Vec::new();
    let mut only_space = true;
    for (start, part) in text.split_word_bound_indices() {
        let end = start + part.len();
        let space = part.trim().is_empty();
        match words.last_mut() {
            Some(last) if space || only_space => last.end = end,
            _ => words.push(start..end),
        }
        only_space &= space;
    }
    words
}

/// The sentences of `text` (Unicode Standard Annex 29), cut at line ends too; the ranges tile the text.
pub fn sentences(text: &str) -> Vec<Range<usize>> {
    text.split_sentence_bound_indices().map(|(start, part)| start..start + part.len()).collect()
}

/// The lower-case words of `text`, without punctuation and white space: what rankings compare.
pub(crate) fn terms(text: &str) -> Vec<String> {
    text.unicode_words().map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn white_space_stays_with_words() {
        let cut =
            |text: &'static str| words(text).into_iter().map(|r| &text[r]).collect::<Vec<_>>();
        assert_eq!(cut("  a b\n"), ["  a ", "b\n"]);
        assert_eq!(cut("你好"), ["你", "好"]);
        assert_eq!(cut(" \n"), [" \n"]);
        assert!(cut("").is_empty());
    }

    proptest! {
        #[test]
        fn words_and_sentences_tile_the_text(text in ".{0,80}") {
            for ranges in [words(&text), sentences(&text)] {
                let joined: String = ranges.into_iter().map(|r| &text[r]).collect();
                prop_assert_eq!(&joined, &text);
            }
        }
    }
}
