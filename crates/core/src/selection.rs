//! Selected entries of a sequence, to keep or to append.

use std::sync::{Arc, OnceLock};

use crate::{Batch, Error, Result};
use candle_core::{DType, Tensor};

/// Selected entries of a sequence: for each kv head (`[kv_heads]`), entry indices in increasing
/// order.
///
/// ```
/// use longctx_core::Selection;
///
/// // Two heads that hold 5 and 4 entries: the first keeps its first and last, the second all.
/// let keep = Selection::new(vec![vec![0, 4], vec![0, 1, 2, 3]]);
/// assert!(keep.check(&[5, 4]).is_ok());
/// assert!(keep.check(&[4, 4]).unwrap_err().to_string().contains("head 0"));
/// ```
///
/// The indices may be in device memory ([`on_device`](Self::on_device)), where they were computed.
/// A store on the same device reads them there without synchronization.
#[derive(Debug, Clone)]
pub struct Selection {
    lists: Lists,
}

#[derive(Debug, Clone)]
enum Lists {
    Host(Vec<Vec<u32>>),
    Device(Arc<OnDevice>),
}

#[derive(Debug)]
struct OnDevice {
    /// Entry indices, `[kv_heads, count]`.
    entries: Tensor,
    /// Their copy on the host, made on the first request.
    host: OnceLock<Vec<Vec<u32>>>,
}

impl Selection {
    /// Creates a selection from one list per kv head.
    pub fn new(heads: Vec<Vec<u32>>) -> Self {
        Self { lists: Lists::Host(heads) }
    }

    /// Creates a selection with the same list for `heads` heads.
    pub fn uniform(heads: usize, keep: Vec<u32>) -> Self {
        Self::new(vec![keep; heads])
    }

    /// Creates a selection from indices `[kv_heads, count]` in u32 on a device, increasing in each
    /// row.
    ///
    /// The values are not checked, because the check would wait for the device. A store clamps
    /// indices past the last entry of a head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for another dtype or number of dimensions.
    pub fn on_device(entries: &Tensor) -> Result<Self> {
        if entries.dtype() != DType::U32 || entries.rank() != 2 {
            let got = format!("{:?} {:?}", entries.dtype(), entries.dims());
            return Err(Error::mismatch("selected entries", "u32 [kv_heads, count]", got));
        }
        let entries = entries.contiguous()?;
        Ok(Self { lists: Lists::Device(Arc::new(OnDevice { entries, host: OnceLock::new() })) })
    }

    /// Returns the indices `[kv_heads, count]` in u32 if they are on a device.
    pub fn entries(&self) -> Option<&Tensor> {
        match &self.lists {
            Lists::Host(_) => None,
            Lists::Device(of) => Some(&of.entries),
        }
    }

    /// Returns the lists. Waits for the device if the indices are there.
    ///
    /// # Errors
    /// If the copy from the device fails.
    pub fn heads(&self) -> Result<&[Vec<u32>]> {
        match &self.lists {
            Lists::Host(heads) => Ok(heads),
            Lists::Device(of) => match of.host.get() {
                Some(heads) => Ok(heads),
                None => {
                    let heads = of.entries.to_vec2()?;
                    Ok(of.host.get_or_init(|| heads))
                }
            },
        }
    }

    /// Returns the number of selected entries of each kv head, `[kv_heads]`.
    pub fn lens(&self) -> Vec<usize> {
        match &self.lists {
            Lists::Host(heads) => heads.iter().map(Vec::len).collect(),
            Lists::Device(of) => vec![of.entries.dims()[1]; of.entries.dims()[0]],
        }
    }

    /// Checks the lists against the number of entries of each head, and returns them. Waits for the
    /// device if the indices are there.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the first head whose list is not strictly increasing or exceeds
    /// its entries.
    pub fn check(&self, lens: &[usize]) -> Result<&[Vec<u32>]> {
        self.check_lens(lens)?;
        let heads = self.heads()?;
        for (head, (keep, &len)) in heads.iter().zip(lens).enumerate() {
            let what = || format!("selection for head {head}");
            if let Some(w) = keep.windows(2).find(|w| w[0] >= w[1]) {
                let got = format!("{} before {}", w[0], w[1]);
                return Err(Error::mismatch(what(), "strictly increasing entries", got));
            }
            if let Some(&last) = keep.last().filter(|&&last| last as usize >= len) {
                return Err(Error::mismatch(what(), format!("entries below {len}"), last));
            }
        }
        Ok(heads)
    }

    /// Like [`check`](Self::check), but does not read indices on a device. For stores on that
    /// device.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_unread(&self, lens: &[usize]) -> Result<()> {
        match &self.lists {
            Lists::Host(_) => self.check(lens).map(|_| ()),
            Lists::Device(_) => self.check_lens(lens),
        }
    }

    fn check_lens(&self, lens: &[usize]) -> Result<()> {
        let counts = self.lens();
        if counts.len() != lens.len() {
            return Err(Error::mismatch("heads of a selection", lens.len(), counts.len()));
        }
        let on_device = self.entries().is_some();
        for (head, (count, len)) in counts.iter().zip(lens).enumerate().filter(|_| on_device) {
            if count > len {
                let what = format!("selection for head {head}");
                return Err(Error::mismatch(what, format!("at most {len} entries"), count));
            }
        }
        Ok(())
    }
}

/// Checks one selection per sequence of a batch against the sequences' tokens. Indices on a device
/// are not read.
///
/// # Errors
/// [`Error::Mismatch`] for a wrong number of selections; as [`Selection::check`].
pub fn check_selections(batch: &Batch, tokens: &[Selection], kv_heads: usize) -> Result<()> {
    if tokens.len() != batch.seqs().len() {
        return Err(Error::mismatch("selections of tokens", batch.seqs().len(), tokens.len()));
    }
    for ((_, own), selection) in batch.iter().zip(tokens) {
        selection.check_unread(&vec![own.len(); kv_heads])?;
    }
    Ok(())
}
