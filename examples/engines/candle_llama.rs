//! Compares the caches with the unchanged model. It is `main.rs` of the package that
//! `candle_llama.py` creates.
//!
//!     cargo run -- [MODEL.gguf]
//!
//! Without a GGUF file of a Llama, the weights are random.

use std::collections::HashMap;
use std::fs::File;

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::generation::LogitsProcessor;
use longctx_core::KvCache;

mod base;
mod kivi;
mod paged;
mod snapkv;

const PROMPT: usize = 400;
const DECODED: usize = 50;

/// A model's weights and its config, with the fields of `config.json`.
struct Source {
    config: serde_json::Value,
    weights: VarBuilder<'static>,
}

impl Source {
    fn random() -> Self {
        let config = serde_json::json!({
            "hidden_size": 256, "intermediate_size": 512, "vocab_size": 500, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 2048,
        });
        // Variables are created when the first model requests them, and shared by later models.
        let weights = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        Self { config, weights }
    }

    /// Returns the dequantized weights of a GGUF file, with the names of a safetensors file.
    fn gguf(path: &str) -> Result<Self> {
        let mut file = File::open(path)?;
        let content = Content::read(&mut file)?;
        let number = |key: &str| -> Result<f64> {
            let value = content.metadata.get(&format!("llama.{key}"));
            let value = value.ok_or_else(|| Error::msg(format!("{path} has no llama.{key}")))?;
            value.to_u32().map(f64::from).or_else(|_| value.to_f32().map(f64::from))
        };
        let count = |key| number(key).map(|x| x as usize);
        let (heads, kv_heads) = (count("attention.head_count")?, count("attention.head_count_kv")?);
        let mut tensors = HashMap::new();
        for name in content.tensor_infos.keys() {
            let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            let (name, heads) = renamed(name, heads, kv_heads);
            tensors.insert(name, heads.map_or(Ok(tensor.clone()), |h| in_halves(&tensor, h))?);
        }
        let vocab = tensors["model.embed_tokens.weight"].dim(0)?;
        let config = serde_json::json!({
            "hidden_size": count("embedding_length")?,
            "intermediate_size": count("feed_forward_length")?,
            "vocab_size": vocab,
            "num_hidden_layers": count("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
            "rope_theta": number("rope.freq_base")?,
            "max_position_embeddings": count("context_length")?,
            "tie_word_embeddings": !tensors.contains_key("lm_head.weight"),
        });
        Ok(Self { config, weights: VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu) })
    }
}

/// Returns a tensor's name in a safetensors file, and for queries and keys the number of heads.
fn renamed(name: &str, heads: usize, kv_heads: usize) -> (String, Option<usize>) {
    let heads = match name {
        _ if name.ends_with("attn_q.weight") => Some(heads),
        _ if name.ends_with("attn_k.weight") => Some(kv_heads),
        _ => None,
    };
    let names = [
        ("blk.", "model.layers."),
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q.", "self_attn.q_proj."),
        ("attn_k.", "self_attn.k_proj."),
        ("attn_v.", "self_attn.v_proj."),
        ("attn_output", "self_attn.o_proj"),
        ("output.", "lm_head."),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    (names.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to)), heads)
}

/// Reorders rows from GGUF's order of adjacent channel pairs to the two halves of a head.
fn in_halves(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let pairs = weight.reshape((heads, rows / heads / 2, 2, columns))?;
    pairs.transpose(1, 2)?.reshape((rows, columns))
}

/// Creates the model of a module, and its cache.
macro_rules! model {
    ($module:ident, $source:expr) => {{
        let config: $module::LlamaConfig =
            serde_json::from_value($source.config.clone()).map_err(Error::wrap)?;
        let config = config.into_config(false);
        let model = $module::Llama::load($source.weights.clone(), &config)?;
        (model, $module::Cache::new(true, DType::F32, &config, &Device::Cpu)?)
    }};
}

fn row(ids: &[u32]) -> Result<Tensor> {
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// Returns the tokens that the unchanged model generates, and its logits from the prompt's last
/// token on.
fn written(source: &Source) -> Result<(Vec<u32>, Vec<Tensor>)> {
    let (model, mut cache) = model!(base, source);
    let mut sampler = LogitsProcessor::new(1, Some(0.8), None);
    let (mut ids, mut logits) = (vec![1], Vec::new());
    for at in 0..PROMPT + DECODED {
        let next = model.forward(&row(&ids[at..])?, at, &mut cache)?.squeeze(0)?;
        ids.push(sampler.sample(&next)?);
        if at + 1 >= PROMPT {
            logits.push(next);
        }
    }
    Ok((ids, logits))
}

/// Returns the norm of the difference relative to the norm of `b`.
fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    let norm = |x: &Tensor| -> Result<f32> { x.sqr()?.sum_all()?.sqrt()?.to_scalar() };
    Ok(norm(&(a.flatten_all()? - b.flatten_all()?)?)? / norm(b)?)
}

fn best(logits: &Tensor) -> Result<u32> {
    logits.flatten_all()?.argmax(0)?.to_scalar()
}

macro_rules! compare {
    ($module:ident, $source:expr, $ids:expr, $want:expr) => {{
        let (model, mut cache) = model!($module, $source);
        let prompt = model.forward(&row(&$ids[..PROMPT])?, 0, &mut cache)?;
        let first = distance(&prompt, &$want[0])?;
        let (mut sum, mut worst, mut same) = (0f32, 0f32, 0);
        for (at, want) in (PROMPT..).zip(&$want[1..]) {
            let got = model.forward(&row(&$ids[at..at + 1])?, at, &mut cache)?;
            let far = distance(&got, want)?;
            (sum, worst) = (sum + far, worst.max(far));
            same += usize::from(best(&got)? == best(want)?);
        }
        let held: usize = cache.layers.iter().map(|layer| layer.seq_footprint(0).total()).sum();
        let shape = cache.layers[0].spec().shape;
        let per_token = cache.layers.len() * 2 * shape.kv_heads * shape.head_dim * 2;
        let smaller = ((PROMPT + DECODED) * per_token) as f64 / held as f64;
        println!(
            "{}: the prompt's logits {first:.1e}, {DECODED} decoded tokens' {:.1e} on average and \
             {worst:.1e} at the most; the same best token {same} times; {smaller:.2}x smaller than f16",
            stringify!($module),
            sum / DECODED as f32,
        );
        assert!(first < 1e-4, "a prompt in one call is exact");
    }};
}

/// Calls a function for each layer's cache.
fn each(
    cache: &mut paged::Cache,
    f: impl Fn(&mut Box<dyn KvCache>) -> longctx_core::Result<()>,
) -> Result<()> {
    Ok(cache.layers.iter_mut().try_for_each(f)?)
}

/// Checks a rollback (three of four draft tokens are rejected) and a fork (a second answer to the
/// same prompt).
fn roll_back_and_fork(source: &Source, ids: &[u32]) -> Result<()> {
    let (prompt, accepted, next) =
        (&ids[..PROMPT], &ids[PROMPT..PROMPT + 1], &ids[PROMPT + 1..PROMPT + 2]);
    let (model, mut plain) = model!(paged, source);
    model.forward(&row(prompt)?, 0, &mut plain)?;
    model.forward(&row(accepted)?, PROMPT, &mut plain)?;
    let want = model.forward(&row(next)?, PROMPT + 1, &mut plain)?;

    let (model, mut cache) = model!(paged, source);
    model.forward(&row(prompt)?, 0, &mut cache)?;
    each(&mut cache, |layer| layer.fork(0, 1))?;
    let draft = [accepted, &[3, 4, 5]].concat();
    model.forward(&row(&draft)?, PROMPT, &mut cache)?;
    each(&mut cache, |layer| layer.truncate(0, PROMPT + 1))?;
    let after = distance(&model.forward(&row(next)?, PROMPT + 1, &mut cache)?, &want)?;
    cache.seq = 1;
    model.forward(&row(accepted)?, PROMPT, &mut cache)?;
    let forked = distance(&model.forward(&row(next)?, PROMPT + 1, &mut cache)?, &want)?;
    println!(
        "paged: after a rollback {after:.1e}, in a fork {forked:.1e} from a sequence without either"
    );
    assert!(after < 1e-4 && forked < 1e-4);
    Ok(())
}

fn main() -> Result<()> {
    let source =
        std::env::args().nth(1).map_or(Ok(Source::random()), |path| Source::gguf(&path))?;
    let (ids, want) = written(&source)?;
    compare!(kivi, source, ids, want);
    compare!(snapkv, source, ids, want);
    compare!(paged, source, ids, want);
    roll_back_and_fork(&source, &ids)
}
