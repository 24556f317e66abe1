//! The one kernel that scores and weighted sums are made of: products of a few vectors with a panel of codes.

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
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;

use crate::packed::Line;

/// A panel's words for a run of steps.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `[word][line]`
    pub codes: &'a [Line],
    /// Lines of a word, 1 or 2: 16 or 32 lanes.
    pub width: usize,
    /// Bits of a code: 1, 2, 4 or 8.
    pub bits: usize,
    /// What a code's lowest bit is worth.
    pub unit: f32,
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

/// A way to do it: rows of vectors, a panel, and rows of sums so far apart.
type Kernel = fn(Panel<'_>, Rows<'_>, &mut [f32], usize);

/// `out[r * out_stride + lane] += unit * Σ_s x[r][s] code[s][lane]`, for all lanes of the panel.
///
/// # Panics
/// If the rows of `x`, the codes or the rows of `out` reach beyond their slices.
pub fn accumulate(panel: Panel<'_>, x: Rows<'_>, out: &mut [f32], out_stride: usize) {
    let kernel = kernels().last().map_or(portable::accumulate as Kernel, |(_, kernel)| kernel);
    run(kernel, panel, x, out, out_stride);
}

/// Checks what the kernels, some of them in raw pointers, rely on.
fn run(kernel: Kernel, panel: Panel<'_>, x: Rows<'_>, out: &mut [f32], out_stride: usize) {
    if x.count == 0 || x.steps == 0 {
        return;
    }
    assert!(matches!(panel.width, 1 | 2) && matches!(panel.bits, 1 | 2 | 4 | 8), "panel");
    assert!((x.count - 1) * x.stride + x.steps <= x.data.len(), "rows of the vectors");
    assert!((x.count - 1) * out_stride + 16 * panel.width <= out.len(), "rows of the sums");
    assert!(x.steps.div_ceil(32 / panel.bits) * panel.width <= panel.codes.len(), "codes");
    kernel(panel, x, out, out_stride);
}

/// The kernels that this machine can run, the fastest last.
fn kernels() -> impl DoubleEndedIterator<Item = (&'static str, Kernel)> {
    [
        Some(("portable", portable::accumulate as Kernel)),
        #[cfg(target_arch = "x86_64")]
        avx2::kernel().map(|kernel| ("AVX2", kernel)),
        #[cfg(target_arch = "x86_64")]
        avx512::kernel().map(|kernel| ("AVX-512", kernel)),
        #[cfg(target_arch = "aarch64")]
        Some(("NEON", neon::accumulate as Kernel)),
    ]
    .into_iter()
    .flatten()
}
