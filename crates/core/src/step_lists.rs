//! Decode steps in two parts: work on the host, and launches that were captured in a CUDA graph.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::{Batch, Result, SeqId};

/// A cache's interface for decode steps in CUDA graphs. It separates a step's work on the host from
/// its kernel launches.
///
/// [`KvCache::attend`](crate::KvCache::attend) usually does both. To replay a captured step, an
/// engine calls [`prepare_decode`](Self::prepare_decode) of all layers, copies the lists to the
/// device, and launches the graph. To capture one, it calls `attend` between these two with a batch
/// [with prepared lists](Batch::with_prepared), which then only launches kernels.
pub trait PreparedDecode {
    /// Allocates memory for one token of each sequence, counts the tokens, and adds the lists that
    /// the kernels read. Every sequence must already have tokens.
    ///
    /// # Errors
    /// [`Error::PoolFull`](crate::Error::PoolFull), and errors of the driver. After an error, the
    /// sequences of the batch are unchanged or poisoned.
    fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()>;
}

/// The device memory of a prepared step: addresses for [`StepLists`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PreparedStep {
    /// Address of the lists.
    pub lists: u64,
    /// Address of the workspace.
    pub workspace: u64,
    /// Address of the memory that layers [reserve](StepLists::reserve).
    pub reserved: u64,
}

/// The lists of a prepared step, to be copied to the device together. A list's offset depends only
/// on the capacities of the lists before it, so captured launches find the lists of a later step at
/// the same addresses.
///
/// ```
/// use longctx_core::StepLists;
///
/// let mut lists = StepLists::default();
/// assert_eq!(lists.push(&[1, 2, 3], 20), 0);
/// assert_eq!(lists.push_shared(&[7, 8], 2), 32);
/// // The next layer has the same list.
/// assert_eq!(lists.push_shared(&[7, 8], 2), 32);
/// assert_eq!(lists.bytes()[..4], [1, 2, 3, 0]);
/// ```
#[derive(Debug, Default)]
pub struct StepLists {
    bytes: Vec<u8>,
    /// Every offset that was returned, and sizes of launches.
    layout: Vec<usize>,
    shared: Vec<Range<usize>>,
    owned: Vec<Owned>,
    workspace: usize,
    reserved: usize,
}

/// A shared list that is a part of a value.
#[derive(Debug)]
struct Owned {
    /// Keeps the value alive, so that no other list gets the same address.
    _owner: Arc<dyn Any + Send + Sync>,
    address: usize,
    len: usize,
    range: Range<usize>,
}

/// Alignment of each list, in bytes.
const ALIGNMENT: usize = 16;

impl StepLists {
    /// Removes all lists.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.layout.clear();
        self.shared.clear();
        self.owned.clear();
        self.workspace = 0;
        self.reserved = 0;
    }

    /// Adds a list, followed by zeros up to `capacity` bytes. Returns its offset in bytes.
    pub fn push(&mut self, list: &[u8], capacity: usize) -> u64 {
        let first = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(first, 0);
        self.bytes.extend_from_slice(list);
        self.bytes.resize(first + capacity.max(list.len()), 0);
        self.layout.push(first);
        first as u64
    }

    /// As [`push`](Self::push). Layers that push equal lists share one.
    pub fn push_shared(&mut self, list: &[u8], capacity: usize) -> u64 {
        let size = capacity.max(list.len());
        let equal = |range: &&Range<usize>| {
            let held = &self.bytes[range.start..range.end];
            held.len() == size && held.starts_with(list) && is_zero(&held[list.len()..])
        };
        if let Some(range) = self.shared.iter().rev().find(equal) {
            // The offset is a part of the layout, because in another step this caller may share
            // another list.
            self.layout.push(range.start);
            return range.start as u64;
        }
        let first = self.push(list, capacity);
        self.shared.push(first as usize..first as usize + size);
        first
    }

    /// As [`push_shared`](Self::push_shared), for a list that is a part of `owner`. If another layer has
    /// pushed the same part of the same value, the bytes are not compared.
    pub fn push_part<T: Any + Send + Sync>(
        &mut self,
        owner: &Arc<T>,
        list: &[u8],
        capacity: usize,
    ) -> u64 {
        let (address, len, size) = (list.as_ptr() as usize, list.len(), capacity.max(list.len()));
        let same = |of: &&Owned| (of.address, of.len, of.range.len()) == (address, len, size);
        if let Some(Owned { range, .. }) = self.owned.iter().find(same) {
            self.layout.push(range.start);
            return range.start as u64;
        }
        let first = self.push_shared(list, capacity);
        let range = first as usize..first as usize + size;
        self.owned.push(Owned { _owner: owner.clone(), address, len, range });
        first
    }

    /// Adds the position of each token of a batch, i64, as [`Batch::positions`] returns them.
    pub fn push_positions(&mut self, batch: &Batch, seen: impl Fn(SeqId) -> usize) -> u64 {
        let positions = batch.positions(seen);
        let bytes: Vec<u8> = positions.iter().flat_map(|position| position.to_ne_bytes()).collect();
        self.push_shared(&bytes, bytes.len())
    }

    /// Adds the size of a launch to the layout: a step with another size needs another launch.
    pub fn push_size(&mut self, size: usize) {
        self.layout.push(size);
    }

    /// Requires a workspace of at least `bytes` bytes. All layers share it: a kernel's results there
    /// are valid until the next layer's kernels.
    pub fn require_workspace(&mut self, bytes: usize) {
        self.workspace = self.workspace.max(bytes);
    }

    /// Reserves memory for one layer, which is valid until the end of the step. Returns its offset in
    /// bytes.
    pub fn reserve(&mut self, bytes: usize) -> u64 {
        let first = self.reserved;
        self.reserved += bytes.next_multiple_of(ALIGNMENT);
        self.layout.push(first);
        first as u64
    }

    /// Returns the bytes that layers have reserved.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Returns the lists.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the offset of the list of each push, and the sizes of launches. Steps with equal layouts
    /// can share captured launches.
    pub fn layout(&self) -> &[usize] {
        &self.layout
    }

    /// Returns the bytes of the workspace.
    pub fn workspace(&self) -> usize {
        self.workspace
    }
}

/// Returns whether all bytes are 0.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_depend_on_capacities_only() {
        let mut lists = StepLists::default();
        let mut layout = |list: &[u8]| {
            lists.clear();
            lists.push(list, 40);
            lists.push_shared(list, 8);
            lists.push(&[1], 1);
            lists.require_workspace(100);
            lists.require_workspace(60);
            lists.reserve(30);
            lists.reserve(8);
            lists.push_size(3);
            (lists.layout().to_vec(), lists.workspace(), lists.reserved())
        };
        let first = layout(&[1, 2, 3]);
        assert_eq!(first, (vec![0, 48, 64, 0, 32, 3], 100, 48));
        assert_eq!(layout(&[9; 8]), first);
        // A list beyond its capacity moves the later ones.
        assert_ne!(layout(&[9; 41]), first);
    }

    #[test]
    fn the_layout_tells_which_list_is_shared() {
        let layout = |third: u8| {
            let mut lists = StepLists::default();
            for list in [1, 2, third] {
                lists.push_shared(&[list], 1);
            }
            lists.layout().to_vec()
        };
        assert_eq!((layout(1), layout(2)), (vec![0, 16, 0], vec![0, 16, 16]));
    }

    #[test]
    fn a_part_of_a_value_is_pushed_once() {
        let mut lists = StepLists::default();
        let owner = Arc::new(vec![5u8, 6, 7]);
        let first = lists.push_part(&owner, &owner[..2], 4);
        assert_eq!(lists.push_part(&owner, &owner[..2], 4), first);
        // Another length, another part, another capacity.
        assert_eq!(lists.push_part(&owner, &owner[..1], 4), 16);
        assert_eq!(lists.push_part(&owner, &owner[1..], 4), 32);
        assert_eq!(lists.push_part(&owner, &owner[..2], 5), 48);
        // Another value with equal bytes.
        let other = Arc::new(vec![5u8, 6]);
        assert_eq!(lists.push_part(&other, &other, 4), first);
        assert_eq!(lists.bytes()[..4], [5, 6, 0, 0]);
        assert_eq!(lists.layout(), [0, 0, 16, 32, 48, 0]);
    }

    #[test]
    fn only_equal_lists_are_shared() {
        let mut lists = StepLists::default();
        let own = lists.push(&[5, 6], 2);
        let shared = lists.push_shared(&[5, 6], 2);
        assert_ne!(own, shared);
        assert_ne!(lists.push_shared(&[5, 7], 2), shared);
        assert_ne!(lists.push_shared(&[5, 6], 3), shared);
        assert_eq!(lists.push_shared(&[5, 6], 2), shared);
        assert_ne!(lists.push_shared(&[], 2), shared);
        assert_ne!(lists.push_shared(&[5], 2), shared);
    }
}
