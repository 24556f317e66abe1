//! A pool's blocks as pages for tiled attention.

use std::ops::Range;

use super::pool::{BLOCK, Pool};
use crate::attention::{Element, Page};
use crate::{AttentionShape, Batch, EntryRanges, Mask, Result, SeqId};
use candle_core::{Device, Tensor};

/// Returns the pages of each sequence and kv head.
pub fn pages<'a, T: Element>(
    pool: &'a Pool<T>,
    batch: &Batch,
    shape: &AttentionShape,
) -> Vec<Vec<Page<'a, T>>> {
    let of_seq = |&seq: &SeqId| (0..shape.kv_heads).map(move |head| pool.pages(seq, head));
    batch.seqs().iter().flat_map(of_seq).collect()
}

/// Returns the parts of the pages within a mask's ranges, or the pages themselves without one.
pub fn masked<'a, T: Element>(
    heads: &[Vec<Page<'a, T>>],
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Vec<Vec<Page<'a, T>>>> {
    let Mask::Entries(ranges) = mask else { return Ok(heads.to_vec()) };
    let len = |pages: &Vec<Page<'a, T>>| {
        pages.iter().map(|page| page.keys.len() / shape.head_dim).sum::<usize>()
    };
    ranges.check(&heads.iter().map(len).collect::<Vec<_>>())?;
    let cut = |(pages, ranges): (&Vec<Page<'a, T>>, &Vec<Range<usize>>)| {
        ranges.iter().flat_map(|range| slice_pages(pages, range, shape)).collect()
    };
    Ok(heads.iter().zip(ranges.heads()).map(cut).collect())
}

/// Returns the parts of a head's pages within a range of entries. All pages except the last are
/// full.
pub fn slice_pages<'a, T: Element>(
    pages: &[Page<'a, T>],
    range: &Range<usize>,
    shape: &AttentionShape,
) -> Vec<Page<'a, T>> {
    let (d, dv) = (shape.head_dim, shape.value_dim);
    let part = |i: usize| {
        let start = range.start.max(i * BLOCK) - i * BLOCK;
        let end = range.end.min((i + 1) * BLOCK) - i * BLOCK;
        let Page { keys, values } = pages[i];
        Page { keys: &keys[start * d..end * d], values: &values[start * dv..end * dv] }
    };
    (range.start / BLOCK..range.end.div_ceil(BLOCK)).map(part).collect()
}

/// Scatters sums over ranges of entries to the indices of all entries; 0 elsewhere.
pub fn scatter<T: Element>(
    sums: Vec<Vec<f32>>,
    ranges: &EntryRanges,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
) -> Vec<Vec<f32>> {
    let place = |(i, sums): (usize, Vec<f32>)| {
        let head = i / shape.heads_per_kv();
        let len = heads[head].iter().map(|page| page.keys.len() / shape.head_dim).sum();
        let mut all = vec![0.0; len];
        let mut sums = sums.into_iter();
        for range in &ranges.heads()[head] {
            all[range.clone()].iter_mut().zip(&mut sums).for_each(|(place, sum)| *place = sum);
        }
        all
    };
    sums.into_iter().enumerate().map(place).collect()
}

pub fn read<T: Element>(pages: &[Page<'_, T>], shape: &AttentionShape) -> Result<(Tensor, Tensor)> {
    let (mut keys, mut values, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
    for page in pages {
        keys.extend_from_slice(T::widen(page.keys, &mut scratch));
        values.extend_from_slice(T::widen(page.values, &mut scratch));
    }
    let len = keys.len() / shape.head_dim;
    Ok((
        Tensor::from_vec(keys, (len, shape.head_dim), &Device::Cpu)?,
        Tensor::from_vec(values, (len, shape.value_dim), &Device::Cpu)?,
    ))
}
