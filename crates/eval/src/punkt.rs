//! Sentence segmentation as in NLTK 3.9 for English: the Punkt algorithm (Kiss and Strunk, 2006)
//! with NLTK's parameters.
//!
//! Written here because the crate `punkt` is unmaintained and differs from NLTK.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::LazyLock;

use fancy_regex::{Captures, Regex};

use crate::python;

/// Parameters learned from a large text.
#[derive(serde::Deserialize)]
struct Parameters {
    abbrev_types: HashSet<String>,
    collocations: HashSet<(String, String)>,
    sentence_starters: HashSet<String>,
    /// For each word, the positions and cases in which it occurred, as flags.
    ortho_context: HashMap<String, u8>,
}

static ENGLISH: LazyLock<Parameters> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/punkt/english.json"))
        .expect("the file is one of parameters")
});

/// Flags of an orthographic context.
const MIDDLE_UPPER: u8 = 1 << 2;
const UPPER: u8 = 1 << 1 | MIDDLE_UPPER | 1 << 3;
const BEGINNING_LOWER: u8 = 1 << 4;
const LOWER: u8 = BEGINNING_LOWER | 1 << 5 | 1 << 6;

/// `nltk.sent_tokenize(text)`.
pub fn sentences(text: &str) -> Vec<&str> {
    let breaks = breaks(text);
    let mut all = Vec::new();
    // Bytes of the next sentence that belong to this one: closing quotes and brackets.
    let mut taken = 0;
    for (i, sentence) in breaks.iter().enumerate() {
        let start = sentence.start + taken;
        let closing =
            breaks.get(i + 1).and_then(|next| Some((next.start, closing(&text[next.clone()])?)));
        let end = closing.map_or(sentence.end, |(next, closing)| {
            next + closing.trim_end_matches(python::is_space).len()
        });
        taken = closing.map_or(0, |(_, closing)| closing.len());
        if closing.is_some() || start < end {
            all.push(&text[start.min(end)..end]);
        }
    }
    all
}

/// Returns the closing punctuation at the start of a sentence, with the white space after it.
fn closing(sentence: &str) -> Option<&str> {
    static CLOSING: LazyLock<Regex> =
        LazyLock::new(|| pattern(r#"\A(?m:["')\]}]+?(?:\s+|(?=--)|$))"#));
    CLOSING.find(sentence).ok().flatten().map(|found| found.as_str())
}

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the pattern is valid")
}

/// A position where a sentence may end, and the words on both sides of it.
struct Candidate {
    end: usize,
    next: Option<usize>,
    context: String,
}

fn breaks(text: &str) -> Vec<Range<usize>> {
    let mut all = Vec::new();
    let mut start = 0;
    for candidate in candidates(text) {
        if contains_break(&candidate.context) {
            all.push(start..candidate.end);
            start = candidate.next.unwrap_or(candidate.end);
        }
    }
    all.push(start..text.trim_end_matches(python::is_space).len().max(start));
    all
}

fn candidates(text: &str) -> Vec<Candidate> {
    static END: LazyLock<Regex> =
        LazyLock::new(|| pattern(r#"[.?!](?=(?P<after>(?:[)";}\]*:@'({\[!?])|\s+(?P<next>\S+)))"#));
    let candidate = |word: &Range<usize>, found: &Captures<'_, str>| {
        let end = found.get(0).map_or(0, |all| all.end());
        let after = found.name("after").map_or("", |after| after.as_str());
        Candidate {
            end,
            next: found.name("next").map(|next| next.start()),
            context: text[word.start..end].to_owned() + after,
        }
    };
    let mut all = Vec::new();
    let mut previous: Option<(Range<usize>, Captures<'_, str>)> = None;
    for found in END.captures_iter(text).filter_map(Result::ok) {
        let at = found.get(0).map_or(0, |all| all.start());
        let (from, to) = previous.as_ref().map_or((0, 0), |(word, _)| (word.start, word.end));
        // Python's search for the last space returns 0 both for no space and for one at the start.
        let space = text[to..at].rfind(|c: char| " \t\n\r\x0b\x0c".contains(c)).filter(|&i| i > 0);
        let word = space.map_or(from, |space| to + space + 1)..at;
        if let Some((before, found)) = &previous
            && before.end <= word.start
        {
            all.push(candidate(before, found));
        }
        previous = Some((word, found));
    }
    all.extend(previous.map(|(word, found)| candidate(&word, &found)));
    all
}

/// A word and its classification.
struct Token {
    text: String,
    /// In lower case, with numbers replaced by a placeholder.
    kind: String,
    ends_sentence: bool,
    abbreviation: bool,
    ellipsis: bool,
}

fn contains_break(context: &str) -> bool {
    let lines = context.split('\n').filter(|line| !python::strip(line).is_empty());
    let mut tokens: Vec<Token> = lines.flat_map(words).map(Token::new).collect();
    for i in 0..tokens.len().saturating_sub(1) {
        let (left, right) = tokens.split_at_mut(i + 1);
        left[i].reconsider(&right[0]);
    }
    // The last token does not end a sentence.
    let last = tokens.len().saturating_sub(1);
    tokens[..last].iter().any(|token| token.ends_sentence)
}

fn words(line: &str) -> Vec<&str> {
    static WORD: LazyLock<Regex> = LazyLock::new(|| {
        let several = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)";
        let no_word = r#"(?:[)";}\]*:@'({\[!?])"#;
        let word = r#"(?=[^("`{\[:;&#*@)}\]\-,])\S+?"#;
        pattern(&format!(
            r"{several}|{word}(?=\s|$|{no_word}|{several}|,(?=$|\s|{no_word}|{several}))|\S"
        ))
    });
    WORD.find_iter(line).filter_map(Result::ok).map(|word| word.as_str()).collect()
}

impl Token {
    fn new(text: &str) -> Self {
        static NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"^-?[.,]?\d[\d,.\-]*\.?$"));
        let lower = text.to_lowercase();
        let number = NUMBER.is_match(&lower).unwrap_or(false);
        let kind = if number { "##number##".to_owned() } else { lower.clone() };
        let ellipsis = text.len() > 1 && text.bytes().all(|byte| byte == b'.');
        let word = lower.strip_suffix('.').filter(|_| !ellipsis && !text.ends_with(".."));
        let known = |word: &str| ENGLISH.abbrev_types.contains(word);
        let abbreviation = text != "."
            && word.is_some_and(|word| known(word) || word.rsplit('-').next().is_some_and(known));
        let ends_sentence = ["?", "!", "."].contains(&text) || (word.is_some() && !abbreviation);
        Self { text: text.to_owned(), kind, ends_sentence, abbreviation, ellipsis }
    }

    /// Decides from the next token whether a period ends a sentence.
    fn reconsider(&mut self, next: &Self) {
        if !self.text.ends_with('.') {
            return;
        }
        let (kind, next_kind) = (without_period(&self.kind), next.kind_in_sentence());
        if ENGLISH.collocations.contains(&(kind.to_owned(), next_kind.to_owned())) {
            (self.ends_sentence, self.abbreviation) = (false, true);
            return;
        }
        let initial = is_initial(&self.text);
        if (self.abbreviation || self.ellipsis) && !initial {
            let frequent = next.upper() && ENGLISH.sentence_starters.contains(next_kind);
            if next.starts_sentence() == Some(true) || frequent {
                self.ends_sentence = true;
                return;
            }
        }
        if initial || kind == "##number##" {
            let never_lower = context(next_kind) & LOWER == 0;
            match next.starts_sentence() {
                Some(false) => (self.ends_sentence, self.abbreviation) = (false, true),
                None if initial && next.upper() && never_lower => {
                    (self.ends_sentence, self.abbreviation) = (false, true);
                }
                _ => {}
            }
        }
    }

    /// Decides by its case and the cases in which it occurred; `None`: undecided.
    fn starts_sentence(&self) -> Option<bool> {
        if [";", ":", ",", ".", "!", "?"].contains(&self.text.as_str()) {
            return Some(false);
        }
        let seen = context(self.kind_in_sentence());
        if self.upper() && seen & LOWER != 0 && seen & MIDDLE_UPPER == 0 {
            return Some(true);
        }
        let lower = self.text.chars().next().is_some_and(char::is_lowercase);
        (lower && (seen & UPPER != 0 || seen & BEGINNING_LOWER == 0)).then_some(false)
    }

    fn upper(&self) -> bool {
        self.text.chars().next().is_some_and(char::is_uppercase)
    }

    fn kind_in_sentence(&self) -> &str {
        if self.ends_sentence { without_period(&self.kind) } else { &self.kind }
    }
}

fn without_period(kind: &str) -> &str {
    kind.strip_suffix('.').filter(|kind| !kind.is_empty()).unwrap_or(kind)
}

/// Returns whether a text is one letter and a period.
fn is_initial(text: &str) -> bool {
    text.strip_suffix('.').is_some_and(|letter| {
        let mut chars = letter.chars();
        chars.next().is_some_and(|c| (c.is_alphanumeric() || c == '_') && !c.is_numeric())
            && chars.next().is_none()
    })
}

fn context(kind: &str) -> u8 {
    ENGLISH.ortho_context.get(kind).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fixture is the output of NLTK (`tests/fixtures/ruler/make.py`).
    #[test]
    fn sentences_are_nltks() {
        let text = include_str!("../tests/fixtures/ruler/sentences.json");
        let all: Vec<(String, Vec<String>)> = serde_json::from_str(text).unwrap();
        assert!(all.len() > 400);
        for (text, theirs) in all {
            assert_eq!(sentences(&text), theirs, "{text}");
        }
    }
}
