//! The kernel of scores and weighted sums: products of a few vectors with a panel of codes.
//!
//! Under Miri the portable kernel is used, because feature detection finds only the compiler's
//! target features, and NEON is excluded. With `RUSTFLAGS=-Ctarget-feature=+avx2,+fma,+f16c` Miri
//! runs the AVX2 kernel as far as it supports the intrinsics.

/// Calls `$rows::<R>` for blocks of 8, 4, 3, 2 and 1 rows until all are done. Codes are unpacked
/// once per block.
macro_rules! in_blocks {
    ($x:expr, $max_rows:expr, |$first:ident| $rows:ident($($arg:expr),*)) => {{
        let mut $first = 0;
        while $first < $x.count {
            let left = ($x.count - $first).min($max_rows);
            // SAFETY: the requirements are those of the caller.
            unsafe {
                match left {
                    8.. => { $rows::<8>($($arg),*); $first += 8; }
                    4..8 => { $rows::<4>($($arg),*); $first += 4; }
                    3 => { $rows::<3>($($arg),*); $first += 3; }
                    2 => { $rows::<2>($($arg),*); $first += 2; }
                    _ => { $rows::<1>($($arg),*); $first += 1; }
                }
            }
        }
    }};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(target_arch = "aarch64", not(miri)))]
mod neon;
mod portable;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use crate::layout::{Line, PANEL};
use crate::levels::Levels;
use half::f16;

/// The words of a panel for a run of steps.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `[word][line]`; for codes of 3 bits, the two lower bits.
    pub codes: &'a [Line],
    /// The upper bits of codes of 3 bits, 32 per word.
    pub high: &'a [Line],
    /// Lines per word, 1 or 2: 16 or 32 lanes.
    pub width: usize,
    /// Bits per code: 2, 3, 4 or 8.
    pub bits: usize,
    /// The meaning of codes.
    pub levels: Levels,
    /// Codes of a later product, prefetched while this one is computed. Prefetching all of them at
    /// once would fill the queue of outstanding cache misses, and the product would wait.
    pub ahead: &'a [Line],
}

impl<'a> Panel<'a> {
    /// Returns the bits of a code in a word of `codes`.
    pub fn low_bits(&self) -> usize {
        if self.bits == 3 { 2 } else { self.bits }
    }

    /// Returns the number of codes in a word of `codes`.
    fn per_word(&self) -> usize {
        32 / self.low_bits()
    }

    /// Returns the lines to prefetch at each word.
    fn ahead_by_word(&self) -> std::slice::Chunks<'a, Line> {
        let words = self.codes.len() / self.width;
        self.ahead.chunks(self.ahead.len().div_ceil(words.max(1)).max(1))
    }
}

/// Rows of vectors over the steps, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The data, from the first element of the first row on.
    pub data: &'a [f32],
    /// Row stride.
    pub stride: usize,
    /// Number of rows.
    pub count: usize,
    /// Elements per row.
    pub steps: usize,
}

/// A scale and a zero point per step, at least as many as steps.
#[derive(Debug, Clone, Copy)]
pub struct Params<'a> {
    /// Factors of the levels.
    pub scales: &'a [f32],
    /// Added to the scaled levels. Zero for floating-point codes, which have none.
    pub zero_points: &'a [f32],
}

/// Arguments: a panel, its steps' scales and zeros, rows of vectors, rows of running sums, and the
/// row stride of these.
type Accumulate = fn(Panel<'_>, Params<'_>, Rows<'_>, &mut [f32], usize);

/// A kernel for several panels of integers that share their parameters.
#[derive(Debug, Clone, Copy)]
struct Shared {
    accumulate: fn(&[Panel<'_>], Params<'_>, Rows<'_>, &mut [f32], usize),
    /// The fewest steps for which it is used.
    min_steps: usize,
}

impl Shared {
    fn takes(&self, panel: &Panel<'_>, steps: usize) -> bool {
        let integers = matches!(panel.levels, Levels::Integers { .. }) && panel.bits != 3;
        integers && steps >= self.min_steps
    }
}

/// The kernels of one instruction set.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    #[cfg_attr(not(test), expect(dead_code, reason = "tests name the kernel that fails"))]
    name: &'static str,
    accumulate: Accumulate,
    shared: Option<Shared>,
    /// Converts f16 to f32, in slices of the same length.
    widen: fn(&[f16], &mut [f32]),
}

/// Computes `out[r * out_stride + lane] += Σ_s x[r][s] (level[code[s][lane]] * scale[s] + zero[s])`
/// for all lanes of the panel.
///
/// # Panics
/// If the rows of `x`, the parameters, the codes or the rows of `out` exceed their slices.
pub fn accumulate(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    run(best().accumulate, panel, params, x, out, out_stride);
}

/// Computes the same as [`accumulate`] for panels that share the scales and zeros of their steps.
/// Panel i begins at lane 32 i of `out`.
///
/// # Panics
/// As [`accumulate`].
pub fn accumulate_shared(
    panels: &[Panel<'_>],
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    run_shared(best(), panels, params, x, out, out_stride);
}

/// Converts f16 to f32, replacing the contents of `out`.
pub fn widen(src: &[f16], out: &mut Vec<f32>) {
    out.resize(src.len(), 0.0);
    (best().widen)(src, out);
}

/// Converts f16 to f32.
///
/// # Panics
/// If the slices differ in length.
pub fn widen_into(src: &[f16], out: &mut [f32]) {
    assert_eq!(src.len(), out.len(), "floats");
    (best().widen)(src, out);
}

/// Prefetches memory that will be read soon. A block is too short for the hardware prefetcher to
/// detect the pattern.
#[inline]
pub fn prefetch<T>(data: &[T]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for start in (0..size_of_val(data)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no visible effect, and the address is in `data`.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().add(start)) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = data;
}

/// Checks the conditions that the kernels rely on, some of which use raw pointers.
fn run(
    accumulate: Accumulate,
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    if x.count == 0 {
        return;
    }
    check(panel, params, x, out, out_stride);
    accumulate(panel, params, x, out, out_stride);
}

/// As [`run`], for panels that share their parameters. Without a kernel for them the
/// panels are computed one by one.
fn run_shared(
    kernels: &Kernels,
    panels: &[Panel<'_>],
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    match kernels.shared {
        Some(shared) if x.count > 0 && panels.iter().all(|panel| shared.takes(panel, x.steps)) => {
            for (i, panel) in panels.iter().enumerate() {
                check(*panel, params, x, &out[i * PANEL..], out_stride);
                assert_eq!((panel.bits, panel.levels), (panels[0].bits, panels[0].levels));
            }
            (shared.accumulate)(panels, params, x, out, out_stride);
        }
        _ => {
            for (i, panel) in panels.iter().enumerate() {
                let out = &mut out[i * PANEL..];
                run(kernels.accumulate, *panel, params, x, out, out_stride);
            }
        }
    }
}

fn check(panel: Panel<'_>, params: Params<'_>, x: Rows<'_>, out: &[f32], out_stride: usize) {
    assert!(matches!(panel.width, 1 | 2) && matches!(panel.bits, 2 | 3 | 4 | 8), "panel");
    assert!(panel.bits == 8 || !matches!(panel.levels, Levels::Float8(_)), "levels");
    assert!(panel.bits < 8 || !matches!(panel.levels, Levels::Table(_)), "levels");
    assert!((x.count - 1) * x.stride + x.steps <= x.data.len(), "rows of the vectors");
    assert!(x.steps <= params.scales.len().min(params.zero_points.len()), "scales and zeros");
    assert!((x.count - 1) * out_stride + 16 * panel.width <= out.len(), "rows of the sums");
    assert!(x.steps.div_ceil(panel.per_word()) * panel.width <= panel.codes.len(), "codes");
    if panel.bits == 3 {
        assert!(x.steps.div_ceil(32) * panel.width <= panel.high.len(), "upper bits");
    }
}

/// Returns the fastest kernels that this CPU supports.
fn best() -> &'static Kernels {
    static BEST: OnceLock<Kernels> = OnceLock::new();
    BEST.get_or_init(|| kernels().last().unwrap_or(portable::KERNELS))
}

/// Returns all kernels that this CPU supports, the fastest last.
fn kernels() -> impl Iterator<Item = Kernels> {
    [
        Some(portable::KERNELS),
        #[cfg(target_arch = "x86_64")]
        avx2::kernels(),
        #[cfg(target_arch = "x86_64")]
        avx512::kernels(),
        #[cfg(target_arch = "x86_64")]
        avx512::vnni_kernels(),
        #[cfg(all(target_arch = "aarch64", not(miri)))]
        Some(neon::KERNELS),
    ]
    .into_iter()
    .flatten()
}
