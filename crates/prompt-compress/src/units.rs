//! Splits a text into words and sentences that cover it.

use std::ops::Range;
use unicode_segmentation::UnicodeSegmentation;

/// Returns the words of `text` (Unicode Standard Annex 29), each with its punctuation and the white
/// space after it. The ranges are consecutive and cover the text.
///
/// Punctuation belongs to the word before it, or to the word after it if white space precedes the
/// punctuation. White space before the first word belongs to it. A Chinese character is a word.
///
/// ```
/// let text = "Hello,  (new) world!";
/// let words: Vec<&str> = prompt_compress::words(text).into_iter().map(|r| &text[r]).collect();
/// assert_eq!(words, ["Hello,  ", "(new) ", "world!"]);
/// ```
pub fn words(text: &str) -> Vec<Range<usize>> {
    let mut words: Vec<Range<usize>> = Vec::new();
    // Whether there was only white space so far; whether the last word has letters or digits;
    // whether it ends in white space.
    let (mut only_space, mut named, mut spaced) = (true, false, false);
    for (start, part) in text.split_word_bound_indices() {
        let end = start + part.len();
        let space = part.trim().is_empty();
        let names = part.contains(char::is_alphanumeric);
        match words.last_mut() {
            Some(last) if space || only_space || !(spaced || named && names) => {
                last.end = end;
                named |= names;
            }
            _ => {
                words.push(start..end);
                named = names;
            }
        }
        spaced = space;
        only_space &= space;
    }
    words
}

/// Returns the sentences of `text` (Unicode Standard Annex 29), also split at line ends. The ranges
/// are consecutive and cover the text.
pub fn sentences(text: &str) -> Vec<Range<usize>> {
    text.split_sentence_bound_indices().map(|(start, part)| start..start + part.len()).collect()
}

/// Returns the lower-case words of `text`, without punctuation and white space, for ranking.
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
        assert_eq!(cut("你好。"), ["你", "好。"]);
        assert_eq!(cut("a - (b), c/d"), ["a ", "- ", "(b), ", "c/", "d"]);
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
