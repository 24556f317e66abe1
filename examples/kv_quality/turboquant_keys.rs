//! TurboQuant's keys with the paper's residual bit.
//!
//! For inner products, arXiv 2504.19874 proposes codes with one bit less, and one bit for the signs
//! of a random projection S of the residual r (QJL, arXiv 2406.03482). The estimate of q·k is
//! linear in q: it is q·k' with
//!
//!     k' = levels * norm + √(π/2) / d * |r| * Sᵀ sign(S r)
//!
//! The caches here hold k' and exact values in f16, so they show the quality of such keys in the
//! bytes of f16.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use base_models::Pretrained;
use candle_core::{DType, Tensor};
use half::f16;
use kv_quant::{Axis, Bits, Packed, Scheme};
use longctx_core::{
    AttentionState, Batch, CacheStrategy, CausalLm, DenseStore, KvCache, KvStore, LayerSpec,
    Logits, Mask, Step, StoreCache, attention,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The names: bits of the codes, norm correction, and the residual bit.
const NAMES: [(&str, Bits, bool, bool); 6] = [
    ("turboquant-keys-4", Bits::Four, false, false),
    ("turboquant-keys-4-nc", Bits::Four, true, false),
    ("turboquant-keys-3-qjl", Bits::Three, false, true),
    ("turboquant-keys-3", Bits::Three, false, false),
    ("turboquant-keys-3-nc", Bits::Three, true, false),
    ("turboquant-keys-2-qjl", Bits::Two, false, true),
];

/// How keys are reconstructed.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    pub name: &'static str,
    bits: Bits,
    norm_correction: bool,
    residual_bit: bool,
}

impl Keys {
    pub fn all() -> impl Iterator<Item = Self> {
        let of = |(name, bits, norm_correction, residual_bit)| Self {
            name,
            bits,
            norm_correction,
            residual_bit,
        };
        NAMES.into_iter().map(of)
    }

    /// Creates a layer's cache.
    ///
    /// # Errors
    /// [`longctx_core::Error::Setting`] for a layer with a sliding window or latent attention.
    pub fn cache(&self, spec: &LayerSpec) -> longctx_core::Result<Box<dyn KvCache>> {
        let store = DenseStore::new(spec.shape, DType::F16)?;
        let strategy = Reconstructed(Reconstruction::new(*self, spec)?);
        Ok(Box::new(StoreCache::with_strategy(spec.clone(), store, strategy)?))
    }
}

/// Quantizes and dequantizes the keys of a layer.
#[derive(Debug, Clone)]
struct Reconstruction {
    scheme: Scheme,
    head_dim: usize,
    /// The projection S, `[head_dim, head_dim]`, of independent normal numbers; for the residual
    /// bit.
    projection: Option<Vec<f32>>,
}

impl Reconstruction {
    fn new(keys: Keys, spec: &LayerSpec) -> longctx_core::Result<Self> {
        if spec.shape.window.is_some() || spec.latent {
            let expected = "full attention over keys and values";
            return Err(longctx_core::Error::setting(
                "layer",
                expected,
                format!("{:?}", spec.shape),
            ));
        }
        let d = spec.shape.head_dim;
        let mut rng = ChaCha8Rng::seed_from_u64(spec.index as u64);
        let projection = keys.residual_bit.then(|| (0..d * d).map(|_| normal(&mut rng)).collect());
        let scheme = Scheme::lloyd_max(keys.bits, keys.norm_correction)?;
        Ok(Self { scheme, head_dim: d, projection })
    }

    /// Returns reconstructed keys for keys `[rows, head_dim]`.
    fn apply(&self, keys: &[f32]) -> kv_quant::Result<Vec<f32>> {
        let d = self.head_dim;
        let packed = Packed::quantize(keys, d, self.scheme, Axis::Tokens)?;
        let mut out = vec![0.0; keys.len()];
        packed.dequantize(&mut out)?;
        if let Some(projection) = &self.projection {
            for (key, out) in keys.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
                add_residual(key, projection, out);
            }
        }
        Ok(out)
    }
}

/// Adds the estimate of the residual `key - out` by the signs of its projection and its norm, which
/// is stored in f16.
fn add_residual(key: &[f32], projection: &[f32], out: &mut [f32]) {
    let d = key.len();
    let residual: Vec<f32> = key.iter().zip(&*out).map(|(key, out)| key - out).collect();
    let norm = f16::from_f32(dot(&residual, &residual).sqrt()).to_f32();
    let step = (std::f32::consts::PI / 2.0).sqrt() / d as f32 * norm;
    for row in projection.chunks_exact(d) {
        let signed = step.copysign(dot(row, &residual));
        out.iter_mut().zip(row).for_each(|(out, s)| *out += signed * s);
    }
}

/// Returns a normal random number (Box-Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Attends to the exact keys of a call and the reconstructed ones before it, as packed caches do.
#[derive(Debug, Clone)]
struct Reconstructed(Reconstruction);

impl CacheStrategy<DenseStore> for Reconstructed {
    fn attend(
        &self,
        spec: &LayerSpec,
        store: &mut DenseStore,
        step: &Step<'_>,
    ) -> longctx_core::Result<Tensor> {
        let own = attention::attend(step.batch, step.q, step.k, step.v, &spec.shape)?;
        let past = store.attend(step.batch, step.q, Mask::Full)?;
        let keys = self.0.apply(&step.k.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)?;
        store.append(
            step.batch,
            &Tensor::from_vec(keys, step.k.shape(), step.k.device())?,
            step.v,
        )?;
        spec.output(AttentionState::merge(&[past, own])?, step.q.dtype())
    }

    fn evict(&self, _: &LayerSpec, _: &mut DenseStore, _: &Batch) -> longctx_core::Result<()> {
        Ok(())
    }
}

/// Sums over pairs of a query and a key: of the score s = q·k * scale, and of its error e.
#[derive(Debug, Clone, Copy, Default)]
struct Errors {
    pairs: f64,
    score_squared: f64,
    error_times_score: f64,
    error_squared: f64,
    error: f64,
}

/// Attends exactly, and sums the errors of the scores that reconstructed keys would have: all pairs
/// of a query and a key of the same call.
struct Probe {
    reconstructions: Vec<Reconstruction>,
    errors: Arc<Mutex<Vec<Errors>>>,
}

impl CacheStrategy<DenseStore> for Probe {
    fn attend(
        &self,
        spec: &LayerSpec,
        store: &mut DenseStore,
        step: &Step<'_>,
    ) -> longctx_core::Result<Tensor> {
        let by_head = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(0, 1)?.to_vec3::<f32>();
        let (q, k) = (by_head(step.q)?, by_head(step.k)?);
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        for (head, keys) in k.iter().enumerate() {
            let group = spec.shape.heads_per_kv();
            let queries = &q[head * group..(head + 1) * group];
            let flat: Vec<f32> = keys.concat();
            for (reconstruction, errors) in self.reconstructions.iter().zip(errors.iter_mut()) {
                let close = reconstruction.apply(&flat)?;
                for (key, close) in keys.iter().zip(close.chunks_exact(spec.shape.head_dim)) {
                    for query in queries.iter().flatten() {
                        errors.add(query, key, close, spec.shape.scale);
                    }
                }
            }
        }
        store.append(step.batch, step.k, step.v)?;
        spec.output(store.attend(step.batch, step.q, Mask::Causal)?, step.q.dtype())
    }

    fn evict(&self, _: &LayerSpec, _: &mut DenseStore, _: &Batch) -> longctx_core::Result<()> {
        Ok(())
    }
}

impl Errors {
    fn add(&mut self, query: &[f32], key: &[f32], close: &[f32], scale: f32) {
        let score = f64::from(dot(query, key) * scale);
        let error = f64::from(dot(query, close) * scale) - score;
        self.pairs += 1.0;
        self.score_squared += score * score;
        self.error_times_score += error * score;
        self.error_squared += error * error;
        self.error += error;
    }
}

/// Prints the errors of the scores of reconstructed keys, on the model's own queries and keys.
pub fn table(llm: &Pretrained, contexts: &[Vec<u32>], block: usize) -> Result<()> {
    let errors = Arc::new(Mutex::new(vec![Errors::default(); NAMES.len()]));
    let mut session = llm.model.session(|spec| {
        let reconstructions =
            Keys::all().map(|keys| Reconstruction::new(keys, spec)).collect::<Result<_, _>>()?;
        let probe = Probe { reconstructions, errors: errors.clone() };
        let store = DenseStore::new(spec.shape, DType::F16)?;
        Ok(Box::new(StoreCache::with_strategy(spec.clone(), store, probe)?))
    })?;
    for start in (0..contexts[0].len()).step_by(block) {
        let fed = block.min(contexts[0].len() - start);
        let lens: Vec<_> = (0..).zip(contexts).map(|(seq, _)| (seq, fed)).collect();
        let ids: Vec<_> = contexts.iter().flat_map(|c| &c[start..start + fed]).copied().collect();
        session.forward(&Batch::new(&lens)?, &ids, Logits::All)?;
    }
    println!("| keys | mean error | error / score (slope) | root mean square error |");
    println!("|---|---|---|---|");
    let errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(errors[0].pairs > 0.0, "no queries");
    for (keys, e) in Keys::all().zip(errors.iter()) {
        println!(
            "| {} | {:+.4} | {:+.2}% | {:.4} |",
            keys.name,
            e.error / e.pairs,
            100.0 * e.error_times_score / e.score_squared,
            (e.error_squared / e.pairs).sqrt()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QJL's estimate is unbiased over projections (Lemma 4 of arXiv 2504.19874).
    #[test]
    fn the_residual_bit_is_unbiased() {
        let d = 32;
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let key: Vec<f32> = (0..d).map(|_| normal(&mut rng)).collect();
        let query: Vec<f32> = (0..d).map(|_| normal(&mut rng)).collect();
        let samples = 4000;
        let estimates: Vec<f32> = (0..samples)
            .map(|_| {
                let projection: Vec<f32> = (0..d * d).map(|_| normal(&mut rng)).collect();
                let mut out = vec![0.0; d];
                add_residual(&key, &projection, &mut out);
                dot(&query, &out)
            })
            .collect();
        let mean = estimates.iter().sum::<f32>() / samples as f32;
        let variance = estimates.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / samples as f32;
        let standard_error = (variance / samples as f32).sqrt();
        assert!((mean - dot(&query, &key)).abs() < 4.0 * standard_error, "{mean}");
        // Lemma 4: the variance is at most π/2 / d * |q|² |r|².
        let bound = std::f32::consts::PI / 2.0 / d as f32 * dot(&query, &query) * dot(&key, &key);
        assert!(variance < 1.1 * bound, "{variance}, not below {bound}");
    }
}
