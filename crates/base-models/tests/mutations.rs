//! The fuzz targets without a fuzzer: randomly modified files of the fixtures.
//!
//!     LONGCTX_MUTATIONS=100000 cargo test -p base-models --release --test mutations -- \
//!         --include-ignored --nocapture

mod common;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::fs;
use std::time::{Duration, Instant};

use common::fixture;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Number of inputs per test unless LONGCTX_MUTATIONS is set.
const FEW: usize = 300;

/// Returns a copy with some bytes changed, ranges removed, duplicated or taken from another input,
/// or numbers replaced by extreme ones.
fn mutated(rng: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds.choose(rng).expect("a seed").clone();
    for _ in 0..rng.random_range(1..6) {
        if data.is_empty() {
            break;
        }
        // Most important data are at the beginning.
        let end = if rng.random_bool(0.7) { data.len().min(1500) } else { data.len() };
        let at = rng.random_range(0..end);
        let length = rng.random_range(1..=(data.len() - at).min(64));
        match rng.random_range(0..8) {
            0 => data[at] = rng.random(),
            1 => data[at] ^= 1 << rng.random_range(0..8),
            2 => drop(data.drain(at..at + length)),
            3 => {
                let part = data[at..at + length].to_vec();
                data.splice(at..at, part);
            }
            4 => data.truncate(at),
            5 => {
                let extreme: u64 =
                    *[0, 1, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 62, u64::MAX, 1 << 31]
                        .choose(rng)
                        .expect("one");
                let bytes = extreme.to_le_bytes();
                let width = *[1, 2, 4, 8].choose(rng).expect("one");
                let width = width.min(data.len() - at);
                data[at..at + width].copy_from_slice(&bytes[..width]);
            }
            6 => {
                let other = seeds.choose(rng).expect("a seed");
                let from = rng.random_range(0..other.len());
                let part = &other[from..(from + length).min(other.len())];
                data.splice(at..at, part.iter().copied());
            }
            _ => {
                let digits =
                    *["-1", "0", "1e9", "99999999999", "null", "[]", "{}", "\"x\"", "1.5", "true"]
                        .choose(rng)
                        .expect("one");
                data.splice(at..(at + 1).min(data.len()), digits.bytes());
            }
        }
    }
    data
}

type Target = fn(&[u8]);

fn run(name: &str, seeds: &[Vec<u8>], target: Target) {
    let count = std::env::var("LONGCTX_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(FEW);
    let seed =
        std::env::var("LONGCTX_MUTATION_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut slowest = Duration::ZERO;
    // After an abort, the input that caused it is left here.
    let last = std::env::temp_dir().join(format!("{name}-{seed}"));
    for i in 0..count {
        let data = mutated(&mut rng, seeds);
        fs::write(&last, &data).unwrap();
        let start = Instant::now();
        let caught = std::panic::catch_unwind(|| target(&data));
        slowest = slowest.max(start.elapsed());
        if caught.is_err() || start.elapsed() > Duration::from_secs(10) {
            panic!("{name}, input {i}: {}, {:?}", last.display(), start.elapsed());
        }
    }
    fs::remove_file(last).unwrap();
    println!("{name}: {count} inputs, the slowest took {slowest:?}");
}

fn read(name: &str) -> Vec<u8> {
    fs::read(fixture(name)).unwrap()
}

/// Returns a GGUF file with a tokenizer of each kind and, in the first, some weights.
fn gguf_files() -> Vec<Vec<u8>> {
    use candle_core::quantized::gguf_file::Value;
    use candle_core::{DType, Device, Tensor};
    use common::{floats, integers, stored, text, texts};
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<_> =
        (0..256).map(|b| format!("<0x{b:02X}>")).chain(["<s>".into(), "a".into()]).collect();
    let kinds = [vec![6; 256], vec![3, 1]].concat();
    let number = Value::U32;
    let metadata = vec![
        ("general.architecture", text("llama")),
        ("general.alignment", number(32)),
        ("llama.block_count", number(1)),
        ("llama.context_length", number(64)),
        ("llama.embedding_length", number(8)),
        ("llama.feed_forward_length", number(8)),
        ("llama.attention.head_count", number(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(1e4)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.scores", floats(&vec![0.0; tokens.len()])),
        ("tokenizer.ggml.token_type", integers(&kinds)),
        ("tokenizer.ggml.bos_token_id", number(256)),
        ("tokenizer.chat_template", text("{{ messages[0].content }}")),
    ];
    let tensor = |dims: &[usize]| stored(&Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap());
    let square = || tensor(&[8, 8]);
    let named = [
        ("token_embd.weight", tensor(&[258, 8])),
        ("output_norm.weight", tensor(&[8])),
        ("blk.0.attn_norm.weight", tensor(&[8])),
        ("blk.0.ffn_norm.weight", tensor(&[8])),
        ("blk.0.attn_q.weight", square()),
        ("blk.0.attn_k.weight", square()),
        ("blk.0.attn_v.weight", square()),
        ("blk.0.attn_output.weight", square()),
        ("blk.0.ffn_gate.weight", square()),
        ("blk.0.ffn_up.weight", square()),
        ("blk.0.ffn_down.weight", square()),
    ];
    let tensors: Vec<_> = named.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let path = common::write(folder.path(), &metadata, &tensors);
    let options = base_models::LoadOptions::default();
    base_models::Pretrained::from_gguf(&path, &options)
        .expect("a file that opens before it is changed");
    let whole = fs::read(path).unwrap();
    let bytes = vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("llama-bpe")),
        ("tokenizer.ggml.tokens", texts(&["H", "i", "Hi", "Ġ", "<s>", "Ã", "¯"])),
        ("tokenizer.ggml.token_type", integers(&[1, 1, 1, 1, 3, 1, 1])),
        ("tokenizer.ggml.merges", texts(&["H i"])),
        ("tokenizer.ggml.bos_token_id", number(4)),
    ];
    let bytes = fs::read(common::write(folder.path(), &bytes, &[])).unwrap();
    let mut seeds = vec![whole, bytes];
    for (case, _) in common::cases::cases() {
        let Some(gguf) = &case.gguf else { continue };
        let folder = tempfile::tempdir().unwrap();
        seeds.push(fs::read(common::cases::write_gguf(&case, gguf, folder.path())).unwrap());
    }
    seeds
}

/// Runs the files named by LONGCTX_REPLAY_TEMPLATE and similar variables: inputs of an earlier run.
#[test]
fn replay() {
    let targets: [(&str, Target); 5] = [
        ("GGUF", fuzz::gguf),
        ("SAFETENSORS", fuzz::safetensors),
        ("TORCH", fuzz::torch),
        ("TOKENIZER", fuzz::tokenizer),
        ("TEMPLATE", fuzz::template),
    ];
    for (name, target) in targets {
        if let Some(path) = std::env::var_os(format!("LONGCTX_REPLAY_{name}")) {
            let start = Instant::now();
            target(&fs::read(path).unwrap());
            println!("{name}: {:?}", start.elapsed());
        }
    }
}

#[test]
fn gguf() {
    run("gguf", &gguf_files(), fuzz::gguf);
}

#[test]
fn safetensors() {
    let join = |name: &str| {
        let config = read(&format!("formats/{name}/config.json"));
        [config, vec![0], read(&format!("formats/{name}/model.safetensors"))].concat()
    };
    let mut seeds = ["biased", "fp8-tensor", "fp8-block"].map(join).to_vec();
    for (case, _) in common::cases::cases() {
        let folder = tempfile::tempdir().unwrap();
        common::cases::write(&case, folder.path());
        let read = |name| fs::read(folder.path().join(name)).unwrap();
        seeds.push([read("config.json"), vec![0], read("model.safetensors")].concat());
    }
    run("safetensors", &seeds, fuzz::safetensors);
}

#[test]
fn torch() {
    let whole = read("formats/torch/pytorch_model.bin");
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&whole)).unwrap();
    let name = archive
        .file_names()
        .flatten()
        .find(|name| name.ends_with("data.pkl"))
        .unwrap()
        .into_owned();
    let mut pickle = Vec::new();
    std::io::Read::read_to_end(&mut archive.by_name(&name).unwrap(), &mut pickle).unwrap();
    pickle.extend([0; 5000]);
    run("torch", &[whole, pickle], fuzz::torch);
}

#[test]
fn tokenizer() {
    let json = r#"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}], "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "_"}]}, "pre_tokenizer": {"type": "Sequence", "pretokenizers":
        [{"type": "Split", "pattern": {"Regex": "(?i:'s)|\\p{N}{1,3}|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}, "post_processor": {"type":
        "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}, "model": {"type": "BPE", "dropout": null,
        "unk_token": "<s>", "fuse_unk": true, "byte_fallback": false, "ignore_merges": true, "vocab": {"<s>": 0, "H": 1, "i": 2,
        "Hi": 3}, "merges": ["H i"]}}"#;
    let model = read("formats/sentencepiece/tokenizer.model");
    run("tokenizer", &[json.into(), model], fuzz::tokenizer);
}

#[test]
fn template() {
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&read("chat.json")).unwrap();
    let mut templates: Vec<_> =
        cases.iter().map(|c| c["template"].as_str().unwrap().as_bytes().to_vec()).collect();
    templates.dedup();
    run("template", &templates, fuzz::template);
}
