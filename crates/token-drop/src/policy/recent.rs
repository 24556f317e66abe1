//! The newest tokens alone, a control; or with sinks, the selection of StreamingLLM: Xiao et al., arXiv 2309.17453.

use longctx_core::{EvictionPolicy, Held, Needs, Protected, Result};

/// Keeps the first few tokens, none by default, and the newest.
///
/// With sinks this is what kvpress calls StreamingLLM: tokens stay rotated at their true positions. [`StreamingLlm`](crate::StreamingLlm)
/// places them within the cache, as the paper does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recent {
    sinks: usize,
}

impl Recent {
    /// Keeps the first `sinks` tokens beside the newest.
    pub fn with_sinks(sinks: usize) -> Self {
        Self { sinks }
    }
}

impl EvictionPolicy for Recent {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        let of_head = |positions: &[u32]| positions.iter().map(|&p| p as f32).collect();
        Ok(held.heads.iter().map(|head| of_head(head.positions)).collect())
    }

    fn protects(&self, _: usize) -> Protected {
        Protected { sinks: self.sinks, recent: 0 }
    }
}
