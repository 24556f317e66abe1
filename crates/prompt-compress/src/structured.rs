//! Prompts in sections, each kept unchanged or compressed at its own rate.

use longctx_core::{Compressed, Error, Piece, Prompt, PromptCompressor, Rate, Result};

/// A section of a structured prompt.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Section {
    /// Copied byte for byte.
    Keep(String),
    /// Compressed, at this rate or at the prompt's.
    Compress(String, Option<Rate>),
}

impl Section {
    /// Returns the section's text.
    pub fn text(&self) -> &str {
        match self {
            Section::Keep(text) | Section::Compress(text, _) => text,
        }
    }
}

/// A prompt in sections, built in code or parsed from llmlingua's tags.
///
/// Chat templates and instructions go into kept sections; only the material between them is
/// compressed.
///
/// ```
/// use longctx_core::Rate;
/// use prompt_compress::{StructuredPrompt, baseline::TruncateMiddle};
///
/// let prompt = StructuredPrompt::new()
///     .keep("<|user|>\nSum up: ")
///     .compress("one two three four five six")
///     .keep("\n<|assistant|>\n");
/// let short = prompt.compress_with(&mut TruncateMiddle, Rate::new(0.5)?)?;
/// assert_eq!(short.text, "<|user|>\nSum up: one two six\n<|assistant|>\n");
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StructuredPrompt {
    sections: Vec<Section>,
    question: Option<String>,
}

impl StructuredPrompt {
    /// Creates a prompt without sections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a section that is copied byte for byte.
    pub fn keep(mut self, text: impl Into<String>) -> Self {
        self.sections.push(Section::Keep(text.into()));
        self
    }

    /// Adds a section that is compressed at the prompt's rate.
    pub fn compress(mut self, text: impl Into<String>) -> Self {
        self.sections.push(Section::Compress(text.into(), None));
        self
    }

    /// Adds a section that is compressed at its own rate.
    pub fn compress_at(mut self, text: impl Into<String>, rate: Rate) -> Self {
        self.sections.push(Section::Compress(text.into(), Some(rate)));
        self
    }

    /// Sets the question for question-aware compressors.
    pub fn question(mut self, question: impl Into<String>) -> Self {
        self.question = Some(question.into());
        self
    }

    /// Parses the tags of llmlingua 0.2.2: `<llmlingua, rate=0.3, compress=True>…</llmlingua>`.
    /// Both settings are optional and may come in any order. `compress=False` keeps the section and
    /// ignores its rate.
    ///
    /// Text outside tags is compressed at the prompt's rate. The package silently drops such text
    /// between other tags, and every section that contains `<`; here nothing is lost.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming an unclosed or nested tag, or an unknown or malformed setting;
    /// [`Error::Setting`] for a rate outside (0, 1].
    pub fn parse(tagged: &str) -> Result<Self> {
        const OPEN: &str = "<llmlingua";
        const CLOSE: &str = "</llmlingua>";
        let mut prompt = Self::new();
        let mut rest = tagged;
        while let Some(start) = rest.find(OPEN) {
            if start > 0 {
                prompt = prompt.compress(&rest[..start]);
            }
            let tag = &rest[start..];
            let Some((settings, inner)) = tag[OPEN.len()..].split_once('>') else {
                return Err(Error::mismatch("structured prompt", "a tag that ends in >", tag));
            };
            let Some((text, after)) = inner.split_once(CLOSE) else {
                return Err(Error::mismatch("structured prompt", CLOSE, "the end of the text"));
            };
            if text.contains(OPEN) {
                return Err(Error::mismatch("structured prompt", "tags that are not nested", tag));
            }
            prompt.sections.push(section(settings, text)?);
            rest = after;
        }
        if rest.contains(CLOSE) {
            return Err(Error::mismatch("structured prompt", "an opening tag before", CLOSE));
        }
        Ok(if rest.is_empty() { prompt } else { prompt.compress(rest) })
    }

    /// Returns the sections, in order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Returns the prompt without tags. The source ranges of its compression refer to this text.
    pub fn text(&self) -> String {
        self.sections.iter().map(Section::text).collect()
    }

    /// Compresses each section that is not kept, at its own rate or at `rate`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if all sections are only white space; errors of the compressor.
    pub fn compress_with(
        &self,
        compressor: &mut impl PromptCompressor,
        rate: Rate,
    ) -> Result<Compressed> {
        Prompt::new(&self.text())?;
        let mut whole = Compressed::default();
        let mut start = 0;
        for section in &self.sections {
            let text = section.text();
            let part = match section {
                Section::Compress(text, own) if !text.trim().is_empty() => {
                    let prompt = Prompt { question: self.question.as_deref(), text };
                    compressor.compress(prompt, own.unwrap_or(rate))?
                }
                _ => Compressed::copy(text, std::iter::once(0..text.len()))?,
            };
            let shift = whole.text.len();
            whole.text.push_str(&part.text);
            whole.pieces.extend(part.pieces.into_iter().map(|piece| Piece {
                source: piece.source.start + start..piece.source.end + start,
                output: piece.output.start + shift..piece.output.end + shift,
            }));
            start += text.len();
        }
        Ok(whole)
    }
}

fn section(settings: &str, text: &str) -> Result<Section> {
    let (mut rate, mut compress) = (None, true);
    let mut parts = settings.split(',').map(str::trim);
    let malformed = |part| {
        Error::mismatch("tag of a structured prompt", "rate=NUMBER or compress=True|False", part)
    };
    if let Some(part) = parts.next().filter(|part| !part.is_empty()) {
        return Err(malformed(part));
    }
    for part in parts {
        let (name, value) = part.split_once('=').ok_or_else(|| malformed(part))?;
        match (name.trim(), value.trim()) {
            ("compress", "True") => compress = true,
            ("compress", "False") => compress = false,
            ("rate", value) => {
                rate = Some(Rate::new(value.parse().map_err(|_| malformed(part))?)?);
            }
            _ => return Err(malformed(part)),
        }
    }
    Ok(if compress { Section::Compress(text.into(), rate) } else { Section::Keep(text.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_tags_of_the_package() {
        let prompt = StructuredPrompt::parse(
            "<llmlingua, compress=False>Speaker 4:</llmlingua><llmlingua, rate=0.4> Thank you.\
             </llmlingua> plain <llmlingua , compress = True , rate = 0.2>a < b</llmlingua><llmlingua>x</llmlingua>",
        )
        .unwrap();
        let rate = |r| Some(Rate::new(r).unwrap());
        assert_eq!(
            prompt.sections(),
            [
                Section::Keep("Speaker 4:".into()),
                Section::Compress(" Thank you.".into(), rate(0.4)),
                Section::Compress(" plain ".into(), None),
                Section::Compress("a < b".into(), rate(0.2)),
                Section::Compress("x".into(), None),
            ]
        );
    }

    #[test]
    fn an_empty_prompt_is_named() {
        let rate = Rate::new(0.5).unwrap();
        let prompt = StructuredPrompt::new().keep(" ").compress("\n");
        let error = prompt.compress_with(&mut crate::baseline::TruncateMiddle, rate).unwrap_err();
        assert!(error.to_string().contains("nothing but white space"), "{error}");
    }

    #[test]
    fn malformed_tags_are_named() {
        let message = |text| StructuredPrompt::parse(text).unwrap_err().to_string();
        assert!(message("<llmlingua>no end").contains("</llmlingua>"));
        assert!(message("<llmlingua").contains("ends in >"));
        assert!(message("x</llmlingua>").contains("opening tag"));
        assert!(message("<llmlingua><llmlingua>x</llmlingua></llmlingua>").contains("nested"));
        assert!(message("<llmlingua, rate=1.5>x</llmlingua>").contains("(0, 1]"));
        assert!(message("<llmlingua, rate=fast>x</llmlingua>").contains("rate=fast"));
        assert!(message("<llmlingua, keep=True>x</llmlingua>").contains("keep=True"));
        assert!(message("<llmlinguax>x</llmlingua>").contains("got x"));
    }
}
