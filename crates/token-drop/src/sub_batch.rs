//! A part of a batch's sequences, and its rows of the batch's tensors.

use candle_core::Tensor;
use longctx_core::{AttentionState, Batch, Result, SeqId};

/// Some sequences of a batch, with all or some of their tokens.
#[derive(Debug)]
pub struct SubBatch {
    pub batch: Batch,
    /// The tokens' rows in the batch; `None`: all, in order.
    rows: Option<Vec<u32>>,
}

impl SubBatch {
    /// Selects the range of each sequence's own tokens that `tokens` returns; `None` if no token is
    /// selected.
    pub fn new(
        batch: &Batch,
        tokens: impl Fn(SeqId, usize) -> std::ops::Range<usize>,
    ) -> Result<Option<Self>> {
        let (mut seqs, mut rows) = (Vec::new(), Vec::new());
        for (seq, own) in batch.iter() {
            let selected = tokens(seq, own.len());
            if !selected.is_empty() {
                seqs.push((seq, selected.len()));
                rows.extend(selected.map(|i| (own.start + i) as u32));
            }
        }
        match rows.len() {
            0 => Ok(None),
            all if all == batch.tokens() => Ok(Some(Self { batch: batch.clone(), rows: None })),
            _ => Ok(Some(Self { batch: Batch::new(&seqs)?, rows: Some(rows) })),
        }
    }

    /// Selects the sequences for which `wanted` returns true, with all their tokens.
    pub fn of_sequences(
        batch: &Batch,
        includes: impl Fn(SeqId, usize) -> bool,
    ) -> Result<Option<Self>> {
        Self::new(batch, |seq, tokens| if includes(seq, tokens) { 0..tokens } else { 0..0 })
    }

    /// Returns this part's rows of a tensor of all tokens.
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rows {
            Some(rows) => {
                let rows = Tensor::new(rows.as_slice(), x.device())?;
                select_rows(x, &rows)
            }
            None => Ok(x.clone()),
        }
    }

    /// Scatters the part's attention to its rows among `tokens`; the other rows see nothing.
    pub fn scatter(&self, state: AttentionState, tokens: usize) -> Result<AttentionState> {
        let Some(rows) = &self.rows else { return Ok(state) };
        let device = state.lse.device();
        let nothing = rows.len() as u32;
        let mut row_indices = vec![nothing; tokens];
        (0..).zip(rows).for_each(|(i, &row)| row_indices[row as usize] = i);
        let row_indices = Tensor::new(row_indices, device)?;
        let (_, heads, value_dim) = state.out.dims3()?;
        let zeros = Tensor::zeros((1, heads, value_dim), state.out.dtype(), device)?;
        let none = Tensor::full(f32::NEG_INFINITY, (1, heads), device)?;
        Ok(AttentionState {
            out: select_rows(&Tensor::cat(&[&state.out, &zeros], 0)?, &row_indices)?,
            lse: select_rows(&Tensor::cat(&[&state.lse, &none], 0)?, &row_indices)?,
        })
    }
}

/// Merges parts that together form a batch of `tokens` tokens.
pub fn assemble(parts: &[(&SubBatch, AttentionState)], tokens: usize) -> Result<AttentionState> {
    if let [(part, state)] = parts
        && part.rows.is_none()
    {
        return Ok(state.clone());
    }
    let mut row_indices = vec![0u32; tokens];
    let rows = parts.iter().flat_map(|(part, _)| part.rows.iter().flatten());
    (0..).zip(rows).for_each(|(i, &row)| row_indices[row as usize] = i);
    let gather = |x: fn(&AttentionState) -> &Tensor| -> Result<Tensor> {
        let all: Vec<_> = parts.iter().map(|(_, state)| x(state)).collect();
        let all = Tensor::cat(&all, 0)?;
        select_rows(&all, &Tensor::new(row_indices.as_slice(), all.device())?)
    };
    Ok(AttentionState { out: gather(|s| &s.out)?, lse: gather(|s| &s.lse)? })
}

/// Returns the rows of some indices. A device selects rows of contiguous tensors only.
pub(crate) fn select_rows(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    Ok(x.contiguous()?.index_select(rows, 0)?)
}
