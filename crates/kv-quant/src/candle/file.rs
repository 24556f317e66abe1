//! A sequence of a model's caches in a file: sinks and packed tokens of each cache.

use std::path::Path;

use super::QuantCache;
use crate::{CacheFile, Pool};
use longctx_core::{Error, KvCache, KvStore, Result, SeqId};

/// Writes a sequence of the caches of a model's layers to a file, so that a long prompt need not be
/// processed again.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, Format, QuantCache, load_caches, save_caches};
/// use longctx_core::{AttentionShape, Batch, KvCache, LayerSpec, Rope, RopeScaling, Step};
///
/// let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None)?);
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?).with_rope(rope);
/// let make = || QuantCache::new(spec.clone(), Format::kivi(Bits::Four, Bits::Four, 32, 128)?);
/// let mut layers = [make()?, make()?];
/// let batch = Batch::single(7, 300)?;
/// for cache in &mut layers {
///     let q = Tensor::randn(0f32, 1., (300, 8, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (300, 2, 64), &Device::Cpu)?;
///     cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
/// }
/// let path = std::env::temp_dir().join(format!("kv-quant-{}.safetensors", std::process::id()));
/// save_caches(&path, 7, &layers)?;
///
/// let mut others = [make()?, make()?];
/// load_caches(&path, 0, &mut others)?;
/// assert_eq!(others[1].seen(0), 300);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), longctx_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::UnknownSequence`] if the sequence is missing in a cache; [`Error::Poisoned`];
/// [`Error::File`] if the file cannot be written.
pub fn save_caches(path: impl AsRef<Path>, seq: SeqId, caches: &[QuantCache]) -> Result<()> {
    let empty: Vec<_> = caches.iter().map(|cache| begun(cache, seq)).collect::<Result<_>>()?;
    let mut sequences = Vec::new();
    for (cache, (no_sinks, no_store)) in caches.iter().zip(&empty) {
        if !cache.seqs().contains(&seq) {
            return Err(Error::UnknownSequence(seq));
        }
        cache.check(seq)?;
        let known = |pool: &Pool| pool.lens(seq).is_some();
        let (sinks, store) = (on_cpu(cache.sinks().pool())?, on_cpu(cache.store().pool())?);
        sequences.push((if known(sinks) { sinks } else { no_sinks }, seq));
        sequences.push((if known(store) { store } else { no_store }, seq));
    }
    Ok(crate::save(path, &sequences)?)
}

/// Returns a store's pool, or an error if it is not on the CPU.
fn on_cpu<P>(pool: Option<P>) -> Result<P> {
    let what = "saving or loading sequences of a packed store on a CUDA device";
    pool.ok_or_else(|| Error::Unsupported(what.into()))
}

/// Creates pools like those of a cache, with an empty sequence.
fn begun(cache: &QuantCache, seq: SeqId) -> Result<(Pool, Pool)> {
    let begin = |like: &Pool| -> Result<Pool> {
        let mut pool = match like.rotary() {
            Some(rotary) => Pool::before_rope(like.shape(), like.format(), rotary.clone())?,
            None => Pool::new(like.shape(), like.format())?,
        };
        pool.append::<f32>(&[seq], &[0, 0], &[], &[])?;
        Ok(pool)
    };
    Ok((begin(on_cpu(cache.sinks().pool())?)?, begin(on_cpu(cache.store().pool())?)?))
}

/// Creates a sequence in each of the caches from a file of [`save_caches`]. The caches must have
/// the formats of the saved ones.
///
/// # Errors
/// [`Error::File`] if the file cannot be read, is truncated or damaged; [`Error::Mismatch`] if the
/// number or formats of the caches differ from the saved ones, or a cache has the sequence already.
/// On an error no cache has changed.
pub fn load_caches(path: impl AsRef<Path>, seq: SeqId, caches: &mut [QuantCache]) -> Result<()> {
    let file = CacheFile::open(path)?;
    if file.len() != 2 * caches.len() {
        return Err(Error::mismatch("caches in the file", caches.len(), file.len() / 2));
    }
    if let Some(cache) = caches.iter().find(|cache| cache.seqs().contains(&seq)) {
        let got = format!("{seq}, which has {} tokens", cache.seen(seq));
        return Err(Error::mismatch("sequence to load", "a new one", got));
    }
    let mut done = Ok(());
    for (layer, cache) in caches.iter_mut().enumerate() {
        done = load(&file, layer, seq, cache);
        if done.is_err() {
            break;
        }
    }
    if done.is_err() {
        for cache in caches {
            cache.remove(seq);
        }
    }
    done
}

fn load(file: &CacheFile, layer: usize, seq: SeqId, cache: &mut QuantCache) -> Result<()> {
    let (sinks, store) = cache.stores_mut();
    for (store, list) in [(sinks, 2 * layer), (store, 2 * layer + 1)] {
        // A list without heads means that the store was empty.
        if file.has(list) {
            on_cpu(store.pool_mut())?.load(seq, file, list)?;
            if store.len(seq) == 0 {
                store.remove(seq);
            }
        }
    }
    cache.register(seq);
    Ok(())
}
