//! Compares packed attention on the device with the host's, over the keys and values of a real
//! model's layers for a real text.

use std::path::Path;
use std::sync::mpsc::{Sender, channel};

use anyhow::{Result, ensure};
use base_models::{LoadOptions, Pretrained};
use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{Batch, CausalLm, DenseCache, KvCache, KvStore, Logits, Mask, SeqId, Step};

/// The sequence of the text.
const SEQ: SeqId = 0;

/// A dense cache that also sends rotated queries and keys, and values, to a channel.
struct Recording {
    inner: DenseCache,
    sender: Sender<[Tensor; 3]>,
}

impl KvCache for Recording {
    fn attend(&mut self, step: &Step<'_>) -> longctx_core::Result<Tensor> {
        let f16 = |x: &Tensor| x.to_dtype(DType::F16);
        let (q, k) = step.rotate(self.spec(), |seq| self.seen(seq))?;
        // Sending fails only if the program is ending.
        let _ = self.sender.send([f16(&q)?, f16(&k)?, f16(step.v)?]);
        self.inner.attend(step)
    }

    longctx_core::forward_kv_cache!(self => self.inner;
        spec, append_prompt, needs_lse, fork, check_truncate, truncate, remove, seqs, seen, held,
        can_append, footprint, seq_footprint, clear);
}

/// Prints the worst relative error over all layers and several formats; fails if it is too large.
pub fn check(gguf: &Path, device: &Device) -> Result<()> {
    let text = include_str!("../../docs/attention.md").repeat(3);
    let llm = Pretrained::open(gguf.to_string_lossy().as_ref(), &LoadOptions::default())?;
    let tokens = llm.tokenizer.encode(&text, true)?;
    let (sender, layers) = channel();
    let mut session = llm.model.session(|spec| {
        let inner = DenseCache::new(spec.clone(), DType::F32)?;
        Ok(Recording { inner, sender: sender.clone() })
    })?;
    drop(sender);
    let batch = Batch::single(SEQ, tokens.len())?;
    session.forward(&batch, &tokens, Logits::Last)?;
    drop(session);
    let shape = llm.model.config().attention(0)?;
    let (mut cases, mut worst) = (0, 0f32);
    for [q, k, v] in layers {
        for bits in [Bits::Two, Bits::Four, Bits::Eight] {
            for format in [Format::kivi(bits, bits, 32, 128)?, Format::kivi(bits, bits, 64, 64)?] {
                let mut host = QuantStore::new(shape, format)?;
                let mut packed = QuantStore::new(shape, format)?;
                host.append(&batch, &k, &v)?;
                packed.append(&batch, &k.to_device(device)?, &v.to_device(device)?)?;
                let queries = Batch::single(SEQ, 4)?;
                let last = q.narrow(0, tokens.len() - 4, 4)?.contiguous()?;
                let want = host.attend(&queries, &last, Mask::Causal)?.out;
                let got = packed.attend(&queries, &last.to_device(device)?, Mask::Causal)?.out;
                let error = relative(&got.to_device(&Device::Cpu)?, &want)?;
                ensure!(error <= 2e-3, "{format:?}: off by {error}");
                (cases, worst) = (cases + 1, worst.max(error));
            }
        }
    }
    println!(
        "{} tokens through {}: {cases} packed caches, the worst relative error beside the host {worst:.1e}",
        tokens.len(),
        gguf.display()
    );
    Ok(())
}

fn relative(got: &Tensor, want: &Tensor) -> Result<f32> {
    let norm = |x: Tensor| -> Result<f32> { Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
    Ok(norm((got - want)?)? / norm(want.clone())?)
}
