//! Reads arbitrary bytes as the files of a model. Errors are allowed, panics are not.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use base_models::{ChatTemplate, LoadOptions, Message, Pretrained, Tokenizer, Transformer};

/// A text with many of the characters that tokenizers treat specially.
const TEXT: &str = "Hi, it's  2024…\n\tnaïve 日本 🙂<s></s><|im_end|>";

/// Opens a GGUF file as tokenizer and weights. A tokenizer that opens is used.
pub fn gguf(data: &[u8]) {
    let folder = folder();
    let path = folder.path().join("model.gguf");
    fs::write(&path, data).expect("a file");
    if let Ok(tokenizer) = Tokenizer::from_gguf(&path) {
        encode(&tokenizer);
    }
    let _ = Pretrained::from_gguf(&path, &LoadOptions::default());
}

/// Opens a configuration, a zero byte, and safetensors weights.
pub fn safetensors(data: &[u8]) {
    let (config, weights) = halves(data);
    let folder = folder();
    fs::write(folder.path().join("config.json"), config).expect("a file");
    fs::write(folder.path().join("model.safetensors"), weights).expect("a file");
    let _ = Transformer::from_folder(folder.path(), &LoadOptions::default());
}

/// Opens a pickle, a zero byte, and a storage, in an archive; or the archive itself.
pub fn torch(data: &[u8]) {
    let folder = folder();
    let path = folder.path().join("pytorch_model.bin");
    match data.starts_with(b"PK") {
        true => fs::write(&path, data).expect("a file"),
        false => archive(&path, data),
    }
    fs::write(folder.path().join("config.json"), CONFIG).expect("a file");
    let _ = Transformer::from_folder(folder.path(), &LoadOptions::default());
}

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": true, "mlp_bias": true}"#;

fn archive(path: &Path, data: &[u8]) {
    let (pickle, storage) = halves(data);
    let mut archive = zip::ZipWriter::new(File::create(path).expect("a file"));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", storage)] {
        archive.start_file(name, stored).expect("an entry");
        archive.write_all(bytes).expect("its bytes");
    }
    archive.finish().expect("an archive");
}

/// Opens a `tokenizer.json` if the data begins with a brace, otherwise a `tokenizer.model`.
pub fn tokenizer(data: &[u8]) {
    let folder = folder();
    let name = if data.starts_with(b"{") { "tokenizer.json" } else { "tokenizer.model" };
    fs::write(folder.path().join(name), data).expect("a file");
    if let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) {
        encode(&tokenizer);
    }
}

fn encode(tokenizer: &Tokenizer) {
    let Ok(ids) = tokenizer.encode(TEXT, true) else { return };
    let _ = tokenizer.decode(&ids);
    let mut stream = tokenizer.stream();
    for id in ids {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}

/// Renders a template for a short conversation.
pub fn template(data: &[u8]) {
    let Ok(template) = std::str::from_utf8(data) else { return };
    if let Ok(chat) = ChatTemplate::new(template, "<s>", "</s>") {
        let messages = [Message::system("Be brief."), Message::user(TEXT)];
        let _ = chat.render(&messages, true);
    }
}

fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    (&data[..at], &data[(at + 1).min(data.len())..])
}

/// Returns a temporary folder, in memory if the system has such a file system.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
}
