use longctx_core::{AttentionShape, Error, Result, Step};

/// Checks a call before a cache changes anything for it: its tensors against the layer that the cache was made for, and the batch against the
/// one held, if any. Gives the batch and the tokens.
pub fn check_step(
    step: &Step<'_>,
    shape: &AttentionShape,
    held: Option<usize>,
) -> Result<(usize, usize)> {
    if step.shape != shape {
        let (expected, got) = (format!("{shape:?}"), format!("{:?}", step.shape));
        return Err(Error::mismatch("the step's shape", expected, got));
    }
    let (batch, tokens) = shape.check_q(step.q)?;
    if batch == 0 || tokens == 0 {
        let got = format!("{:?}", step.q.dims());
        return Err(Error::mismatch("q", "at least 1 batch entry and 1 token", got));
    }
    let of_kv = shape.check_kv(step.k, step.v)?;
    if of_kv != (batch, tokens) {
        let expected = format!("batch {batch} and {tokens} tokens, as q has");
        let got = format!("batch {} and {} tokens", of_kv.0, of_kv.1);
        return Err(Error::mismatch("k and v", expected, got));
    }
    match held {
        Some(held) if held != batch => Err(Error::mismatch("batch", held, batch)),
        _ => Ok((batch, tokens)),
    }
}

/// As [`check_step`], for caches that keep their keys and values in the CPU's memory.
pub fn check_cpu_step(
    step: &Step<'_>,
    shape: &AttentionShape,
    held: Option<usize>,
) -> Result<(usize, usize)> {
    if !step.q.device().is_cpu() {
        let what = format!("this cache on a device other than the CPU: {:?}", step.q.device());
        return Err(Error::Unsupported(what));
    }
    check_step(step, shape, held)
}
