//! Reads arbitrary bytes as a file of sequences. Errors are allowed, panics are not. Loaded
//! sequences must work.

use kv_quant::CacheFile;
use serde_json::Value;

/// Reads the bytes unchanged, and again with corrected checksums, so that the checks after the
/// checksums are reached.
pub fn file(data: &[u8]) {
    read(data.to_vec());
    if let Some(data) = with_right_checksums(data) {
        read(data);
    }
}

fn read(bytes: Vec<u8>) {
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
}

/// Returns the file with recomputed checksums of its tensors and its description; `None` if it is
/// not a safetensors file with such a description.
fn with_right_checksums(file: &[u8]) -> Option<Vec<u8>> {
    let len = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    let end = usize::try_from(len).ok()?.checked_add(8)?;
    let mut header: Value = serde_json::from_slice(file.get(8..end)?).ok()?;
    let data = &file[end..];

    let metadata = header.get("__metadata__")?;
    let mut heads: Value = serde_json::from_str(metadata.get("heads")?.as_str()?).ok()?;
    for (name, sum) in heads.get_mut(1)?.as_object_mut()? {
        let place = header.get(name).and_then(|tensor| tensor.get("data_offsets"));
        let at = |i| Some(place?.get(i)?.as_u64()? as usize);
        if let (Some(from), Some(to)) = (at(0), at(1)) {
            *sum = crc32fast::hash(data.get(from..to)?).into();
        }
    }
    let heads = heads.to_string();
    let metadata = header.get_mut("__metadata__")?.as_object_mut()?;
    metadata.insert("check".into(), crc32fast::hash(heads.as_bytes()).to_string().into());
    metadata.insert("heads".into(), heads.into());

    let header = header.to_string();
    let len = (header.len() as u64).to_le_bytes();
    Some([&len[..], header.as_bytes(), data].concat())
}
