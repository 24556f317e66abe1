//! Tests of the command's errors and small outputs.

use std::process::{Command, Output, Stdio};

fn longctx(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longctx"));
    command.args(args);
    command
}

fn run(program: &mut Command) -> (bool, String) {
    let Output { status, stdout, stderr } = program.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(!said.contains("panicked"), "{said}");
    (status.success(), said)
}

#[test]
fn a_closed_connection_is_not_an_error() {
    let mut child =
        longctx(&["eval", "list"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn a_run_of_which_every_sample_failed_has_failed() {
    let out = tempfile::tempdir().unwrap();
    let (succeeded, said) = run(longctx(&["eval", "run"])
        .args(["--settings", "dense-f16", "--model", "/nowhere/model.gguf"])
        .args(["--tasks", "recall", "--long-samples", "3", "--out"])
        .arg(out.path()));
    let all = said.contains("3 failed") && said.contains("no result for: opening dense-f16");
    assert!(!succeeded && all, "{said}");
}

#[test]
fn an_unwritable_folder_is_an_error_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    std::fs::write(&text, "word ".repeat(1000)).unwrap();
    let out = text.join("out");
    let model = ["--model", "/nowhere/model.gguf"];
    let calls = [
        &["compare"][..],
        &["eval", "run", "--settings", "dense-f16", "--tasks", "recall"],
        &["eval", "agree", "--settings", "dense-f16", "--text", text.to_str().unwrap()],
    ];
    for arguments in calls {
        let (succeeded, said) = run(longctx(arguments).args(model).arg("--out").arg(&out));
        assert!(!succeeded && said.contains("text/out: can't be written to"), "{said}");
    }
}

#[test]
fn numbers_of_unbounded_length_are_refused() {
    let most = u64::MAX.to_string();
    let calls: [(&[&str], &str); 5] = [
        (&["compare"], "--words"),
        (&["compare"], "--digits"),
        (&["eval", "run", "--settings", "x", "--out", "x"], "--needle-words"),
        (&["eval", "run", "--settings", "x", "--out", "x"], "--items"),
        (&["eval", "agree", "--settings", "x", "--out", "x", "--text", "x"], "--words"),
    ];
    for (arguments, option) in calls {
        let (succeeded, said) = run(longctx(arguments).args([option, &most]));
        assert!(!succeeded && said.contains("expected ") && said.contains(option), "{said}");
    }
}

#[test]
fn a_run_with_other_conditions_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (out, model) = (folder.path().join("out"), folder.path().join("model.gguf"));
    let call = |more: &[&str]| {
        run(longctx(&["eval", "run", "--settings", "dense-f16", "--tasks", "multi-needle"])
            .args([
                "--needle-words",
                "50",
                "--needle-depths",
                "1",
                "--needle-repeats",
                "1",
                "--model",
            ])
            .arg(&model)
            .arg("--out")
            .arg(&out)
            .args(more))
        .1
    };
    let text = folder.path().join("text");
    std::fs::write(&text, "some words ").unwrap();
    std::fs::write(&model, "no model").unwrap();
    assert!(call(&[]).contains("no result for: opening dense-f16"));
    assert!(call(&["--distractors", "5"]).contains("`distractors`: expected 4"));
    assert!(call(&["--prefill-chunk", "64"]).contains("`prefill_chunk`"));
    assert!(call(&["--haystack", text.to_str().unwrap()]).contains("`haystack`"));
    std::fs::write(&model, "another").unwrap();
    assert!(call(&[]).contains("`model "));
}

#[test]
fn plan_needs_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;
    let path = folder.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    let plan = |more: &[&str]| run(longctx(&["plan", "--model"]).arg(&path).args(more));
    let (succeeded, said) =
        plan(&["--memory", "1GB", "--context", "4096", "--settings", "dense-f16,kivi-4,h2o-4x"]);
    assert!(succeeded, "{said}");
    let row = |name: &str| {
        let line = said.lines().find(|line| line.trim_start().starts_with(name)).expect(name);
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    // 4 layers x 2 heads x 64 channels x keys and values x 2 bytes.
    let number = |name, i: usize| row(name)[i].parse::<f64>().unwrap();
    let near = |x: f64, y: f64| (x / y - 1.0).abs() < 0.02;
    assert!(near(number("dense-f16", 1), 2048.0) && number("dense-f16", 2) == 1.0, "{said}");
    assert!(near(number("dense-f16", 3), 1e9 / 2048.0), "{said}");
    assert!(near(number("dense-f16", 4), 1e9 / 2048.0 / 4096.0), "{said}");
    assert!((2.5..4.0).contains(&number("kivi-4", 2)), "{said}");
    // H2O also holds attention sums.
    assert!((3.5..4.0).contains(&number("h2o-4x", 2)), "{said}");
    let (succeeded, said) = plan(&["--memory", "1GB", "--weights", "2GB"]);
    assert!(!succeeded && said.contains("nothing is left"), "{said}");
    assert!(!plan(&["--memory", "much"]).0);
    // Such keys would not fit in this computer's memory.
    std::fs::write(&path, config.replace("\"head_dim\": 64", "\"head_dim\": 1000000000")).unwrap();
    let (succeeded, said) = plan(&["--memory", "1GB"]);
    assert!(!succeeded && said.contains("got 2000000000"), "{said}");
}

#[test]
fn plan_counts_latents_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "deepseek_v3", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}"#;
    let path = folder.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    let (succeeded, said) =
        run(longctx(&["plan", "--memory", "1GB", "--settings", "dense-f16", "--model"]).arg(&path));
    assert!(succeeded, "{said}");
    let line = said.lines().find(|line| line.trim_start().starts_with("dense-f16")).unwrap();
    let bytes: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    // 4 layers x (64 rotated channels and a latent of 512) x 2 bytes.
    assert!((bytes / 4608.0 - 1.0).abs() < 0.02, "{said}");
}

#[test]
fn a_margin_must_be_a_number() {
    let folder = tempfile::tempdir().unwrap();
    for margin in ["nan", "inf", "-1", "x"] {
        let mut command = longctx(&["eval", "run", "--settings", "dense-f16", "--until-sure"]);
        let margin = format!("--margin={margin}");
        let (succeeded, said) = run(command.arg("--out").arg(folder.path()).arg(margin));
        assert!(!succeeded && said.contains("expected a number from 0 to 100"), "{said}");
    }
}

#[test]
fn settings_are_listed_by_group() {
    let (succeeded, said) = run(&mut longctx(&["eval", "list"]));
    assert!(succeeded);
    // The paper's settings are listed before the methods, and their names contain names of methods.
    let (_, methods) = said.split_once("Methods, ").expect("a list of methods");
    let (methods, _) = methods.split_once("Tasks, ").expect("a list of tasks");
    let place = |words: &str| methods.find(words).unwrap_or_else(|| panic!("{words}: {methods}"));
    let order = [
        "Dense: ",
        "  dense-f16",
        "Quantization: ",
        "  kivi-4",
        "Eviction: ",
        "  h2o-2x",
        "Retrieval: ",
        "  infllm-2x",
        "Prompt compression: ",
    ];
    assert!(order.map(place).is_sorted());
    // Every method has a description.
    for line in methods.lines().filter(|line| line.starts_with("  ")) {
        assert!(line.trim_end().len() > 88, "{line}");
    }
}

#[test]
fn the_dense_cache_finds_every_key_and_a_window_does_not() {
    let out = tempfile::tempdir().unwrap();
    let output = longctx(&["compare"])
        .args(["--methods", "streaming-llm-4x,dense-f16", "--words", "100,600", "--depths", "4"])
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let row = |name: &str| said.lines().position(|line| line.starts_with(name)).expect(name);
    assert!(said.contains("8 of 8"), "{said}");
    // The dense method runs first, because the other's ratio needs it.
    assert!(row("dense-f16") < row("streaming-llm-4x"), "{said}");
    let saved = std::fs::read_to_string(out.path().join("compare.json")).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(rows[0]["exact"], 8.0);
    assert!(rows[1]["exact"].as_f64().unwrap() < 8.0, "{saved}");
    assert!(rows[1]["ratio"].as_f64().unwrap() > 1.5, "{saved}");
}
