//! Sequences forked, cut, thinned and removed: edits of tables.

use super::CudaPool;
use super::head::{Cut, Head};
use longctx_core::{Error, Result, Selection, SeqId};

impl CudaPool {
    /// Copies tables and rings; records are shared.
    ///
    /// Records that are not full are shared, too: their keys are packed, so that the entries they
    /// will hold are in both sequences' pasts, and both pack the same values into them.
    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequence(from)?;
        self.synchronize()?;
        self.check(from)?;
        if self.contains(to) {
            return Err(Error::mismatch("sequence to fork to", "a new one", to));
        }
        let bytes = self.sequence(from)?.ring_bytes();
        self.check_room(bytes)?;
        let number = self.status().begin();
        let copy = self.sequence(from)?.fork(&self.stream(), number)?;
        self.seqs.insert(to, copy);
        Ok(())
    }

    pub fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let heads = &self.sequence(seq)?.heads;
        self.check(seq)?;
        if let Some(short) = heads.iter().find(|head| head.len < len) {
            let expected = format!("at most the {} of its shortest head", short.len);
            return Err(Error::mismatch("entries to leave", expected, len));
        }
        Ok(())
    }

    /// As [`Pool::truncate`](crate::Pool::truncate): entries of a record that is cut go back to
    /// the ring as their codes have them, in the ring's dtype.
    pub fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let (format, group) = (self.format, self.layout.group);
        let cut = |head: &Head| head.cut(format, group, len);
        let cuts: Vec<_> = self.sequence(seq)?.heads.iter().map(cut).collect();
        let unpack = |(kv_head, cut): (usize, &Cut)| self.unpack_to_ring(seq, kv_head, cut);
        let done = cuts.iter().enumerate().try_for_each(unpack);
        let Some(sequence) = self.seqs.get_mut(&seq) else { return done };
        if let Err(error) = &done {
            sequence.poisoned = Some(error.to_string());
        }
        for (head, cut) in sequence.heads.iter_mut().zip(cuts) {
            (head.len, head.packed, head.ring_from) = (len, cut.packed, cut.ring_from);
            head.table.retain(|place| place < cut.packed.keys / group);
        }
        done
    }

    /// Drops whole records.
    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        let group = self.layout.group;
        let sequence = self.sequence(seq)?;
        self.check(seq)?;
        keep.check(&self.lens(seq))?;
        let kept: Option<Vec<_>> = sequence
            .heads
            .iter()
            .zip(keep.heads())
            .map(|(head, keep)| kept_records(head, keep, group))
            .collect();
        let Some(kept) = kept else {
            let what = "dropping entries of a packed store on a CUDA device but in whole groups";
            return Err(Error::Unsupported(format!("{what} of {group} that are packed")));
        };
        let (stream, ring) = (self.stream(), self.ring_places());
        let Some(sequence) = self.seqs.get_mut(&seq) else { return Ok(()) };
        for (i, kept) in kept.iter().enumerate() {
            let dropped = kept.iter().filter(|&&kept| !kept).count();
            if dropped == 0 {
                continue;
            }
            let (head, entries) = (&mut sequence.heads[i], dropped * group);
            head.table.retain(|place| kept.get(place).copied().unwrap_or(true));
            head.len -= entries;
            head.packed.keys -= entries;
            head.packed.values -= entries;
            head.packed.tiles -= entries / super::kernels::TILE;
            // Packed entries that are in the ring, too, may be gone.
            head.ring_from = head.packed.values;
            head.shift = (head.shift + entries) % ring;
            sequence.upload(&stream, i)?;
        }
        Ok(())
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        self.seqs.remove(&seq).is_some()
    }
}

/// Which of a head's full records stay; `None` if one would stay in part.
fn kept_records(head: &Head, keep: &[u32], group: usize) -> Option<Vec<bool>> {
    let full = head.packed.values / group;
    let mut counts = vec![0; full];
    let mut rest = 0;
    for &entry in keep {
        match counts.get_mut(entry as usize / group) {
            Some(count) => *count += 1,
            None => rest += 1,
        }
    }
    if rest != head.len - full * group {
        return None;
    }
    counts.into_iter().map(|count| [0, group].contains(&count).then_some(count > 0)).collect()
}
