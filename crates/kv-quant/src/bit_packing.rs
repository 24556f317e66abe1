//! Packs codes into the words of a packed matrix, a row at a time.

use crate::format::Plane;
use crate::layout::{Line, PANEL};
use longctx_simd::wide;

/// Buffers for packing.
#[derive(Debug, Default)]
pub struct Scratch {
    /// A row's codes, padded with zeros to a whole panel.
    pub padded: Vec<u8>,
    /// A lane's words.
    pub lane_words: Vec<u32>,
}

wide! {
    /// Packs codes into a lane's words: `32 / bits` codes per word, the first in the lowest bits.
    /// The words hold exactly the codes.
    fn pack_lane(codes: &'a [u8], plane: Plane, words: &'a mut [u32]) -> () {
        match plane.bits {
            1 => pack_words::<1, 32>(codes, plane.shift, words),
            2 => pack_words::<2, 16>(codes, plane.shift, words),
            4 => pack_words::<4, 8>(codes, plane.shift, words),
            _ => pack_words::<8, 4>(codes, plane.shift, words),
        }
    }
}

/// Packs eight codes at a time: adjacent codes are joined first, then pairs, then fours.
#[inline(always)]
fn pack_words<const BITS: usize, const PER_WORD: usize>(
    codes: &[u8],
    shift: usize,
    words: &mut [u32],
) {
    const fn mask(bits: usize) -> u64 {
        (1 << bits) - 1
    }
    for (word, codes) in words.iter_mut().zip(codes.as_chunks::<PER_WORD>().0) {
        if let (8, Ok(bytes)) = (BITS, codes[..].try_into()) {
            *word = u32::from_le_bytes(bytes);
            continue;
        }
        let mut joined = 0;
        for (i, codes) in codes.as_chunks().0.iter().enumerate() {
            let x = u64::from_le_bytes(*codes) >> shift & (0x0101_0101_0101_0101 * mask(BITS));
            let x = (x | x >> (8 - BITS)) & (0x0001_0001_0001_0001 * mask(2 * BITS));
            let x = (x | x >> (16 - 2 * BITS)) & (0x0000_0001_0000_0001 * mask(4 * BITS));
            joined |= (x | x >> (32 - 4 * BITS)) << (8 * BITS * i);
        }
        *word = joined as u32;
    }
}

wide! {
    /// Writes a code to a word of each lane, at bit `at`. `codes` has one code for each lane of
    /// `lines`, which are all lines of a plane, with `words` words per lane.
    fn pack_row(codes: &'a [u8], plane: Plane, word: usize, words: usize, at: usize, lines: &'a mut [Line]) -> () {
        for (panel, codes) in lines.chunks_mut(2 * words).zip(codes.chunks(PANEL)) {
            let width = panel.len() / words;
            let lines = panel[word * width..][..width].iter_mut();
            for (line, codes) in lines.zip(codes.as_chunks::<16>().0) {
                for (word, &code) in line.iter_mut().zip(codes) {
                    let code = u32::from(code) >> plane.shift & plane.mask();
                    *word = *word & !(plane.mask() << at) | code << at;
                }
            }
        }
    }
}
