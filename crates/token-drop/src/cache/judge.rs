//! What a policy is shown of a cache, and what it answers.

use super::{Call, PolicyCache};
use candle_core::{DType, Tensor};
use longctx_core::{
    Error, EvictionPolicy, Held, HeldHead, KvStore, Mass, Protected, Result, Selection, Visible,
    attention,
};

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Scores, if the policy must; and selects, if there are budgets to meet.
    pub(super) fn judge(
        &mut self,
        call: &Call<'_>,
        budgets: Option<&Vec<usize>>,
        protected: Protected,
    ) -> Result<Option<Selection>> {
        let carries = self.policy.needs().previous;
        if budgets.is_none() && !carries {
            return Ok(None);
        }
        let scores = self.score(call)?;
        let shape = self.store.shape();
        let keep = budgets.map(|b| self.policy.select(&scores, b, shape, protected));
        if carries {
            self.ledger.carry(scores);
        }
        Ok(keep)
    }

    /// Keeps the newest queries if the policy will ask for them while decoding.
    pub(super) fn remember_queries(&mut self, q: &Tensor) -> Result<()> {
        let needs = self.policy.needs();
        let of_mass = match needs.mass {
            Some(Mass::Newest { queries, .. }) if queries > 1 => queries,
            _ => 0,
        };
        let wanted = needs.queries.unwrap_or(0).max(of_mass);
        if wanted == 0 || self.decode_step.is_none() {
            return Ok(());
        }
        let all = match &self.queries {
            Some(old) => Tensor::cat(&[old, q], 2)?,
            None => q.clone(),
        };
        let len = all.dim(2)?;
        let count = wanted.min(len);
        // A copy, so that the whole prompt's queries do not stay behind a view of the last.
        self.queries = Some(all.narrow(2, len - count, count)?.force_contiguous()?);
        Ok(())
    }

    /// Has the policy score everything.
    fn score(&self, call: &Call<'_>) -> Result<Vec<Vec<f32>>> {
        let needs = self.policy.needs();
        let (mass, mass_queries) = match needs.mass {
            Some(mass) => self.mass(call, mass)?,
            None => (Vec::new(), 0),
        };
        let group = self.store.shape().group();
        let heads = (0..self.ledger.heads()).map(|head| {
            let of_group = head * group..(head + 1) * group;
            let (keys, values) = self.read(call, head, needs.keys, needs.values)?;
            let positions = &self.ledger.positions()[head];
            let mass = mass.get(of_group).unwrap_or_default();
            let previous = self.ledger.scores(head);
            Ok(HeldHead { positions, keys, values, mass, mass_queries, previous })
        });
        let held = Held {
            shape: self.store.shape(),
            rope: call.step.rope,
            next_position: self.seen,
            queries: match call.kv {
                Some(_) => Some(call.step.q),
                None => self.queries.as_ref(),
            },
            heads: heads.collect::<Result<_>>()?,
        };
        let scores = self.policy.score(&held)?;
        let expected = self.ledger.lens();
        if !scores.iter().map(Vec::len).eq(expected.iter().copied()) {
            let got = format!("{:?}", scores.iter().map(Vec::len).collect::<Vec<_>>());
            return Err(Error::mismatch("a policy's scores", format!("{expected:?}"), got));
        }
        Ok(scores)
    }

    /// Keys and values of one kv head in f32: the store's, then the call's own.
    fn read(
        &self,
        call: &Call<'_>,
        head: usize,
        keys: bool,
        values: bool,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        if !keys && !values {
            return Ok((Vec::new(), Vec::new()));
        }
        let (batch, kv_head) =
            (head / self.store.shape().kv_heads, head % self.store.shape().kv_heads);
        let mut parts = Vec::new();
        if !self.store.is_empty() {
            parts.push(self.store.read(batch, kv_head)?);
        }
        if let Some((k, v)) = call.kv {
            parts.push((k.get(batch)?.get(kv_head)?, v.get(batch)?.get(kv_head)?));
        }
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let numbers = |x: &Tensor| -> Result<Vec<f32>> {
            Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        for (part_k, part_v) in &parts {
            if keys {
                k.extend(numbers(part_k)?);
            }
            if values {
                v.extend(numbers(part_v)?);
            }
        }
        Ok((k, v))
    }

    /// The attention that entries received, `[batch * heads]` lists, and from how many queries.
    fn mass(&self, call: &Call<'_>, mass: Mass) -> Result<(Vec<Vec<f32>>, usize)> {
        let tokens = call.q.dim(2)?;
        let (queries, by_position) = match mass {
            Mass::Call => (tokens, false),
            Mass::Newest { queries, by_position } => (queries, by_position),
        };
        let (q, mut lse) = match &self.queries {
            // While decoding, queries of earlier calls look again at what is there now.
            Some(earlier) if call.kv.is_none() && queries > 1 => {
                let q = call.step.rope.apply(earlier, self.next_position() - earlier.dim(2)?)?;
                let lse = self.store.attend(&q, Visible::Causal)?.lse;
                (q, lse)
            }
            _ => {
                let count = queries.min(tokens);
                let newest = |x: &Tensor| x.narrow(2, tokens - count, count);
                (newest(call.q)?, newest(call.lse)?)
            }
        };
        let count = q.dim(2)?;
        if by_position {
            // Attention is exp(score - lse), so that ln(n) less in the sum counts a query n times.
            let first = self.seen - count;
            let logs: Vec<_> = (first..self.seen).map(|n| (n.max(1) as f32).ln()).collect();
            lse = lse.broadcast_sub(&Tensor::from_vec(logs, count, lse.device())?)?;
        }
        let Some((k, _)) = call.kv else {
            return Ok((self.store.mass(&q, &lse, Visible::Causal)?, count));
        };
        let own = attention::mass(&q, k, &lse, self.store.shape(), Visible::Causal)?;
        if self.store.is_empty() {
            return Ok((own, count));
        }
        let mut all = self.store.mass(&q, &lse, Visible::All)?;
        all.iter_mut().zip(own).for_each(|(all, own)| all.extend(own));
        Ok((all, count))
    }
}
