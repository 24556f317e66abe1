//! Python's string functions, where they differ from Rust's standard library: Python programs
//! define the metrics.

pub mod random;

use std::sync::LazyLock;

use regex::{Captures, Regex};

/// `str.isspace`: Unicode's white space and the four ASCII separators.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.split()`.
pub fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// `str.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `re.sub(r"\b(a|an|the)\b", with, text)`: an article is a maximal run of word characters.
pub fn replace_articles(text: &str, with: &str) -> String {
    // Python's \w is letters, numbers and the underscore. The regex crate's \w differs; its Unicode
    // classes do not.
    static WORD: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").expect("the pattern is valid"));
    let article = |found: &Captures<'_>| match &found[0] {
        "a" | "an" | "the" => with.to_owned(),
        word => word.to_owned(),
    };
    WORD.replace_all(text, article).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_separators_are_space() {
        assert_eq!(split("\x1ca\u{a0}b\x1fc ").collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(strip("\x1d a\u{85}"), "a");
    }

    #[test]
    fn articles_are_whole_words() {
        assert_eq!(
            replace_articles("the cat, an other a_b á la the", "-"),
            "- cat, - other a_b á la -"
        );
    }
}
