//! Checks of the arguments of calls: sequences, their tokens, lists of indices.

use crate::{Error, Position, Result};

/// The largest number of tokens of a call. Sizes in bytes that are computed from it do not
/// overflow.
const MAX_TOKENS: usize = u32::MAX as usize;

/// Checks that `cu_seqlens` starts at 0, does not decrease, ends at 2^32 - 1 at most and has one
/// element more than there are sequences, and that no sequence is listed twice.
///
/// # Errors
/// [`Error::Mismatch`].
pub fn check(seqs: &[u64], cu_seqlens: &[usize]) -> Result<()> {
    if cu_seqlens.len() != seqs.len() + 1 {
        return Err(Error::mismatch("cu_seqlens", seqs.len() + 1, cu_seqlens.len()));
    }
    if cu_seqlens[0] != 0 {
        return Err(Error::mismatch("cu_seqlens", "0 at its beginning", cu_seqlens[0]));
    }
    if let Some(pair) = cu_seqlens.windows(2).find(|pair| pair[0] > pair[1]) {
        let got = format!("{} before {}", pair[0], pair[1]);
        return Err(Error::mismatch("cu_seqlens", "numbers that never decrease", got));
    }
    if cu_seqlens[seqs.len()] > MAX_TOKENS {
        let expected = format!("at most {MAX_TOKENS} tokens");
        return Err(Error::mismatch("cu_seqlens", expected, cu_seqlens[seqs.len()]));
    }
    let mut sorted = seqs.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(Error::mismatch("sequences of a call", "each once", format!("{} twice", pair[0])))
        }
        None => Ok(()),
    }
}

/// Checks that a list is strictly increasing and below `len`.
///
/// # Errors
/// [`Error::Mismatch`].
pub fn check_list(what: &'static str, list: &[u32], len: usize) -> Result<()> {
    if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        let got = format!("{} before {}", pair[0], pair[1]);
        return Err(Error::mismatch(what, "strictly increasing numbers", got));
    }
    match list.last() {
        Some(&last) if last as usize >= len => {
            Err(Error::mismatch(what, format!("numbers below {len}"), last))
        }
        _ => Ok(()),
    }
}

/// Returns the position of element `at` of `[tokens, heads, columns]`.
pub fn position(
    of: &'static str,
    (seqs, cu_seqlens): (&[u64], &[usize]),
    heads: usize,
    columns: usize,
    at: usize,
) -> Position {
    let (row, channel) = (at / columns, at % columns);
    let (token, head) = (row / heads, row % heads);
    let i = cu_seqlens.partition_point(|&first| first <= token) - 1;
    Position::Sequence { of, seq: seqs[i], token: token - cu_seqlens[i], head, channel }
}
