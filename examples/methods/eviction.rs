//! Eviction policies by name.

use longctx_core::{KvStore, LayerSpec, Result};
use token_drop::{
    Budget, DuoAttention, EvictionPolicy, ExpectedAttention, Finch, Granularity, H2o, HeadBudgets,
    KNorm, KeyDiff, LagKv, LayerBudgets, PolicyCache, Random, Recent, SnapKv, Tova,
};

use super::Compress;
use crate::heads::{RECENT, SINKS};

/// The number of newest queries that SnapKV and its variants observe.
pub const WINDOW: usize = 32;

/// The number of entries evicted at a time during decoding by policies that were published without
/// eviction during decoding.
const DECODE_STEP: usize = 16;

/// A policy. DuoAttention is not one of them, because it needs a model's [heads](crate::heads).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eviction {
    /// Keeps random tokens.
    Random,
    /// Keeps the newest tokens.
    Recent,
    /// Keeps the tokens whose keys have the smallest norm.
    KNorm,
    /// Keeps the tokens whose keys differ most from the mean key.
    KeyDiff,
    /// Keeps the tokens that differ most from the next ones.
    LagKv,
    /// Keeps the tokens that future queries are expected to attend to.
    ExpectedAttention,
    /// Keeps the tokens that the newest query attends to.
    Tova,
    /// Keeps the tokens with the largest attention accumulated over all queries.
    H2o,
    /// Keeps the tokens that the newest queries attend to.
    SnapKv,
    /// SnapKV with scores smoothed over 13 tokens, so that attention to the first digit of a
    /// 7-digit key also keeps its last digit.
    WideSnapKv,
    /// PyramidKV: SnapKV with larger budgets in lower layers.
    PyramidSnapKv,
    /// AdaKV: SnapKV with one budget for all heads of a layer.
    AdaSnapKv,
    /// ChunkKV: SnapKV that keeps whole chunks.
    ChunkSnapKv,
    /// SnapKV that re-rotates the kept keys to contiguous positions.
    RerotatedSnapKv,
    /// Keeps the tokens that the question attends to, and re-rotates them to contiguous positions.
    Finch,
}

/// A cache with a policy chosen at run time.
pub type Evicting<S> = PolicyCache<S, Box<dyn EvictionPolicy>>;

impl Eviction {
    /// All policies.
    pub const ALL: [Self; 15] = [
        Self::Random,
        Self::Recent,
        Self::KNorm,
        Self::KeyDiff,
        Self::LagKv,
        Self::ExpectedAttention,
        Self::Tova,
        Self::H2o,
        Self::SnapKv,
        Self::WideSnapKv,
        Self::PyramidSnapKv,
        Self::AdaSnapKv,
        Self::ChunkSnapKv,
        Self::RerotatedSnapKv,
        Self::Finch,
    ];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Recent => "recent",
            Self::KNorm => "k-norm",
            Self::KeyDiff => "key-diff",
            Self::LagKv => "lag-kv",
            Self::ExpectedAttention => "expected-attention",
            Self::Tova => "tova",
            Self::H2o => "h2o",
            Self::SnapKv => "snap-kv",
            Self::WideSnapKv => "wide-snap-kv",
            Self::PyramidSnapKv => "pyramid-snap-kv",
            Self::AdaSnapKv => "ada-snap-kv",
            Self::ChunkSnapKv => "chunk-snap-kv",
            Self::RerotatedSnapKv => "rerotated-snap-kv",
            Self::Finch => "finch",
        }
    }

    /// Creates a cache for one layer.
    ///
    /// # Errors
    /// If the budget is too small, or the policy does not support the layer.
    pub fn cache<S: KvStore>(
        self,
        spec: LayerSpec,
        store: S,
        budget: Budget,
    ) -> Result<Evicting<S>> {
        let snap_kv =
            |spec, store, budget| PolicyCache::snap_kv(spec, store, SnapKv::new(WINDOW)?, budget);
        Ok(match self {
            Self::Random => {
                let policy = Random::new(spec.index as u64);
                PolicyCache::new(spec, store, policy, budget)?.boxed()
            }
            Self::Recent => PolicyCache::recent(spec, store, 0, budget)?.boxed(),
            Self::KNorm => PolicyCache::new(spec, store, KNorm, budget)?.boxed(),
            Self::KeyDiff => PolicyCache::new(spec, store, KeyDiff, budget)?.boxed(),
            Self::LagKv => PolicyCache::lag_kv(spec, store, LagKv::new(4, 64)?, budget)?.boxed(),
            Self::ExpectedAttention => {
                let policy = ExpectedAttention::default();
                PolicyCache::expected_attention(spec, store, policy, budget)?.boxed()
            }
            Self::Tova => PolicyCache::tova(spec, store, Tova::default(), budget)?.boxed(),
            Self::H2o => PolicyCache::h2o(spec, store, H2o::default(), budget)?.boxed(),
            Self::SnapKv => snap_kv(spec, store, budget)?.boxed(),
            Self::WideSnapKv => {
                let policy = SnapKv::new(WINDOW)?.with_kernel(13)?;
                PolicyCache::snap_kv(spec, store, policy, budget)?.boxed()
            }
            Self::PyramidSnapKv => snap_kv(spec, store, budget)?
                .with_layer_budgets(LayerBudgets::Pyramid { beta: 20.0 })?
                .boxed(),
            Self::AdaSnapKv => {
                snap_kv(spec, store, budget)?.with_head_budgets(HeadBudgets::ADA_KV)?.boxed()
            }
            Self::ChunkSnapKv => {
                snap_kv(spec, store, budget)?.with_granularity(Granularity::Chunk(20))?.boxed()
            }
            Self::RerotatedSnapKv => snap_kv(spec, store, budget)?.with_rerotation()?.boxed(),
            Self::Finch => PolicyCache::finch(spec, store, Finch::new(16)?, budget)?.boxed(),
        })
    }
}

impl Compress {
    /// Returns the cache with its policy applied to these tokens.
    pub(super) fn evicting<S: KvStore>(self, cache: Evicting<S>) -> Result<Evicting<S>> {
        match self {
            Self::Published => Ok(cache),
            Self::Prompt => cache.with_decode_step(None),
            Self::Decoded => {
                let step = cache.settings().decode_step.unwrap_or(DECODE_STEP);
                cache.with_decode_step(Some(step))?.with_kept_prompt()
            }
        }
    }
}

/// Creates a cache with DuoAttention; `streaming` has the streaming heads of each layer.
///
/// # Errors
/// If there is no list for the layer, or its length is not the number of kv heads.
pub fn duo_attention<S: KvStore>(
    spec: LayerSpec,
    store: S,
    streaming: &[Vec<bool>],
) -> Result<PolicyCache<S, Recent>> {
    let of_layer = streaming.get(spec.index).ok_or_else(|| {
        let what = "layers that DuoAttention has scores of";
        longctx_core::Error::mismatch(what, spec.num_layers, streaming.len())
    })?;
    let heads = DuoAttention::new(of_layer.clone(), SINKS, RECENT)?;
    PolicyCache::duo_attention(spec, store, &heads)
}
