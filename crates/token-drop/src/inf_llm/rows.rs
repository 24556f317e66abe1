//! Unrotated queries, keys and values of some sequences of a call.

use crate::part::Part;
use candle_core::Tensor;
use longctx_core::{Batch, Result, Step};

/// Rows of a call.
#[derive(Debug)]
pub struct Rows {
    pub batch: Batch,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// The log-sum-exp of exact attention, `[tokens, heads]`, if the engine computed it.
    pub exact: Option<Tensor>,
}

impl Rows {
    /// Takes all rows of a call.
    pub fn all(step: &Step<'_>) -> Self {
        let [q, k, v] = [step.q, step.k, step.v].map(Tensor::clone);
        Self { batch: step.batch.clone(), q, k, v, exact: None }
    }

    /// Takes a part's rows of a call.
    pub fn of(part: &Part, step: &Step<'_>) -> Result<Self> {
        Self::all(step).part(part)
    }

    /// Takes a part of these rows.
    pub fn part(&self, part: &Part) -> Result<Self> {
        Ok(Self {
            batch: part.batch.clone(),
            q: part.take(&self.q)?,
            k: part.take(&self.k)?,
            v: part.take(&self.v)?,
            exact: self.exact.as_ref().map(|lse| part.take(lse)).transpose()?,
        })
    }
}
