//! Arbitrary bytes as a file of heads: errors may come, panics may not, and what is read must work.
//!
//! Two kinds of input. Bytes that begin with 0 are the rest of a file as it is. In all others the first two bytes say how long the description of
//! heads (JSON) is; then come the description and the data of the tensors that it names. Those are put into a file whose checksums are right, so
//! that the checks behind the checksums are reached.
#![no_main]

use std::collections::HashMap;

use bytes::Bytes;
use kv_quant::load_bytes;
use libfuzzer_sys::fuzz_target;
use safetensors::tensor::{Dtype, TensorView};

const TENSORS: [(&str, Dtype); 9] = [
    ("keys.codes", Dtype::U32),
    ("keys.scales", Dtype::F16),
    ("keys.zeros", Dtype::F16),
    ("values.codes", Dtype::U32),
    ("values.scales", Dtype::F16),
    ("values.zeros", Dtype::F16),
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
        ("version".into(), "1".into()),
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
    if let Ok(lists) = load_bytes(Bytes::from(bytes)) {
        for mut head in lists.into_iter().flatten() {
            let (keys, values) = head.read();
            assert_eq!(keys.len(), values.len());
            let token = vec![0.5f32; head.head_dim()];
            head.append(&token, &token).expect("a token of finite numbers");
        }
    }
});
