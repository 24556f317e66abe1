//! Decoding on a GPU with a model of Llama-3-8B's shape (random weights) over long caches in f16, 4 and 2 bits; and, given a GGUF file, the
//! packed attention over that model's own keys and values beside the host's.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_decode -- [model.gguf]

use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use anyhow::{Result, ensure};
use base_models::{Config, LoadOptions, Pretrained, Transformer};
use candle_core::cuda::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, CudaStore, Format, QuantCache, QuantStore};
use longctx_core::{
    CausalLm, DenseCache, Footprint, KvCache, KvStore, LayerShape, Logits, Partial, Rope,
    RopeScaling, Step, Visible,
};

const STEPS: usize = 64;
const GIB: f64 = (1u64 << 30) as f64;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    // `cargo bench` adds an argument of its own.
    if let Some(gguf) = std::env::args().skip(1).find(|arg| arg.ends_with(".gguf")) {
        check_real(Path::new(&gguf), &device)?;
    }
    let options = LoadOptions { device: device.clone(), dtype: DType::F16, expand: false };
    let model = Transformer::random(llama_3_8b(), &options)?;
    println!(
        "\n| tokens | cache | ms a token | tokens/s | KV cache, GiB | device memory in use, GiB |"
    );
    println!("|---:|---|---:|---:|---:|---:|");
    for tokens in [4_096, 32_768, 131_072] {
        let decode = |name, cache: &MakeCache<'_>| decode(&model, &device, tokens, name, cache);
        decode("f16", &|layer| Ok(Box::new(DenseCache::new(layer.attention, DType::F16)?)))?;
        for (name, bits) in [("KIVI-4", Bits::Four), ("KIVI-2", Bits::Two)] {
            let format = Format::kivi(bits, bits, 32, 128)?;
            decode(name, &|layer| Ok(Box::new(QuantCache::new(layer.attention, format)?)))?;
        }
    }
    Ok(())
}

fn llama_3_8b() -> Config {
    let layers = 32;
    Config {
        family: "llama".into(),
        vocab_size: 128_256,
        hidden_size: 4096,
        intermediate_size: 14_336,
        layers,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::None,
        context_length: 1 << 20,
        windows: vec![None; layers],
        qkv_bias: false,
        out_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied_embeddings: false,
        bos: None,
        eos: Vec::new(),
    }
}

type MakeCache<'a> = dyn Fn(&LayerShape) -> longctx_core::Result<Box<dyn KvCache>> + 'a;

/// Median of steps after a random past.
fn decode(
    model: &Transformer,
    device: &Device,
    tokens: usize,
    name: &str,
    cache: &MakeCache<'_>,
) -> Result<()> {
    let mut session = model.session(|layer| filled(cache(layer)?, layer, tokens, device))?;
    let token = Tensor::new(&[[42u32]], device)?;
    let mut times = Vec::new();
    for _ in 0..STEPS {
        let start = Instant::now();
        let logits = session.forward(&token, Logits::Last)?;
        // The choice of the next token waits for the device, as a generation does.
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        times.push(start.elapsed());
    }
    times.sort();
    let seconds = times[STEPS / 2].as_secs_f64();
    let (free, total) = mem_get_info()?;
    let (cache, used) = (session.footprint().total() as f64 / GIB, (total - free) as f64 / GIB);
    let (ms, rate) = (seconds * 1e3, 1.0 / seconds);
    println!("| {tokens} | {name} | {ms:.2} | {rate:.1} | {cache:.2} | {used:.1} |");
    Ok(())
}

fn filled(
    mut cache: Box<dyn KvCache>,
    layer: &LayerShape,
    tokens: usize,
    device: &Device,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let shape = layer.attention;
    let random = || -> longctx_core::Result<Tensor> {
        let x = Tensor::randn(0f32, 1., (1, shape.kv_heads, tokens, shape.head_dim), device)?;
        Ok(x.to_dtype(DType::F16)?)
    };
    let rope = Rope::new(shape.head_dim, shape.head_dim, 500_000.0, RopeScaling::None)?;
    let (k, v) = (random()?, random()?);
    // Attention among random tokens is not worth computing: the cache is only filled.
    let q = Tensor::zeros((1, shape.heads, tokens, shape.head_dim), DType::F16, device)?;
    let nothing = Tensor::zeros(1, DType::F32, device)?;
    let whole = Partial { out: nothing.clone(), lse: nothing };
    cache.take_prompt(&Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope }, &whole)?;
    Ok(cache)
}

/// A dense cache that shows what it is handed: rotated queries and keys, and values.
struct Recording {
    inner: DenseCache,
    sender: Sender<[Tensor; 3]>,
}

impl KvCache for Recording {
    fn attend(&mut self, step: &Step<'_>) -> longctx_core::Result<Tensor> {
        let f16 = |x: Tensor| x.to_dtype(DType::F16);
        let q = f16(step.rope.apply(step.q, self.seen())?)?;
        let k = f16(step.rope.apply(step.k, self.seen())?)?;
        // Nobody listens any more only if the program ends.
        let _ = self.sender.send([q, k, f16(step.v.clone())?]);
        self.inner.attend(step)
    }
    fn seen(&self) -> usize {
        self.inner.seen()
    }
    fn held(&self) -> usize {
        self.inner.held()
    }
    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }
    fn reset(&mut self) {
        self.inner.reset();
    }
}

/// The packed attention on the device beside the host's, over what a real model's layers hold of a real text.
fn check_real(gguf: &Path, device: &Device) -> Result<()> {
    let Device::Cuda(cuda) = device else { return Ok(()) };
    let text = include_str!("../../docs/attention.md").repeat(3);
    let llm = Pretrained::open(gguf.to_string_lossy().as_ref(), &LoadOptions::default())?;
    let tokens = llm.tokenizer.encode(&text, true)?;
    let (sender, layers) = channel();
    let mut session = llm.model.session(|layer| {
        let inner = DenseCache::new(layer.attention, DType::F32)?;
        Ok(Recording { inner, sender: sender.clone() })
    })?;
    drop(sender);
    session.forward(&Tensor::new(tokens.as_slice(), &Device::Cpu)?.unsqueeze(0)?, Logits::Last)?;
    drop(session);
    let shape = llm.model.config().attention(0)?;
    let (mut cases, mut worst) = (0, 0f32);
    for [q, k, v] in layers {
        for bits in [Bits::Two, Bits::Four, Bits::Eight] {
            for format in [Format::kivi(bits, bits, 32, 128)?, Format::kivi(bits, bits, 64, 64)?] {
                let mut host = QuantStore::new(shape, format)?;
                let mut packed = CudaStore::new(shape, format, cuda)?;
                host.append(&k, &v)?;
                packed.append(&k.to_device(device)?, &v.to_device(device)?)?;
                let last = q.narrow(2, tokens.len() - 4, 4)?.contiguous()?;
                let want = host.attend(&last, Visible::Causal)?.out;
                let got = packed.attend(&last.to_device(device)?, Visible::Causal)?.out;
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
