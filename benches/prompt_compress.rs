//! Measures LLMLingua-2 with a random encoder of XLM-RoBERTa-base's shape (12 layers, 768 channels)
//! on a text of 10,000 words.
//!
//!     cargo bench -p longctx-benches --bench prompt_compress
//!
//! `python benches/prompt_compress.py FOLDER` times llmlingua 0.2.2 with PyTorch on the same files,
//! which this benchmark writes to the folder for temporary files. The vocabulary is the small one
//! of the crate's tests; it has about as many tokens per word as the real one.

use std::collections::HashMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, SamplingMode};
use longctx_core::Rate;
use longctx_examples::peak_memory;
use prompt_compress::LlmLingua2;
use prompt_compress::llmlingua2::{Request, Settings};

const HIDDEN: usize = 768;
const INNER: usize = 3072;
const LAYERS: usize = 12;
const WORDS: usize = 10_000;

fn main() -> Result<()> {
    let folder = checkpoint()?;
    let model = LlmLingua2::from_folder(&folder, Settings::paper(), &Device::Cpu)?;
    let text = text(WORDS);
    std::fs::write(folder.join("text.txt"), &text)?;
    let request = Request::rate(Rate::new(0.25)?);
    // A quarter of the text fills a batch; the whole text must not need more memory.
    for part in [&text[..text.len() / 4], &text] {
        let got = model.score(&[part])?.compress(&request)?;
        let (before, after) = (got.original_tokens, got.compressed_tokens);
        let peak = peak_memory::peak().unwrap_or(0) / (1 << 20);
        println!("{before} tokens to {after}, peak resident memory so far {peak} MiB");
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("llmlingua2");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_secs(60));
    group.bench_function("xlm-roberta-base/10000 words", |bench| {
        bench.iter(|| model.score(&[black_box(&text)])?.compress(&request));
    });
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// Returns words of one or two tokens each, with a full stop after every eleventh word.
fn text(words: usize) -> String {
    const CHOICE: [&str; 20] = [
        "time",
        "year",
        "day",
        "life",
        "problem",
        "hand",
        "public",
        "human",
        "community",
        "information",
        "control",
        "second",
        "official",
        "sequence",
        "way",
        "man",
        "world",
        "child",
        "group",
        "country",
    ];
    let mut seed = 1u64;
    let word = |i: usize| {
        seed = (seed * 1_103_515_245 + 12_345) % (1 << 31);
        let word = CHOICE[(seed >> 16) as usize % CHOICE.len()];
        if i % 11 == 10 { format!("{word}.") } else { word.to_owned() }
    };
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

/// Writes the checkpoint and returns its folder. llmlingua reads the model family from the folder's
/// name.
fn checkpoint() -> Result<PathBuf> {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../crates/prompt-compress/tests/fixtures/tiny-xlm-roberta-large");
    let folder = std::env::temp_dir().join("longctx-xlm-roberta-large-of-base-shape");
    std::fs::create_dir_all(&folder)?;
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(tiny.join(file), folder.join(file))?;
    }
    let config = std::fs::read_to_string(tiny.join("config.json"))?;
    let mut config: serde_json::Value = serde_json::from_str(&config)?;
    let sizes = [
        ("hidden_size", HIDDEN),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", HIDDEN / 64),
        ("intermediate_size", INNER),
    ];
    for (name, size) in sizes {
        config[name] = size.into();
    }
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let vocab = config["vocab_size"].as_u64().unwrap_or_default() as usize;
    // transformers requires this metadata entry.
    let info = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(weights(vocab)?, Some(info), &path)?;
    Ok(folder)
}

fn weights(vocab: usize) -> Result<HashMap<String, Tensor>> {
    let mut all = HashMap::new();
    let mut add = |name: &str, shape: &[usize], spread: f32| -> Result<()> {
        all.insert(format!("roberta.{name}"), Tensor::randn(0f32, spread, shape, &Device::Cpu)?);
        Ok(())
    };
    add("embeddings.word_embeddings.weight", &[vocab, HIDDEN], 1.0)?;
    add("embeddings.position_embeddings.weight", &[514, HIDDEN], 1.0)?;
    add("embeddings.token_type_embeddings.weight", &[1, HIDDEN], 1.0)?;
    for layer in 0..LAYERS {
        let parts = [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", INNER, HIDDEN),
            ("output.dense", HIDDEN, INNER),
        ];
        for (part, out, inner) in parts {
            let name = format!("encoder.layer.{layer}.{part}");
            add(&format!("{name}.weight"), &[out, inner], (inner as f32).powf(-0.5))?;
            add(&format!("{name}.bias"), &[out], 0.1)?;
        }
    }
    let ones = Tensor::ones(HIDDEN, DType::F32, &Device::Cpu)?;
    let zeros = ones.zeros_like()?;
    let mut norm = |name: &str| {
        all.insert(format!("roberta.{name}.LayerNorm.weight"), ones.clone());
        all.insert(format!("roberta.{name}.LayerNorm.bias"), zeros.clone());
    };
    norm("embeddings");
    for layer in 0..LAYERS {
        norm(&format!("encoder.layer.{layer}.attention.output"));
        norm(&format!("encoder.layer.{layer}.output"));
    }
    let head = Tensor::randn(0f32, 0.05, (2, HIDDEN), &Device::Cpu)?;
    all.insert("classifier.weight".into(), head);
    all.insert("classifier.bias".into(), Tensor::zeros(2, DType::F32, &Device::Cpu)?);
    Ok(all)
}
