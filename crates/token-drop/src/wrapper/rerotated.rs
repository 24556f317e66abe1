//! Contiguous positions after eviction, as in Finch (Corallo and Papotti, TACL 2024) and transformers' `SinkCache`.

use longctx_core::EvictionPolicy;

/// Rotates kept keys to contiguous positions, around any policy whose heads keep equally many entries.
///
/// The next token comes right after the kept ones, so that a text longer than the model was trained for stays within known positions. Turning keys
/// that a packed store holds means to pack them anew.
#[derive(Debug, Clone, Copy)]
pub struct Rerotated<P> {
    policy: P,
}

impl<P: EvictionPolicy> Rerotated<P> {
    /// Around `policy`.
    pub fn new(policy: P) -> Self {
        Self { policy }
    }
}

impl<P: EvictionPolicy> EvictionPolicy for Rerotated<P> {
    forward!(needs, score, protects, budgets, bounds_heads, is_over, select, decode_step);

    fn rerotates(&self) -> bool {
        true
    }
}
