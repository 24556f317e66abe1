//! Token counts of GPT-3.5 and GPT-4, the unit of llmlingua.

/// Returns the number of tokens of `text` in the encoding `cl100k_base`. Text that looks like a
/// special token is counted as plain text.
///
/// ```
/// assert_eq!(prompt_compress::cl100k_tokens("Hello, world!"), 4);
/// ```
pub fn cl100k_tokens(text: &str) -> usize {
    tiktoken_rs::cl100k_base_singleton().encode_ordinary(text).len()
}
