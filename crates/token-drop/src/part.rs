//! Some of a batch's sequences, and their rows of its tensors.

use candle_core::Tensor;
use longctx_core::{AttentionState, Batch, Result, SeqId};

/// Some of a batch's sequences, whole or in part.
#[derive(Debug)]
pub struct Part {
    pub batch: Batch,
    /// The tokens' places in the whole batch; `None`: all, in order.
    rows: Option<Vec<u32>>,
}

impl Part {
    /// Of each sequence the range of its own tokens that `tokens` names; `None` if nothing is left.
    pub fn new(
        batch: &Batch,
        tokens: impl Fn(SeqId, usize) -> std::ops::Range<usize>,
    ) -> Result<Option<Self>> {
        let (mut seqs, mut rows) = (Vec::new(), Vec::new());
        for (seq, own) in batch.iter() {
            let wanted = tokens(seq, own.len());
            if !wanted.is_empty() {
                seqs.push((seq, wanted.len()));
                rows.extend(wanted.map(|i| (own.start + i) as u32));
            }
        }
        match rows.len() {
            0 => Ok(None),
            all if all == batch.tokens() => Ok(Some(Self { batch: batch.clone(), rows: None })),
            _ => Ok(Some(Self { batch: Batch::new(&seqs)?, rows: Some(rows) })),
        }
    }

    /// The sequences that `wanted` names, whole.
    pub fn of(batch: &Batch, wanted: impl Fn(SeqId, usize) -> bool) -> Result<Option<Self>> {
        Self::new(batch, |seq, tokens| if wanted(seq, tokens) { 0..tokens } else { 0..0 })
    }

    /// This part's rows of a tensor of all tokens.
    pub fn take(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rows {
            Some(rows) => {
                let rows = Tensor::new(rows.as_slice(), x.device())?;
                Ok(x.contiguous()?.index_select(&rows, 0)?)
            }
            None => Ok(x.clone()),
        }
    }

    /// The part's attention in its rows among `tokens`; the others see nothing.
    pub fn spread(&self, state: AttentionState, tokens: usize) -> Result<AttentionState> {
        let Some(rows) = &self.rows else { return Ok(state) };
        let device = state.lse.device();
        let nothing = rows.len() as u32;
        let mut places = vec![nothing; tokens];
        (0..).zip(rows).for_each(|(i, &row)| places[row as usize] = i);
        let places = Tensor::new(places, device)?;
        let (_, heads, value_dim) = state.out.dims3()?;
        let zeros = Tensor::zeros((1, heads, value_dim), state.out.dtype(), device)?;
        let none = Tensor::full(f32::NEG_INFINITY, (1, heads), device)?;
        Ok(AttentionState {
            out: Tensor::cat(&[&state.out, &zeros], 0)?.index_select(&places, 0)?,
            lse: Tensor::cat(&[&state.lse, &none], 0)?.index_select(&places, 0)?,
        })
    }
}

/// Puts parts that make up a batch of `tokens` tokens together.
pub fn join(parts: &[(&Part, AttentionState)], tokens: usize) -> Result<AttentionState> {
    if let [(part, state)] = parts
        && part.rows.is_none()
    {
        return Ok(state.clone());
    }
    let mut places = vec![0u32; tokens];
    let rows = parts.iter().flat_map(|(part, _)| part.rows.iter().flatten());
    (0..).zip(rows).for_each(|(i, &row)| places[row as usize] = i);
    let gather = |x: fn(&AttentionState) -> &Tensor| -> Result<Tensor> {
        let all: Vec<_> = parts.iter().map(|(_, state)| x(state)).collect();
        let all = Tensor::cat(&all, 0)?;
        Ok(all.index_select(&Tensor::new(places.as_slice(), all.device())?, 0)?)
    };
    Ok(AttentionState { out: gather(|s| &s.out)?, lse: gather(|s| &s.lse)? })
}
