//! Some of a batch's tokens as a batch.

use std::ops::Range;

use candle_core::Tensor;
use longctx_core::{AttentionState, Batch, Result, SeqId};

/// Some tokens of each of a batch's sequences.
pub struct Part {
    /// The sequences with chosen tokens, and the numbers of these.
    pub batch: Batch,
    /// Indices of these tokens in the whole batch.
    rows: Vec<u32>,
}

impl Part {
    /// Selects tokens of each sequence. `choose` receives the sequence's token range in the batch;
    /// `None` if no token is selected.
    pub fn of(
        batch: &Batch,
        choose: impl Fn(SeqId, Range<usize>) -> Range<usize>,
    ) -> Result<Option<Self>> {
        let chosen = batch.iter().map(|(seq, tokens)| (seq, choose(seq, tokens)));
        let chosen: Vec<_> = chosen.filter(|(_, tokens)| !tokens.is_empty()).collect();
        if chosen.is_empty() {
            return Ok(None);
        }
        let seqs: Vec<_> = chosen.iter().map(|(seq, tokens)| (*seq, tokens.len())).collect();
        let rows = chosen.into_iter().flat_map(|(_, tokens)| tokens).map(|row| row as u32);
        Ok(Some(Self { batch: Batch::new(&seqs)?, rows: rows.collect() }))
    }

    /// Returns the selected tokens' rows of `[tokens, heads, channels]`.
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let rows = Tensor::new(self.rows.as_slice(), x.device())?;
        Ok(x.contiguous()?.index_select(&rows, 0)?)
    }

    /// Merges the states of parts that together form a batch, in the order of its tokens.
    pub fn join(parts: &[(Self, AttentionState)]) -> Result<AttentionState> {
        let rows: Vec<u32> = parts.iter().flat_map(|(part, _)| part.rows.iter().copied()).collect();
        let mut places = vec![0u32; rows.len()];
        (0..).zip(&rows).for_each(|(place, &row)| places[row as usize] = place);
        let join = |of: fn(&AttentionState) -> &Tensor| -> Result<Tensor> {
            let all: Vec<_> = parts.iter().map(|(_, state)| of(state)).collect();
            let all = Tensor::cat(&all, 0)?;
            let places = Tensor::new(places.as_slice(), all.device())?;
            Ok(all.index_select(&places, 0)?)
        };
        Ok(AttentionState { out: join(|state| &state.out)?, lse: join(|state| &state.lse)? })
    }
}
