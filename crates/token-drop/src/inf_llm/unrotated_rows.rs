//! Unrotated queries, keys and values of some sequences of a call.

use crate::sub_batch::SubBatch;
use candle_core::Tensor;
use longctx_core::{Batch, Result, Step};

/// Rows of a call.
#[derive(Debug)]
pub struct UnrotatedRows {
    pub batch: Batch,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// The log-sum-exp of exact attention, `[tokens, heads]`, if the engine computed it.
    pub exact_lse: Option<Tensor>,
}

impl UnrotatedRows {
    /// Takes all rows of a call.
    pub fn all(step: &Step<'_>) -> Self {
        let [q, k, v] = [step.q, step.k, step.v].map(Tensor::clone);
        Self { batch: step.batch.clone(), q, k, v, exact_lse: None }
    }

    /// Takes a part's rows of a call.
    pub fn of(part: &SubBatch, step: &Step<'_>) -> Result<Self> {
        Self::all(step).sub_batch(part)
    }

    /// Takes a part of these rows.
    pub fn sub_batch(&self, part: &SubBatch) -> Result<Self> {
        Ok(Self {
            batch: part.batch.clone(),
            q: part.rows(&self.q)?,
            k: part.rows(&self.k)?,
            v: part.rows(&self.v)?,
            exact_lse: self.exact_lse.as_ref().map(|lse| part.rows(lse)).transpose()?,
        })
    }
}
