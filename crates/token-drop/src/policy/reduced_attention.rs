//! Scores that are reduced attention sums, as those of H2O and TOVA.

use super::window::{equal_scores, protect_newest};
use crate::{GroupReduction, LayerView};
use candle_core::Tensor;
use longctx_core::{Error, Result};

/// Scores that are reduced attention sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReducedAttention {
    /// The query heads whose sums are reduced.
    pub heads: ReducedHeads,
    /// How they are reduced.
    pub reduction: GroupReduction,
    /// Number of newest entries whose scores are above all others.
    pub newest: usize,
}

/// The query heads whose attention sums are reduced to the scores of a kv head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReducedHeads {
    /// Those of the kv head's group.
    Group,
    /// All of the layer. All kv heads have the same scores.
    Layer,
}

impl ReducedAttention {
    /// Computes the scores, `[kv_heads, entries]`: the reduced sums, plus the previous scores if
    /// the view has them.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the policy needs no attention. [`Error::Unsupported`] if all heads
    /// are reduced and the view lacks some, because kv heads have different numbers of entries.
    pub fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let kv_heads = view.kv_heads.len();
        if self.heads == ReducedHeads::Layer && kv_heads != view.spec.shape.kv_heads {
            let what = "attention reduced over kv heads with different numbers of entries";
            return Err(Error::Unsupported(what.into()));
        }
        let sums = view.attention_sums()?;
        let Some(older) = view.entries.checked_sub(self.newest).filter(|older| *older > 0) else {
            return equal_scores(view, sums);
        };
        let scores = match self.heads {
            ReducedHeads::Group => self.reduction.reduce(sums)?,
            ReducedHeads::Layer => {
                let scores = self.reduction.reduce(&sums.reshape((1, (), view.entries))?)?;
                scores.broadcast_as((kv_heads, view.entries))?
            }
        };
        let scores = match &view.previous_scores {
            Some(previous) => (previous + scores)?,
            None => scores,
        };
        protect_newest(&scores.narrow(1, 0, older)?, view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EvictionPolicy, H2o, Tova};
    use candle_core::Device;
    use longctx_core::{AttentionShape, LayerSpec};

    /// Returns the scores that a policy describes, plainly: `[kv_heads][entries]`.
    fn described(
        of: ReducedAttention,
        sums: &[Vec<Vec<f32>>],
        previous: &[Vec<f32>],
    ) -> Vec<Vec<f32>> {
        let layer = sums.concat();
        let head = |(head, own): (usize, &Vec<Vec<f32>>)| {
            let rows = if of.heads == ReducedHeads::Group { own } else { &layer };
            let entries = rows[0].len();
            let entry = |i: usize| {
                let column = rows.iter().map(|row| row[i]);
                let score = match of.reduction {
                    GroupReduction::Mean => column.sum::<f32>() / rows.len() as f32,
                    GroupReduction::Max => column.fold(0.0, f32::max),
                };
                let previous = previous.get(head).and_then(|of| of.get(i)).unwrap_or(&0.0);
                if i + of.newest >= entries { f32::INFINITY } else { score + previous }
            };
            (0..entries).map(entry).collect()
        };
        sums.iter().enumerate().map(head).collect()
    }

    /// Returns the entries from the best to the worst; the older of equal ones first.
    fn order(scores: &[f32]) -> Vec<usize> {
        let mut order: Vec<_> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order
    }

    #[test]
    fn scores_follow_from_their_description() {
        let spec = LayerSpec::new(AttentionShape::new(6, 2, 8).unwrap());
        let number = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 1009.0;
        let sums: Vec<Vec<Vec<f32>>> = (0..2)
            .map(|head| {
                (0..3)
                    .map(|row| (0..50).map(|i| number(head * 300 + row * 70 + i)).collect())
                    .collect()
            })
            .collect();
        let previous: Vec<Vec<f32>> = (0..2)
            .map(|head| {
                (0..50).map(|i| if i < 40 { number(900 + head * 50 + i) } else { 0.0 }).collect()
            })
            .collect();
        let policies: [Box<dyn EvictionPolicy>; 4] = [
            Box::new(H2o::default()),
            Box::new(H2o::default().with_group_reduction(GroupReduction::Max)),
            Box::new(Tova::default()),
            Box::new(Tova::default().with_published_newest()),
        ];
        for policy in policies {
            let carries = policy.needs().previous_scores;
            let tensor = |x: &Vec<Vec<f32>>| Tensor::new(x.clone(), &Device::Cpu).unwrap();
            let view = LayerView {
                spec: &spec,
                seen: 50,
                queries: None,
                kv_heads: 0..2,
                entries: 50,
                positions: None,
                keys: None,
                values: None,
                attention_sums: Some(Tensor::new(sums.clone(), &Device::Cpu).unwrap()),
                observed_queries: 1,
                previous_scores: carries.then(|| tensor(&previous)),
            };
            let scores = policy.score(&view).unwrap().to_vec2::<f32>().unwrap();
            let carried = if carries { &previous[..] } else { &[] };
            let plain = described(policy.reduced_attention().unwrap(), &sums, carried);
            for (scores, plain) in scores.iter().zip(&plain) {
                assert_eq!(order(scores), order(plain));
            }
        }
    }
}
