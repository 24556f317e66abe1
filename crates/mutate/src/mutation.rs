//! Random mutations of valid files.

use rand::Rng;
use rand::rngs::StdRng;

/// Numbers at which sizes and offsets overflow.
const EDGES: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 62, u64::MAX];
/// Extreme numbers as text.
const WORDS: [&str; 10] = [
    "0",
    "-1",
    "1e9",
    "1e400",
    "4294967296",
    "18446744073709551615",
    "null",
    "[]",
    "{}",
    "\"\u{20ac}\"",
];

/// Returns a file of the corpus with one to eight mutations.
pub fn mutated(rng: &mut StdRng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[rng.random_range(0..corpus.len())].clone();
    for _ in 0..1 << rng.random_range(0..4) {
        mutate(rng, &mut bytes, corpus);
    }
    bytes
}

fn mutate(rng: &mut StdRng, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let at = rng.random_range(0..=bytes.len());
    let len = rng.random_range(0..=(bytes.len() - at).min(64));
    match rng.random_range(0..10) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
        2 if at < bytes.len() => bytes[at] = rng.random(),
        3 => bytes.truncate(at),
        4 => drop(bytes.drain(at..at + len)),
        5 => {
            let copy = bytes[at..at + len].to_vec();
            let to = rng.random_range(0..=bytes.len());
            drop(bytes.splice(to..to, copy));
        }
        6 => {
            let size = [1, 2, 4, 8][rng.random_range(0..4)];
            let number = EDGES[rng.random_range(0..EDGES.len())].to_le_bytes();
            let end = (at + size).min(bytes.len());
            bytes[at..end].copy_from_slice(&number[..end - at]);
        }
        7 => number(rng, bytes, at),
        8 => {
            let other = &corpus[rng.random_range(0..corpus.len())];
            let from = rng.random_range(0..=other.len());
            let to = (from + rng.random_range(0..=64)).min(other.len());
            drop(bytes.splice(at..at + len, other[from..to].iter().copied()));
        }
        _ => drop(bytes.splice(at..at, std::iter::repeat_n(rng.random(), len))),
    }
}

/// Replaces the next decimal number.
fn number(rng: &mut StdRng, bytes: &mut Vec<u8>, at: usize) {
    let digits = |byte: &u8| byte.is_ascii_digit();
    let Some(start) = bytes[at..].iter().position(digits).map(|found| at + found) else { return };
    let end = start + bytes[start..].iter().take_while(|byte| digits(byte)).count();
    let word = WORDS[rng.random_range(0..WORDS.len())];
    drop(bytes.splice(start..end, word.bytes()));
}
