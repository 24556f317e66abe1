//! Models from the Hub, with a server in this process instead of the Hub.
#![cfg(feature = "hub")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::{fs, thread};

use base_models::{LoadOptions, Pretrained};
use common::{error_of, fixture};

type Files = BTreeMap<String, PathBuf>;

/// Answers like the Hub: with the size, a tag and a commit for each file, and with range requests.
/// A file that cannot be read is answered with status 503.
fn answer(stream: TcpStream, files: &Files, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let headers: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let path = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
    asked.lock().unwrap().push(path.clone());
    let mut stream = stream;
    let Some(file) = files.get(&path) else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let Ok(bytes) = fs::read(file) else {
        return write!(
            stream,
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let first_byte_alone = headers.iter().any(|h| h.to_lowercase().starts_with("range: bytes=0-0"));
    let part = if first_byte_alone { &bytes[..1] } else { &bytes[..] };
    let tag: String = path.chars().filter(char::is_ascii_alphanumeric).collect();
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes 0-{}/{}\r\nETag: \"{tag}\"\r\n\
         x-repo-commit: 0123456789\r\nConnection: close\r\n\r\n",
        part.len(),
        part.len() - 1,
        bytes.len(),
    )?;
    stream.write_all(part)
}

fn serve(files: Files) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream, &files, &log);
        }
    });
    (address, asked)
}

#[test]
fn all_files_of_a_model_are_downloaded_and_none_outside_its_folder() {
    let scratch = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = scratch.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let mut files = Files::new();
    let mut add = |model: &str, name: &str, path: PathBuf| {
        files.insert(format!("{model}/resolve/main/{name}"), path);
    };
    for name in [
        "config.json",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ] {
        add("org/good", name, fixture("formats/torch-sharded").join(name));
    }
    add("org/good", "tokenizer.model", fixture("formats/sentencepiece/tokenizer.model"));
    add("org/good", "generation_config.json", write("g.json", r#"{"eos_token_id": [2, 5]}"#));
    add(
        "org/good",
        "tokenizer_config.json",
        write("t.json", r#"{"chat_template": "{{ messages[0].content }}"}"#),
    );
    add("org/bad", "config.json", fixture("formats/torch/config.json"));
    add("org/bad", "tokenizer.model", fixture("formats/sentencepiece/tokenizer.model"));
    add(
        "org/bad",
        "model.safetensors.index.json",
        write("i.json", r#"{"weight_map": {"a": "../../../../escaped"}}"#),
    );
    add("org/bad", "../../../../escaped", write("e", "x"));
    add("org/busy", "config.json", fixture("formats/torch/config.json"));
    add("org/busy", "tokenizer_config.json", scratch.path().join("missing"));
    let (address, asked) = serve(files);
    let home = tempfile::tempdir().unwrap();
    // SAFETY: this is the only test of this process, and no other thread reads the environment yet.
    unsafe {
        std::env::set_var("HF_ENDPOINT", &address);
        std::env::set_var("HF_HOME", home.path());
        std::env::set_var("NO_PROXY", "127.0.0.1");
    }

    let llm = Pretrained::open("org/good", &LoadOptions::default()).unwrap();
    assert_eq!(llm.model.config().eos, [2, 5]);
    assert!(llm.chat.is_some());
    assert!(llm.tokenizer.encode("import", true).unwrap().starts_with(&[1]));
    assert!(error_of(&llm.model, &fixture("formats/torch-sharded")) < 1e-4);

    let message = Pretrained::open("org/bad", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.contains("\"../../../../escaped\", is not in the same folder"), "{message}");
    assert!(asked.lock().unwrap().iter().all(|path| !path.contains("escaped")));

    let message = Pretrained::open("org/none", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.starts_with("org/none/config.json"), "{message}");

    // A chat template that could not be downloaded is an error, not a model without a template.
    let message = Pretrained::open("org/busy", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.starts_with("org/busy/tokenizer_config.json"), "{message}");
    assert!(message.contains("503"), "{message}");

    // Offline, a cached model opens without the files that it lacks.
    // SAFETY: as above; the server's thread does not read the environment.
    unsafe { std::env::set_var("HF_ENDPOINT", "http://127.0.0.1:9") };
    Pretrained::open("org/good", &LoadOptions::default()).unwrap();
    let message = Pretrained::open("org/none", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.starts_with("org/none/config.json"), "{message}");
}
