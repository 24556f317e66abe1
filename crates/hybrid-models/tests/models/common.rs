//! Shared code of the tests: fixtures, and feeding sequences in chunks.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, Session};
use longctx_core::{Batch, CausalLm, DenseCache, Logits, Result, SeqId};

pub struct Fixture {
    pub folder: PathBuf,
    pub tokens: Tensor,
    pub logits: Tensor,
    pub logits_of_bf16: Tensor,
}

impl Fixture {
    pub fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let file = folder.join("expected.safetensors");
        let mut expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let mut take = |name| expected.remove(name).unwrap();
        let tokens = take("tokens").to_dtype(DType::U32).unwrap();
        let (logits, logits_of_bf16) = (take("logits"), take("logits_of_bf16"));
        Self { folder, tokens, logits, logits_of_bf16 }
    }

    pub fn model(&self, dtype: DType) -> Model {
        Model::from_folder(&self.folder, &LoadOptions { dtype, ..Default::default() }).unwrap()
    }

    /// Returns the model with all its weights rounded to `stored` and its matrices in `held`.
    pub fn rounded(&self, stored: DType, held: DType) -> Model {
        let tensors = self.tensors().into_iter();
        let tensors = tensors.map(|(name, t)| (name, t.to_dtype(stored).unwrap())).collect();
        let config = std::fs::read_to_string(self.folder.join("config.json")).ok();
        Model::from_tensors(
            config.as_deref(),
            tensors,
            &LoadOptions { dtype: held, ..Default::default() },
        )
        .unwrap()
    }

    pub fn tensors(&self) -> HashMap<String, Tensor> {
        let file = self.folder.join("model.safetensors");
        if file.exists() {
            return candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        }
        let all = candle_core::pickle::read_all(self.folder.join("model.pth")).unwrap();
        all.into_iter().collect()
    }
}

pub fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Returns the largest difference between two computations of the same logits, divided by the
/// largest logit.
///
/// If a layer's output nearly cancels before a norm, rounding errors grow. Over 400 random prompts,
/// chunks and steps of the Mamba fixture differ by up to 5e-5 of the largest logit, all of it f32
/// rounding (`transformers` in f32 and in f64 differ as much at the same tokens). The growth
/// depends on the order of sums, and so on the CPU's vector width. A broken law gives far larger
/// differences: see [`SAME`].
pub fn relative_distance(a: &Tensor, b: &Tensor) -> f32 {
    let largest: f32 = b.abs().unwrap().max_all().unwrap().to_scalar().unwrap();
    distance(a, b) / largest
}

/// Logits with a smaller [`relative_distance`] are equal up to rounding. A prompt that lacks one
/// token gives 0.2 and more.
pub const SAME: f32 = 1e-3;

pub fn session(model: &Model) -> Session {
    model.session(|layer| DenseCache::new(layer.clone(), DType::F32)).unwrap()
}

/// Feeds each sequence of a batch its tokens.
pub fn advance(session: &mut Session, parts: &[(SeqId, &[u32])], logits: Logits) -> Result<Tensor> {
    let lengths: Vec<_> = parts.iter().map(|(seq, ids)| (*seq, ids.len())).collect();
    let ids: Vec<u32> = parts.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
    session.forward(&Batch::new(&lengths)?, &ids, logits)
}

/// Returns all logits, `[sequences, tokens, vocab]`, of `tokens`, `[sequences, tokens]`, fed in
/// chunks of the given lengths. The last length repeats.
pub fn feed(model: &Model, tokens: &Tensor, cuts: &[usize]) -> Tensor {
    feed_on(&mut session(model), tokens, cuts)
}

pub fn feed_on(session: &mut Session, tokens: &Tensor, cuts: &[usize]) -> Tensor {
    let rows: Vec<Vec<u32>> = tokens.to_vec2().unwrap();
    let length = tokens.dim(1).unwrap();
    let (mut start, mut parts) = (0, Vec::new());
    for &cut in cuts.iter().chain(std::iter::repeat(cuts.last().unwrap())) {
        let count = cut.min(length - start);
        if count == 0 {
            break;
        }
        let chunks = rows.iter().map(|row| &row[start..start + count]);
        let logits = advance(session, &(0..).zip(chunks).collect::<Vec<_>>(), Logits::All).unwrap();
        parts.push(logits.reshape((rows.len(), count, ())).unwrap());
        start += count;
    }
    Tensor::cat(&parts, 1).unwrap()
}
