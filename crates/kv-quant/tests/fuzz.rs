//! Damaged files of sequences: none panics, hangs or needs more memory than a multiple of its size.
#![cfg(all(feature = "save", not(miri)))] // too long for an interpreter, and full of files

#[path = "../fuzz/src/lib.rs"]
mod fuzz;
mod reference_impl;

use kv_quant::{Pool, to_bytes};
use longctx_mutate::{Counting, Trial};
use reference_impl::{formats, numbers, shape};

#[global_allocator]
static MEMORY: Counting = Counting;

/// Returns a file of two sequences: one complete, one with holes if the format supports them.
fn file(mut pool: Pool) -> Vec<u8> {
    let tokens = 70;
    let rows = |seed| numbers(seed, tokens * 16);
    pool.append(&[1], &[0, tokens], &rows(1), &rows(2)).unwrap();
    pool.fork(1, 2).unwrap();
    let keep: Vec<u32> = (0..tokens as u32).filter(|e| e % 3 > 0 || *e > 60).collect();
    pool.retain(2, &[keep]).unwrap();
    to_bytes(&[(&pool, 1), (&pool, 2)]).unwrap()
}

#[test]
fn damaged_files_are_errors() {
    let pools = formats().into_iter().filter_map(|format| Pool::new(shape(1, 16, 16), format).ok());
    let corpus: Vec<_> = pools.map(file).collect();
    assert!(!corpus.is_empty());
    // A pool allocates slabs, however few entries a file has.
    let memory = |bytes| 64 * bytes + (1 << 22);
    let tried = Trial { name: "kv-quant-file", corpus: &corpus, memory }.run(fuzz::file);
    println!("{tried} files of {} formats", corpus.len());
}
