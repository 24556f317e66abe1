use crate::{Error, Result};

/// Truncates a prompt in the middle to at most `limit` tokens, as longctx_bench does: its first and
/// last `limit / 2` tokens, each half decoded by `decode` (which drops special tokens) and the two
/// joined. A prompt that fits is returned unchanged.
///
/// If the joined text is encoded again it can have a few tokens more or fewer than `limit`, because
/// of the tokens at the cut.
///
/// # Errors
/// [`Error::Setting`] if `limit` leaves no token in a half; errors of `encode` and `decode`.
///
/// ```
/// use longctx_eval::{Error, truncate_middle};
///
/// let encode = |text: &str| Ok::<_, Error>(text.bytes().map(u32::from).collect());
/// let decode = |tokens: &[u32]| Ok(tokens.iter().map(|&byte| char::from(byte as u8)).collect());
/// assert_eq!(truncate_middle("beginning and end", 9, encode, decode)?, "begi end");
/// # Ok::<(), Error>(())
/// ```
pub fn truncate_middle<E: From<Error>>(
    prompt: &str,
    limit: usize,
    encode: impl FnOnce(&str) -> Result<Vec<u32>, E>,
    mut decode: impl FnMut(&[u32]) -> Result<String, E>,
) -> Result<String, E> {
    if limit < 2 {
        return Err(Error::setting("model_max_len", "at least 2 tokens", limit).into());
    }
    let tokens = encode(prompt)?;
    if tokens.len() <= limit {
        return Ok(prompt.to_owned());
    }
    let half = limit / 2;
    Ok(decode(&tokens[..half])? + &decode(&tokens[tokens.len() - half..])?)
}
