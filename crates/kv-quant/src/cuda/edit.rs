//! Sequences forked, cut, thinned and removed: edits of tables.

use super::CudaPool;
use super::head::Head;
use longctx_core::{Error, Result, Selection, SeqId};

impl CudaPool {
    /// Copies tables and rings; records are shared.
    ///
    /// Records that are not full are shared, too: their keys are packed, so that the entries they
    /// will hold are in both sequences' pasts, and both pack the same values into them.
    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequence(from)?;
        self.check(from)?;
        if self.contains(to) {
            return Err(Error::mismatch("sequence to fork to", "a new one", to));
        }
        let bytes = self.sequence(from)?.ring_bytes();
        self.check_room(bytes)?;
        let number = self.next_number();
        let copy = self.sequence(from)?.fork(&self.stream(), number)?;
        self.seqs.insert(to, copy);
        Ok(())
    }

    pub fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let heads = &self.sequence(seq)?.heads;
        self.check(seq)?;
        for head in heads {
            if head.len < len {
                let expected = format!("at most {}", head.len);
                return Err(Error::mismatch("entries to leave", expected, len));
            }
            if head.cut(self.format, self.layout.group, len).is_none() {
                let what = "truncation into packed groups on a CUDA device";
                return Err(Error::Unsupported(format!(
                    "{what}: {} of {} entries are packed, and {len} are to stay",
                    head.packed.keys, head.len
                )));
            }
        }
        Ok(())
    }

    /// A cut among entries that are in full precision, or were until the last group was packed with
    /// a rolling flush.
    pub fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let (format, group) = (self.format, self.layout.group);
        for head in self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads) {
            let Some(cut) = head.cut(format, group, len) else { continue };
            (head.packed, head.len) = (cut, len);
            let records = cut.keys / group;
            head.table.retain(|place| place < records);
        }
        Ok(())
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
