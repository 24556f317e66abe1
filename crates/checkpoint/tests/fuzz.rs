//! Damaged files: none panics, hangs or needs more memory than a multiple of its size.

use std::io::Cursor;
use std::path::Path;

use longctx_checkpoint::{Pth, read_tokenizer};
use longctx_mutate::{Counting, Trial};

#[global_allocator]
static MEMORY: Counting = Counting;

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// A single test, because memory is counted for the whole process.
#[test]
fn damaged_files_are_errors() {
    let corpus = [fixture("tests/fixtures/tensors.pth")];
    let trial = Trial { name: "pth", corpus: &corpus, memory: |bytes| 64 * bytes + (1 << 16) };
    let tried = trial.run(|bytes| {
        let Ok(file) = Pth::read(Cursor::new(bytes.to_vec()), "damaged.pth") else { return };
        for name in file.names() {
            // Every described tensor can be read.
            let tensor = file.tensor(name).unwrap();
            assert_eq!(Some(tensor.dims()), file.shape(name));
        }
    });
    println!("{tried} PyTorch files");

    let folder = "../prompt-compress/tests/fixtures";
    let corpus = ["llama", "bert-base-multilingual-cased"]
        .map(|name| fixture(&format!("{folder}/tiny-{name}/tokenizer.json")));
    let memory = |bytes| 1000 * bytes + (1 << 20);
    let tried = Trial { name: "tokenizer", corpus: &corpus, memory }.run(|bytes| {
        if let Ok(tokenizer) = read_tokenizer(bytes) {
            drop(tokenizer.encode("A text, 1 or 2 \u{4f60}\u{597d}.", true));
        }
    });
    println!("{tried} tokenizers");
}
