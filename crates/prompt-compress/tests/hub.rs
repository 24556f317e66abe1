//! Checkpoints by name, from a folder laid out like the Hub's cache.
#![cfg(feature = "hub")]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use candle_core::Device;
use prompt_compress::LlmLingua2;
use prompt_compress::llmlingua2::{Family, Settings};

const NAME: &str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank";
/// Set when the test runs itself: a process cannot change its own environment safely.
const INNER: &str = "LONGCTX_TEST_INSIDE";

#[test]
fn a_name_opens_a_cached_model() {
    if env::var_os(INNER).is_some() {
        return opens_by_name();
    }
    let home = tempfile::tempdir().unwrap();
    let repo = home.path().join("hub").join(format!("models--{}", NAME.replace('/', "--")));
    let (refs, snapshot) = (repo.join("refs"), repo.join("snapshots/0123abc"));
    fs::create_dir_all(&refs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(refs.join("main"), "0123abc").unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny-bert-base-multilingual-cased");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(fixture.join(file), snapshot.join(file)).unwrap();
    }
    let mut inner = Command::new(env::current_exe().unwrap());
    inner.args(["--exact", "a_name_opens_a_cached_model", "--nocapture"]).env(INNER, "1");
    // Nothing listens on this port: files that are not cached cannot be downloaded.
    inner.env("HF_HOME", home.path()).env("HF_ENDPOINT", "http://127.0.0.1:9");
    assert!(inner.status().unwrap().success());
}

fn opens_by_name() {
    let open = |name| LlmLingua2::from_hub(name, Settings::paper(), &Device::Cpu);
    let model = open(NAME).unwrap();
    assert_eq!(model.family(), Family::Bert);
    assert!(model.score(&["One. Two!"]).is_ok());
    let error = open("nobody/nothing").unwrap_err().to_string();
    assert!(error.contains("nobody/nothing/tokenizer.json: not in the Hub's cache"), "{error}");
}
