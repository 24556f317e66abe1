//! The policy's inputs for a sequence, and its scores.

use std::ops::Range;

use super::PolicyCache;
use crate::{
    EvictionPolicy, LayerView, Needs, ObservedQueries, metadata::EntryMetadata, scores::Scores,
    storage::lse_with_sink_logits,
};
use candle_core::{DType, Tensor};
use longctx_core::{AttentionSums, Batch, Error, KvStore, Mask, Result, SeqId, Step, attention};

/// The tensors of one sequence in a call.
#[derive(Debug)]
pub struct CallTensors {
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

impl CallTensors {
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

/// The attention that entries received, the store's followed by the call's, and the number of
/// queries.
#[derive(Default)]
struct Observed {
    sums: Vec<AttentionSums>,
    queries: usize,
}

/// Keys and values `[kv_heads, entries, channels]` in f32, if the policy needs them.
type KeysValues = (Option<Tensor>, Option<Tensor>);

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Lets the policy score all entries of a sequence: all heads in one call, or, if heads hold
    /// different numbers of entries, one call per range of heads with equal numbers.
    /// `newest_queries` holds the newest queries.
    pub(super) fn score(
        &self,
        call: &CallTensors,
        newest_queries: Option<&Tensor>,
    ) -> Result<Scores> {
        let observed = match self.needs.attention {
            Some(queries) => self.attention_sums(call, queries, newest_queries)?,
            None => Observed::default(),
        };
        let queries = match call.in_store {
            true => newest_queries.or(Some(&call.unrotated_q)),
            false => Some(&call.unrotated_q),
        };
        let queries = queries.filter(|_| self.needs.queries.is_some());
        let lens = self.metadata(call.seq).lens();
        let mut runs = Vec::new();
        for heads in equal_len_runs(&lens) {
            let scores = self.score_heads(call, &observed, queries, heads.clone())?;
            let expected = [heads.len(), lens[heads.start]];
            if scores.dims() != expected {
                let (expected, got) = (format!("{expected:?}"), format!("{:?}", scores.dims()));
                return Err(Error::mismatch("a policy's scores", expected, got));
            }
            runs.push(scores);
        }
        Scores::new(runs)
    }

    /// Returns the scores of heads with equal numbers of entries.
    fn score_heads(
        &self,
        call: &CallTensors,
        observed: &Observed,
        queries: Option<&Tensor>,
        heads: Range<usize>,
    ) -> Result<Tensor> {
        let (entries, device) = (self.metadata(call.seq), call.k.device());
        let of_heads = |sums: &AttentionSums| sums.heads(heads.clone());
        let sums = observed.sums.iter().map(of_heads).collect::<Result<Vec<_>>>()?;
        let sums: Vec<_> = sums.iter().filter(|sums| sums.elem_count() > 0).collect();
        let attention_sums = match sums.as_slice() {
            [] => None,
            [all] => Some((*all).clone()),
            parts => Some(Tensor::cat(parts, 2)?),
        };
        let positions = match self.needs.positions {
            true => Some(entries.positions_of(heads.clone(), device)?),
            false => None,
        };
        let len = entries.lens()[heads.start];
        let previous = match self.needs.previous_scores {
            true => entries.scores(heads.clone(), device)?,
            false => None,
        };
        let padded = |scores: Tensor| scores.pad_with_zeros(1, 0, len - scores.dim(1)?);
        let previous = previous.map(padded).transpose()?;
        let (keys, values) = self.keys_values(call, heads.clone())?;
        self.policy.score(&LayerView {
            spec: &self.spec,
            seen: self.sequences.seen(call.seq) + call.tokens(),
            queries,
            entries: len,
            kv_heads: heads,
            positions,
            keys,
            values,
            attention_sums,
            observed_queries: observed.queries,
            previous_scores: previous,
        })
    }

    /// Returns the entries of a known sequence.
    pub(super) fn metadata(&self, seq: SeqId) -> &EntryMetadata {
        match self.sequences.get(seq) {
            Some(sequence) => &sequence.state.metadata,
            None => unreachable!("a call begins its sequences"),
        }
    }

    /// Returns the rows of heads that hold equally many entries.
    fn keys_values(&self, call: &CallTensors, heads: Range<usize>) -> Result<KeysValues> {
        let Needs { keys, values, .. } = self.needs;
        if !keys && !values {
            return Ok((None, None));
        }
        if self.store.len(call.seq) == 0 {
            let of = |x: &Tensor| -> Result<Tensor> {
                let x = x.narrow(1, heads.start, heads.len())?.transpose(0, 1)?;
                Ok(x.to_dtype(DType::F32)?.contiguous()?)
            };
            return Ok((
                keys.then(|| of(&call.k)).transpose()?,
                values.then(|| of(&call.v)).transpose()?,
            ));
        }
        let rows =
            heads.map(|head| self.head_keys_values(call, head)).collect::<Result<Vec<_>>>()?;
        let (k, v): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let stack = |rows: Vec<Tensor>| Tensor::stack(&rows, 0);
        Ok((keys.then(|| stack(k)).transpose()?, values.then(|| stack(v)).transpose()?))
    }

    /// Returns keys and values of one kv head in f32: the store's, followed by the call's.
    pub(super) fn head_keys_values(
        &self,
        call: &CallTensors,
        head: usize,
    ) -> Result<(Tensor, Tensor)> {
        let held = match self.store.len(call.seq) {
            0 => None,
            _ => Some(self.store.read(call.seq, head)?),
        };
        if let Some(held) = held.as_ref().filter(|_| call.in_store) {
            return Ok(held.clone());
        }
        let of_head = |x: &Tensor| -> Result<Tensor> {
            Ok(x.narrow(1, head, 1)?.squeeze(1)?.to_dtype(DType::F32)?.contiguous()?)
        };
        let (k, v) = (of_head(&call.k)?, of_head(&call.v)?);
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
        call: &CallTensors,
        observed: ObservedQueries,
        newest_queries: Option<&Tensor>,
    ) -> Result<Observed> {
        let (queries, by_position) = match observed {
            ObservedQueries::Call => (call.tokens(), false),
            ObservedQueries::Newest { queries, by_position } => (queries, by_position),
        };
        let (q, mut lse) = match newest_queries {
            // During decoding, queries of earlier calls attend to the current entries again.
            Some(earlier) if call.in_store && queries > 1 => self.reattend(call.seq, earlier)?,
            _ => {
                let count = queries.min(call.tokens());
                let newest = |x: &Tensor| x.narrow(0, call.tokens() - count, count);
                let lse = call.lse.as_ref().map(newest).transpose()?;
                let missing = || Error::mismatch("lse", "that of the call's queries", "none");
                (newest(&call.q)?, lse.ok_or_else(missing)?)
            }
        };
        let count = q.dim(0)?;
        if by_position {
            // Attention is exp(score - lse): subtracting ln(n) from the lse counts a query n times.
            let seen = self.sequences.seen(call.seq) + call.tokens();
            let logs: Vec<_> = (seen - count..seen).map(|n| (n.max(1) as f32).ln()).collect();
            lse = lse.broadcast_sub(&Tensor::from_vec(logs, (count, 1), lse.device())?)?;
        }
        let observers = Batch::single(call.seq, count)?;
        let mut sums = Vec::new();
        if call.in_store {
            sums.extend(self.store.attention_sums(&observers, &q, &lse, Mask::Causal)?);
            return Ok(Observed { sums, queries: count });
        }
        if self.store.len(call.seq) > 0 {
            sums.extend(self.store.attention_sums(&observers, &q, &lse, Mask::Full)?);
        }
        let batch = Batch::single(call.seq, call.tokens())?;
        let shape = &self.spec.shape;
        sums.extend(attention::attention_sums(&batch, &call.k, &observers, &q, &lse, shape)?);
        Ok(Observed { sums, queries: count })
    }

    /// Returns the newest queries, rotated, and their log-sum-exp over the store's current entries,
    /// including the call's token.
    fn reattend(&self, seq: SeqId, earlier: &Tensor) -> Result<(Tensor, Tensor)> {
        let count = earlier.dim(0)?;
        let end = match self.settings.rerotate {
            true => self.store.len(seq),
            false => self.sequences.seen(seq) + 1,
        } as i64;
        let positions: Vec<_> = (end - count as i64..end).collect();
        let q = self.spec.rotate(earlier, &positions)?;
        let state = self.store.attend(&Batch::single(seq, count)?, &q, Mask::Causal)?;
        let lse = lse_with_sink_logits(&state, &self.spec)?;
        Ok((q, lse))
    }
}

/// The longest ranges of neighbouring heads that hold equally many entries.
fn equal_len_runs(lens: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (head, len) in lens.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if lens[run.start] == *len => run.end = head + 1,
            _ => runs.push(head..head + 1),
        }
    }
    runs
}
