//! TOVA: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104.

use super::window::end_with;
use crate::Group;
use longctx_core::{EvictionPolicy, Held, Mass, Needs, Protected, Result};

/// Keeps what the newest query attends to, averaged over all heads of the layer; at every decoded token one goes.
///
/// As in kvpress, the newest token itself stays, and all heads keep the same tokens. There is no [`Group`] to choose: the heads that are averaged are
/// not those of one kv head but all of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tova {
    published_newest: bool,
}

impl Tova {
    /// Lets the newest token go like any other, if its own query attends to it the least, as the published code does
    /// (schwartz-lab-NLP/TOVA, `TOVACache.reduce`).
    #[must_use]
    pub fn with_published_newest(mut self) -> Self {
        self.published_newest = true;
        self
    }
}

impl EvictionPolicy for Tova {
    fn needs(&self) -> Needs {
        let mass = Mass::Newest { queries: 1, by_position: false };
        Needs { mass: Some(mass), ..Default::default() }
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        let kv_heads = held.shape.kv_heads;
        let scores = held.heads.chunks(kv_heads).flat_map(|heads| {
            let masses = heads.iter().flat_map(|head| head.mass);
            let mut mean = Group::Mean.join(&masses.cloned().collect::<Vec<_>>());
            if !self.published_newest {
                mean.pop();
            }
            vec![mean; kv_heads]
        });
        let lens: Vec<_> = held.heads.iter().map(|head| head.positions.len()).collect();
        Ok(end_with(scores.collect(), &lens))
    }

    fn protects(&self, _: usize) -> Protected {
        Protected { sinks: 0, recent: usize::from(!self.published_newest) }
    }

    fn decode_step(&self) -> Option<usize> {
        Some(1)
    }
}
