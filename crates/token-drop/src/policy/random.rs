//! Random eviction: a baseline for other policies.

use crate::{EvictionPolicy, LayerView, Needs};
use candle_core::Tensor;
use longctx_core::Result;

/// Keeps random tokens, determined by the seed. The score of a token, one per kv head, never
/// changes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random {
    seed: u64,
}

impl Random {
    /// Creates the policy with a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl EvictionPolicy for Random {
    fn needs(&self) -> Needs {
        Needs { positions: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let score = |head: usize, position: u32| {
            let mixed = mix(self.seed ^ mix((head as u64) << 32 | u64::from(position)));
            (mixed >> 40) as f32
        };
        let positions = view.positions()?;
        let heads = view.kv_heads.clone().zip(positions.to_vec2::<u32>()?);
        let of_head = |(head, positions): (usize, Vec<u32>)| {
            positions.into_iter().map(move |position| score(head, position))
        };
        let scores: Vec<f32> = heads.flat_map(of_head).collect();
        Ok(Tensor::from_vec(scores, positions.dims(), positions.device())?)
    }
}

/// SplitMix64's output function (Steele et al., OOPSLA 2014): every input bit affects every output
/// bit.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
