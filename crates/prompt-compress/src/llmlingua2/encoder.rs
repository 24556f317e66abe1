//! The encoder: XLM-RoBERTa or BERT, with a token classification head (keep or drop).
//!
//! The windows of a batch are concatenated in one matrix, without padding: matrix products run over
//! all tokens of the batch, and only attention is computed per window.

use super::checkpoint::{Config, Family, Weights};
use super::gelu::bias_gelu;
use candle_core::{Device, Tensor};
use candle_nn::ops::layer_norm;
use longctx_core::{AttentionShape, Batch, DenseStore, Error, KvStore, Mask, Result};

/// Tokens of a window including its first and last special token, as in training.
pub const WINDOW: usize = 512;

/// An encoder with its two-class head.
#[derive(Debug)]
pub struct Encoder {
    config: Config,
    shape: AttentionShape,
    device: Device,
    words: Tensor,
    positions: Tensor,
    /// The embedding of the only token type in use, `[hidden]`.
    token_type: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
    head: Linear,
}

impl Encoder {
    pub fn load(config: Config, w: &mut Weights, device: &Device) -> Result<Self> {
        let hidden = config.hidden_size;
        if !hidden.is_multiple_of(config.num_attention_heads.max(1)) {
            let expected = format!("a divisor of hidden_size {hidden}");
            return Err(Error::setting(
                "num_attention_heads",
                expected,
                config.num_attention_heads,
            ));
        }
        let heads = config.num_attention_heads;
        let shape = AttentionShape::new(heads, heads, hidden / heads.max(1))?;
        let first = config.first_position();
        if config.max_position_embeddings < WINDOW + first {
            let expected = format!("at least {}", WINDOW + first);
            let got = config.max_position_embeddings;
            return Err(Error::setting("max_position_embeddings", expected, got));
        }
        match w.shape("classifier.weight") {
            Some(&[2, _]) => {}
            other => {
                let expected = format!("a token classifier with two classes, [2, {hidden}]");
                let got = other.map_or("none".into(), |shape| format!("{shape:?}"));
                return Err(Error::mismatch("classifier.weight", expected, got));
            }
        }
        let base = config.prefix();
        let name = |part: &str| format!("{base}.embeddings.{part}");
        let words = w.tensor(&name("word_embeddings.weight"), &[config.vocab_size, hidden])?;
        let positions = w.tensor(
            &name("position_embeddings.weight"),
            &[config.max_position_embeddings, hidden],
        )?;
        let token_types =
            w.tensor(&name("token_type_embeddings.weight"), &[config.type_vocab_size, hidden])?;
        let norm = Norm::load(w, &name("LayerNorm"), &config)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::load(w, &format!("{base}.encoder.layer.{i}"), &config))
            .collect::<Result<_>>()?;
        let head = Linear::load(w, "classifier", 2, hidden)?;
        let (token_type, device) = (token_types.get(0)?, device.clone());
        Ok(Self { config, shape, device, words, positions, token_type, norm, layers, head })
    }

    /// Returns the number of embedding rows: the vocabulary and the added tokens.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Returns the keep probability of each token of each window.
    pub fn keep_probabilities(&self, windows: &[EncoderInput]) -> Result<Vec<Vec<f32>>> {
        let lens: Vec<usize> = windows.iter().map(|window| window.ids.len()).collect();
        let total = lens.iter().sum::<usize>();
        if total == 0 {
            return Ok(vec![Vec::new(); windows.len()]);
        }
        let gather = |of: fn(&EncoderInput) -> &[u32], rows: &Tensor| -> Result<Tensor> {
            let all: Vec<u32> = windows.iter().flat_map(of).copied().collect();
            Ok(rows.index_select(&Tensor::from_vec(all, total, &self.device)?, 0)?)
        };
        let words = gather(|window| &window.ids, &self.words)?.broadcast_add(&self.token_type)?;
        let positions = gather(|window| &window.positions, &self.positions)?;
        let mut x = self.norm.forward(&(words + positions)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, &lens, &self.shape)?;
        }
        let logits = self.head.forward(&x)?.to_vec2::<f32>()?;
        let mut probs = logits.iter().map(|pair| keep_probability(pair[0], pair[1]));
        Ok(lens.iter().map(|&len| probs.by_ref().take(len).collect()).collect())
    }
}

/// Softmax over two classes; the second is "keep".
fn keep_probability(drop: f32, keep: f32) -> f32 {
    let max = drop.max(keep);
    let (drop, keep) = ((drop - max).exp(), (keep - max).exp());
    keep / (drop + keep)
}

/// The encoder's input for one window: as many ids as positions.
#[derive(Debug, Default)]
pub struct EncoderInput {
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
}

impl Config {
    /// Returns the common prefix of the tensor names.
    fn prefix(&self) -> &'static str {
        match self.model_type {
            Family::XlmRoberta => "roberta",
            Family::Bert => "bert",
        }
    }

    /// Returns the position of a window's first token: RoBERTa counts from after its padding id.
    fn first_position(&self) -> usize {
        match self.model_type {
            Family::XlmRoberta => self.pad_token_id as usize + 1,
            Family::Bert => 0,
        }
    }

    /// Returns the positions of `ids`. In XLM-RoBERTa a padding token in the text has the padding's
    /// position and is not counted.
    pub fn positions(&self, ids: &[u32]) -> Vec<u32> {
        match self.model_type {
            Family::Bert => (0..ids.len() as u32).collect(),
            Family::XlmRoberta => {
                let pad = self.pad_token_id;
                let mut last = pad;
                let position = |&id: &u32| {
                    last += u32::from(id != pad);
                    if id == pad { pad } else { last }
                };
                ids.iter().map(position).collect()
            }
        }
    }
}

#[derive(Debug)]
struct Linear {
    /// `[out, inner]`, as in the file.
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn load(w: &mut Weights, name: &str, out: usize, inner: usize) -> Result<Self> {
        let weight = w.tensor(&format!("{name}.weight"), &[out, inner])?;
        Ok(Self { weight, bias: w.tensor(&format!("{name}.bias"), &[out])? })
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.weight.t()?)?)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.product(x)?.broadcast_add(&self.bias)?)
    }
}

#[derive(Debug)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl Norm {
    fn load(w: &mut Weights, name: &str, config: &Config) -> Result<Self> {
        let mut of = |part: &str| w.tensor(&format!("{name}.{part}"), &[config.hidden_size]);
        Ok(Self { weight: of("weight")?, bias: of("bias")?, eps: config.layer_norm_eps as f32 })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

#[derive(Debug)]
struct Layer {
    /// Queries, keys and values in one projection.
    qkv: Linear,
    out: Linear,
    attention_norm: Norm,
    inner: Linear,
    outer: Linear,
    norm: Norm,
}

impl Layer {
    fn load(w: &mut Weights, base: &str, config: &Config) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let parts = ["query", "key", "value"]
            .map(|part| Linear::load(w, &format!("{base}.attention.self.{part}"), hidden, hidden));
        let [q, k, v] = parts;
        let (q, k, v) = (q?, k?, v?);
        let qkv = Linear {
            weight: Tensor::cat(&[&q.weight, &k.weight, &v.weight], 0)?,
            bias: Tensor::cat(&[&q.bias, &k.bias, &v.bias], 0)?,
        };
        let name = |part: &str| format!("{base}.{part}");
        Ok(Self {
            qkv,
            out: Linear::load(w, &name("attention.output.dense"), hidden, hidden)?,
            attention_norm: Norm::load(w, &name("attention.output.LayerNorm"), config)?,
            inner: Linear::load(w, &name("intermediate.dense"), inner, hidden)?,
            outer: Linear::load(w, &name("output.dense"), hidden, inner)?,
            norm: Norm::load(w, &name("output.LayerNorm"), config)?,
        })
    }

    fn forward(&self, x: &Tensor, lens: &[usize], shape: &AttentionShape) -> Result<Tensor> {
        let mixed = attend(&self.qkv.forward(x)?, lens, shape)?;
        let x = self.attention_norm.forward(&(self.out.forward(&mixed)? + x)?)?;
        let inner = bias_gelu(self.inner.product(&x)?, &self.inner.bias)?;
        self.norm.forward(&(self.outer.forward(&inner)? + x)?)
    }
}

/// Attention within each window, from `[tokens, 3 * hidden]` to `[tokens, hidden]`.
fn attend(qkv: &Tensor, lens: &[usize], shape: &AttentionShape) -> Result<Tensor> {
    let (heads, d) = (shape.heads, shape.head_dim);
    let windows: Vec<_> = (0..).zip(lens.iter().copied()).filter(|(_, len)| *len > 0).collect();
    let batch = Batch::new(&windows)?;
    let qkv = qkv.reshape((batch.tokens(), 3, heads, d))?;
    let part = |i: usize| -> Result<Tensor> { Ok(qkv.narrow(1, i, 1)?.squeeze(1)?) };
    let mut store = DenseStore::new(*shape, qkv.dtype())?;
    store.append(&batch, &part(1)?, &part(2)?)?;
    let out = store.attend(&batch, &part(0)?, Mask::Full)?.out;
    Ok(out.reshape((batch.tokens(), heads * d))?)
}
