//! The tokenizer of RWKV's World models: greedy longest match over bytes.

use std::collections::HashMap;
use std::path::Path;

use longctx_core::{Error, Result};

/// A vocabulary of byte strings, stored as a trie.
#[derive(Debug, Clone)]
pub struct World {
    /// Nodes of the trie, the root first.
    nodes: Vec<Node>,
    words: HashMap<u32, Vec<u8>>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    /// The token that ends at this node.
    token: Option<u32>,
    /// Children by next byte, in increasing order.
    next: Vec<(u8, u32)>,
}

impl World {
    /// Reads a vocabulary file of the `rwkv` package: lines of an id, a Python string or bytes
    /// literal, and its length in bytes.
    ///
    /// # Errors
    /// [`Error::File`] naming an invalid line.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let mut world = Self { nodes: vec![Node::default()], words: HashMap::new() };
        // Only "\n" ends a line: literals may contain other line separators.
        for (number, line) in text.split('\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            let (id, word) = parse(line).ok_or_else(|| {
                let what = format!("line {}: no id, literal and length: {line:?}", number + 1);
                Error::file(path, what)
            })?;
            world.insert(id, word);
        }
        Ok(world)
    }

    fn insert(&mut self, id: u32, word: Vec<u8>) {
        let mut at = 0;
        for &byte in &word {
            let place = self.nodes[at].next.binary_search_by_key(&byte, |&(b, _)| b);
            at = match place {
                Ok(i) => self.nodes[at].next[i].1 as usize,
                Err(i) => {
                    let new = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].next.insert(i, (byte, new as u32));
                    new
                }
            };
        }
        self.nodes[at].token = Some(id);
        self.words.insert(id, word);
    }

    /// Returns the tokens of a byte string.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a byte that begins no word. The published vocabulary has a word
    /// for every byte.
    pub fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let (token, length) = self.longest(&bytes[at..]).ok_or_else(|| {
                Error::tokenizer(format_args!("byte {:#04x} begins no token", bytes[at]))
            })?;
            tokens.push(token);
            at += length;
        }
        Ok(tokens)
    }

    /// Returns the longest word that is a prefix of `bytes`, and its length.
    fn longest(&self, bytes: &[u8]) -> Option<(u32, usize)> {
        let (mut node, mut found) = (&self.nodes[0], None);
        for (i, byte) in bytes.iter().enumerate() {
            let Ok(next) = node.next.binary_search_by_key(byte, |&(b, _)| b) else { break };
            node = &self.nodes[node.next[next].1 as usize];
            found = node.token.map(|token| (token, i + 1)).or(found);
        }
        found
    }

    /// Returns the bytes of tokens. Token 0, the end of a text, and unknown tokens have no bytes.
    pub fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        tokens.iter().filter_map(|token| self.words.get(token)).flatten().copied().collect()
    }
}

/// Parses an id, a literal and its length in bytes.
fn parse(line: &str) -> Option<(u32, Vec<u8>)> {
    let (id, rest) = line.split_once(' ')?;
    let (literal, length) = rest.trim_end_matches('\r').rsplit_once(' ')?;
    let word = bytes_of(literal.trim())?;
    (word.len() == length.parse::<usize>().ok()?).then_some((id.parse().ok()?, word))
}

/// Returns the bytes of a Python literal: `'…'` or `"…"`, in UTF-8, or `b'…'`.
fn bytes_of(literal: &str) -> Option<Vec<u8>> {
    let (is_bytes, quoted) = match literal.strip_prefix('b') {
        Some(rest) => (true, rest),
        None => (false, literal),
    };
    let quote = quoted.chars().next().filter(|&c| c == '\'' || c == '"')?;
    let inner = quoted.strip_prefix(quote)?.strip_suffix(quote)?;
    let mut bytes = Vec::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        let c = if c == '\\' { escape(&mut chars)? } else { c };
        match is_bytes {
            true => bytes.push(u8::try_from(u32::from(c)).ok()?),
            false => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Some(bytes)
}

/// Returns the character of an escape sequence, after its backslash.
fn escape(chars: &mut std::str::Chars<'_>) -> Option<char> {
    let digits = match chars.next()? {
        'n' => return Some('\n'),
        'r' => return Some('\r'),
        't' => return Some('\t'),
        c @ ('\\' | '\'' | '"') => return Some(c),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => return None,
    };
    let code: String = chars.by_ref().take(digits).collect();
    if code.len() != digits {
        return None;
    }
    char::from_u32(u32::from_str_radix(&code, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_read_as_python_does() {
        let cases: [(&str, Option<&[u8]>); 9] = [
            ("'a b'", Some(b"a b")),
            ("\"it's\"", Some(b"it's")),
            ("'\\\\\\''", Some(b"\\'")),
            ("'\\x85'", Some(b"\xc2\x85")),
            ("b'\\x85\\n'", Some(b"\x85\n")),
            ("'\\u2028'", Some("\u{2028}".as_bytes())),
            ("b'é'", Some(b"\xe9")),
            ("'open", None),
            ("'\\q'", None),
        ];
        for (literal, want) in cases {
            assert_eq!(bytes_of(literal).as_deref(), want, "{literal}");
        }
        assert_eq!(parse("7 'ab' 2"), Some((7, b"ab".to_vec())));
        assert_eq!(parse("7 'ab' 3"), None);
    }
}
