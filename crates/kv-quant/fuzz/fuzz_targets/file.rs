//! Arbitrary bytes as a file of sequences: errors may come, panics may not, and what is read must work.
//!
//! Two kinds of input. Bytes that begin with 0 are the rest of a file as it is. In all others the first two bytes say how long the description of
//! heads (JSON) is; then come the description and the data of the tensors that it names. Those are put into a file whose checksums are right, so
//! that the checks behind the checksums are reached.
#![no_main]

use std::collections::HashMap;

use kv_quant::CacheFile;
use libfuzzer_sys::fuzz_target;
use safetensors::tensor::{Dtype, TensorView};

const TENSORS: [(&str, Dtype); 11] = [
    ("keys.codes", Dtype::U32),
    ("keys.scales", Dtype::F16),
    ("keys.zeros", Dtype::F16),
    ("keys.factors", Dtype::F16),
    ("values.codes", Dtype::U32),
    ("values.scales", Dtype::F16),
    ("values.zeros", Dtype::F16),
    ("values.factors", Dtype::F16),
    ("keys.new", Dtype::F16),
    ("values.new", Dtype::F16),
    ("live", Dtype::U32),
];

/// A file with one head: its description, and its tensors from equal parts of the data.
fn file(data: &[u8]) -> Option<Vec<u8>> {
    let len = usize::from(u16::from_le_bytes([*data.first()?, *data.get(1)?]));
    let layers = std::str::from_utf8(data.get(2..2 + len)?).ok()?;
    let rest = &data[2 + len..];
    let part = rest.len() / TENSORS.len() / 4 * 4;
    let (mut tensors, mut sums) = (Vec::new(), Vec::new());
    for (i, (name, dtype)) in TENSORS.into_iter().enumerate() {
        let bytes = &rest[i * part..][..part];
        let count = 8 * bytes.len() / dtype.bitsize();
        sums.push(format!("\"0.0.{name}\":{}", crc32fast::hash(bytes)));
        tensors.push((format!("0.0.{name}"), TensorView::new(dtype, vec![count], bytes).ok()?));
    }
    let heads = format!("[{layers},{{{}}}]", sums.join(","));
    let metadata = HashMap::from([
        ("format".into(), "kv-quant".into()),
        ("version".into(), "2".into()),
        ("check".into(), crc32fast::hash(heads.as_bytes()).to_string()),
        ("heads".into(), heads),
    ]);
    safetensors::serialize(tensors, Some(metadata)).ok()
}

fuzz_target!(|data: &[u8]| {
    let bytes = match data {
        [0, rest @ ..] => rest.to_vec(),
        _ => match file(data) {
            Some(file) => file,
            None => return,
        },
    };
    let Ok(file) = CacheFile::from_bytes(bytes) else { return };
    for layer in 0..file.len() {
        let Ok(mut pool) = file.pool(layer) else { continue };
        if pool.load(1, &file, layer).is_err() {
            continue;
        }
        let shape = pool.shape();
        let (keys, values) = pool.read(1, shape.kv_heads - 1).expect("a head");
        assert_eq!(keys.len() / shape.head_dim, values.len() / shape.value_dim);
        let (key, value) = (
            vec![0.5f32; shape.kv_heads * shape.head_dim],
            vec![0.5f32; shape.kv_heads * shape.value_dim],
        );
        pool.append(&[1], &[0, 1], &key, &value).expect("a token of finite numbers");
        let lens = pool.lens(1).expect("a sequence");
        let shortest = lens.into_iter().min().unwrap_or(0);
        pool.truncate(1, shortest / 2).expect("fewer entries");
        pool.append(&[1], &[0, 1], &key, &value).expect("a token of finite numbers");
    }
});
