use base_models::{Config, LoadOptions, Transformer};
use candle_core::{DType, Device};
use longctx_core::{Batch, CausalLm, DenseCache, Logits, RopeScaling};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::new_cuda(0)?;
    let layers: usize = std::env::var("LAYERS").map_or(32, |n| n.parse().unwrap());
    let config = Config {
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
        qk_norm: false,
        tied_embeddings: false,
        bos: None,
        eos: Vec::new(),
    };
    let options = LoadOptions { device: device.clone(), dtype: DType::F16, expand: false };
    let model = Transformer::random(config, &options)?;
    let all: &[usize] = if layers < 32 { &[8192] } else { &[8192, 8192, 32768] };
    for &tokens in all {
        let mut session = model.session(|spec| DenseCache::new(spec.clone(), DType::F16))?;
        let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % 128_000) as u32).collect();
        let batch = Batch::single(0, tokens)?;
        device.synchronize()?;
        let start = Instant::now();
        let logits = session.forward(&batch, &ids, Logits::Last)?;
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        println!("prefill of {tokens}: {:.4} s", start.elapsed().as_secs_f64());
        let step = Batch::single(0, 1)?;
        let mut times = Vec::new();
        for _ in 0..if layers < 32 { 1 } else { 12 } {
            let start = Instant::now();
            let logits = session.forward(&step, &[42], Logits::Last)?;
            logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        println!("step after {tokens}: {:.2} ms", times[times.len() / 2]);
    }
    Ok(())
}
