//! The states of sequences on the device, contiguous for sequences that are processed together.

use candle_core::Tensor;
use longctx_core::{Error, Result, SeqId};

/// The states of all sequences of a session, which kernels update in place. If the same batch
/// decodes at every step, its states are contiguous already and none is copied.
#[derive(Default)]
pub struct StatePool {
    groups: Vec<Group>,
}

/// Sequences that were last processed together.
struct Group {
    /// `None`: a removed sequence. Its memory is freed with the group.
    seqs: Vec<Option<SeqId>>,
    /// One tensor `[sequences, …]` for each array of a state.
    arrays: Vec<Tensor>,
}

impl Group {
    /// Returns the group without the given sequences; `None` if no sequence is left.
    fn without(&self, seqs: &[SeqId]) -> Result<Option<Group>> {
        let stays = |seq: &Option<SeqId>| seq.is_some_and(|seq| !seqs.contains(&seq));
        let rows: Vec<usize> =
            self.seqs.iter().enumerate().filter(|(_, seq)| stays(seq)).map(|(i, _)| i).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let seqs = rows.iter().map(|&row| self.seqs[row]).collect();
        let of_array = |array: &Tensor| gather_rows(rows.iter().map(|&row| (array, row)));
        let arrays = self.arrays.iter().map(of_array).collect::<Result<_>>()?;
        Ok(Some(Group { seqs, arrays }))
    }
}

/// Copies rows of tensors into one new tensor.
fn gather_rows<'a>(rows: impl Iterator<Item = (&'a Tensor, usize)>) -> Result<Tensor> {
    let rows = rows.map(|(array, row)| array.narrow(0, row, 1)).collect::<Result<Vec<_>, _>>()?;
    match rows.as_slice() {
        [one] => Ok(one.copy()?),
        rows => Ok(Tensor::cat(rows, 0)?),
    }
}

impl StatePool {
    /// Returns the group of a sequence and its row in it.
    fn locate(&self, seq: SeqId) -> Option<(usize, usize)> {
        let of_group = |(i, group): (usize, &Group)| {
            Some((i, group.seqs.iter().position(|&other| other == Some(seq))?))
        };
        self.groups.iter().enumerate().find_map(of_group)
    }

    /// Returns a contiguous copy of the sequences' states.
    fn gather(&self, seqs: &[SeqId]) -> Result<Vec<Tensor>> {
        let locate = |&seq: &SeqId| self.locate(seq).ok_or(Error::UnknownSequence(seq));
        let locations = seqs.iter().map(locate).collect::<Result<Vec<_>>>()?;
        let count = locations.first().map_or(0, |&(group, _)| self.groups[group].arrays.len());
        let array = |i: usize| {
            gather_rows(locations.iter().map(|&(group, row)| (&self.groups[group].arrays[i], row)))
        };
        (0..count).map(array).collect()
    }

    /// Returns a copy of a sequence's state.
    pub fn copy(&self, seq: SeqId) -> Result<Vec<Tensor>> {
        self.gather(&[seq])
    }

    /// Sets a sequence's state to a copy of the given one.
    pub fn set(&mut self, seq: SeqId, arrays: &[Tensor]) -> Result<()> {
        let arrays = arrays.iter().map(Tensor::copy).collect::<Result<_, _>>()?;
        self.remove(seq);
        self.groups.push(Group { seqs: vec![Some(seq)], arrays });
        Ok(())
    }

    pub fn remove(&mut self, seq: SeqId) {
        if let Some((group, row)) = self.locate(seq) {
            self.groups[group].seqs[row] = None;
        }
        self.groups.retain(|group| group.seqs.iter().any(Option::is_some));
    }

    pub fn clear(&mut self) {
        self.groups.clear();
    }

    /// Returns the states of some sequences, contiguous, `[sequences, …]` each, for update in
    /// place.
    pub fn contiguous(&mut self, seqs: &[SeqId]) -> Result<&mut [Tensor]> {
        let requested: Vec<_> = seqs.iter().copied().map(Some).collect();
        let found = self.groups.iter().position(|group| group.seqs == requested);
        let at = match found {
            Some(at) => at,
            None => {
                let arrays = self.gather(seqs)?;
                let moved = |group: &Group| group.seqs.iter().any(|seq| requested.contains(seq));
                let left = self.groups.iter().filter(|group| moved(group));
                let left = left.map(|group| group.without(seqs)).collect::<Result<Vec<_>>>()?;
                self.groups.retain(|group| !moved(group));
                self.groups.extend(left.into_iter().flatten());
                self.groups.push(Group { seqs: requested.clone(), arrays });
                self.groups.len() - 1
            }
        };
        Ok(&mut self.groups[at].arrays)
    }
}
