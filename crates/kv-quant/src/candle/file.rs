//! Caches in files: two lists of heads for each, the sinks and the packed ones.

use std::path::Path;

use super::QuantCache;
use longctx_core::{Error, Result};

/// Writes the caches of a model's layers to a file, so that a long prompt need not be read again.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, Format, QuantCache, load_caches, save_caches};
/// use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let make = || QuantCache::new(shape, Format::kivi(Bits::Four, Bits::Four, 32, 128)?);
/// let mut layers = [make()?, make()?];
/// for cache in &mut layers {
///     let q = Tensor::randn(0f32, 1., (1, 8, 300, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (1, 2, 300, 64), &Device::Cpu)?;
///     cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
/// }
/// let path = std::env::temp_dir().join(format!("kv-quant-{}.safetensors", std::process::id()));
/// save_caches(&path, &layers)?;
///
/// let opened = load_caches(&path, [make()?, make()?])?;
/// assert_eq!(opened[1].seen(), 300);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), longctx_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] for a cache that has taken in nothing; [`Error::File`] if the file can't be written.
pub fn save_caches(path: impl AsRef<Path>, caches: &[QuantCache]) -> Result<()> {
    let mut lists = Vec::new();
    for (layer, cache) in caches.iter().enumerate() {
        #[cfg(feature = "cuda")]
        if cache.device.is_some() {
            let what = format!("saving the cache of layer {layer}, which is on a CUDA device");
            return Err(Error::Unsupported(what));
        }
        let stores = [cache.sinks().heads(), cache.store().heads()];
        if stores.iter().all(|heads| heads.is_empty()) {
            return Err(Error::mismatch(format!("cache of layer {layer}"), "tokens", "none"));
        }
        lists.extend(stores);
    }
    Ok(crate::save(path, &lists)?)
}

/// Maps a file that [`save_caches`] has written, into empty caches made as those that were saved, and gives these back. The file must stay as
/// it is while the caches live: they read from it.
///
/// # Errors
/// [`Error::File`] if the file can't be read, is truncated or damaged; [`Error::Mismatch`] if the caches are of another number or
/// format than those saved.
pub fn load_caches(
    path: impl AsRef<Path>,
    caches: impl IntoIterator<Item = QuantCache>,
) -> Result<Vec<QuantCache>> {
    let mut lists = crate::load(path)?.into_iter();
    let mut loaded = Vec::new();
    for cache in caches {
        let (Some(sinks), Some(heads)) = (lists.next(), lists.next()) else {
            return Err(Error::mismatch("caches in the file", "one for each given", loaded.len()));
        };
        loaded.push(cache.with_stores(sinks, heads)?);
    }
    match lists.len() / 2 {
        0 => Ok(loaded),
        more => {
            let got = format!("{more} more");
            Err(Error::mismatch("caches in the file", loaded.len(), got))
        }
    }
}
