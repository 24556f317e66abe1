//! What the kernels take: field for field the structs of kernels/*.cuh. Pointers are device addresses, 0 for none.

use candle_core::cuda::cudarc::driver::DeviceRepr;

#[repr(C)]
#[derive(Debug, Default)]
pub struct AttendArgs {
    pub q: u64,
    pub packed: u64,
    pub residual_k: u64,
    pub residual_v: u64,
    pub out: u64,
    pub lse: u64,
    pub part_out: u64,
    pub part_lse: u64,
    pub arrived: u64,
    pub lens: u64,
    pub packed_stride: i64,
    pub packed_len: i32,
    pub residual_len: i32,
    pub ring_start: i32,
    pub ring: i32,
    pub kv_heads: i32,
    pub heads_per_kv: i32,
    pub queries: i32,
    pub splits: i32,
    pub causal: i32,
    pub window: i32,
    pub kind: i32,
    pub out_kind: i32,
    pub scale: f32,
    pub soft_cap: f32,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct QuantizeArgs {
    pub k: u64,
    pub v: u64,
    pub packed: u64,
    pub rounded: u64,
    pub status: u64,
    pub packed_stride: i64,
    pub pitch: i64,
    pub start: i32,
    pub ring: i32,
    pub key_offset: i32,
    pub key_record: i32,
    pub key_records: i32,
    pub value_offset: i32,
    pub value_tile: i32,
    pub value_tiles: i32,
    pub kind: i32,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct UnpackArgs {
    pub packed: u64,
    pub k: u64,
    pub v: u64,
    pub packed_stride: i64,
    pub rows: i32,
    pub tokens: i32,
    pub keys: i32,
    pub values: i32,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct MoveArgs {
    pub from_k: u64,
    pub from_v: u64,
    pub to_k: u64,
    pub to_v: u64,
    pub from_pitch: i64,
    pub to_pitch: i64,
    pub from_start: i32,
    pub from_ring: i32,
    pub to_start: i32,
    pub to_ring: i32,
    pub pieces: i32,
}

// SAFETY: all four are plain numbers in C's layout, as the kernels read them.
unsafe impl DeviceRepr for AttendArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for QuantizeArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for UnpackArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for MoveArgs {}
