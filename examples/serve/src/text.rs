//! Incremental detokenization, with complete characters, and stop strings.

/// Decodes tokens to text.
type Decode<'a> = &'a (dyn Fn(&[u32]) -> anyhow::Result<String> + Send + Sync);

/// The largest number of tokens that are held back because their text ends within a character.
const MAX_HELD: usize = 32;

/// Converts tokens to pieces of text. A character whose bytes are in several tokens is part of the
/// last token's piece.
///
/// For each token, only the tokens of the last piece and those after it are decoded. Earlier tokens
/// affect only white space.
#[derive(Default)]
pub struct Detokenizer {
    /// The tokens of the last piece, and those after it, which have not been returned.
    tokens: Vec<u32>,
    /// The number of tokens of the last piece.
    returned: usize,
}

impl Detokenizer {
    /// Adds a token and returns the text that it completes, which can be empty.
    pub fn push(&mut self, token: u32, decode: Decode<'_>) -> anyhow::Result<String> {
        self.tokens.push(token);
        let text = self.rest(decode)?;
        let open = text.is_empty() || text.ends_with('\u{FFFD}');
        if open && self.tokens.len() - self.returned < MAX_HELD {
            return Ok(String::new());
        }
        self.tokens.drain(..self.returned);
        self.returned = self.tokens.len();
        Ok(text)
    }

    /// Returns the text of the remaining tokens, which have not completed a character.
    pub fn finish(&mut self, decode: Decode<'_>) -> anyhow::Result<String> {
        let text = self.rest(decode)?;
        self.returned = self.tokens.len();
        Ok(text)
    }

    /// Returns the text of the tokens that have not been returned.
    fn rest(&self, decode: Decode<'_>) -> anyhow::Result<String> {
        let before = decode(&self.tokens[..self.returned])?;
        match decode(&self.tokens)?.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // An incomplete character also changes complete ones before it, if each of their bytes
            // is a token.
            None => decode(&self.tokens[self.returned..]),
        }
    }
}

/// Ends a text before the first stop string. It holds back the end of the text while it can be the
/// start of a stop string.
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Creates a search for these stop strings. Empty ones are ignored.
    pub fn new(strings: Vec<String>) -> Self {
        let strings = strings.into_iter().filter(|s| !s.is_empty()).collect();
        Self { strings, held: String::new() }
    }

    /// Returns the text that can be shown, and whether a stop string was found.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.strings.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let open = |stop: &String| {
            let ends = (1..stop.len()).rev().filter(|&n| stop.is_char_boundary(n));
            ends.map(|n| &stop[..n]).find(|start| self.held.ends_with(start)).map_or(0, str::len)
        };
        let keep = self.strings.iter().map(open).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Returns the text that was held back at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_characters_are_whole() {
        // Each token is a byte.
        let decode = |tokens: &[u32]| {
            let bytes: Vec<u8> = tokens.iter().map(|&t| t as u8).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = "aé漢🦀b";
        let mut detokenizer = Detokenizer::default();
        let mut all = String::new();
        for byte in text.bytes() {
            let piece = detokenizer.push(byte.into(), &decode).unwrap();
            assert!(piece.chars().count() <= 1 && !piece.contains('\u{FFFD}'));
            all += &piece;
        }
        assert_eq!(all, text);
        assert_eq!(detokenizer.finish(&decode).unwrap(), "");
        // Bytes that do not complete a character are returned at the end.
        assert_eq!(detokenizer.push(0xe6, &decode).unwrap(), "");
        assert_eq!(detokenizer.finish(&decode).unwrap(), "\u{FFFD}");
    }

    /// Decodes as Llama 2's tokenizer: the words after the bytes, and runs of bytes, of which each
    /// is a replacement character unless all are valid.
    fn with_byte_fallback(tokens: &[u32]) -> anyhow::Result<String> {
        let is_byte = |token: u32| token < 256;
        let run = |run: &[u32]| match run
            .iter()
            .map(|&t| u8::try_from(t))
            .collect::<Result<Vec<_>, _>>()
        {
            Ok(bytes) => String::from_utf8(bytes).unwrap_or_else(|_| "\u{FFFD}".repeat(run.len())),
            Err(_) => run.iter().map(|t| format!("w{t} ")).collect(),
        };
        Ok(tokens.chunk_by(|a, b| is_byte(*a) == is_byte(*b)).map(run).collect())
    }

    #[test]
    fn text_goes_on_after_an_incomplete_character() {
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        // A character, the first byte of another one, and words.
        let tokens = [bytes("漢"), vec![0xe6, 300, 301], bytes("字"), vec![302]].concat();
        let mut detokenizer = Detokenizer::default();
        let push = |&token| detokenizer.push(token, &with_byte_fallback).unwrap();
        let text: String = tokens.iter().map(push).collect();
        assert_eq!(text, "漢\u{FFFD}w300 w301 字w302 ");
        assert_eq!(detokenizer.finish(&with_byte_fallback).unwrap(), "");
    }

    #[test]
    fn invalid_text_is_returned_and_few_tokens_are_held() {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for _ in 0..1000 {
            text += &detokenizer.push(0xe6, &with_byte_fallback).unwrap();
            assert!(detokenizer.tokens.len() <= 2 * MAX_HELD);
        }
        text += &detokenizer.finish(&with_byte_fallback).unwrap();
        assert_eq!(text, "\u{FFFD}".repeat(1000));
    }

    #[test]
    fn stop_strings_end_the_text_wherever_pieces_break() {
        let text = "one two STOP three";
        for size in 1..text.len() {
            let mut stops = StopStrings::new(vec!["STOP".into(), "STAB".into(), String::new()]);
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in text.as_bytes().chunks(size) {
                let (safe, stop) = stops.push(std::str::from_utf8(piece).unwrap());
                shown += &safe;
                if stop {
                    stopped = true;
                    break;
                }
            }
            assert!(stopped);
            assert_eq!(shown, "one two ");
        }
        let mut stops = StopStrings::new(vec!["STOP".into()]);
        assert_eq!(stops.push("an ST"), ("an ".into(), false));
        assert_eq!(stops.finish(), "ST");
    }
}
