//! Some of a batch's tokens as a batch.

use std::ops::Range;

use candle_core::Tensor;
use longctx_core::{AttentionState, Batch, Result, SeqId};

/// Some tokens of each of a batch's sequences.
pub struct SubBatch {
    /// The sequences with selected tokens, and the numbers of these.
    pub batch: Batch,
    /// Indices of these tokens in the whole batch.
    rows: Vec<u32>,
}

impl SubBatch {
    /// Selects tokens of each sequence. `select` receives the sequence's token range in the batch;
    /// `None` if no token is selected.
    pub fn of(
        batch: &Batch,
        select: impl Fn(SeqId, Range<usize>) -> Range<usize>,
    ) -> Result<Option<Self>> {
        let selected = batch.iter().map(|(seq, tokens)| (seq, select(seq, tokens)));
        let selected: Vec<_> = selected.filter(|(_, tokens)| !tokens.is_empty()).collect();
        if selected.is_empty() {
            return Ok(None);
        }
        let seqs: Vec<_> = selected.iter().map(|(seq, tokens)| (*seq, tokens.len())).collect();
        let rows = selected.into_iter().flat_map(|(_, tokens)| tokens).map(|row| row as u32);
        Ok(Some(Self { batch: Batch::new(&seqs)?, rows: rows.collect() }))
    }

    /// Returns the selected tokens' rows of `[tokens, heads, channels]`.
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let rows = Tensor::new(self.rows.as_slice(), x.device())?;
        Ok(x.contiguous()?.index_select(&rows, 0)?)
    }

    /// Merges the states of parts that together form a batch, in the order of its tokens.
    pub fn assemble(parts: &[(Self, AttentionState)]) -> Result<AttentionState> {
        let rows: Vec<u32> = parts.iter().flat_map(|(part, _)| part.rows.iter().copied()).collect();
        let mut indices = vec![0u32; rows.len()];
        (0..).zip(&rows).for_each(|(index, &row)| indices[row as usize] = index);
        let gather = |of: fn(&AttentionState) -> &Tensor| -> Result<Tensor> {
            let all: Vec<_> = parts.iter().map(|(_, state)| of(state)).collect();
            let all = Tensor::cat(&all, 0)?;
            let indices = Tensor::new(indices.as_slice(), all.device())?;
            Ok(all.index_select(&indices, 0)?)
        };
        Ok(AttentionState { out: gather(|state| &state.out)?, lse: gather(|state| &state.lse)? })
    }
}
