//! Splits attention over the device's thread blocks. The plan is made on the host, from lengths
//! known there.

use super::Work;

/// Must equal the constant in kernels/args.cuh.
const MAX_SPLITS: usize = 127;

/// Number of entries per thread block and wave from which on a further split costs less than idle
/// multiprocessors.
const MIN_ENTRIES: usize = 4096;

/// The work items of a launch of attention. See
/// [`AttendKernel::plan`](super::AttendKernel::plan).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// The work items.
    pub work: Vec<Work>,
    /// Number of partial results.
    pub parts: usize,
    /// Number of sets of partial results to merge.
    pub merges: usize,
}

/// The properties of a launch that determine its plan, besides the lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sizes {
    /// Entries per record.
    pub group: usize,
    /// Query heads per kv head.
    pub heads_per_kv: usize,
    /// Columns per thread block.
    pub columns: usize,
    /// Warps per thread block; none should be idle.
    pub warps: usize,
    /// Number of thread blocks that the device runs concurrently.
    pub slots: usize,
    /// The sliding window, if causal.
    pub window: Option<usize>,
}

/// A kv head with some columns.
#[derive(Clone, Copy)]
struct Row {
    work: Work,
    first: usize,
    end: usize,
}

impl Plan {
    /// Splits the records of all rows evenly over the concurrent thread blocks, and longer rows
    /// over more of them, so that a long sequence among short ones does not dominate the time.
    /// Rings are last, because they take little time.
    pub(crate) fn new(heads: &[Work], sizes: Sizes) -> Self {
        let mut rows = Vec::with_capacity(heads.len());
        for head in heads {
            let (first, end) = records(head, sizes);
            let columns = sizes.heads_per_kv * head.queries as usize;
            for first_column in (0..columns).step_by(sizes.columns) {
                let work = Work { first_column: first_column as i32, ..*head };
                rows.push(Row { work, first, end });
            }
        }
        let total: usize = rows.iter().map(|row| row.end - row.first).sum();
        let budget = budget(&rows, total, sizes);
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_by_key(|&row| {
            let Row { first, end, .. } = rows[row as usize];
            std::cmp::Reverse(end - first)
        });
        let mut plan = Self::default();
        plan.work.reserve(budget + 2 * rows.len());
        let mut rings = Vec::with_capacity(rows.len());
        for row in order {
            let Row { work, first, end } = rows[row as usize];
            let records = end - first;
            let splits = splits_of(records, budget, total).min(records.div_ceil(sizes.warps));
            let splits = splits.clamp(usize::from(records > 0), MAX_SPLITS);
            // A row without entries also has a work item, which writes an empty result.
            let ring = work.residual > 0 || splits == 0;
            let parts = splits + usize::from(ring);
            let work = Work {
                first_part: plan.parts as i32,
                parts: parts as i32,
                merge: plan.merges as i32,
                ..work
            };
            plan.work.extend((0..splits).map(|part| Work {
                from: (first + records * part / splits) as i32,
                to: (first + records * (part + 1) / splits) as i32,
                part: part as i32,
                ..work
            }));
            if ring {
                rings.push(Work { from: -1, to: -1, part: splits as i32, ..work });
            }
            plan.parts += parts;
            plan.merges += 1;
        }
        plan.work.append(&mut rings);
        plan
    }

    /// Pads the list to at least `count` work items, for a launch captured with this length.
    #[must_use]
    pub fn padded(mut self, count: usize) -> Self {
        self.work.resize(count.max(self.work.len()), Work::default());
        self
    }
}

/// Returns the number of thread blocks for the records of all rows.
///
/// Rings run concurrently with the records, unless half of the device would be idle for long.
/// Records take two waves if one would leave a fifth of the device idle for long.
fn budget(rows: &[Row], total: usize, sizes: Sizes) -> usize {
    let used = |budget: usize| -> usize {
        rows.iter().map(|row| splits_of(row.end - row.first, budget, total).max(1)).sum()
    };
    let mut budget = sizes.slots.saturating_sub(rows.len()).max(sizes.slots * 4 / 5);
    for waves in [1, 2] {
        let (blocks, more) = (used(budget), waves * sizes.slots);
        let idle = match waves {
            1 => 2 * blocks <= sizes.slots,
            _ => 5 * blocks < 4 * blocks.next_multiple_of(sizes.slots),
        };
        let entries = waves * MIN_ENTRIES * used(more);
        if idle && total * sizes.group >= entries && used(more) > blocks {
            budget = more;
        }
    }
    budget
}

/// Returns the thread blocks of a row with some of the `total` records.
fn splits_of(records: usize, budget: usize, total: usize) -> usize {
    records * budget / total.max(1)
}

/// Returns the range of records that contain entries visible to a head's queries.
fn records(head: &Work, sizes: Sizes) -> (usize, usize) {
    let (packed, residual) = (head.packed as usize, head.residual as usize);
    let end = packed.div_ceil(sizes.group);
    let seen = |window| (packed + residual + 1).saturating_sub(head.queries as usize + window);
    // With holes, the entries of a window extend farther back.
    let window = sizes.window.filter(|_| head.holes == 0);
    (window.map_or(0, |window| seen(window) / sizes.group).min(end), end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> Sizes {
        Sizes { group: 32, heads_per_kv: 4, columns: 8, warps: 8, slots: 264, window: None }
    }

    fn head(packed: i32) -> Work {
        Work { packed, residual: 100, queries: 1, ..Work::default() }
    }

    /// Checks that every record of every head is read once, and every partial result is computed
    /// once.
    fn check(heads: &[Work], plan: &Plan) {
        let mut seen = vec![0; plan.parts];
        let mut records = vec![0; plan.merges];
        for work in &plan.work {
            seen[(work.first_part + work.part) as usize] += 1;
            records[work.merge as usize] += (work.to - work.from) as usize;
        }
        assert!(seen.iter().all(|&count| count == 1));
        let total: usize = heads.iter().map(|head| (head.packed as usize).div_ceil(32)).sum();
        assert_eq!(records.iter().sum::<usize>(), total);
    }

    #[test]
    fn equal_heads_fill_the_device_once() {
        for rows in [1, 8, 32, 64] {
            let heads = vec![head(32_768); rows];
            let plan = Plan::new(&heads, sizes());
            check(&heads, &plan);
            assert!((128..=264).contains(&plan.work.len()), "{}", plan.work.len());
        }
    }

    #[test]
    fn long_heads_fill_one_wave_or_two() {
        // (heads, entries, thread blocks per head)
        for (rows, entries, pieces) in [
            (64, 3968, 1),
            (64, 32_640, 2),
            (128, 16_256, 1),
            (256, 130_944, 1),
            (160, 130_944, 1),
            (85, 130_944, 3),
        ] {
            let heads = vec![head(entries); rows];
            let plan = Plan::new(&heads, Sizes { slots: 132, ..sizes() });
            check(&heads, &plan);
            assert_eq!(plan.work.len(), rows * (pieces + 1), "{rows} x {entries}");
        }
    }

    #[test]
    fn a_long_sequence_does_not_wait() {
        let mut heads = vec![head(2048); 31 * 8];
        heads.splice(80..80, vec![head(131_072); 8]);
        let plan = Plan::new(&heads, sizes());
        check(&heads, &plan);
        let longest = plan.work.iter().map(|work| work.to - work.from).max().unwrap();
        assert!(plan.work.len() <= 264 + 2 * heads.len() && plan.parts == plan.work.len());
        let total = (31 * 8 * 64 + 8 * 4096) / 264;
        assert!(longest <= 2 * total, "{longest} records in a block, {total} on average");
    }

    #[test]
    fn heads_without_entries_have_a_block() {
        let heads = [Work { queries: 1, ..Work::default() }];
        let plan = Plan::new(&heads, sizes());
        assert_eq!((plan.work.len(), plan.work[0].from, plan.work[0].parts), (1, -1, 1));
        let plan = plan.padded(3);
        assert_eq!((plan.work.len(), plan.work[2].queries, plan.parts), (3, 0, 1));
    }
}
