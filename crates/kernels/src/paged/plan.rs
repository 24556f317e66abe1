//! Splits attention over the device's thread blocks. The plan is made on the host, from lengths
//! known there.

use super::AttendWork;
use crate::PAGE;

/// Parts of fewer pages only make the merge longer. On an H200 attention of 2,048 entries of 8 heads
/// takes 11.3 µs with 16 parts and 13.3 with 33, with a slower merge.
const MIN_PAGES: usize = 2;

/// The work items of a launch of [`attend`](super::attend).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// The work items, largest first.
    pub work: Vec<AttendWork>,
    /// Number of partial results.
    pub parts: usize,
    /// Number of merges of partial results: one for each kv head and block of columns.
    pub merges: usize,
}

impl Plan {
    /// Splits the entries of all kv heads evenly over the `slots` thread blocks that the device
    /// [runs concurrently](super::attend_slots), so that one long sequence among short ones does
    /// not dominate the time.
    ///
    /// `heads` has one work item for each kv head of each sequence, over all its entries and
    /// without columns. The plan has at most `slots` items plus one for each kv head and `columns`
    /// columns.
    pub fn new(heads: &[AttendWork], heads_per_kv: usize, columns: usize, slots: usize) -> Self {
        let pages = |work: &AttendWork| ((work.to - work.from).max(0) as usize).div_ceil(PAGE);
        let mut rows = Vec::new();
        for head in heads {
            let all = heads_per_kv * head.queries as usize;
            let first = (0..all).step_by(columns);
            rows.extend(first.map(|first| AttendWork { first_column: first as i32, ..*head }));
        }
        let total: usize = rows.iter().map(pages).sum();
        let mut plan = Self::default();
        for row in rows {
            let pages = pages(&row);
            // Rounds to the nearest: 1.5 shares take one block twice as long.
            let splits = (pages * slots + total / 2) / total.max(1);
            let splits = splits.clamp(1, (pages / MIN_PAGES).max(1));
            let at = |page: usize| (row.from + (page * PAGE) as i32).min(row.to);
            plan.work.extend((0..splits).map(|part| AttendWork {
                from: at(pages * part / splits),
                to: at(pages * (part + 1) / splits),
                first_part: plan.parts as i32,
                part: part as i32,
                parts: splits as i32,
                merge: plan.merges as i32,
                ..row
            }));
            plan.parts += splits;
            plan.merges += 1;
        }
        plan.work.sort_by_key(|work| std::cmp::Reverse(work.to - work.from));
        plan
    }

    /// Pads the list to `work` items, for a launch captured with this length.
    #[must_use]
    pub fn padded(mut self, work: usize) -> Self {
        self.work.resize(work.max(self.work.len()), AttendWork::default());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(len: i32) -> AttendWork {
        AttendWork { len, to: len, queries: 1, ..AttendWork::default() }
    }

    /// Checks that every entry of every kv head is read once, for all columns.
    fn check(heads: &[AttendWork], plan: &Plan, blocks: usize) {
        let read: i32 = plan.work.iter().map(|work| work.to - work.from).sum();
        let all: i32 = heads.iter().map(|head| head.to - head.from).sum();
        assert_eq!(read, all * blocks as i32);
        let part = |work: &AttendWork| (work.first_part + work.part) as usize;
        let mut parts: Vec<_> = plan.work.iter().map(part).collect();
        parts.sort_unstable();
        assert!(parts.into_iter().eq(0..plan.parts));
        let first = plan.work.iter().filter(|work| work.part == 0);
        assert_eq!(first.clone().map(|work| work.parts as usize).sum::<usize>(), plan.parts);
        let mut merges: Vec<_> = first.map(|work| work.merge as usize).collect();
        merges.sort_unstable();
        assert!(merges.into_iter().eq(0..plan.merges));
    }

    #[test]
    fn a_long_sequence_does_not_wait() {
        let mut heads = vec![head(2048); 31 * 8];
        heads.splice(80..80, vec![head(131_072); 8]);
        let plan = Plan::new(&heads, 4, 4, 528);
        check(&heads, &plan, 1);
        let longest = plan.work.iter().map(|work| work.to - work.from).max().unwrap();
        assert!(longest <= 2 * (31 * 8 * 2048 + 8 * 131_072) / 528, "{longest}");
    }

    #[test]
    fn equal_heads_fill_the_device() {
        for rows in [1, 8, 64, 100, 1000] {
            let heads = vec![head(32_000); rows];
            let plan = Plan::new(&heads, 8, 4, 264);
            check(&heads, &plan, 2);
            assert!(plan.work.len() <= 264 + 2 * rows, "{}", plan.work.len());
        }
    }

    #[test]
    fn short_heads_have_few_parts() {
        let page = PAGE as i32;
        let parts = |len| Plan::new(&[head(len)], 4, 4, 264).parts;
        assert_eq!([1, 3 * page, 4 * page, 32 * page].map(parts), [1, 1, 2, 16]);
    }

    #[test]
    fn heads_without_entries_have_a_part() {
        let plan = Plan::new(&[head(0)], 1, 1, 264);
        assert_eq!((plan.work.len(), plan.parts), (1, 1));
        let plan = plan.padded(3);
        assert_eq!((plan.work.len(), plan.work[2].queries), (3, 0));
    }
}
