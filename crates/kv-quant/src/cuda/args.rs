//! The kernels' arguments, with the fields of the structs in kernels/*.cuh. Pointers are device
//! addresses; 0 means none.

longctx_cuda::args! {
    pub struct Work: 104, sums at 32, packed at 40 {
        pub table: u64,
        pub ring_k: u64,
        pub ring_v: u64,
        pub live: u64,
        pub sums: i64,
        pub packed: i32,
        pub residual: i32,
        pub ring_start: i32,
        pub kv_head: i32,
        pub queries: i32,
        pub first_token: i32,
        pub first_column: i32,
        pub from: i32,
        pub to: i32,
        pub first_part: i32,
        pub part: i32,
        pub parts: i32,
        pub join: i32,
        pub live_slots: i32,
        pub holes: i32,
        pub unused: i32,
    }
}

longctx_cuda::args! {
    pub struct AttendArgs: 104, heads at 56, scale at 84 {
        pub q: u64,
        pub out: u64,
        pub lse: u64,
        pub part_out: u64,
        pub part_lse: u64,
        pub arrived: u64,
        pub work: u64,
        pub heads: i32,
        pub heads_per_kv: i32,
        pub ring: i32,
        pub causal: i32,
        pub window: i32,
        pub kind: i32,
        pub out_kind: i32,
        pub scale: f32,
        pub soft_cap: f32,
        pub rotated: i32,
        pub key_scale: f32,
        pub value_scale: f32,
    }
}

longctx_cuda::args! {
    pub struct FillRow: 104, first_new at 64 {
        pub ring_k: u64,
        pub ring_v: u64,
        pub new_k: u64,
        pub new_v: u64,
        pub table: u64,
        pub fresh: u64,
        pub status: u64,
        pub tag: u64,
        pub first_new: i32,
        pub shift: i32,
        pub move_from: i32,
        pub move_to: i32,
        pub fresh_record: i32,
        pub key_record: i32,
        pub key_records: i32,
        pub value_tile: i32,
        pub value_tiles: i32,
        pub round: i32,
    }
}

longctx_cuda::args! {
    pub struct FillArgs: 48, ring at 16 {
        pub rows: u64,
        pub stride: i64,
        pub ring: i32,
        pub kind: i32,
        pub pieces: i32,
        pub rotated: i32,
        pub f16_steps: i32,
        pub key_scale: f32,
        pub value_scale: f32,
        pub unused: i32,
    }
}

longctx_cuda::args! {
    pub struct UnpackArgs: 56, first at 24 {
        pub table: u64,
        pub k: u64,
        pub v: u64,
        pub first: i32,
        pub entries: i32,
        pub ring: i32,
        pub shift: i32,
        pub kind: i32,
        pub rotated: i32,
        pub key_scale: f32,
        pub value_scale: f32,
    }
}

longctx_cuda::args! {
    pub struct KeepRow: 48, count at 24 {
        pub ring_k: u64,
        pub ring_v: u64,
        pub slots: u64,
        pub count: i32,
        pub first: i32,
        pub shift: i32,
        pub ring: i32,
        pub pieces: i32,
        pub unused: i32,
    }
}
