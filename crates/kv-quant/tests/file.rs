//! Files of packed heads: whole ones come back, all others are refused.
#![cfg(all(feature = "save", not(miri)))] // Miri maps no files

use kv_quant::{
    Axis, Bits, Error, Flush, Format, Head, KeyBasis, Queries, Rotary, Scheme, attend, load,
    load_bytes, save,
};

fn formats() -> Vec<Format> {
    let per_token = Scheme::new(Bits::Four, Axis::Channels, 32).unwrap();
    vec![
        Format::kivi(Bits::Two, Bits::Four, 32, 64).unwrap(),
        Format::kivi(Bits::Three, Bits::Three, 64, 64).unwrap(),
        Format::flexgen(Bits::Eight, Bits::Two, 32).unwrap().with_basis(KeyBasis::Hadamard),
        Format::new(per_token, per_token, Flush::Together).unwrap(),
        Format::f16(),
    ]
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.37).sin() * (i % 7) as f32).collect()
}

fn heads() -> Vec<Vec<Head>> {
    let mut layers: Vec<Vec<Head>> = formats()
        .into_iter()
        .map(|format| {
            let mut head = Head::new(48, format).unwrap();
            head.append(&numbers(201 * 48), &numbers(201 * 48)).unwrap();
            let mut other = head.clone();
            other.retain(&(0..201).filter(|e| e % 3 > 0 || *e > 180).collect::<Vec<_>>()).unwrap();
            vec![head, other]
        })
        .collect();
    let rotary = Rotary::new(&[1.0, 0.1, 0.01], 4).unwrap().into();
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut head = Head::before_rope(48, format, rotary).unwrap();
    head.append(&numbers(77 * 48), &numbers(77 * 48)).unwrap();
    layers.push(vec![head]);
    layers.push(Vec::new());
    layers
}

fn file() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.safetensors");
    let layers = heads();
    save(&path, &layers.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    (dir, path)
}

#[test]
fn heads_come_back_and_go_on() {
    let (_dir, path) = file();
    let (saved, mut loaded) = (heads(), load(&path).unwrap());
    assert_eq!(saved.len(), loaded.len());
    let q = numbers(2 * 48);
    let queries = Queries { data: &q, heads: 2, tokens: 1, scale: 0.1, soft_cap: None };
    for (mut saved, loaded) in saved.into_iter().flatten().zip(loaded.iter_mut().flatten()) {
        for _ in 0..2 {
            assert_eq!(saved.read(), loaded.read());
            assert_eq!(saved.bytes().codes, loaded.bytes().codes);
            let len = saved.len();
            let of = |head: &Head| {
                attend(std::slice::from_ref(head), 1, &queries, |_, _| 0..len).unwrap()
            };
            assert_eq!(of(&saved), of(loaded));
            // Appending to what is mapped writes to memory, not to the file.
            saved.append(&numbers(70 * 48), &numbers(70 * 48)).unwrap();
            loaded.append(&numbers(70 * 48), &numbers(70 * 48)).unwrap();
        }
    }
    assert_eq!(load(&path).unwrap()[0][0].len(), 201);
}

#[test]
fn damage_is_an_error() {
    let (_dir, path) = file();
    let whole = std::fs::read(&path).unwrap();
    assert!(load_bytes(whole.clone().into()).is_ok());
    // Cut anywhere, or with a bit turned anywhere.
    for i in (0..whole.len()).step_by(whole.len() / 400) {
        assert!(load_bytes(whole[..i].to_vec().into()).is_err(), "cut at {i}");
        let mut bad = whole.clone();
        bad[i] ^= 1 << (i % 8);
        assert!(load_bytes(bad.into()).is_err(), "a bit turned at {i} of {}", whole.len());
    }
    let cut = path.with_extension("cut");
    std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    let Err(Error::File { path: named, .. }) = load(&cut) else { panic!("a cut file was read") };
    assert_eq!(named, cut);
    assert!(load(path.with_extension("missing")).is_err());
}

#[test]
fn other_versions_are_refused() {
    let (_dir, path) = file();
    let text = std::fs::read(&path).unwrap();
    let at = text.windows(13).position(|w| w == b"\"version\":\"1\"").unwrap();
    let mut other = text.clone();
    other[at + 11] = b'2';
    let message = load_bytes(other.into()).unwrap_err().to_string();
    assert!(
        message.contains("version \"1\", got") && message.contains("version \"2\""),
        "{message}"
    );
}
