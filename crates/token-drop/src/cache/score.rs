//! The policy's inputs for a sequence, and its scores.

use std::ops::Range;

use super::PolicyCache;
use crate::{
    EvictionPolicy, HeadView, LayerView, ObservedQueries, entries::Entries, storage::whole_lse,
};
use candle_core::{DType, Tensor};
use longctx_core::{Batch, Error, KvStore, Mask, Result, SeqId, Step, attention};

/// The tensors of one sequence in a call.
#[derive(Debug)]
pub struct Own {
    pub seq: SeqId,
    tokens: Range<usize>,
    /// Whether the tokens are already in the store.
    pub in_store: bool,
    pub unrotated_q: Tensor,
    q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// The log-sum-exp over everything that the queries see; `None` if the policy reads no
    /// attention.
    lse: Option<Tensor>,
}

impl Own {
    /// Takes the rows of one sequence of the step. `q` and `k` are rotated.
    pub fn new(
        step: &Step<'_>,
        (q, k): (&Tensor, &Tensor),
        lse: Option<&Tensor>,
        (seq, tokens): (SeqId, Range<usize>),
        in_store: bool,
    ) -> Result<Self> {
        let of = |x: &Tensor| x.narrow(0, tokens.start, tokens.len());
        Ok(Self {
            seq,
            in_store,
            unrotated_q: of(step.q)?,
            q: of(q)?,
            k: of(k)?,
            v: of(step.v)?,
            lse: lse.map(of).transpose()?,
            tokens,
        })
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }
}

/// The attention that entries received, `[group, entries]` for each kv head, and the number of
/// queries.
type Observed = (Vec<Tensor>, usize);

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Lets the policy score all entries of a sequence. `remembered` holds its newest queries. Only
    /// the scores are copied from the store's device: selection runs on the host.
    pub(super) fn score(&self, own: &Own, remembered: Option<&Tensor>) -> Result<Vec<Vec<f32>>> {
        let (sums, observed) = match self.needs.attention {
            Some(queries) => self.attention_sums(own, queries, remembered)?,
            None => (Vec::new(), 0),
        };
        let entries = self.entries(own.seq);
        let heads = (0..self.spec.shape.kv_heads).map(|head| {
            let (keys, values) = self.read(own, head)?;
            Ok(HeadView {
                positions: &entries.positions()[head],
                keys,
                values,
                attention_sums: sums.get(head).cloned(),
                observed,
                previous: entries.scores(head),
            })
        });
        let queries = match own.in_store {
            true => remembered.or(Some(&own.unrotated_q)),
            false => Some(&own.unrotated_q),
        };
        let view = LayerView {
            spec: &self.spec,
            seen: self.sequences.seen(own.seq) + own.tokens(),
            queries: queries.filter(|_| self.needs.queries.is_some()),
            heads: heads.collect::<Result<_>>()?,
        };
        let scores = lists(&self.policy.score(&view)?)?;
        let expected = entries.lens();
        if !scores.iter().map(Vec::len).eq(expected.iter().copied()) {
            let got = format!("{:?}", scores.iter().map(Vec::len).collect::<Vec<_>>());
            return Err(Error::mismatch("a policy's scores", format!("{expected:?}"), got));
        }
        Ok(scores)
    }

    /// Returns the entries of a known sequence.
    pub(super) fn entries(&self, seq: SeqId) -> &Entries {
        match self.sequences.get(seq) {
            Some(sequence) => &sequence.state.entries,
            None => unreachable!("a call begins its sequences"),
        }
    }

    /// Returns keys and values of one kv head in f32, if the policy needs them.
    fn read(&self, own: &Own, head: usize) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !self.needs.keys && !self.needs.values {
            return Ok((None, None));
        }
        let (keys, values) = self.all_rows(own, head)?;
        Ok((Some(keys).filter(|_| self.needs.keys), Some(values).filter(|_| self.needs.values)))
    }

    /// Returns keys and values of one kv head in f32: the store's, followed by the call's.
    pub(super) fn all_rows(&self, own: &Own, head: usize) -> Result<(Tensor, Tensor)> {
        let held = match self.store.len(own.seq) {
            0 => None,
            _ => Some(self.store.read(own.seq, head)?),
        };
        if let Some(held) = held.as_ref().filter(|_| own.in_store) {
            return Ok(held.clone());
        }
        let of_head = |x: &Tensor| -> Result<Tensor> {
            Ok(x.narrow(1, head, 1)?.squeeze(1)?.to_dtype(DType::F32)?.contiguous()?)
        };
        let (k, v) = (of_head(&own.k)?, of_head(&own.v)?);
        match held {
            Some((keys, values)) => {
                Ok((Tensor::cat(&[&keys, &k], 0)?, Tensor::cat(&[&values, &v], 0)?))
            }
            None => Ok((k, v)),
        }
    }

    /// Returns the attention that entries received from the observed queries.
    fn attention_sums(
        &self,
        own: &Own,
        observed: ObservedQueries,
        remembered: Option<&Tensor>,
    ) -> Result<Observed> {
        let (queries, by_position) = match observed {
            ObservedQueries::Call => (own.tokens(), false),
            ObservedQueries::Newest { queries, by_position } => (queries, by_position),
        };
        let (q, mut lse) = match remembered {
            // During decoding, queries of earlier calls attend to the current entries again.
            Some(earlier) if own.in_store && queries > 1 => self.look_again(own.seq, earlier)?,
            _ => {
                let count = queries.min(own.tokens());
                let newest = |x: &Tensor| x.narrow(0, own.tokens() - count, count);
                let lse = own.lse.as_ref().map(newest).transpose()?;
                let missing = || Error::mismatch("lse", "that of the call's queries", "none");
                (newest(&own.q)?, lse.ok_or_else(missing)?)
            }
        };
        let count = q.dim(0)?;
        if by_position {
            // Attention is exp(score - lse): subtracting ln(n) from the lse counts a query n times.
            let seen = self.sequences.seen(own.seq) + own.tokens();
            let logs: Vec<_> = (seen - count..seen).map(|n| (n.max(1) as f32).ln()).collect();
            lse = lse.broadcast_sub(&Tensor::from_vec(logs, (count, 1), lse.device())?)?;
        }
        let observers = Batch::single(own.seq, count)?;
        if own.in_store {
            return Ok((self.store.attention_sums(&observers, &q, &lse, Mask::Causal)?, count));
        }
        let batch = Batch::single(own.seq, own.tokens())?;
        let shape = &self.spec.shape;
        let recent = attention::attention_sums(&batch, &own.k, &observers, &q, &lse, shape)?;
        if self.store.len(own.seq) == 0 {
            return Ok((recent, count));
        }
        let held = self.store.attention_sums(&observers, &q, &lse, Mask::Full)?;
        let all = held.iter().zip(&recent).map(|(held, recent)| Tensor::cat(&[held, recent], 1));
        Ok((all.collect::<candle_core::Result<_>>()?, count))
    }

    /// Returns the newest queries, rotated, and their log-sum-exp over the store's current entries,
    /// including the call's token.
    fn look_again(&self, seq: SeqId, earlier: &Tensor) -> Result<(Tensor, Tensor)> {
        let count = earlier.dim(0)?;
        let end = match self.settings.rerotate {
            true => self.store.len(seq),
            false => self.sequences.seen(seq) + 1,
        } as i64;
        let positions: Vec<_> = (end - count as i64..end).collect();
        let q = self.spec.rotate(earlier, &positions)?;
        let state = self.store.attend(&Batch::single(seq, count)?, &q, Mask::Causal)?;
        let lse = whole_lse(&state, &self.spec)?;
        Ok((q, lse))
    }
}

/// Returns the scores as lists on the host, with one copy.
fn lists(scores: &[Tensor]) -> Result<Vec<Vec<f32>>> {
    let lens: Vec<_> = scores.iter().map(Tensor::elem_count).collect();
    let some: Vec<_> = scores.iter().filter(|scores| scores.elem_count() > 0).collect();
    if some.is_empty() {
        return Ok(vec![Vec::new(); scores.len()]);
    }
    let all = Tensor::cat(&some, 0)?.to_vec1::<f32>()?;
    let mut rest = all.as_slice();
    let take = |len| {
        let (own, more) = rest.split_at(len);
        rest = more;
        own.to_vec()
    };
    Ok(lens.into_iter().map(take).collect())
}
