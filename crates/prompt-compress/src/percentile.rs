//! numpy's percentile, bit for bit: the selection of words depends on it.

/// A number as the package stores it: numpy's f32, or a Python float where the package assigns one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Computed by the model.
    F32(f32),
    /// Assigned: 0 or 1.
    F64(f64),
}

impl Number {
    pub fn get(self) -> f64 {
        match self {
            Number::F32(x) => f64::from(x),
            Number::F64(x) => x,
        }
    }
}

/// Returns the `q`th percentile of `values` by linear interpolation, as numpy 2 does; `None` for an
/// empty list.
///
/// A list of f32 is interpolated in f32. If it contains a Python float, numpy uses f64 for all.
pub fn percentile(values: &[Number], q: u32) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().map(|value| value.get()).collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let at = last as f64 * (f64::from(q.min(100)) / 100.0);
    let below = (at.floor() as usize).min(last);
    let (a, b) = (sorted[below], sorted[(below + 1).min(last)]);
    let t = at - at.floor();
    if values.iter().any(|value| matches!(value, Number::F64(_))) {
        let step = b - a;
        return Some(if t >= 0.5 { b - step * (1.0 - t) } else { a + step * t });
    }
    let (a, b) = (a as f32, b as f32);
    let step = b - a;
    let between = if t >= 0.5 { b - step * (1.0 - t) as f32 } else { a + step * t as f32 };
    Some(f64::from(between))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_numpy() {
        // numpy 2.4.6: np.percentile(np.array([...], dtype=np.float32), q), and the same with a
        // Python 1.0 in the list.
        let narrow = [0.1f32, 0.7, 0.35, 0.9, 0.2].map(Number::F32);
        assert_eq!(percentile(&narrow, 51), Some(f64::from(0.364_f32)));
        assert_eq!(percentile(&narrow, 0), Some(f64::from(0.1f32)));
        assert_eq!(percentile(&narrow, 100), Some(f64::from(0.9f32)));
        let mut wide = narrow.to_vec();
        wide.push(Number::F64(1.0));
        assert_eq!(percentile(&wide, 84), Some(0.919_999_980_926_513_7));
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(percentile(&[Number::F32(0.25)], 76), Some(0.25));
    }
}
