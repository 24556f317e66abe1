//! The share of tokens to keep in each segment.

/// A number of tokens of a segment, and the share of them to keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub tokens: usize,
    pub ratio: f64,
}

/// Returns the ratios of each segment of `size` tokens, for concatenated contexts of `lengths`
/// tokens.
///
/// Together they keep `target` tokens. `bonus` is added to each context's own ratio.
pub fn ratios(lengths: &[usize], bonus: &[f64], target: f64, size: usize) -> Vec<Vec<Step>> {
    let tau = target / (lengths.iter().sum::<usize>() + 1) as f64;
    let (mut segments, mut open) = (Vec::new(), Vec::new());
    // The first token of a text has no loss and is never cut.
    let mut filled = 1;
    for (&length, bonus) in lengths.iter().zip(bonus) {
        let ratio = (tau + bonus).clamp(0.0, 1.0);
        if filled + length < size {
            filled += length;
            open.push(Step { tokens: length, ratio });
            continue;
        }
        open.push(Step { tokens: size - filled, ratio });
        segments.push(std::mem::take(&mut open));
        filled = filled + length - size;
        if filled > size {
            segments.extend(std::iter::repeat_n(vec![Step { tokens: size, ratio }], filled / size));
            filled %= size;
        }
        if filled > 0 {
            open.push(Step { tokens: filled, ratio });
        }
    }
    if !open.is_empty() {
        segments.push(open);
    }
    segments
}
