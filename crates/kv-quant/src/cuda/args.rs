//! The kernels' arguments, with the fields of the structs in kernels/*.cuh.

longctx_cuda::args! {
    /// The memory of a sequence's kv head, by device addresses.
    pub struct KvHead: 32, valid at 24 {
        /// Block table: record addresses, u64.
        pub table: u64,
        /// The ring's keys, `[ring, head_dim]`, in the dtype of the queries.
        pub ring_k: u64,
        /// The ring's values.
        pub ring_v: u64,
        /// Which slots are not holes: for each 32 slots a u64, whose lower half has a bit per slot,
        /// and whose upper half is the number of entries before them. 0: there are no holes.
        pub valid: u64,
    }
}

longctx_cuda::args! {
    /// One thread block's share of a kv head: some of its records, or its ring, for a few columns.
    /// Column c is query `c % queries` of the kv head's query head `c / queries`. An item without
    /// queries is skipped, so that the list of a captured launch may be longer than needed.
    ///
    /// [`AttendKernel::plan`](super::AttendKernel::plan) makes the items from one for each kv head,
    /// and sets the fields from `first_column` to `merge`. [`Kernels::sums`](super::Kernels::sums)
    /// reads one item for each kv head.
    pub struct Work: 72, head at 8, holes at 68 {
        /// Offset of the kv head's sums in the output of [`Kernels::sums`](super::Kernels::sums),
        /// in elements.
        pub sums: i64,
        /// Index of the kv head's memory in [`AttendArgs::kv_heads`].
        pub head: i32,
        /// Slots in records.
        pub packed: i32,
        /// Slots in the ring.
        pub residual: i32,
        /// Ring position of the oldest of them. Later ones follow, modulo the ring's capacity.
        pub ring_start: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// Token index of the sequence's first query.
        pub first_token: i32,
        /// First column.
        pub first_column: i32,
        /// First record of the share; negative: the ring.
        pub from: i32,
        /// End of the share (exclusive).
        pub to: i32,
        /// Index of the first partial result of the kv head and columns.
        pub first_part: i32,
        /// The share's index among them.
        pub part: i32,
        /// Their number.
        pub parts: i32,
        /// Index in [`AttendArgs::arrived`].
        pub merge: i32,
        /// Slots that [`KvHead::valid`] covers, a multiple of 32. Later slots are not holes.
        pub valid_slots: i32,
        /// Number of holes.
        pub holes: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`AttendKernel::launch`](super::AttendKernel::launch) and
    /// [`Kernels::sums`](super::Kernels::sums).
    ///
    /// `columns` is [`AttendKernel::columns`](super::AttendKernel::columns), and `parts` and
    /// `merges` are those of the [`Plan`](super::Plan).
    ///
    /// Addresses are device addresses; 0 means none.
    pub struct AttendArgs: 112, heads at 64, scale at 92 {
        /// `[tokens, heads, head_dim]`, contiguous, of dtype `kind`.
        pub q: u64,
        /// Output, `[tokens, heads, head_dim]`, of dtype `out_kind`. Sums: f32, `[heads_per_kv,
        /// slots]` for each kv head, 0 for holes.
        pub out: u64,
        /// Output, `[tokens, heads]`, f32: the natural log-sum-exp; -inf where nothing is seen. 0:
        /// not written. Sums read it.
        pub lse: u64,
        /// Workspace `[parts, columns, head_dim]`, f32. Not used by sums.
        pub part_out: u64,
        /// Workspace `[parts, columns]`, f32. Not used by sums.
        pub part_lse: u64,
        /// Workspace `[merges]`, u32: 0 before and after the launch. Not used by sums.
        pub arrived: u64,
        /// Array of [`Work`].
        pub work: u64,
        /// Array of [`KvHead`], one for each kv head of each sequence.
        pub kv_heads: u64,
        /// Query heads.
        pub heads: i32,
        /// Query heads of a kv head.
        pub heads_per_kv: i32,
        /// Capacity of a ring.
        pub ring: i32,
        /// 1: causal mask; the last entries of a sequence belong to its queries.
        pub causal: i32,
        /// Sliding window: entries that a query sees up to its own, if causal. 0: no limit.
        pub window: i32,
        /// Dtype of queries and rings. 0: f16; 1: bf16.
        pub kind: i32,
        /// Dtype of the output. 0: f16; 1: bf16; 2: f32.
        pub out_kind: i32,
        /// Softmax scale of the scores q·k; positive.
        pub scale: f32,
        /// Scores s become `soft_cap * tanh(s / soft_cap)`. 0: they stay as they are.
        pub soft_cap: f32,
        /// Set by the launch.
        pub rotated: i32,
        /// Set by the launch.
        pub key_scale: f32,
        /// Set by the launch.
        pub value_scale: f32,
    }
}

longctx_cuda::args! {
    /// The entries to append to a kv head. Slots from `first_new` on are in the call's tensors,
    /// earlier ones in the ring. Slot s has ring position `(s + shift) % ring`.
    pub struct FillRow: 72, first_new at 24 {
        /// Bits for the report, within [`Report::TAG`](super::Report::TAG).
        pub tag: u64,
        /// Index of the kv head's memory in [`FillArgs::kv_heads`].
        pub head: i32,
        /// Index of the sequence's word in [`FillArgs::status`].
        pub status: i32,
        /// The kv head in the call's tensors.
        pub kv_head: i32,
        /// Token of slot `first_new` in the call's tensors.
        pub first_token: i32,
        /// First slot in the call's tensors.
        pub first_new: i32,
        /// See above.
        pub shift: i32,
        /// First new slot to copy to the ring.
        pub move_from: i32,
        /// End of these slots (exclusive).
        pub move_to: i32,
        /// Block table index of the first new record. Earlier ones are in the table.
        pub first_new_record: i32,
        /// Index of its address in [`FillArgs::new_records`].
        pub new_records: i32,
        /// First record whose keys are packed.
        pub key_record: i32,
        /// Number of these records.
        pub key_records: i32,
        /// First [tile](super::TILE) of slots whose values are packed.
        pub value_tile: i32,
        /// Number of these tiles.
        pub value_tiles: i32,
        /// 1: the packed keys are also written back to the ring as they are dequantized. Used for
        /// keys that are packed before their values.
        pub round: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`Kernels::pack`](super::Kernels::pack) and
    /// [`Kernels::fill_rings`](super::Kernels::fill_rings).
    /// Addresses and strides, which count elements, are multiples of 16 bytes.
    pub struct FillArgs: 112, ring at 80 {
        /// Array of [`FillRow`], one for each kv head of each sequence.
        pub rows: u64,
        /// Array of [`KvHead`].
        pub kv_heads: u64,
        /// New keys, `[tokens, kv_heads, head_dim]`, in the dtype of the rings.
        pub new_k: u64,
        /// New values.
        pub new_v: u64,
        /// Addresses of the new records, u64. Packing writes them to the block tables.
        pub new_records: u64,
        /// Words, u64, to which packing writes a [`Report`](super::Report) of a sequence's group
        /// that cannot be quantized. They can be in pinned host memory.
        pub status: u64,
        /// Token stride of `new_k`.
        pub k_token: i64,
        /// Head stride of `new_k`.
        pub k_head: i64,
        /// Token stride of `new_v`.
        pub v_token: i64,
        /// Head stride of `new_v`.
        pub v_head: i64,
        /// Capacity of a ring.
        pub ring: i32,
        /// Dtype of new entries and rings. 0: f16; 1: bf16.
        pub kind: i32,
        /// Set by the launch.
        pub pieces: i32,
        /// Set by the launch.
        pub rotated: i32,
        /// Set by the launch.
        pub f16_steps: i32,
        /// Set by the launch.
        pub key_scale: f32,
        /// Set by the launch.
        pub value_scale: f32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`Kernels::unpack`](super::Kernels::unpack).
    pub struct UnpackArgs: 56, first at 24 {
        /// Block table of a kv head.
        pub table: u64,
        /// Output: keys `[entries, head_dim]`, or a ring `[ring, head_dim]` in which slot s has
        /// position `(s + shift) % ring`.
        pub k: u64,
        /// Output: values.
        pub v: u64,
        /// First slot to read.
        pub first: i32,
        /// Number of slots.
        pub entries: i32,
        /// Capacity of the ring. 0: the outputs are not rings.
        pub ring: i32,
        /// See `k`.
        pub shift: i32,
        /// Dtype of the outputs. 0: f16; 1: bf16; 2: f32.
        pub kind: i32,
        /// Set by the launch.
        pub rotated: i32,
        /// Set by the launch.
        pub key_scale: f32,
        /// Set by the launch.
        pub value_scale: f32,
    }
}

longctx_cuda::args! {
    /// The slots of a ring that [`Kernels::compact_rings`](super::Kernels::compact_rings) keeps.
    pub struct CompactRow: 48, count at 24 {
        /// The ring's keys, see [`KvHead::ring_k`].
        pub ring_k: u64,
        /// The ring's values.
        pub ring_v: u64,
        /// The kept slots, u32, in order. None moves to a later slot.
        pub slots: u64,
        /// Number of kept slots.
        pub count: i32,
        /// New slot of the first of them. The others follow.
        pub first: i32,
        /// Slot s has ring position `(s + shift) % ring`.
        pub shift: i32,
        /// Capacity of the ring.
        pub ring: i32,
        /// 16-byte pieces of a slot: head_dim / 8.
        pub pieces: i32,
        /// Padding.
        pub unused: i32,
    }
}
