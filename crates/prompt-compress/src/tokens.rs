//! Counts in the tokens of GPT-3.5 and GPT-4, the unit that llmlingua counts in.

/// Tokens of `text` in the encoding `cl100k_base`; what looks like a special token is counted as the text that it is.
///
/// ```
/// assert_eq!(prompt_compress::cl100k_tokens("Hello, world!"), 4);
/// ```
pub fn cl100k_tokens(text: &str) -> usize {
    tiktoken_rs::cl100k_base_singleton().encode_ordinary(text).len()
}
