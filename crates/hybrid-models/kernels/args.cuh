// The arguments of the kernels: one struct each, passed by value, pointers first, then numbers of 4
// bytes. The Rust side mirrors them.
//
// - T is the dtype of an entry point: `_f16`, `_bf16` or `_f32`. Arrays marked f32, or declared as
//   float, are f32 in every entry point.
// - States are f32, read and written in place, in the layout of the crate's `State`.
// - `*_row` is the stride between the rows of two tokens, in elements of T, so that an input may be
//   columns of a wider matrix. The rows of a batch's entries are consecutive (row = entry *
//   tokens + token). tokens >= 1.
//
// Every kernel has two entry points per dtype, with the same struct and a grid each: `NAME_T` for
// the shapes given below, and `NAME_generic_T` for all others, and for few tokens where the comment
// says so. `/` rounds up in grids. A kernel with dynamic shared memory needs
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES to be set first.
#pragma once
#include <cstddef>

namespace hybrid {

// Mamba: h <- exp(dt A) h + dt B u, y = (C h + D u) silu(z), dt = softplus(steps + bias).
//
// - selective_scan_T: states == 16. Grid (channels / 32, batch), 128 threads, SCAN_SHARED bytes of
//   dynamic shared memory. Prefill and decode.
// - selective_scan_few_T: the same in grid (channels / 40, batch), 320 threads, SCAN_FEW_SHARED
//   bytes. Faster for many tokens if no multiprocessor gets two of these blocks.
// - selective_scan_generic_T: states <= 256. Grid (channels / 4, batch), 128 threads.
struct SelectiveScan {
    const void *u, *steps, *z;  // T, rows of `channels`; z may be null: no gate
    const void *b, *c;          // T, rows of `states`
    const float *a;             // [channels][states]: -exp(A_log)
    const float *d, *bias;      // [channels]
    float* state;               // [batch][channels][states]
    void* y;                    // T, rows of `channels`; may alias u
    int tokens, channels, states;
    int u_row, steps_row, z_row, b_row, c_row, y_row;
};
// Devices of 8.6 and 8.9 have 101376 at most.
constexpr int SCAN_SHARED = 30720, SCAN_FEW_SHARED = 118784;

// Mamba-2: H <- e^(dt a) H + dt B x', y = H' C + D x for each head, dt = min(max(softplus(steps +
// bias), step_min), step_max).
//
// - ssd_T (f16, bf16): head_dim == 64, states == 64 or 128, all rows and pointers multiples of 8
//   elements. For 16 tokens or more. Inputs of products are rounded to T, the
//   state is kept in f32. Grid (2, heads, batch), 256 threads, SSD_SHARED_64 or SSD_SHARED_128
//   bytes of dynamic shared memory.
// - ssd_wgmma_T: the same, for compute capability 9.0 only (code for sm_90a; does nothing
//   elsewhere), in clusters of two blocks. Launch ssd_group_tiles_T first, with the same struct:
//   grid (tokens / 64, groups, batch), 128 threads. Grid (groups * (heads / groups / 2) * 2,
//   batch), 384 threads, SSD_WGMMA_SHARED_64 or SSD_WGMMA_SHARED_128 bytes of dynamic shared
//   memory.
// - ssd_generic_T: states <= 256, any head_dim. Grid (head_dim / 32, heads, batch), 128 threads.
//   Also for decode.
struct Ssd {
    const void* x;                // T, rows of heads * head_dim
    const void *b, *c;            // T, rows of groups * states
    const void* steps;            // T, rows of `heads`
    const float *a, *d, *bias;    // [heads]; a: -exp(A_log)
    float* state;                 // [batch][heads][states][head_dim]
    void* y;                      // T, rows of heads * head_dim; must not alias x
    // For ssd_wgmma: batch * groups * (tokens / 64 + 1) times SSD_GROUP_TILES_64 or
    // SSD_GROUP_TILES_128 bytes, 16-aligned
    void* scratch;
    int tokens, heads, head_dim, groups, states;
    int x_row, b_row, c_row, steps_row, y_row;
    float step_min, step_max;
};
// Devices of 8.6 and 8.9 have 101376 at most.
constexpr int SSD_SHARED_64 = 58888, SSD_SHARED_128 = 101896;
constexpr int SSD_WGMMA_SHARED_64 = 125024, SSD_WGMMA_SHARED_128 = 174176;
constexpr int SSD_GROUP_TILES_64 = 26624, SSD_GROUP_TILES_128 = 43008;

// RWKV-5 and 6: y = S' r + (r . (u o k)) v, then S <- diag(w) S + k v' for each head. w is `decay`
// in RWKV-5 and e^-e^(w + decay) in RWKV-6, computed in f32.
//
// - wkv5_T, wkv6_T (f16, bf16): dim == 64, all rows and pointers multiples of 8 elements. For 16
//   tokens or more. Inputs of products are rounded to T. The state is kept in f32, and may exceed
//   the range of T. Grid (1 or 2, heads, batch): 2 blocks per head are faster if all of them fit
//   the device at once, otherwise 1. 256 or 192 threads, or 128 with 2 blocks per head.
//   WKV_SHARED + (threads / 32 - 2) * WKV_PRODUCER_SHARED bytes of dynamic shared memory.
// - wkv5_generic_T, wkv6_generic_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. Also
//   for decode.
struct Wkv {
    const void *r, *k, *v;  // T, rows of heads * dim
    // T, rows of heads * dim: only for 6: the token's part of the decay, before e^-e^
    const void* w;
    const float* decay;     // [heads][dim]: for 5: the decay, 0 to 1; for 6: added to w
    const float* u;         // [heads][dim]
    float* state;           // [batch][heads][dim keys][dim values]
    void* y;                // T, rows of heads * dim; must not alias an input
    int tokens, heads, dim;
    int r_row, k_row, v_row, w_row, y_row;
};
constexpr int WKV_SHARED = 2688, WKV_PRODUCER_SHARED = 28160;

// RWKV-7's delta rule, and its layer's preparation of the keys. For each head, with rate =
// sigmoid(a + rate_bias),
//
//     removal = key o removal_scale, divided by its length (at least 1e-12)
//     k = key o (1 + (rate - 1) o key_rate),  added = rate o removal
//     w = e^(-e^(-1/2) sigmoid(w + decay))
//     S <- diag(w) S - added (removal' S) + k v',  y = S' r
//     bonus = sum of r o k o bonus_weight
//
// - wkv7_T (f16, bf16): dim == 64, all rows and pointers multiples of 8 elements. For 16 tokens or
//   more. Computes in f16 for both dtypes: r beyond 500 and keys beyond 8000 overflow at the
//   strongest decays; v beyond 65504 and states beyond a million overflow at any. Grid (1 or 2,
//   heads, batch): 2 blocks per head are faster if all of them fit the device at once, otherwise 1.
//   384 threads, WKV7_SHARED bytes of dynamic shared memory, or with 2 blocks per head at least
//   WKV7_HALF_SHARED.
// - wkv7_f32: the same shapes, token by token. Grid (2, heads, batch), 128 threads.
// - wkv7_generic_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. Also for decode.
struct Wkv7 {
    // T, rows of heads * dim; w, a: before bias and sigmoid
    const void *r, *key, *v, *w, *a;
    const float *decay, *rate_bias, *removal_scale, *key_rate, *bonus_weight;  // [heads][dim]
    // [batch][heads][dim keys][dim values]
    float* state;
    // T, rows of heads * dim; must not alias an input
    void* y;
    // [batch][tokens][heads]; may be null
    float* bonus;
    int tokens, heads, dim;
    int r_row, key_row, v_row, w_row, a_row, y_row;
};
// Devices of 8.0 have 166912 at most, those of 8.6 and 8.9 101376.
constexpr int WKV7_SHARED = 169600, WKV7_HALF_SHARED = 121184;

// RWKV-4, each array [channels]; see src/rwkv/v4.rs. y is the mean of the values, weighted by
// e^key. Grid (channels / 128, batch), 128 threads. One entry point per dtype.
struct Wkv4 {
    const void *k, *v;            // T, rows of `channels`
    const float *decay, *first;   // [channels]: -e^decay; added to the key of the token itself
    // State; `state_entry` is the stride between entries.
    float *numerator, *denominator, *largest;
    void* y;                      // T, rows of `channels`; may alias v
    int tokens, channels, state_entry;
    int k_row, v_row, y_row;
};

// RG-LRU: log a = decay sigmoid(r + r_bias), h <- a h + sqrt(1 - a^2) sigmoid(i + i_bias) x, y = h
// gelu(gate).
//
// Channel c of a row of the gates r and i is at offset (c / block) * block_stride + row *
// gate_row + c % block. So the product with a block-diagonal matrix may keep its layout,
// [blocks][rows][block]. For plain rows, block = channels and block_stride = 0.
//
// rg_lru_T: grid (channels / 64 * tokens / 64 * batch), 256 threads. One entry point per dtype, for
// all shapes, prefill and decode.
struct RgLru {
    const void* x;                              // T, rows of `channels`
    const void *r, *i;                          // T, the gates before bias and sigmoid
    // T, rows of `channels`, before the GELU (tanh); may be null: no gate
    const void* gate;
    const float *r_bias, *i_bias;               // [channels]
    const float* decay;                         // [channels]: -8 softplus(Lambda)
    float* state;                               // [batch][channels]
    void* y;                                    // T, rows of `channels`; must not alias an input
    // RG_LRU_SCRATCH bytes (below), 256-aligned, zero before each launch
    void* scratch;
    int batch, tokens, channels;
    int x_row, gate_row, y_row, z_row;          // gate_row: of r and i; z_row: of `gate`
    int block, block_stride;
    // 1: the first token has no past; its factor is 1 instead of the square root
    int first;
};
// Bytes of scratch: 256 + 1024 * batch * (channels / 64) * (tokens / 64), both quotients rounded
// up. May be null for up to 64 tokens.

// Causal depthwise convolution: y[t] = bias + sum over j of weight[j] x[t - (taps - 1) + j], then
// SiLU if `silu` is set. conv_T: taps <= 8. Grid (channels / 256, tokens / 64, batch), 128 threads.
// One entry point per dtype, for all shapes, prefill and decode.
struct Conv {
    const void* x;        // T, rows of `channels`
    const float* weight;  // [taps][channels]
    const float* bias;    // [channels]; may be null
    float* state;         // [batch][taps - 1][channels], oldest first
    void* y;              // T, rows of `channels`; must not alias x
    int tokens, channels, taps, silu;
    int x_row, y_row;
};

// ---- Between the recurrences: the kernels of rows.cu. Each has one entry point per dtype, for all
// shapes. They are fastest if widths and rows are multiples of 8 elements and arrays are aligned to
// 16 bytes. Arrays without `*_row` are contiguous.

// x <- x + added, y = norm(x): a layer norm if there is a bias, otherwise an RMS norm. rows_norm_T
// returns y in T, rows_norm_wide_T in f32. Grid (rows), 256 threads, 4 * channels bytes of dynamic
// shared memory.
struct Norm {
    float* x;                    // [rows][channels]
    const void* added;           // T, [rows][channels]; may be null: nothing is added
    const float *weight, *bias;  // [channels]; bias may be null
    void* y;                     // T or f32, [rows][channels]
    int channels;
    float eps;
};

// Mamba-2: y = weight o RMS norm of each group of channels of x silu(gate). rows_gated_norm_T: grid
// (rows, groups), 256 threads, 4 * group bytes of dynamic shared memory.
struct GatedNorm {
    const void* x;        // T, [rows][groups * group]
    const void* gate;     // T, rows of groups * group
    const float* weight;  // [groups * group]
    void* y;              // T, [rows][groups * group]; may alias x
    int groups, group, gate_row;
    float eps;
};

// RWKV: y = (layer norm of each head of x, with weight and bias, + bonus v) o g, where g is gate or
// silu(gate). rows_head_norm_T: dim <= 256. Grid (rows * heads * lanes / 128), 128 threads; lanes
// is dim / 8, rounded up to a power of 2.
struct HeadNorm {
    const void* x;               // T, [rows][heads][dim]
    const void* gate;            // T, [rows][heads][dim]
    const float *weight, *bias;  // [heads][dim]
    const float* bonus;          // [rows][heads]; may be null: no v is added
    const void* v;               // T, [rows][heads][dim]
    void* y;                     // T, [rows][heads][dim]; may alias x
    int rows, heads, dim, silu;
    float eps;
};

// RWKV's token shift, for each mix: y = x + (previous row - x) o (weight + more). rows_shift_T:
// grid (channels / 1024, tokens / 4, batch), 128 threads.
struct Shift {
    const float* x;        // [batch][tokens][channels]
    const float* before;   // [batch][channels]: the row before each entry's first one
    float* last;           // [batch][channels]: each entry's last row; must not alias `before`
    const float* weights;  // [mixes][channels]
    const void* more;      // T, [mixes][batch][tokens][channels]; may be null
    void* y;               // T, [mixes][batch][tokens][channels]
    int tokens, channels, mixes;
};

// y = f(gate + gate_bias) (x + x_bias). rows_gate_T: grid (rows * (channels / 8) / 256), 256
// threads.
enum GateFunction { GATE_SILU, GATE_GELU, GATE_SIGMOID, GATE_RELU };
struct Gate {
    const void *gate, *x;             // T, rows of `channels`; may alias each other
    const float *gate_bias, *x_bias;  // [channels]; may both be null
    void* y;                          // T, [rows][channels]; may alias an input
    int rows, channels, gate_row, x_row, function;
};

// RWKV-7's values: y = x + (other - x) sigmoid(share + bias). rows_blend_T: grid and threads of
// rows_gate_T.
struct Blend {
    const void *x, *other, *share;  // T, [rows][channels]
    const float* bias;              // [channels]
    void* y;                        // T, [rows][channels]; may alias an input
    int rows, channels;
};

// y <- y + bias. rows_bias_T: grid and threads of rows_gate_T.
struct Bias {
    void* y;            // T, [rows][channels]
    const float* bias;  // [channels]
    int rows, channels;
};

// As in src/cuda/args.rs.
static_assert(sizeof(SelectiveScan) == 120 && offsetof(SelectiveScan, tokens) == 80, "SelectiveScan");
static_assert(sizeof(Ssd) == 128 && offsetof(Ssd, tokens) == 80, "Ssd");
static_assert(sizeof(Wkv) == 96 && offsetof(Wkv, tokens) == 64, "Wkv");
static_assert(sizeof(Wkv7) == 144 && offsetof(Wkv7, tokens) == 104, "Wkv7");
static_assert(sizeof(Wkv4) == 88 && offsetof(Wkv4, tokens) == 64, "Wkv4");
static_assert(sizeof(RgLru) == 120 && offsetof(RgLru, batch) == 80, "RgLru");
static_assert(sizeof(Conv) == 64 && offsetof(Conv, tokens) == 40, "Conv");
static_assert(sizeof(Norm) == 48 && offsetof(Norm, channels) == 40, "Norm");
static_assert(sizeof(GatedNorm) == 48 && offsetof(GatedNorm, groups) == 32, "GatedNorm");
static_assert(sizeof(HeadNorm) == 80 && offsetof(HeadNorm, rows) == 56, "HeadNorm");
static_assert(sizeof(Shift) == 64 && offsetof(Shift, tokens) == 48, "Shift");
static_assert(sizeof(Gate) == 64 && offsetof(Gate, rows) == 40, "Gate");
static_assert(sizeof(Blend) == 48 && offsetof(Blend, rows) == 40, "Blend");
static_assert(sizeof(Bias) == 24 && offsetof(Bias, rows) == 16, "Bias");

}  // namespace hybrid
