//! The one kernel that scores and weighted sums are made of: products of a few vectors with a panel of codes.
//!
//! Under Miri it is the portable one: there the detection of instruction sets finds only those that the compiler was told of, and NEON is left out.
//! With `RUSTFLAGS=-Ctarget-feature=+avx2,+fma,+f16c` Miri is given the AVX2 kernel, to run as far as it knows the intrinsics.

/// Calls `$rows::<R>` for blocks of 8, 4, 3, 2 and 1 rows until all are done: codes are unpacked once per block.
macro_rules! in_blocks {
    ($x:expr, $most:expr, |$first:ident| $rows:ident($($arg:expr),*)) => {{
        let mut $first = 0;
        while $first < $x.count {
            let left = ($x.count - $first).min($most);
            // SAFETY: as the caller's.
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

use crate::layout::Line;
use crate::levels::Levels;
use half::f16;

/// A panel's words for a run of steps.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `[word][line]`; of codes of 3 bits the two lower bits.
    pub codes: &'a [Line],
    /// The upper bits of codes of 3 bits, 32 in a word.
    pub high: &'a [Line],
    /// Lines of a word, 1 or 2: 16 or 32 lanes.
    pub width: usize,
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: usize,
    /// What codes mean.
    pub levels: Levels,
    /// Codes of a later product, to be asked for while this one is computed: asked for at once, they would fill the queue of misses, and the
    /// product would wait for them.
    pub ahead: &'a [Line],
}

impl<'a> Panel<'a> {
    /// Bits of a code in a word of `codes`.
    pub fn low_bits(&self) -> usize {
        if self.bits == 3 { 2 } else { self.bits }
    }

    /// Codes in a word of `codes`.
    fn per_word(&self) -> usize {
        32 / self.low_bits()
    }

    /// What to ask for at each word.
    fn ahead_by_word(&self) -> std::slice::Chunks<'a, Line> {
        let words = self.codes.len() / self.width;
        self.ahead.chunks(self.ahead.len().div_ceil(words.max(1)).max(1))
    }
}

/// Rows of vectors over the steps, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The first row's first number on.
    pub data: &'a [f32],
    /// From row to row.
    pub stride: usize,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub steps: usize,
}

/// A scale and a zero for each step, at least as many as steps.
#[derive(Debug, Clone, Copy)]
pub struct Params<'a> {
    /// What codes are multiplied by.
    pub scales: &'a [f32],
    /// What is added to them then.
    pub zeros: &'a [f32],
}

/// A panel, its steps' scales and zeros, rows of vectors, rows of sums so far, and how far apart these are.
type Accumulate = fn(Panel<'_>, Params<'_>, Rows<'_>, &mut [f32], usize);

/// One instruction set's way.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    #[cfg_attr(not(test), expect(dead_code, reason = "tests name the kernel that fails"))]
    name: &'static str,
    accumulate: Accumulate,
    /// Writes halves as floats, in a slice of the same length.
    widen: fn(&[f16], &mut [f32]),
}

/// `out[r * out_stride + lane] += Σ_s x[r][s] (level[code[s][lane]] * scale[s] + zero[s])`, for all lanes of the panel.
///
/// # Panics
/// If the rows of `x`, the parameters, the codes or the rows of `out` reach beyond their slices.
pub fn accumulate(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    run(best().accumulate, panel, params, x, out, out_stride);
}

/// Halves as floats, in the place of what `out` held.
pub fn widen(src: &[f16], out: &mut Vec<f32>) {
    out.resize(src.len(), 0.0);
    (best().widen)(src, out);
}

/// Halves as floats.
///
/// # Panics
/// If the slices differ in length.
pub fn widen_into(src: &[f16], out: &mut [f32]) {
    assert_eq!(src.len(), out.len(), "floats");
    (best().widen)(src, out);
}

/// Asks for memory that will be read soon. A chunk is too short for the hardware to see the pattern before it ends.
#[inline]
pub fn prefetch<T>(data: &[T]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for start in (0..size_of_val(data)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees, and the address lies in `data`.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().add(start)) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = data;
}

/// Checks what the kernels, some of them in raw pointers, rely on.
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
    assert!(matches!(panel.width, 1 | 2) && matches!(panel.bits, 2 | 3 | 4 | 8), "panel");
    assert!(panel.bits == 8 || !matches!(panel.levels, Levels::Float8(_)), "levels");
    assert!(panel.bits < 8 || !matches!(panel.levels, Levels::Table(_)), "levels");
    assert!((x.count - 1) * x.stride + x.steps <= x.data.len(), "rows of the vectors");
    assert!(x.steps <= params.scales.len().min(params.zeros.len()), "scales and zeros");
    assert!((x.count - 1) * out_stride + 16 * panel.width <= out.len(), "rows of the sums");
    assert!(x.steps.div_ceil(panel.per_word()) * panel.width <= panel.codes.len(), "codes");
    if panel.bits == 3 {
        assert!(x.steps.div_ceil(32) * panel.width <= panel.high.len(), "upper bits");
    }
    accumulate(panel, params, x, out, out_stride);
}

/// The fastest that this machine can run.
fn best() -> &'static Kernels {
    static BEST: OnceLock<Kernels> = OnceLock::new();
    BEST.get_or_init(|| kernels().last().unwrap_or(portable::KERNELS))
}

/// All that this machine can run, the fastest last.
fn kernels() -> impl Iterator<Item = Kernels> {
    [
        Some(portable::KERNELS),
        #[cfg(target_arch = "x86_64")]
        avx2::kernels(),
        #[cfg(target_arch = "x86_64")]
        avx512::kernels(),
        #[cfg(all(target_arch = "aarch64", not(miri)))]
        Some(neon::KERNELS),
    ]
    .into_iter()
    .flatten()
}
