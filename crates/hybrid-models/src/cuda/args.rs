//! Kernel arguments, with the same layout as the structs of kernels/args.cuh. Pointers are device
//! addresses, 0 for none; `*_row` are row strides in elements.

longctx_cuda::args! {
    pub struct SelectiveScan: 120, tokens at 80 {
        pub u: u64,
        pub steps: u64,
        pub z: u64,
        pub b: u64,
        pub c: u64,
        pub a: u64,
        pub d: u64,
        pub bias: u64,
        pub state: u64,
        pub y: u64,
        pub tokens: i32,
        pub channels: i32,
        pub states: i32,
        pub u_row: i32,
        pub steps_row: i32,
        pub z_row: i32,
        pub b_row: i32,
        pub c_row: i32,
        pub y_row: i32,
    }
}

longctx_cuda::args! {
    pub struct Ssd: 128, tokens at 80 {
        pub x: u64,
        pub b: u64,
        pub c: u64,
        pub steps: u64,
        pub a: u64,
        pub d: u64,
        pub bias: u64,
        pub state: u64,
        pub y: u64,
        pub scratch: u64,
        pub tokens: i32,
        pub heads: i32,
        pub head_dim: i32,
        pub groups: i32,
        pub states: i32,
        pub x_row: i32,
        pub b_row: i32,
        pub c_row: i32,
        pub steps_row: i32,
        pub y_row: i32,
        pub step_min: f32,
        pub step_max: f32,
    }
}

longctx_cuda::args! {
    pub struct Wkv: 96, tokens at 64 {
        pub r: u64,
        pub k: u64,
        pub v: u64,
        pub w: u64,
        pub decay: u64,
        pub u: u64,
        pub state: u64,
        pub y: u64,
        pub tokens: i32,
        pub heads: i32,
        pub dim: i32,
        pub r_row: i32,
        pub k_row: i32,
        pub v_row: i32,
        pub w_row: i32,
        pub y_row: i32,
    }
}

longctx_cuda::args! {
    pub struct Wkv7: 144, tokens at 104 {
        pub r: u64,
        pub key: u64,
        pub v: u64,
        pub w: u64,
        pub a: u64,
        pub decay: u64,
        pub rate_bias: u64,
        pub removal_scale: u64,
        pub key_rate: u64,
        pub bonus_weight: u64,
        pub state: u64,
        pub y: u64,
        pub bonus: u64,
        pub tokens: i32,
        pub heads: i32,
        pub dim: i32,
        pub r_row: i32,
        pub key_row: i32,
        pub v_row: i32,
        pub w_row: i32,
        pub a_row: i32,
        pub y_row: i32,
    }
}

longctx_cuda::args! {
    pub struct Wkv4: 88, tokens at 64 {
        pub k: u64,
        pub v: u64,
        pub decay: u64,
        pub first: u64,
        pub numerator: u64,
        pub denominator: u64,
        pub largest: u64,
        pub y: u64,
        pub tokens: i32,
        pub channels: i32,
        pub state_entry: i32,
        pub k_row: i32,
        pub v_row: i32,
        pub y_row: i32,
    }
}

longctx_cuda::args! {
    pub struct RgLru: 120, batch at 80 {
        pub x: u64,
        pub r: u64,
        pub i: u64,
        pub gate: u64,
        pub r_bias: u64,
        pub i_bias: u64,
        pub decay: u64,
        pub state: u64,
        pub y: u64,
        pub scratch: u64,
        pub batch: i32,
        pub tokens: i32,
        pub channels: i32,
        pub x_row: i32,
        pub gate_row: i32,
        pub y_row: i32,
        pub z_row: i32,
        pub block: i32,
        pub block_stride: i32,
        pub first: i32,
    }
}

longctx_cuda::args! {
    pub struct Conv: 64, tokens at 40 {
        pub x: u64,
        pub weight: u64,
        pub bias: u64,
        pub state: u64,
        pub y: u64,
        pub tokens: i32,
        pub channels: i32,
        pub taps: i32,
        pub silu: i32,
        pub x_row: i32,
        pub y_row: i32,
    }
}

longctx_cuda::args! {
    pub struct Norm: 48, channels at 40 {
        pub x: u64,
        pub added: u64,
        pub weight: u64,
        pub bias: u64,
        pub y: u64,
        pub channels: i32,
        pub eps: f32,
    }
}

longctx_cuda::args! {
    pub struct GatedNorm: 48, groups at 32 {
        pub x: u64,
        pub gate: u64,
        pub weight: u64,
        pub y: u64,
        pub groups: i32,
        pub group: i32,
        pub gate_row: i32,
        pub eps: f32,
    }
}

longctx_cuda::args! {
    pub struct HeadNorm: 80, rows at 56 {
        pub x: u64,
        pub gate: u64,
        pub weight: u64,
        pub bias: u64,
        pub bonus: u64,
        pub v: u64,
        pub y: u64,
        pub rows: i32,
        pub heads: i32,
        pub dim: i32,
        pub silu: i32,
        pub eps: f32,
    }
}

longctx_cuda::args! {
    pub struct Shift: 64, tokens at 48 {
        pub x: u64,
        pub before: u64,
        pub last: u64,
        pub weights: u64,
        pub more: u64,
        pub y: u64,
        pub tokens: i32,
        pub channels: i32,
        pub mixes: i32,
    }
}

longctx_cuda::args! {
    pub struct Gate: 64, rows at 40 {
        pub gate: u64,
        pub x: u64,
        pub gate_bias: u64,
        pub x_bias: u64,
        pub y: u64,
        pub rows: i32,
        pub channels: i32,
        pub gate_row: i32,
        pub x_row: i32,
        pub function: i32,
    }
}

longctx_cuda::args! {
    pub struct Blend: 48, rows at 40 {
        pub x: u64,
        pub other: u64,
        pub share: u64,
        pub bias: u64,
        pub y: u64,
        pub rows: i32,
        pub channels: i32,
    }
}

longctx_cuda::args! {
    pub struct Bias: 24, rows at 16 {
        pub y: u64,
        pub bias: u64,
        pub rows: i32,
        pub channels: i32,
    }
}
