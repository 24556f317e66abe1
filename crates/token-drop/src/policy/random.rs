//! Random eviction: a baseline for other policies.

use crate::{EvictionPolicy, HeadView, LayerView, Needs};
use candle_core::{Device, Tensor};
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
        Needs::default()
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Tensor>> {
        let luck = |head: usize, position: u32| {
            let mixed = mix(self.seed ^ mix((head as u64) << 32 | u64::from(position)));
            (mixed >> 40) as f32
        };
        let of_head = |(i, head): (usize, &HeadView<'_>)| {
            let luck = head.positions.iter().map(|&position| luck(i, position));
            Ok(Tensor::from_iter(luck, &Device::Cpu)?)
        };
        view.heads.iter().enumerate().map(of_head).collect()
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
