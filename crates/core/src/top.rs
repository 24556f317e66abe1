//! Selection of entries by their scores on a CUDA device.

use crate::{Result, Selection};
use candle_core::Tensor;

/// The entries of a sequence on a CUDA device, to select the best of each kv head by score.
///
/// The score of an entry is the reduction of its `rows` scores, plus its previous score.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Number of kv heads.
    pub kv_heads: usize,
    /// `[kv_heads, rows, entries]` in f32, or `[1, rows, entries]` if all kv heads have the same.
    pub scores: Tensor,
    /// Number of entries to select for each kv head.
    pub count: usize,
    /// How the entries are ranked.
    pub ranking: Ranking,
}

/// How the entries of a sequence are ranked, and their positions. No two positions are equal.
/// Entries may be in any order.
#[derive(Debug, Clone)]
pub struct Ranking {
    /// How several scores of an entry are reduced.
    pub reduction: RowReduction,
    /// Scores to add to those of the first entries, `[kv_heads, scored]` in f32.
    pub previous: Option<Tensor>,
    /// Positions of the first entries, `[kv_heads, placed]` in u32.
    pub positions: Option<Tensor>,
    /// The position of the first entry after these. The following entries have consecutive
    /// positions.
    pub next_position: u32,
    /// Number of sinks: the entries at the first positions, which are always kept if there is room.
    pub sinks: usize,
    /// Number of newest entries: those at the last positions, which are always kept if there is
    /// room.
    pub recent: usize,
}

/// How several scores of an entry are reduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowReduction {
    /// The mean.
    Mean,
    /// The maximum.
    Max,
}

/// The best entries of a sequence, on the device.
#[derive(Debug, Clone)]
pub struct TopEntries {
    /// The selected entries.
    pub entries: Selection,
    /// Their scores, `[kv_heads, count]` in f32.
    pub scores: Tensor,
    /// Their positions, `[kv_heads, count]` in u32.
    pub positions: Tensor,
    /// The scores of all entries, `[kv_heads, entries]` in f32.
    pub all_scores: Tensor,
}

/// Selects the entries with the highest scores of each kv head of several sequences, in one launch
/// and without waiting for the device. Of equal scores the older entry is selected; NaN counts as
/// -inf. Returns `None` if the scores are not on a CUDA device; then select on the host.
///
/// # Errors
/// [`Error::Mismatch`](crate::Error::Mismatch) naming an input with a wrong shape or dtype, or with
/// fewer than `count` entries.
pub fn top_entries(sequences: &[Candidates]) -> Result<Option<Vec<TopEntries>>> {
    #[cfg(feature = "cuda")]
    if let Some(first) = sequences.first()
        && let candle_core::Device::Cuda(device) = first.scores.device()
    {
        return on_device::top_entries(device, sequences).map(Some);
    }
    let _ = sequences;
    Ok(None)
}

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod on_device {
    use super::{Candidates, RowReduction, TopEntries};
    use crate::cuda::address;
    use crate::{Error, Result, Selection};
    use candle_core::{CudaDevice, DType, Tensor};
    use longctx_cuda::upload;
    use longctx_kernels::{TopRow, top};

    pub fn top_entries(device: &CudaDevice, sequences: &[Candidates]) -> Result<Vec<TopEntries>> {
        let stream = device.cuda_stream();
        let inputs = sequences.iter().map(Input::new).collect::<Result<Vec<_>>>()?;
        let outputs = inputs.iter().map(Input::outputs).collect::<Result<Vec<_>>>()?;
        let mut rows = Vec::new();
        for (input, output) in inputs.iter().zip(&outputs).filter(|(input, _)| input.len > 0) {
            rows.extend(input.rows(output)?);
        }
        if !rows.is_empty() {
            let on_device = upload(&stream, &rows)?;
            // SAFETY: the arrays have these sizes, and the stream frees no memory before the launch
            // has used it.
            unsafe { top(&stream, on_device.address(), rows.len()) }?;
        }
        Ok(outputs)
    }

    /// Checked, contiguous inputs of a sequence.
    struct Input<'a> {
        of: &'a Candidates,
        scores: Tensor,
        previous: Option<Tensor>,
        positions: Option<Tensor>,
        rows: usize,
        len: usize,
    }

    impl<'a> Input<'a> {
        fn new(of: &'a Candidates) -> Result<Self> {
            let (heads, rows, len) = of.scores.dims3()?;
            if heads != 1 && heads != of.kv_heads {
                let expected = format!("those of 1 or {} kv heads", of.kv_heads);
                return Err(Error::mismatch("scores", expected, heads));
            }
            if of.count > len {
                let expected = format!("at most {len}");
                return Err(Error::mismatch("entries to select", expected, of.count));
            }
            let of_first = |x: &Option<Tensor>, dtype: DType, what: &str| match x {
                Some(x) if x.dims().first() != Some(&of.kv_heads) || x.dim(1)? > len => {
                    let expected = format!("[{}, at most {len}]", of.kv_heads);
                    Err(Error::mismatch(what, expected, format!("{:?}", x.dims())))
                }
                Some(x) if x.elem_count() > 0 => Ok(Some(x.to_dtype(dtype)?.contiguous()?)),
                _ => Ok(None),
            };
            Ok(Self {
                of,
                scores: of.scores.to_dtype(DType::F32)?.contiguous()?,
                previous: of_first(&of.ranking.previous, DType::F32, "previous scores")?,
                positions: of_first(&of.ranking.positions, DType::U32, "positions")?,
                rows,
                len,
            })
        }

        fn outputs(&self) -> Result<TopEntries> {
            let (heads, count, device) = (self.of.kv_heads, self.of.count, self.scores.device());
            // SAFETY: the kernel writes every element.
            let empty = |columns, dtype| unsafe { Tensor::empty((heads, columns), dtype, device) };
            Ok(TopEntries {
                entries: Selection::on_device(&empty(count, DType::U32)?)?,
                scores: empty(count, DType::F32)?,
                positions: empty(count, DType::U32)?,
                all_scores: empty(self.len, DType::F32)?,
            })
        }

        /// Returns the kernel's rows, one for each kv head.
        fn rows(&self, out: &TopEntries) -> Result<Vec<TopRow>> {
            let start = |x: Option<&Tensor>| x.map_or(Ok(0), address);
            let columns = |x: &Option<Tensor>| x.as_ref().map_or(0, |x| x.dims()[1]);
            let (scored, placed) = (columns(&self.previous), columns(&self.positions));
            let (count, len, ranking) = (self.of.count, self.len, &self.of.ranking);
            let sinks = ranking.sinks.min(count);
            let shared = self.scores.dims()[0] == 1;
            let first = TopRow {
                scores: address(&self.scores)?,
                previous: start(self.previous.as_ref())?,
                positions: start(self.positions.as_ref())?,
                all_scores: address(&out.all_scores)?,
                kept_scores: start(Some(&out.scores).filter(|_| count > 0))?,
                kept: start(out.entries.entries().filter(|_| count > 0))?,
                kept_positions: start(Some(&out.positions).filter(|_| count > 0))?,
                rows: self.rows as i32,
                len: len as i32,
                scored: scored as i32,
                placed: placed as i32,
                next: ranking.next_position,
                count: count as i32,
                sinks: sinks as i32,
                recent: ranking.recent.min(count - sinks) as i32,
                maximum: (ranking.reduction == RowReduction::Max).into(),
                unused: 0,
            };
            let row = |head: usize| {
                let at = |start: u64, columns: usize| start + 4 * (head * columns) as u64;
                TopRow {
                    scores: if shared { first.scores } else { at(first.scores, self.rows * len) },
                    previous: at(first.previous, scored),
                    positions: at(first.positions, placed),
                    all_scores: at(first.all_scores, len),
                    kept_scores: at(first.kept_scores, count),
                    kept: at(first.kept, count),
                    kept_positions: at(first.kept_positions, count),
                    ..first
                }
            };
            Ok((0..self.of.kv_heads).map(row).collect())
        }
    }
}
