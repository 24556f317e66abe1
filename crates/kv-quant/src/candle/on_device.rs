//! A cache whose tokens come from a CUDA device, and stay there.

use std::sync::Once;

use super::{Order, QuantCache};
use crate::CudaStore;
use candle_core::{CudaDevice, Device, Tensor};
use longctx_core::{Error, KvStore, Partial, Result, Visible, attention};

impl QuantCache {
    /// Attention by the device's kernels, or `None` where the host has to do it.
    pub(super) fn attend_on_device(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Option<Partial>> {
        let order = self.order;
        let Some(store) = self.settle_device(q)? else { return Ok(None) };
        if order == Order::QuantizeFirst {
            store.append(k, v)?;
            return store.attend(q, Visible::Causal).map(Some);
        }
        // A few tokens wait in full precision beside the packed ones, and one launch sees both.
        if store.fits(k.dim(2)?) {
            store.extend(k, v)?;
            let done = store.attend(q, Visible::Causal)?;
            store.pack()?;
            return Ok(Some(done));
        }
        let mut parts = vec![attention::attend(q, k, v, store.shape(), Visible::Causal)?];
        if !store.is_empty() {
            parts.push(store.attend(q, Visible::All)?);
        }
        store.append(k, v)?;
        Partial::merge(&parts).map(Some)
    }

    /// The store on the device of the tensors that come, begun with the first of them.
    pub(super) fn settle_device(&mut self, like: &Tensor) -> Result<Option<&mut CudaStore>> {
        let Device::Cuda(device) = like.device() else { return Ok(None) };
        if self.device.is_none() && self.store().is_empty() && self.sinks().is_empty() {
            self.device = self.on_device(device)?;
        }
        Ok(self.device.as_mut())
    }

    /// A store with kernels for this cache. Where there are none the host's are right too, but slow: said once.
    fn on_device(&self, device: &CudaDevice) -> Result<Option<CudaStore>> {
        static SAID: Once = Once::new();
        let store = if self.sink_tokens > 0 {
            Err(Error::Unsupported("CUDA kernels need a cache without sinks".into()))
        } else {
            CudaStore::new(*self.store().shape(), self.format, device)
        };
        match store {
            Err(Error::Unsupported(why)) => {
                SAID.call_once(|| log::warn!("{why}: packed on the host instead, which is slow"));
                Ok(None)
            }
            store => store.map(Some),
        }
    }
}
