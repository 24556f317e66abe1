//! All formats of weights; every part of a file is read or refused. `fixtures/make_formats.py` made
//! the expected numbers.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use base_models::{LoadOptions, Pretrained, Tokenizer, Transformer};
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use common::{error_of, fixture, integers, stored, text, texts};
use serde_json::json;

type Tensors = HashMap<String, Tensor>;

fn load(folder: &Path) -> Result<Transformer, String> {
    Transformer::from_folder(folder, &LoadOptions::default()).map_err(|e| e.to_string())
}

fn tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// Copies a fixture's files, so that they can be modified.
fn copy(name: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

fn save(folder: &Path, tensors: &Tensors) {
    candle_core::safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn pytorch_files_and_8_bit_floats_give_the_logits_of_transformers() {
    for name in ["biased", "torch", "torch-sharded", "fp8-tensor", "fp8-channel", "fp8-block"] {
        let folder = fixture("formats").join(name);
        let model = load(&folder).unwrap();
        let error = error_of(&model, &folder);
        println!("{name}: max abs difference {error:e}");
        assert!(error <= 1e-4, "{name}: {error}");
    }
}

#[test]
fn eight_bit_floats_without_scales_are_refused() {
    let folder = copy("formats/fp8-tensor");
    let mut all = tensors(&folder.path().join("model.safetensors"));
    all.remove("model.layers.1.mlp.up_proj.weight_scale").unwrap();
    save(folder.path(), &all);
    let message = load(folder.path()).unwrap_err();
    assert!(
        message.contains("\"model.layers.1.mlp.up_proj.weight\" is of type F8_E4M3"),
        "{message}"
    );

    let wrong = Tensor::ones((3, 5), DType::F32, &Device::Cpu).unwrap();
    all.insert("model.layers.1.mlp.up_proj.weight_scale".into(), wrong);
    save(folder.path(), &all);
    let message = load(folder.path()).unwrap_err();
    assert!(message.contains("[], [40, 1] or [1, 1] scales, got [3, 5]"), "{message}");
}

#[test]
fn other_quantizations_are_refused_by_name() {
    for (method, format, named) in [
        ("gptq", None, "\"gptq\""),
        ("awq", None, "\"awq\""),
        ("bitsandbytes", None, "\"bitsandbytes\""),
        ("compressed-tensors", Some("pack-quantized"), "\"pack-quantized\""),
    ] {
        let folder = copy("llama");
        edit_config(folder.path(), |config| {
            config["quantization_config"] = json!({"quant_method": method, "format": format});
        });
        let message = load(folder.path()).unwrap_err();
        assert!(message.contains("weights quantized by") && message.contains(named), "{message}");
    }
    // Packed weights whose configuration does not say so.
    let folder = copy("llama");
    let mut all = tensors(&folder.path().join("model.safetensors"));
    let weight = all.remove("model.layers.0.self_attn.q_proj.weight").unwrap();
    all.insert("model.layers.0.self_attn.q_proj.qweight".into(), weight);
    save(folder.path(), &all);
    assert!(load(folder.path()).unwrap_err().contains("packed weights (GPTQ, AWQ or similar)"));
    // Integer tensors are not weights.
    let folder = copy("llama");
    let mut all = tensors(&folder.path().join("model.safetensors"));
    let norm = all["model.norm.weight"].to_dtype(DType::U8).unwrap();
    all.insert("model.norm.weight".into(), norm);
    save(folder.path(), &all);
    assert!(load(folder.path()).unwrap_err().contains("\"model.norm.weight\" of type U8"));
}

#[test]
fn unread_tensors_of_a_folder_are_named() {
    let folder = copy("llama");
    let original = tensors(&folder.path().join("model.safetensors"));
    let one = Tensor::ones(48, DType::F32, &Device::Cpu).unwrap();
    let with = |name: &str| {
        let mut all = original.clone();
        all.insert(name.into(), one.clone());
        save(folder.path(), &all);
        load(folder.path())
    };
    let message = with("model.layers.0.self_attn.q_proj.bias").unwrap_err();
    assert!(
        message.contains("does not read: \"model.layers.0.self_attn.q_proj.bias\""),
        "{message}"
    );
    assert!(with("model.layers.2.input_layernorm.weight").is_err());
    assert!(with("model.layers.0.self_attn.rotary_emb.inv_freq").is_ok());
}

#[test]
fn an_output_head_must_equal_tied_embeddings() {
    let folder = copy("llama-3.1");
    let mut all = tensors(&folder.path().join("model.safetensors"));
    let embedding = all["model.embed_tokens.weight"].clone();
    all.insert("lm_head.weight".into(), embedding.clone());
    save(folder.path(), &all);
    load(folder.path()).unwrap();
    all.insert("lm_head.weight".into(), (embedding + 1.0).unwrap());
    save(folder.path(), &all);
    assert!(load(folder.path()).unwrap_err().contains("does not read: \"lm_head.weight\""));
}

#[test]
fn a_valid_file_precedes_a_stale_index() {
    let folder = copy("llama");
    fs::write(
        folder.path().join("model.safetensors.index.json"),
        "{\"weight_map\": {\"a\": \"gone\"}}",
    )
    .unwrap();
    load(folder.path()).unwrap();
}

#[test]
fn sentence_piece_models_give_sentence_pieces_ids() {
    let folder = fixture("formats/sentencepiece");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let cases = fs::read_to_string(folder.join("expected.json")).unwrap();
    for case in serde_json::from_str::<Vec<serde_json::Value>>(&cases).unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), [&[1], ids.as_slice()].concat());
    }
    // Files as transformers writes them, for comparison.
    let other = tempfile::tempdir().unwrap();
    fs::copy(folder.join("tokenizer.model"), other.path().join("tokenizer.model")).unwrap();
    let config = json!({
        "add_bos_token": false,
        "add_eos_token": true,
        "added_tokens_decoder": {"420": {"content": "<more>", "special": true, "normalized": false,
            "lstrip": false, "rstrip": false, "single_word": false}},
    });
    fs::write(other.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let with_more = Tokenizer::from_folder(other.path()).unwrap();
    let ids = with_more.encode("<more>", true).unwrap();
    assert_eq!(ids, [420, 2]);
    let wrong = config.to_string().replace("420", "500");
    fs::write(other.path().join("tokenizer_config.json"), wrong).unwrap();
    let message = Tokenizer::from_folder(other.path()).unwrap_err().to_string();
    assert!(message.contains("\"<more>\" has the id 500, where 420 is free"), "{message}");
}

#[test]
fn sentence_piece_models_other_than_bpe_are_refused() {
    let message = Tokenizer::from_folder(&fixture("formats/unigram")).unwrap_err().to_string();
    assert!(message.contains("a SentencePiece model that is not of type BPE"), "{message}");
}

/// A fixture folder converted to a GGUF file of the architecture llama, with additional metadata.
struct Converted {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Tensor)>,
}

/// Reorders the rows of a projection with heads of `d` channels as llama.cpp does.
fn interleave(tensor: &Tensor, d: usize) -> Tensor {
    let rows = tensor.dim(0).unwrap();
    let order: Vec<u32> =
        (0..rows).map(|row| (row / d * d + row % d / 2 + row % 2 * (d / 2)) as u32).collect();
    tensor.index_select(&Tensor::new(order, &Device::Cpu).unwrap(), 0).unwrap()
}

impl Converted {
    fn new(name: &str) -> Self {
        let folder = fixture(name);
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        let number = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
        let d = config["hidden_size"].as_u64().unwrap()
            / config["num_attention_heads"].as_u64().unwrap();
        let vocab = config["vocab_size"].as_u64().unwrap();
        let tokens: Vec<_> = (0..vocab).map(|i| format!("t{i}")).collect();
        let metadata = [
            ("general.architecture", text("llama")),
            ("llama.block_count", number("num_hidden_layers")),
            ("llama.context_length", number("max_position_embeddings")),
            ("llama.embedding_length", number("hidden_size")),
            ("llama.feed_forward_length", number("intermediate_size")),
            ("llama.attention.head_count", number("num_attention_heads")),
            ("llama.attention.head_count_kv", number("num_key_value_heads")),
            (
                "llama.attention.layer_norm_rms_epsilon",
                Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32),
            ),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("gpt-2")),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.token_type", integers(&vec![1; tokens.len()])),
            ("tokenizer.ggml.merges", Value::Array(Vec::new())),
        ];
        let names = [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("model.layers", "blk"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ];
        let convert = |(name, tensor): (&String, &Tensor)| {
            let interleaved = name.contains("q_proj") || name.contains("k_proj");
            let tensor = if interleaved { interleave(tensor, d as usize) } else { tensor.clone() };
            let name = names.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
            (name, tensor)
        };
        let weights = folder.join("model.safetensors");
        Self {
            metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            tensors: tensors(&weights).iter().map(convert).collect(),
        }
    }

    fn with(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    fn write(&self, folder: &Path) -> std::path::PathBuf {
        let tensors: Vec<(&str, QTensor)> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), stored(tensor))).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        common::write(folder, &metadata, &tensors)
    }

    fn open(&self) -> Result<Transformer, String> {
        let folder = tempfile::tempdir().unwrap();
        let llm = Pretrained::from_gguf(&self.write(folder.path()), &LoadOptions::default());
        llm.map(|llm| llm.model).map_err(|e| e.to_string())
    }
}

#[test]
fn gguf_gives_the_logits_of_transformers() {
    assert!(error_of(&Converted::new("llama").open().unwrap(), &fixture("llama")) < 1e-4);
}

#[test]
fn gguf_end_tokens_are_those_that_the_file_names_and_those_of_known_names() {
    let mut converted = Converted::new("llama")
        .with("tokenizer.ggml.eos_token_id", Value::U32(2))
        .with("tokenizer.ggml.eot_token_id", Value::U32(9));
    let tokens = converted.metadata.iter_mut().find(|(key, _)| key.ends_with(".tokens"));
    let Some((_, Value::Array(tokens))) = tokens else { panic!("no tokens") };
    tokens[5] = text("<|im_end|>");
    tokens[7] = text("<|eot_id|>");
    tokens[2] = text("<|endoftext|>");
    assert_eq!(converted.open().unwrap().config().eos, [2, 9, 5, 7]);
}

#[test]
fn gguf_biases_are_read() {
    let model = Converted::new("formats/biased").open().unwrap();
    assert!(error_of(&model, &fixture("formats/biased")) < 1e-4);
}

#[test]
fn gguf_rope_factors_are_read_under_each_of_their_names() {
    let factor = |key: &str| Converted::new("llama-linear").with(key, Value::F32(4.0));
    for converted in [
        factor("llama.rope.scale_linear"),
        factor("llama.rope.scaling.factor"),
        factor("llama.rope.scaling.factor").with("llama.rope.scaling.type", text("linear")),
    ] {
        assert!(error_of(&converted.open().unwrap(), &fixture("llama-linear")) < 1e-4);
    }
    // "none" disables the factor.
    let none = Converted::new("llama")
        .with("llama.rope.scaling.factor", Value::F32(4.0))
        .with("llama.rope.scaling.type", text("none"));
    assert!(error_of(&none.open().unwrap(), &fixture("llama")) < 1e-4);
    let axial = Converted::new("llama").with("llama.rope.scaling.type", text("axial"));
    assert!(axial.open().unwrap_err().contains("rope scaling \"axial\""));
}

#[test]
fn gguf_settings_that_are_not_read_are_refused() {
    for (key, value) in [
        ("logit_scale", Value::F32(0.5)),
        ("attention.scale", Value::F32(0.1)),
        ("attention.clamp_kqv", Value::F32(8.0)),
        ("attention.causal", Value::Bool(false)),
        ("final_logit_softcapping", Value::F32(30.0)),
        ("rope.dimension_count", Value::U32(4)),
        ("attention.value_length", Value::U32(4)),
        ("rope.scaling.attn_factor", Value::F32(2.0)),
    ] {
        let message =
            Converted::new("llama").with(&format!("llama.{key}"), value).open().unwrap_err();
        assert!(message.contains(&format!("llama.{key}")), "{message}");
    }
    // Settings with the neutral value, or of unknown meaning, are accepted.
    let without_effect = Converted::new("llama")
        .with("llama.expert_count", Value::U32(0))
        .with("llama.logit_scale", Value::F32(1.0))
        .with("llama.color", text("blue"));
    without_effect.open().unwrap();
}

#[test]
fn unread_gguf_tensors_are_named() {
    let mut converted = Converted::new("llama");
    let one = Tensor::ones(48, DType::F32, &Device::Cpu).unwrap();
    converted.tensors.push(("blk.1.attn_sub_norm.weight".into(), one.clone()));
    assert!(
        converted.open().unwrap_err().contains("does not read: \"blk.1.attn_sub_norm.weight\"")
    );
    converted.tensors.pop();
    converted.tensors.push(("blk.0.attn_rot_embd".into(), one));
    converted.open().unwrap();
}

#[test]
fn split_gguf_files_are_read_from_the_first_part() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Converted::new("llama");
    let half = whole.tensors.len() / 2;
    let count = whole.tensors.len() as i32;
    let split = |no: u16, metadata: &[(String, Value)], tensors: &[(String, Tensor)]| {
        let part = Converted { metadata: metadata.to_vec(), tensors: tensors.to_vec() }
            .with("split.no", Value::U16(no))
            .with("split.count", Value::U16(2))
            .with("split.tensors.count", Value::I32(count));
        let path = part.write(folder.path());
        let to = folder.path().join(format!("tiny-{:05}-of-00002.gguf", no + 1));
        fs::rename(path, &to).unwrap();
        to
    };
    let first = split(0, &whole.metadata, &whole.tensors[..half]);
    let open = |path: &Path| Pretrained::from_gguf(path, &LoadOptions::default());
    let message = open(&first).unwrap_err().to_string();
    assert!(message.contains("tiny-00002-of-00002.gguf"), "{message}");
    let second = split(1, &[], &whole.tensors[half..]);
    assert!(error_of(&open(&first).unwrap().model, &fixture("llama")) < 1e-4);
    assert!(
        open(&second).unwrap_err().to_string().contains("this is part 2 of 2; name the first part")
    );
    split(1, &[], &whole.tensors[half + 1..]);
    let message = open(&first).unwrap_err().to_string();
    assert!(message.contains(&format!("hold {} tensors, not {count}", count - 1)), "{message}");
}

/// Every type of ggml's list: its number, its name, and whether products are supported.
const TYPES: [(u32, &str, bool); 37] = [
    (0, "F32", true),
    (1, "F16", true),
    (2, "Q4_0", true),
    (3, "Q4_1", true),
    (6, "Q5_0", true),
    (7, "Q5_1", true),
    (8, "Q8_0", true),
    (9, "Q8_1", false),
    (10, "Q2_K", true),
    (11, "Q3_K", true),
    (12, "Q4_K", true),
    (13, "Q5_K", true),
    (14, "Q6_K", true),
    (15, "Q8_K", false),
    (16, "IQ2_XXS", false),
    (17, "IQ2_XS", false),
    (18, "IQ3_XXS", false),
    (19, "IQ1_S", false),
    (20, "IQ4_NL", false),
    (21, "IQ3_S", false),
    (22, "IQ2_S", false),
    (23, "IQ4_XS", false),
    (24, "I8", false),
    (25, "I16", false),
    (26, "I32", false),
    (27, "I64", false),
    (28, "F64", false),
    (29, "IQ1_M", false),
    (30, "BF16", true),
    (34, "TQ1_0", false),
    (35, "TQ2_0", false),
    (39, "MXFP4", false),
    (40, "NVFP4", false),
    (41, "Q1_0", false),
    (42, "Q2_0", false),
    (4, "Q4_2", false),
    (99, "unknown", false),
];

#[test]
fn every_gguf_type_is_read_or_refused_with_the_tensors_and_its_own_name() {
    let folder = tempfile::tempdir().unwrap();
    for (id, name, readable) in TYPES {
        let mut file = Vec::new();
        file.extend(*b"GGUF");
        file.extend(3u32.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(9u64.to_le_bytes());
        file.extend(*b"my.weight");
        file.extend(1u32.to_le_bytes());
        file.extend(256u64.to_le_bytes());
        file.extend(id.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend([0; 4096]);
        let path = folder.path().join("model.gguf");
        fs::write(&path, file).unwrap();
        let message = Tokenizer::from_gguf(&path).unwrap_err().to_string();
        // A readable type passes the header check; the missing tokenizer is the next error.
        let refused = message.contains(&format!("tensor \"my.weight\" is of type {name}"));
        assert_eq!(refused, !readable, "{name}: {message}");
        assert_eq!(message.contains("tokenizer.ggml.model"), readable, "{name}: {message}");
    }
}
