//! Attention probabilities accumulated per entry.

use std::iter::repeat_n;
use std::ops::Range;

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The attention probability that each entry of a sequence received, summed over queries, per query
/// head.
#[derive(Debug, Clone)]
pub struct AttentionSums {
    /// The sums `[group, entries]` of all kv heads, concatenated; f32.
    sums: Tensor,
    /// Query heads per kv head.
    group: usize,
    /// Entries of each kv head.
    lens: Vec<usize>,
}

impl AttentionSums {
    /// Creates the sums from one list per query head, of which `group` share a kv head. The lists
    /// of a kv head have one element per entry.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the number of lists is not a multiple of `group`, or the lists of a
    /// kv head differ in length.
    pub fn from_lists(lists: &[Vec<f32>], group: usize, device: &Device) -> Result<Self> {
        if group == 0 || !lists.len().is_multiple_of(group) {
            let expected = format!("a multiple of the {group} query heads of a kv head");
            return Err(Error::mismatch("lists of attention sums", expected, lists.len()));
        }
        let kv_heads = lists.chunks_exact(group);
        if let Some(heads) =
            kv_heads.clone().find(|heads| heads.iter().any(|x| x.len() != heads[0].len()))
        {
            let got = format!("{:?}", heads.iter().map(Vec::len).collect::<Vec<_>>());
            let what = "entries of the query heads of a kv head";
            return Err(Error::mismatch(what, "equal numbers", got));
        }
        let lens: Vec<_> = kv_heads.map(|heads| heads[0].len()).collect();
        let all = lists.concat();
        Self::new(Tensor::from_vec(all, group * lens.iter().sum::<usize>(), device)?, group, lens)
    }

    /// Creates the sums from one tensor `[group, entries]` per kv head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for tensors of other shapes.
    pub fn from_heads(heads: &[Tensor]) -> Result<Self> {
        let group = heads.first().map_or(Ok(0), |head| head.dim(0))?;
        let lens = heads.iter().map(|head| head.dim(1)).collect::<candle_core::Result<_>>()?;
        let some: Vec<_> = heads.iter().filter(|head| head.elem_count() > 0).collect();
        let flat =
            some.iter().map(|head| head.flatten_all()).collect::<candle_core::Result<Vec<_>>>()?;
        let sums = match (flat.is_empty(), heads.first()) {
            (false, _) => Tensor::cat(&flat, 0)?,
            (true, Some(head)) => head.flatten_all()?,
            (true, None) => Tensor::zeros(0, DType::F32, &Device::Cpu)?,
        };
        Self::new(sums, group, lens)
    }

    /// Creates the sums from those of all kv heads, `[group, entries]` each, concatenated. Elements
    /// of `sums` past the end are ignored.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if it is shorter.
    pub fn new(sums: Tensor, group: usize, lens: Vec<usize>) -> Result<Self> {
        let expected = group * lens.iter().sum::<usize>();
        if sums.elem_count() < expected {
            return Err(Error::mismatch("attention sums", expected, sums.elem_count()));
        }
        Ok(Self { sums, group, lens })
    }

    /// Returns the same sums on another device.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { sums: self.sums.to_device(device)?, ..self.clone() })
    }

    /// Returns the number of entries of each kv head, `[kv_heads]`.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Returns the sums of one kv head, `[group, entries]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such head.
    pub fn head(&self, kv_head: usize) -> Result<Tensor> {
        Ok(self.heads(kv_head..kv_head + 1)?.squeeze(0)?)
    }

    /// Returns the sums of all kv heads, one tensor `[group, entries]` each.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn split(&self) -> Result<Vec<Tensor>> {
        (0..self.lens.len()).map(|kv_head| self.head(kv_head)).collect()
    }

    /// Returns the sums of several sequences on the host, one list per query head. Copies once
    /// from the device.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn to_lists(all: &[Self]) -> Result<Vec<Vec<f32>>> {
        let flat =
            |sums: &Self| sums.sums.narrow(0, 0, sums.group * sums.lens.iter().sum::<usize>());
        let flat = all.iter().map(flat).collect::<candle_core::Result<Vec<_>>>()?;
        if flat.is_empty() {
            return Ok(Vec::new());
        }
        let numbers = Tensor::cat(&flat, 0)?.to_vec1()?;
        let lens = all.iter().flat_map(|sums| sums.lens.iter().map(|&len| (sums.group, len)));
        let mut rest = numbers.as_slice();
        let take = |len| {
            let (list, after) = rest.split_at(len);
            rest = after;
            list.to_vec()
        };
        Ok(lens.flat_map(|(group, len)| repeat_n(len, group)).map(take).collect())
    }

    /// Returns the sums of kv heads that have the same number of entries, `[kv_heads, group,
    /// entries]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if their numbers of entries differ, or there are no such heads.
    pub fn heads(&self, kv_heads: Range<usize>) -> Result<Tensor> {
        let mismatch = |got: String| {
            let expected = "kv heads of the same number of entries";
            Error::mismatch("attention sums of kv heads", expected, got)
        };
        let lens = self.lens.get(kv_heads.clone()).filter(|lens| !lens.is_empty());
        let lens = lens.ok_or_else(|| mismatch(format!("{kv_heads:?} of {}", self.lens.len())))?;
        if lens.iter().any(|len| *len != lens[0]) {
            return Err(mismatch(format!("{lens:?}")));
        }
        let first = self.group * self.lens[..kv_heads.start].iter().sum::<usize>();
        let own = self.sums.narrow(0, first, self.group * lens[0] * lens.len())?;
        Ok(own.reshape((lens.len(), self.group, lens[0]))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_are_not_groups_are_refused() {
        let sums = |lens: &[usize], group| {
            let lists: Vec<_> = lens.iter().map(|&len| vec![1.0; len]).collect();
            AttentionSums::from_lists(&lists, group, &Device::Cpu)
        };
        assert_eq!(sums(&[3, 3, 5, 5], 2).unwrap().lens(), [3, 5]);
        assert_eq!(sums(&[], 2).unwrap().lens(), [0; 0]);
        for (lens, group) in [(&[3, 3][..], 0), (&[3, 3, 5], 2), (&[3, 5], 2)] {
            let error = sums(lens, group).unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
    }
}
