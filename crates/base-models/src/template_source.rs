//! Prepares the source of a chat template for the template engine.

use longctx_core::{Error, Result};

/// The largest size of a template in bytes. Public models need less than a quarter of it.
const MAX_LENGTH: usize = 128 << 10;
/// The largest size of a tag in bytes, without quoted text: the parser's time grows with the square
/// of an expression's depth.
const MAX_TAG: usize = 4096;
/// The largest number of consecutive signs.
const MAX_CONSECUTIVE_SIGNS: usize = 8;
/// The filter that checks a value before a namespace stores it.
pub(crate) const NAMESPACE_FILTER: &str = "stored_in_namespace";

/// Checks lengths, and rewrites two kinds of tags:
///
/// - `{% generation %}` marks the assistant's text for training; it becomes a plain scope.
/// - `{% set ns.x = value %}` becomes `{% set ns.x = (value) | stored_in_namespace %}`.
///
/// # Errors
/// [`Error::Template`] for templates and expressions longer than any conversation needs.
pub(crate) fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_LENGTH {
        let what = format!("{} bytes (at most {MAX_LENGTH})", source.len());
        return Err(Error::Template(what));
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = ["{{", "{%", "{#"].iter().filter_map(|mark| rest.find(mark)).min() {
        out.push_str(&rest[..at + 2]);
        let kind = rest.as_bytes()[at + 1];
        rest = &rest[at + 2..];
        let end = match kind {
            b'#' => rest.find("#}").unwrap_or(rest.len()),
            _ => tag_end(rest, kind == b'{')?,
        };
        let tag = &rest[..end];
        rest = &rest[end..];
        match kind {
            b'%' => out.push_str(&rewritten(tag)),
            _ => out.push_str(tag),
        }
        if kind == b'%' && word(tag) == "raw" {
            let end = raw_end(rest);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    Ok(out + rest)
}

/// Returns the position of the tag's closing mark.
fn tag_end(tag: &str, variable: bool) -> Result<usize> {
    let (mut length, mut signs, mut braces) = (0, 0, 0usize);
    for (i, c, quoted) in characters(tag) {
        if !quoted {
            match c {
                '}' if variable && braces == 0 && tag[i + 1..].starts_with('}') => return Ok(i),
                '%' if !variable && tag[i + 1..].starts_with('}') => return Ok(i),
                '{' => braces += 1,
                '}' => braces = braces.saturating_sub(1),
                _ => {}
            }
            length += c.len_utf8();
        }
        signs = match c {
            '-' => signs + 1,
            _ if c.is_whitespace() => signs,
            _ => 0,
        };
        if length > MAX_TAG || signs > MAX_CONSECUTIVE_SIGNS {
            return Err(Error::template("an expression of inordinate length"));
        }
    }
    Ok(tag.len())
}

/// Iterates over the characters of a tag with their positions, and whether they are quoted.
fn characters(tag: &str) -> impl Iterator<Item = (usize, char, bool)> {
    let mut quote = None;
    let mut escaped = false;
    tag.char_indices().map(move |(i, c)| {
        let quoted = quote.is_some();
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            None if c == '"' || c == '\'' => quote = Some(c),
            _ => {}
        }
        (i, c, quoted || quote.is_some())
    })
}

/// Returns the first word of a tag, after white space control marks.
fn word(tag: &str) -> &str {
    let inner = tag.trim_start_matches(['-', '+']).trim_start();
    inner.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
}

fn rewritten(tag: &str) -> String {
    let replaced = |with: &str| tag.replacen(word(tag), with, 1);
    let alone = tag.trim_matches(['-', '+']).trim() == word(tag);
    match word(tag) {
        "generation" if alone => replaced("with"),
        "endgeneration" if alone => replaced("endwith"),
        "set" => rewrite_set(tag).unwrap_or_else(|| tag.to_owned()),
        _ => tag.to_owned(),
    }
}

/// Rewrites a tag that assigns to an attribute; `None` for other tags.
fn rewrite_set(tag: &str) -> Option<String> {
    let equals = characters(tag).find(|(_, c, quoted)| *c == '=' && !quoted)?.0;
    let (target, value) = (&tag[..equals], &tag[equals + 1..]);
    let names = |c: char| c.is_alphanumeric() || c.is_whitespace() || "_.,()-+".contains(c);
    if !target.contains('.') || !target.chars().all(names) {
        return None;
    }
    let (value, mark) = match value.strip_suffix(['-', '+']) {
        Some(inner) => (inner, &value[inner.len()..]),
        None => (value, ""),
    };
    Some(format!("{target}= ({value}) | {NAMESPACE_FILTER} {mark}"))
}

/// Returns the end of a `{% raw %}` section.
fn raw_end(rest: &str) -> usize {
    let mut at = 0;
    while let Some(next) = rest[at..].find("{%") {
        at += next;
        if word(&rest[at + 2..]) == "endraw" {
            return at;
        }
        at += 2;
    }
    rest.len()
}
