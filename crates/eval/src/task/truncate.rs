use crate::{Error, Result};

/// A prompt cut in the middle to at most `limit` tokens, as longctx_bench cuts: its first and its last `limit / 2` tokens, each
/// half made text again by `decode` (which leaves special tokens out) and the two joined. A prompt that fits is returned as it is.
///
/// The joined text can have a few tokens more or fewer than `limit` when it is encoded again, since the cut makes new neighbours.
///
/// # Errors
/// [`Error::Setting`] if `limit` leaves no token in a half; what `encode` and `decode` report.
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
