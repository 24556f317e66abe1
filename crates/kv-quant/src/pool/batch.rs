//! Checks of what calls name: sequences, their tokens, lists of numbers.

use crate::{Error, Position, Result};

/// Checks that `cu_seqlens` begins at 0, never decreases and has one number more than there are
/// sequences, none of which comes twice.
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

/// Where the number `at` of `[tokens, heads, columns]` is.
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
