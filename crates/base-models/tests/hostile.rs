//! Malicious files: no panic, no allocation beyond a multiple of the file's size, no endless loop,
//! and no file read outside of the folder.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use base_models::{LoadOptions, Pretrained, Tokenizer, Transformer};
use common::fixture;

fn copy(name: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

/// Returns the error message of loading a folder, within a time limit.
fn message(folder: &Path) -> String {
    let (send, receive) = mpsc::channel();
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        let done = Transformer::from_folder(&folder, &LoadOptions::default());
        send.send(done.map(|_| ()).map_err(|e| e.to_string()))
    });
    receive.recv_timeout(Duration::from_secs(10)).expect("an answer").unwrap_err()
}

fn edit_config(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn an_index_names_only_files_of_its_own_folder() {
    let secret = copy("llama");
    for (single, index) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ] {
        for name in [
            format!(
                "../{}/model.safetensors",
                secret.path().file_name().unwrap().to_str().unwrap()
            ),
            secret.path().join("model.safetensors").to_str().unwrap().to_owned(),
            "a/../../b".into(),
            "..".into(),
            ".".into(),
            String::new(),
        ] {
            let folder = copy("llama");
            let _ = fs::remove_file(folder.path().join("model.safetensors"));
            let _ = fs::remove_file(folder.path().join(single));
            let map = serde_json::json!({"weight_map": {"model.norm.weight": name}});
            fs::write(folder.path().join(index), map.to_string()).unwrap();
            let message = message(folder.path());
            assert!(message.contains("is not in the same folder"), "{message}");
        }
    }
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_not_opened() {
    for file in ["model.safetensors", "config.json", "generation_config.json"] {
        let folder = copy("llama");
        let path = folder.path().join(file);
        let _ = fs::remove_file(&path);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(message(folder.path()).contains("no regular file"), "{file}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let open =
        |path: &Path| Pretrained::from_gguf(path, &LoadOptions::default()).unwrap_err().to_string();
    assert!(open(&path).contains("no regular file"));
    assert!(open(Path::new("/dev/zero")).contains("no regular file"));
}

#[test]
fn numbers_that_no_model_has_are_refused() {
    for (from, to, named) in [
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000", "num_hidden_layers"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 0", "num_hidden_layers"),
        ("\"num_attention_heads\": 6", "\"num_attention_heads\": 0", "num_attention_heads"),
        ("\"hidden_size\": 48", "\"hidden_size\": 18446744073709551615", "hidden_size"),
        ("\"vocab_size\": 96", "\"vocab_size\": -96", "vocab_size"),
        ("\"intermediate_size\": 80", "\"intermediate_size\": 1e15", "intermediate_size"),
        ("\"head_dim\": 8", "\"head_dim\": 7", "head_dim"),
        ("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1", "rms_norm_eps"),
    ] {
        let folder = copy("llama");
        edit_config(folder.path(), from, to);
        let message = message(folder.path());
        assert!(message.contains(named), "{to}: {message}");
    }
}

/// Returns the bytes of a GGUF file: keys with their encoded values, and tensors.
fn gguf(
    keys: &[(&str, u32, Vec<u8>)],
    tensors: &[(&str, &[u64], u32, u64)],
    data: usize,
) -> Vec<u8> {
    let mut file = Vec::new();
    let string = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.bytes());
    };
    file.extend(*b"GGUF");
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((keys.len() as u64).to_le_bytes());
    for (key, kind, value) in keys {
        string(&mut file, key);
        file.extend(kind.to_le_bytes());
        file.extend(value);
    }
    for (name, dims, kind, offset) in tensors {
        string(&mut file, name);
        file.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend(offset.to_le_bytes());
    }
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

fn refused(file: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file).unwrap();
    Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap_err().to_string()
}

fn text_value(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn inconsistent_gguf_headers_are_refused() {
    let u32_value = |n: u32| n.to_le_bytes().to_vec();
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let alignment =
        |n| refused(&gguf(&[("general.alignment", 4, u32_value(n))], &[("a", &[32], 0, 0)], 128));
    assert!(alignment(0).contains("general.alignment"));
    assert!(alignment(48).contains("no power of two"));
    let shape = |dims: &[u64]| refused(&gguf(&[], &[("a.weight", dims, 0, 0)], 128));
    assert!(shape(&[1 << 32, 1 << 32]).contains("tensor \"a.weight\""));
    assert!(shape(&[u64::MAX, 2]).contains("tensor \"a.weight\""));
    assert!(shape(&[0, 4]).contains("tensor \"a.weight\""));
    assert!(shape(&[]).contains("0 dimensions"));
    assert!(shape(&[1, 1, 1, 1, 1]).contains("5 dimensions"));
    assert!(shape(&[1 << 20]).contains("truncated: tensor \"a.weight\""));
    assert!(refused(&gguf(&[], &[("a", &[32], 0, u64::MAX)], 128)).contains("truncated"));
    assert!(
        refused(&gguf(&[], &[("a", &[31], 2, 0)], 128))
            .contains("of type Q4_0 can't have the shape")
    );
    for kind in [0, 4, 6, 8, 9, 12] {
        let file = gguf(&[("a", 9, array(kind, 1 << 60))], &[], 0);
        let message = refused(&file);
        assert!(message.contains("truncated") || message.contains("type"), "{message}");
    }
    assert!(
        refused(&gguf(&[("a", 8, (1u64 << 60).to_le_bytes().to_vec())], &[], 0))
            .contains("truncated")
    );
    let deep: Vec<u8> = (0..100_000).flat_map(|_| array(9, 1)).collect();
    assert!(refused(&gguf(&[("a", 9, deep)], &[], 0)).contains("value of type 9"));
    assert!(refused(&gguf(&[("a", 99, vec![])], &[], 0)).contains("value of type 99"));
    let twice = [("a", 4, u32_value(1)), ("a", 4, u32_value(2))];
    assert!(refused(&gguf(&twice, &[], 0)).contains("metadata \"a\" is there twice"));
    let tensors: [(&str, &[u64], u32, u64); 2] = [("a", &[8], 0, 0), ("a", &[8], 0, 0)];
    assert!(refused(&gguf(&[], &tensors, 128)).contains("tensor \"a\" is there twice"));
}

#[test]
fn gguf_settings_that_no_model_has_are_refused() {
    let number = |n: u64| n.to_le_bytes().to_vec();
    let keys = |layers: u64, heads: u64| {
        vec![
            ("general.architecture", 8, text_value("llama")),
            ("llama.block_count", 10, number(layers)),
            ("llama.context_length", 10, number(64)),
            ("llama.embedding_length", 10, number(32)),
            ("llama.feed_forward_length", 10, number(32)),
            ("llama.attention.head_count", 10, number(heads)),
            ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec()),
            ("tokenizer.ggml.model", 8, text_value("gpt2")),
        ]
    };
    let tensors: [(&str, &[u64], u32, u64); 1] = [("token_embd.weight", &[32, 1], 0, 0)];
    let layers = refused(&gguf(&keys(1 << 62, 4), &tensors, 128));
    assert!(
        layers.contains("num_hidden_layers") && layers.contains("4611686018427387904"),
        "{layers}"
    );
    assert!(refused(&gguf(&keys(1, 0), &tensors, 128)).contains("num_attention_heads"));
    assert!(refused(&gguf(&keys(1, 1 << 40), &tensors, 128)).contains("num_attention_heads"));
}

/// Writes a `.bin` file with a pickle and one storage of eight bytes.
fn bin(pickle: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama/config.json"), folder.path().join("config.json")).unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let mut archive = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 8])] {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
    folder
}

/// Returns a pickle of `{"model.norm.weight": function(arguments)}`, where `arguments` are the
/// operations that push the function's arguments.
fn entry(function: &str, arguments: &[u8]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}X\x11\x00\x00\x00model.norm.weight".to_vec();
    let (module, name) = function.rsplit_once('.').unwrap();
    pickle.extend(format!("c{module}\n{name}\n").bytes());
    pickle.extend(arguments);
    pickle.extend(b"Rs.");
    pickle
}

/// Returns the arguments of a tensor: a storage with a declared size of `count` elements, an
/// offset, a shape and strides.
fn tensor(count: u32, offset: u32, dims: &[u32], strides: &[u32]) -> Vec<u8> {
    let int = |n: &u32| [&b"\x8a\x05"[..], &n.to_le_bytes(), &[0]].concat();
    let tuple =
        |list: &[u32]| [&b"("[..], &list.iter().flat_map(int).collect::<Vec<_>>(), b"t"].concat();
    [
        &b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            [..],
        &int(&count),
        b"tQ",
        &int(&offset),
        &tuple(dims),
        &tuple(strides),
        b"\x89}t",
    ]
    .concat()
}

#[test]
fn inconsistent_pickles_are_refused() {
    let rebuild = "torch._utils._rebuild_tensor_v2";
    let refused = |pickle: &[u8]| message(bin(pickle).path());
    // A valid one is accepted; the error is about the other tensors.
    let good = entry(rebuild, &tensor(2, 0, &[2], &[1]));
    assert!(refused(&good).contains("there is no tensor \"model.embed_tokens.weight\""));
    let huge = refused(&entry(rebuild, &tensor(u32::MAX, 0, &[u32::MAX], &[1])));
    assert!(huge.contains("[4294967295] of stride [1] from 0, of 2 numbers"), "{huge}");
    assert!(
        refused(&entry(rebuild, &tensor(2, 1, &[2], &[1])))
            .contains("[2] of stride [1] from 1, of 2 numbers")
    );
    assert!(
        refused(&entry(rebuild, &tensor(2, 0, &[u32::MAX; 3], &[1; 3])))
            .contains("tensor \"model.norm.weight\"")
    );
    assert!(
        refused(&entry(rebuild, &tensor(2, 0, &[2, 1], &[1, 2, 3])))
            .contains("tensor \"model.norm.weight\"")
    );
    assert!(refused(&entry(rebuild, b")")).contains("got 0 values"));
    assert!(
        refused(&entry("torch._utils._rebuild_parameter", b")"))
            .contains("tensor \"model.norm.weight\"")
    );
    assert!(
        refused(&entry("torch._tensor._rebuild_from_type_v2", b")"))
            .contains("tensor \"model.norm.weight\"")
    );
    assert!(refused(&entry("os.system", b"(X\x02\x00\x00\x00lst")).contains("os.system"));
    let deep = [&b"\x80\x02"[..], &b"]".repeat(2_000_000), &b"a".repeat(1_999_999), b"."].concat();
    assert!(refused(&deep).contains("expected a dictionary of tensors"));
    let tuples = [&b"\x80\x02N"[..], &b"\x85".repeat(2_000_000), b"."].concat();
    assert!(refused(&tuples).contains("expected a dictionary of tensors"));
    // Each list contains the previous one twice.
    let doubled: Vec<u8> =
        (0..60u8).flat_map(|i| [b']', b'q', i + 1, b'h', i, b'a', b'h', i, b'a']).collect();
    assert!(
        refused(&[&b"]q\x00"[..], &doubled, b"."].concat())
            .contains("expected a dictionary of tensors")
    );
    assert!(refused(b"X\xff\xff\xff\xff.").contains("the file ends here"));
    for broken in [
        &b"."[..],
        b"R.",
        b"a.",
        b"s.",
        b"u.",
        b"t.",
        b"(u.",
        b"}(Nu.",
        b"h\x05.",
        b"q\x00.",
        b"\x93.",
        b"\xff",
        b"",
        b"(.",
        b"](R.",
    ] {
        assert!(refused(broken).contains("pytorch_model.bin"), "{broken:?}");
    }
}

#[test]
fn truncated_files_are_refused() {
    let json = fs::read_to_string(fixture("chat.json")).unwrap();
    assert!(json.len() > 1000);
    let whole = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    })
    .to_string();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        assert!(Tokenizer::from_file(&path).is_err(), "{end}");
    }
    fs::write(&path, &whole).unwrap();
    Tokenizer::from_file(&path).unwrap();

    let model = fs::read(fixture("formats/sentencepiece/tokenizer.model")).unwrap();
    let path: PathBuf = folder.path().join("tokenizer.model");
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    for end in (0..model.len()).step_by(7) {
        fs::write(&path, &model[..end]).unwrap();
        let _ = Tokenizer::from_folder(folder.path());
    }
}

#[test]
fn a_text_that_exceeds_the_limit_of_a_pattern_is_an_error() {
    let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": null, "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    assert_eq!(tokenizer.encode("xx", true).unwrap(), [0, 0]);
    let message = tokenizer.encode(&"x".repeat(60), true).unwrap_err().to_string();
    assert!(message.contains("retry"), "{message}");
}
