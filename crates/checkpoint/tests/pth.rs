//! PyTorch files: valid ones are read as PyTorch reads them (`fixtures/make_tensors.py`). Invalid
//! ones give errors that name them, without large allocations.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use candle_core::Device;
use longctx_checkpoint::Pth;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn tensors_are_those_that_were_saved() {
    let expected =
        candle_core::safetensors::load(fixture("tensors.safetensors"), &Device::Cpu).unwrap();
    let file = Pth::open(&fixture("tensors.pth")).unwrap();
    assert_eq!(file.names().count(), expected.len());
    for (name, want) in &expected {
        let got = file.tensor(name).unwrap();
        assert_eq!((got.dtype(), got.dims()), (want.dtype(), want.dims()), "{name}");
        assert_eq!(file.shape(name), Some(want.dims()), "{name}");
        // Rust formats numbers exactly.
        assert_eq!(format!("{got:?} {got}"), format!("{want:?} {want}"), "{name}");
    }
    assert!(file.tensor("other").unwrap_err().to_string().contains("\"other\""));
}

/// Returns a file with this pickle and one storage of 16 bytes.
fn file(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 16])] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn open(pickle: &[u8]) -> Result<Pth, String> {
    Pth::read(Cursor::new(file(pickle)), "model.pth").map_err(|e| e.to_string())
}

/// Returns the pickle of one tensor "x" with these arguments.
fn tensor(arguments: &[u8]) -> Vec<u8> {
    [b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(", arguments, b"tRs."]
        .concat()
}

/// The file's storage, with elements of f32.
const STORAGE: &[u8] =
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ";

#[test]
fn wrong_arguments_are_named() {
    let with = |rest: &[u8]| open(&tensor(&[STORAGE, rest].concat()));
    // Offset 0, shape (2, 2), stride (2, 1).
    let right = with(b"K\x00K\x02K\x02\x86K\x02K\x01\x86").unwrap();
    assert_eq!(right.shape("x"), Some(&[2, 2][..]));
    for (rest, part) in [
        (&b""[..], "got 1 values"),
        (b"K\x00K\x02\x85", "got 3 values"),
        (b"K\x00K\x02\x85K\x02K\x01\x86", "1 dimensions with 2 strides"),
        (b"K\x00K\x05\x85K\x01\x85", "of 4 numbers"),
        (b"K\x01K\x04\x85K\x01\x85", "of 4 numbers"),
        (b"J\xff\xff\xff\xffK\x01\x85K\x01\x85", "got -1"),
        (b"K\x00NN", "expected a tuple"),
    ] {
        let error = with(rest).unwrap_err();
        assert!(error.contains("\"x\"") && error.contains(part), "{error}");
    }
    for (pickle, part) in [
        (&b"\x80\x02."[..], "a value is missing"),
        (b"].", "expected a dictionary of tensors, got a list"),
        (b"}X\x01\x00\x00\x00xcos\nsystem\n)Rs.", "os.system"),
        (b"}X\x01\x00\x00\x00xctorch._utils\n_rebuild_parameter\n)Rs.", "without a tensor"),
        (
            b"}X\x01\x00\x00\x00xctorch._tensor\n_rebuild_from_type_v2\n)Rs.",
            "expected 3 arguments of _rebuild_from_type_v2, got 0",
        ),
    ] {
        let error = open(pickle).unwrap_err();
        assert!(error.contains("model.pth") && error.contains(part), "{error}");
    }
}

#[test]
fn other_values_are_skipped() {
    for pickle in [&b"}K\x01K\x02s."[..], b"}X\x01\x00\x00\x00xK\x02s."] {
        assert_eq!(open(pickle).unwrap().names().count(), 0);
    }
}

#[test]
fn a_declared_size_is_compared_before_anything_is_allocated() {
    // 2^32 adjacent numbers, and the same number 2^32 times.
    for stride in [b"K\x01\x85", b"K\x00\x85"] {
        let rest = [STORAGE, b"K\x00\x8a\x05\x00\x00\x00\x00\x01\x85", stride].concat();
        let error = open(&tensor(&rest)).unwrap_err();
        assert!(error.contains("[4294967296]") && error.contains("of 4 numbers"), "{error}");
    }
    // A shape whose product wraps to 0.
    let huge = b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40";
    let rest = [STORAGE, b"K\x00(", huge, huge, huge, b"tK\x01K\x01K\x01\x87"].concat();
    assert!(open(&tensor(&rest)).unwrap_err().contains("of 4 numbers"));
}

#[test]
fn values_nested_a_million_deep_are_read() {
    let deep = [b"}X\x01\x00\x00\x00x)".as_slice(), &[0x85; 1_000_000], b"s."].concat();
    assert_eq!(open(&deep).unwrap().names().count(), 0);
}

#[test]
fn other_archives_are_named() {
    let read = |bytes: Vec<u8>| Pth::read(Cursor::new(bytes), "model.pth").unwrap_err().to_string();
    assert!(read(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec()).contains("no archive"));
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("a/b", SimpleFileOptions::default()).unwrap();
    assert!(read(zip.finish().unwrap().into_inner()).contains("one data.pkl"));
}
