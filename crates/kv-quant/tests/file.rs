//! Files of sequences: intact files can be loaded, all others are refused.
#![cfg(all(feature = "save", not(miri)))] // too long for an interpreter, and full of files

mod reference_impl;

use kv_quant::{Bits, CacheFile, Error, Format, Mask, Pool, Queries, Rotary, save, to_bytes};
use reference_impl::{all, formats, numbers, shape};

const D: usize = 48;
const V: usize = 16;

/// Returns pools with two sequences each; the second one has holes if the format supports them.
fn pools() -> Vec<Pool> {
    let mut pools: Vec<Pool> =
        formats().into_iter().map(|format| Pool::new(shape(2, D, V), format).unwrap()).collect();
    let format = Format::flexgen(Bits::Eight, Bits::Two, 32).unwrap();
    pools.push(Pool::new(shape(1, D, D), format.with_rotated_keys()).unwrap());
    let rotary = Rotary::new(&[1.0, 0.1, 0.01], 4).unwrap().into();
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    pools.push(Pool::before_rope(shape(2, D, V), format, rotary).unwrap());
    for pool in &mut pools {
        feed(pool, 1, 201);
        pool.fork(1, 2).unwrap();
        if pool.rotary().is_none() {
            let keep: Vec<u32> = (0..201).filter(|e| e % 3 > 0 || *e > 180).collect();
            pool.retain(2, &vec![keep; pool.shape().kv_heads]).unwrap();
        }
    }
    pools
}

fn feed(pool: &mut Pool, seq: u64, tokens: usize) {
    let shape = pool.shape();
    let rows = |seed, size: usize| numbers(seed, tokens * shape.kv_heads * size);
    let (k, v) = (rows(seq, shape.head_dim), rows(seq + 1, shape.value_dim));
    pool.append(&[seq], &[0, tokens], &k, &v).unwrap();
}

fn sequences(pools: &[Pool]) -> Vec<(&Pool, u64)> {
    pools.iter().flat_map(|pool| [(pool, 1), (pool, 2)]).collect()
}

fn file() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.safetensors");
    save(&path, &sequences(&pools())).unwrap();
    (dir, path)
}

#[test]
fn loaded_sequences_continue() {
    let (_dir, path) = file();
    let (mut saved, file) = (pools(), CacheFile::open(&path).unwrap());
    assert_eq!(file.len(), 2 * saved.len());
    assert_eq!(to_bytes(&sequences(&saved)).unwrap().len(), std::fs::read(&path).unwrap().len());
    let q = numbers(5, 2 * 2 * D);
    for (layer, pool) in saved.iter_mut().enumerate() {
        let mut loaded = file.pool(2 * layer).unwrap();
        for (i, seq) in [1, 2].into_iter().enumerate() {
            // Beside another sequence, and under another id.
            feed(&mut loaded, 20 + seq, 40);
            loaded.load(10 + seq, &file, 2 * layer + i).unwrap();
            for _ in 0..2 {
                assert_eq!(all(pool, seq), all(&loaded, 10 + seq));
                let bytes = |pool: &Pool, seq| pool.seq_footprint(seq).codes;
                assert_eq!(bytes(pool, seq), bytes(&loaded, 10 + seq));
                let q =
                    Queries { data: &q[..], heads: 2, scale: 0.1, soft_cap: None, window: None };
                let of = |pool: &Pool, seq| pool.attend(&q, &[seq], &[0, 2], Mask::Causal).unwrap();
                assert_eq!(of(pool, seq), of(&loaded, 10 + seq));
                feed(pool, seq, 70);
                let shape = pool.shape();
                let rows = |seed, size: usize| numbers(seed, 70 * shape.kv_heads * size);
                let (k, v) = (rows(seq, shape.head_dim), rows(seq + 1, shape.value_dim));
                loaded.append(&[10 + seq], &[0, 70], &k, &v).unwrap();
            }
        }
    }
}

/// Another process may change a file that is open.
#[test]
fn an_open_file_does_not_change() {
    let (_dir, path) = file();
    let (pools, file) = (pools(), CacheFile::open(&path).unwrap());
    let size = std::fs::read(&path).unwrap().len();
    std::fs::write(&path, vec![0; size]).unwrap();
    let mut loaded = file.pool(0).unwrap();
    loaded.load(1, &file, 0).unwrap();
    assert_eq!(all(&pools[0], 1), all(&loaded, 1));
}

#[test]
fn errors_of_loading_are_named_and_change_nothing() {
    let (_dir, path) = file();
    let file = CacheFile::open(&path).unwrap();
    let mut pool = file.pool(0).unwrap();
    pool.load(1, &file, 0).unwrap();
    let message = pool.load(1, &file, 0).unwrap_err().to_string();
    assert!(message.contains("1, which exists"), "{message}");
    let message = pool.load(2, &file, 2).unwrap_err().to_string();
    assert!(message.contains("pool of the saved sequence: expected"), "{message}");
    let message = pool.load(2, &file, 99).unwrap_err().to_string();
    assert!(message.contains("layer of the file: expected below"), "{message}");
    let mut small = file.pool(0).unwrap().with_capacity(1000);
    assert!(matches!(small.load(2, &file, 0), Err(Error::PoolFull { free: 1000, .. })));
    assert_eq!((small.seqs().len(), small.free_bytes()), (0, 1000));
    let unknown = to_bytes(&[(&small, 3)]);
    assert_eq!(unknown, Err(Error::UnknownSequence(3)));
}

/// Files of the crate's first version, written by `fixtures/heads.rs`: lists of heads, and the
/// entries that it read back from them.
#[test]
fn earlier_files_are_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/heads.safetensors");
    let file = CacheFile::open(path).unwrap();
    let rows = std::fs::read(path.replace("heads.s", "heads.read.s")).unwrap();
    let rows = safetensors::SafeTensors::deserialize(&rows).unwrap();
    let mut heads = 0;
    for layer in 0..file.len() {
        let Ok(mut pool) = file.pool(layer) else { continue };
        pool.load(1, &file, layer).unwrap();
        for (head, (keys, values)) in all(&pool, 1).into_iter().enumerate() {
            for (name, got) in [("keys", keys), ("values", values)] {
                let want = rows.tensor(&format!("{layer}.{head}.{name}")).unwrap();
                let bytes = want.data().chunks_exact(4);
                let want = bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                assert!(want.eq(got), "{name} of head {head} of layer {layer}");
            }
            heads += 1;
        }
    }
    assert_eq!(2 * heads, rows.len());
}

#[test]
fn damage_is_an_error() {
    let (_dir, path) = file();
    let whole = std::fs::read(&path).unwrap();
    assert!(CacheFile::from_bytes(whole.clone()).is_ok());
    // Truncated at any byte, or with any bit flipped.
    for i in (0..whole.len()).step_by(whole.len() / 400) {
        assert!(CacheFile::from_bytes(whole[..i].to_vec()).is_err(), "cut at {i}");
        let mut bad = whole.clone();
        bad[i] ^= 1 << (i % 8);
        assert!(CacheFile::from_bytes(bad).is_err(), "a bit turned at {i} of {}", whole.len());
    }
    let cut = path.with_extension("cut");
    std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    let Err(Error::File { path: named, .. }) = CacheFile::open(&cut) else {
        panic!("a cut file was read")
    };
    assert_eq!(named, cut);
    assert!(CacheFile::open(path.with_extension("missing")).is_err());
}

#[test]
fn other_versions_are_refused() {
    let (_dir, path) = file();
    let text = std::fs::read(&path).unwrap();
    let at = text.windows(13).position(|w| w == b"\"version\":\"2\"").unwrap();
    let mut other = text.clone();
    other[at + 11] = b'3';
    let message = CacheFile::from_bytes(other).unwrap_err().to_string();
    assert!(
        message.contains("version \"2\" or \"1\", got") && message.contains("version \"3\""),
        "{message}"
    );
}
