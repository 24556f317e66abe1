//! Tests recurrent and hybrid models by name, with the small random checkpoints of `hybrid-models`
//! and a tokenizer with the same vocabulary size.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::DType;
use longctx_core::{DenseCache, GenerateOptions, generate};
use longctx_eval::{Question, Sample, Setting, Subject};
use longctx_examples::llm::Llm;
use longctx_examples::place::Place;
use longctx_examples::subject::Models;

const FAMILIES: [&str; 8] =
    ["mamba", "mamba2", "mamba2_groups", "recurrent_gemma", "rwkv4", "rwkv5", "rwkv6", "rwkv7"];

/// Returns a folder with a checkpoint of 96 tokens and a tokenizer of 96 words.
fn folder(family: &str, at: &Path) -> PathBuf {
    let to = at.join(family);
    fs::create_dir(&to).unwrap();
    let fixtures =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/hybrid-models/tests/fixtures");
    for entry in fs::read_dir(fixtures.join(family)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if name != "expected.safetensors" {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
    let words = ["[unk]", "the", "pass", "key", "is", "grass", "sky", "sun", "."].map(String::from);
    let vocab: serde_json::Map<_, _> = words
        .into_iter()
        .chain((9..96).map(|i| i.to_string()))
        .zip((0..).map(Into::into))
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": { "type": "Lowercase" },
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[unk]" },
    });
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    to
}

#[test]
fn every_family_is_opened_by_name_and_writes() {
    let at = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let llm =
            Llm::open(folder(family, at.path()).to_str().unwrap(), &Place::default()).unwrap();
        assert!(matches!(llm, Llm::Recurrent(_)));
        assert_eq!(llm.has_attention(), family == "recurrent_gemma");
        let mut session = llm.session(|spec| DenseCache::new(spec.clone(), DType::F16)).unwrap();
        let prompt = llm.encode("The pass key is 42. The sky is blue.").unwrap();
        let options = GenerateOptions { max_tokens: 5, ..Default::default() };
        let done = generate(session.as_mut(), 0, &prompt, &options, |_| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(done.tokens.len(), 5, "{family}");
        assert!(!llm.decode(&done.tokens).unwrap().is_empty());
        assert!(session.footprint().total() > 0);
    }
}

#[test]
fn every_family_is_a_subject_of_the_evaluation() {
    let at = tempfile::tempdir().unwrap();
    let models = Models::default();
    for family in FAMILIES {
        let folder = folder(family, at.path());
        let setting = Setting::of("recurrent", folder.to_str().unwrap(), 300);
        let mut reader = models.recurrent(&setting).unwrap();
        let answer = |reader: &mut dyn Subject, text: &str| {
            let sample = Sample {
                id: "0".into(),
                turns: vec![text.into()],
                answers: Vec::new(),
                context: None,
                question: None,
                classes: Vec::new(),
                max_new_tokens: 4,
                chat: false,
                ..Sample::default()
            };
            let question = Question {
                sample: &sample,
                max_new_tokens: 4,
                stops_at_newline: false,
                setting: 0,
            };
            reader.answer(&question).unwrap()
        };
        let short = answer(&mut reader, "The pass key is 42. The pass key is");
        let long = answer(&mut reader, &"The sky is blue. ".repeat(50));
        assert_eq!((short.new_tokens, long.new_tokens), (4, 4), "{family}");
        assert!(long.prompt_tokens > 200);
        match family {
            "recurrent_gemma" => assert!(long.kv_bytes > short.kv_bytes),
            _ => assert_eq!(long.kv_bytes, short.kv_bytes),
        }
    }
}

#[test]
fn an_unknown_model_type_is_named() {
    let at = tempfile::tempdir().unwrap();
    let folder = folder("mamba", at.path());
    fs::write(folder.join("config.json"), r#"{ "model_type": "hyena" }"#).unwrap();
    let error = Llm::open(folder.to_str().unwrap(), &Place::default()).err().unwrap().to_string();
    assert!(error.contains("hyena") && error.contains("mamba2"), "{error}");
}
