//! Logits of every architecture and rotary scaling against `transformers`, for random
//! configurations made by `fixtures/make_architectures.py`.

mod common;

use base_models::{LoadOptions, Pretrained, Session, Transformer};
use candle_core::{Device, Tensor};
use common::cases::{Case, cases, write, write_gguf};
use longctx_core::{
    Batch, CausalLm, DenseCache, DenseStore, LatentCache, LatentStore, LayerSpec, Logits,
};

const TOLERANCE: f32 = 1e-4;

fn open(case: &Case) -> Transformer {
    let folder = tempfile::tempdir().unwrap();
    write(case, folder.path());
    let options = LoadOptions { context_length: Some(case.tokens.len()), ..LoadOptions::default() };
    Transformer::from_folder(folder.path(), &options)
        .unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

/// The GGUF file of a checkpoint has the same logits.
#[test]
fn gguf_files_give_the_logits_of_transformers() {
    let mut count = 0;
    for (case, expected) in cases() {
        let Some(gguf) = &case.gguf else { continue };
        let folder = tempfile::tempdir().unwrap();
        let path = write_gguf(&case, gguf, folder.path());
        let options =
            LoadOptions { context_length: Some(case.tokens.len()), ..LoadOptions::default() };
        let llm = Pretrained::from_gguf(&path, &options);
        let llm = llm.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let error = distance(&in_chunks(&llm.model, &case.tokens, &[23, 1, 17]), &expected);
        println!("{}: largest difference {error:e}", case.name);
        assert!(error < TOLERANCE, "{}: {error}", case.name);
        count += 1;
    }
    assert_eq!(count, 19);
}

fn dense(layer: &LayerSpec) -> longctx_core::Result<DenseCache> {
    DenseCache::new(layer.clone(), candle_core::DType::F32)
}

/// Returns the logits of tokens fed in chunks. The last chunk length repeats.
fn in_chunks(model: &Transformer, tokens: &[u32], chunks: &[usize]) -> Tensor {
    logits_in_chunks(model.session(dense).unwrap(), tokens, chunks)
}

fn logits_in_chunks(mut session: Session, tokens: &[u32], chunks: &[usize]) -> Tensor {
    let mut sizes = chunks.iter().copied().chain(std::iter::repeat(chunks[chunks.len() - 1]));
    let (mut rest, mut parts) = (tokens, Vec::new());
    while !rest.is_empty() {
        let (part, after) = rest.split_at(sizes.next().unwrap().min(rest.len()));
        let batch = Batch::single(0, part.len()).unwrap();
        parts.push(session.forward(&batch, part, Logits::All).unwrap());
        rest = after;
    }
    Tensor::cat(&parts, 0).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn logits_equal_those_of_transformers() {
    let mut failed = Vec::new();
    for (case, expected) in cases() {
        let model = open(&case);
        let mut largest = 0f32;
        for chunks in [&[60][..], &[23, 1, 17], &[1]] {
            largest = largest.max(distance(&in_chunks(&model, &case.tokens, chunks), &expected));
        }
        println!("{}: largest difference {largest:e}", case.name);
        if largest.is_nan() || largest > TOLERANCE {
            failed.push((case.name, largest));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// `transformers` expands the latents to keys and values; here queries attend to the latents, which
/// are held once.
#[test]
fn latent_stores_give_the_same_logits() {
    let latent = |layer: &LayerSpec| {
        let store =
            LatentStore::new(layer.shape, |parts| DenseStore::new(parts, candle_core::DType::F32))?;
        LatentCache::new(layer.clone(), store)
    };
    let mut count = 0;
    for (case, expected) in cases() {
        let config = &case.config;
        let Some(rank) = config["kv_lora_rank"].as_u64() else { continue };
        let model = open(&case);
        for chunks in [&[60][..], &[23, 1, 17], &[1]] {
            let session = model.session(latent).unwrap();
            let error = distance(&logits_in_chunks(session, &case.tokens, chunks), &expected);
            assert!(error < TOLERANCE, "{}: {error}", case.name);
        }
        let mut session = model.session(latent).unwrap();
        session.forward(&Batch::single(0, 60).unwrap(), &case.tokens, Logits::Last).unwrap();
        let channels = rank + config["qk_rope_head_dim"].as_u64().unwrap();
        let layers = config["num_hidden_layers"].as_u64().unwrap();
        assert_eq!(session.footprint().payload as u64, 60 * channels * layers * 4);
        count += 1;
    }
    assert_eq!(count, 10);
}

/// A batch of prefixes of a prompt, and one more token for each.
#[test]
fn sequences_of_unequal_length_have_the_logits_of_their_prompts() {
    for (case, expected) in cases() {
        let mut session = open(&case).session(dense).unwrap();
        let lens = [31, 59, 2];
        let prompts: Vec<_> = lens.iter().flat_map(|&len| &case.tokens[..len]).copied().collect();
        let batch = Batch::new(&[(7, lens[0]), (8, lens[1]), (9, lens[2])]).unwrap();
        let rows = |ends: [usize; 3]| {
            let ends = Tensor::new(&ends.map(|end| end as u32 - 1), &Device::Cpu).unwrap();
            expected.index_select(&ends, 0).unwrap()
        };
        let got = session.forward(&batch, &prompts, Logits::Last).unwrap();
        assert!(distance(&got, &rows(lens)) < TOLERANCE, "{}", case.name);
        let batch = Batch::decode(&[9, 8, 7]).unwrap();
        let next = [case.tokens[2], case.tokens[59], case.tokens[31]];
        let got = session.forward(&batch, &next, Logits::Last).unwrap();
        assert!(distance(&got, &rows([3, 60, 32])) < TOLERANCE, "{}", case.name);
    }
}

/// Sequences longer than the length that the frequencies were computed for are refused.
#[test]
fn sequences_beyond_the_length_that_a_scaling_was_made_for_are_refused() {
    let (case, _) = cases().into_iter().find(|(case, _)| case.name == "dynamic-rope-1").unwrap();
    let mut session = open(&case).session(dense).unwrap();
    session.forward(&Batch::single(0, 60).unwrap(), &case.tokens, Logits::Last).unwrap();
    let limit = session
        .model()
        .config()
        .context_length
        .max(case.config["max_position_embeddings"].as_u64().unwrap() as usize);
    let more = vec![1; limit - 60 + 1];
    let batch = Batch::single(0, more.len()).unwrap();
    let message = session.forward(&batch, &more, Logits::Last).unwrap_err().to_string();
    assert!(message.contains(&format!("at most the {limit}")), "{message}");
}
