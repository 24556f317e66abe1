// What the kernels are given: one struct by value each, pointers first, then numbers of 4 bytes. Mirrored by the Rust side.
//
// T: the kind of an entry point, `_f16`, `_bf16` or `_f32`. All that is marked f32 is f32 with every kind. States are f32, read and
// written in place, laid out as the crate's `State`. `*_row`: numbers of T from one token's row to the next, so that an input may be
// columns of a wider matrix; the rows of a batch's entries follow each other (row = entry * tokens + token). Any tokens >= 1.
//
// Every kernel has two entry points a kind: `NAME_T`, for the shapes said below, and `NAME_generic_T` for all others (and for few tokens,
// where the comment says so), with the same struct and its own grid. `/` rounds up in grids. Where dynamic shared memory is said,
// it must be allowed first (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
#pragma once
#include <cstddef>

namespace hybrid {

// Mamba: h <- exp(dt A) h + dt B u, y = (C h + D u) silu(z), dt = softplus(steps + bias).
// selective_scan_T: states == 16. Grid (channels / 32, batch), 128 threads, SCAN_SHARED bytes of dynamic shared memory. Any tokens, decode too.
// selective_scan_few_T: the same in grid (channels / 40, batch), 320 threads, SCAN_FEW_SHARED bytes: faster for many tokens where no
//   multiprocessor gets two of these blocks.
// selective_scan_generic_T: states <= 256. Grid (channels / 4, batch), 128 threads.
struct SelectiveScan {
    const void *u, *steps, *z;  // T, rows of `channels`; z may be null: no gate
    const void *b, *c;          // T, rows of `states`
    const float *a;             // [channels][states]: -exp(A_log)
    const float *d, *bias;      // [channels]
    float* state;               // [batch][channels][states]
    void* y;                    // T, rows of `channels`; may be u
    int tokens, channels, states;
    int u_row, steps_row, z_row, b_row, c_row, y_row;
};
constexpr int SCAN_SHARED = 30720, SCAN_FEW_SHARED = 118784;  // The latter is more than devices of 8.6 and 8.9 have (101376).

// Mamba-2: H <- e^(dt a) H + dt B x', y = H' C + D x of each head, dt = min(max(softplus(steps + bias), step_min), step_max).
// ssd_T (f16, bf16): head_dim == 64, states == 64 or 128, all rows and pointers multiples of 8 numbers; worth it from 16 tokens on. What products
//   take is rounded to T, the state is kept in f32. Grid (2, heads, batch), 256 threads, SSD_SHARED_64 or SSD_SHARED_128 bytes of dynamic shared memory.
// ssd_wgmma_T: the same on devices of compute capability 9.0 alone (code for sm_90a; elsewhere it does nothing), in clusters of two blocks, after
//   ssd_group_tiles_T with the same struct: grid (tokens / 64, groups, batch), 128 threads. Grid (groups * (heads / groups / 2) * 2, batch), 384 threads,
//   SSD_WGMMA_SHARED_64 or SSD_WGMMA_SHARED_128 bytes of dynamic shared memory.
// ssd_generic_T: states <= 256, head_dim any. Grid (head_dim / 32, heads, batch), 128 threads. For decode, too.
struct Ssd {
    const void* x;                // T, rows of heads * head_dim
    const void *b, *c;            // T, rows of groups * states
    const void* steps;            // T, rows of `heads`
    const float *a, *d, *bias;    // [heads]; a: -exp(A_log)
    float* state;                 // [batch][heads][states][head_dim]
    void* y;                      // T, rows of heads * head_dim; may not be x
    void* scratch;                // For ssd_wgmma: batch * groups * (tokens / 64 + 1) times SSD_GROUP_TILES_64 or SSD_GROUP_TILES_128 bytes, 16-aligned
    int tokens, heads, head_dim, groups, states;
    int x_row, b_row, c_row, steps_row, y_row;
    float step_min, step_max;
};
constexpr int SSD_SHARED_64 = 58888, SSD_SHARED_128 = 101896;  // The latter is more than devices of 8.6 and 8.9 have (101376).
constexpr int SSD_WGMMA_SHARED_64 = 125024, SSD_WGMMA_SHARED_128 = 174176;
constexpr int SSD_GROUP_TILES_64 = 26624, SSD_GROUP_TILES_128 = 43008;

// RWKV-5 and 6: y = S' r + (r . (u o k)) v, then S <- diag(w) S + k v' of each head.
// w: in 5 `decay` itself, in 6 e^-e^(w + decay), all in f32.
// wkv5_T, wkv6_T (f16, bf16): dim == 64, all rows and pointers multiples of 8 numbers; worth it from 16 tokens on. What products take is rounded to T,
//   the state is kept in f32 and may be beyond what T can hold. Grid (1 or 2, heads, batch), 256 threads, or 192, or with 2 blocks for a head 128;
//   WKV_SHARED + (threads / 32 - 2) * WKV_PRODUCER_SHARED bytes of dynamic shared memory. 2 blocks for a head are faster where all of them are on the
//   device at a time, 1 otherwise.
// wkv5_generic_T, wkv6_generic_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. For decode, too.
struct Wkv {
    const void *r, *k, *v;  // T, rows of heads * dim
    const void* w;          // T, rows of heads * dim: only for 6, the token's part of the decay before e^-e^
    const float* decay;     // [heads][dim]: for 5 within 0 to 1; for 6 what is added to w
    const float* u;         // [heads][dim]
    float* state;           // [batch][heads][dim keys][dim values]
    void* y;                // T, rows of heads * dim; none of the inputs
    int tokens, heads, dim;
    int r_row, k_row, v_row, w_row, y_row;
};
constexpr int WKV_SHARED = 2688, WKV_PRODUCER_SHARED = 28160;

// RWKV-7's delta rule with what its layer does to the keys before: per head, with rate = sigmoid(a + rate_bias),
//   removal = key o removal_scale, divided by its length (at least 1e-12); k = key o (1 + (rate - 1) o key_rate); added = rate o removal;
//   w = e^(-e^(-1/2) sigmoid(w + decay)); S <- diag(w) S - added (removal' S) + k v'; y = S' r; own = sum of r o k o own_scale.
// wkv7_T (f16, bf16): dim == 64, all rows and pointers multiples of 8 numbers; worth it from 16 tokens on. Works in f16 inside, with both kinds:
//   at the strongest decays, r beyond 500 and keys beyond 8000 are too large, at any, v beyond 65504 and states beyond a million.
//   Grid (1 or 2, heads, batch), 384 threads, WKV7_SHARED or, with 2, at least WKV7_HALF_SHARED bytes of dynamic shared memory. 2 blocks for a
//   head are faster where all of them are on the device at a time, 1 otherwise.
// wkv7_f32, token by token: the same shapes. Grid (2, heads, batch), 128 threads.
// wkv7_generic_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. For decode, too.
struct Wkv7 {
    const void *r, *key, *v, *w, *a;                                       // T, rows of heads * dim; w, a: before bias and sigmoid
    const float *decay, *rate_bias, *removal_scale, *key_rate, *own_scale;  // [heads][dim]
    float* state;                                                          // [batch][heads][dim keys][dim values]
    void* y;                                                               // T, rows of heads * dim; none of the inputs
    float* own;                                                            // [batch][tokens][heads]; may be null
    int tokens, heads, dim;
    int r_row, key_row, v_row, w_row, a_row, y_row;
};
constexpr int WKV7_SHARED = 169600, WKV7_HALF_SHARED = 121184;  // Devices of 8.0 have 166912 at most, those of 8.6 and 8.9 101376.

// RWKV-4: [channels] each; see src/rwkv/v4.rs. y = mean of the values by e^key. Grid (channels / 128, batch), 128 threads. One entry point a kind.
struct Wkv4 {
    const void *k, *v;            // T, rows of `channels`
    const float *decay, *first;   // [channels]: -e^decay, and what is added to the token's own key
    float *numerator, *denominator, *largest;  // State. Each entry's are `state_entry` numbers after the one's before.
    void* y;                      // T, rows of `channels`; may be v
    int tokens, channels, state_entry;
    int k_row, v_row, y_row;
};

// RG-LRU: log a = decay sigmoid(r + r_bias), h <- a h + sqrt(1 - a^2) sigmoid(i + i_bias) x, y = h gelu(gate).
// Channel c of a gate's row lies at (c / block) * block_stride + row * gate_row + c % block: the product with a block-diagonal matrix
// may stay as it comes, [blocks][rows][block]. Plain rows: block = channels, block_stride = 0.
// rg_lru_T: Grid (channels / 64 * tokens / 64 * batch), 256 threads. One entry point a kind, for all shapes, decode too.
struct RgLru {
    const void* x;                              // T, rows of `channels`
    const void *r, *i;                          // T, gates before bias and sigmoid
    const void* gate;                           // T, rows of `channels`, before the GELU (tanh); may be null: none
    const float *r_bias, *i_bias;               // [channels]
    const float* decay;                         // [channels]: -8 softplus(Lambda)
    float* state;                               // [batch][channels]
    void* y;                                    // T, rows of `channels`; none of the inputs
    void* scratch;                              // RG_LRU_SCRATCH bytes (below), 256-aligned, zero before each launch
    int batch, tokens, channels;
    int x_row, gate_row, y_row, z_row;          // gate_row: of r and i; z_row: of `gate`
    int block, block_stride;
    int first;                                  // 1: the first token has no past and comes in whole, with 1 in place of the root
};
// Bytes of scratch: 256 + 1024 * batch * (channels / 64) * (tokens / 64), rounded up both. For up to 64 tokens it may be null.

// Causal depthwise convolution: y[t] = bias + sum over j of weight[j] x[t - (taps - 1) + j], then SiLU if asked for.
// conv_T: taps <= 8. Grid (channels / 256, tokens / 64, batch), 128 threads. One entry point a kind, for all shapes, decode too.
struct Conv {
    const void* x;        // T, rows of `channels`
    const float* weight;  // [taps][channels]
    const float* bias;    // [channels]; may be null
    float* state;         // [batch][taps - 1][channels], oldest first
    void* y;              // T, rows of `channels`; not x
    int tokens, channels, taps, silu;
    int x_row, y_row;
};

// ---- Between the recurrences: kernels of rows.cu, each with one entry point a kind, for all shapes; fastest where widths and rows are
// multiples of 8 numbers and arrays lie at multiples of 16 bytes. Arrays without `*_row` are contiguous.

// x <- x + added, y = norm(x): a layer norm with a bias, an RMS norm without. rows_norm_T gives y in T, rows_norm_wide_T in f32.
// Grid (rows), 256 threads, 4 * channels bytes of dynamic shared memory.
struct Norm {
    float* x;                    // [rows][channels]
    const void* added;           // T, [rows][channels]; may be null: nothing
    const float *weight, *bias;  // [channels]; bias may be null
    void* y;                     // T or f32, [rows][channels]
    int channels;
    float eps;
};

// Mamba-2: y = RMS norm of each group of channels of x silu(gate), o weight.
// rows_gated_norm_T: Grid (rows, groups), 256 threads, 4 * group bytes of dynamic shared memory.
struct GatedNorm {
    const void* x;        // T, [rows][groups * group]
    const void* gate;     // T, rows of groups * group
    const float* weight;  // [groups * group]
    void* y;              // T, [rows][groups * group]; may be x
    int groups, group, gate_row;
    float eps;
};

// RWKV: y = (layer norm of each head of x, o weight + bias, + own v) o gate, or its SiLU.
// rows_head_norm_T: dim <= 256. Grid (rows * heads * lanes / 128), 128 threads, lanes being dim / 8 and then the next power of 2.
struct HeadNorm {
    const void* x;               // T, [rows][heads][dim]
    const void* gate;            // T, [rows][heads][dim]
    const float *weight, *bias;  // [heads][dim]
    const float* own;            // [rows][heads]; may be null: no v is added
    const void* v;               // T, [rows][heads][dim]
    void* y;                     // T, [rows][heads][dim]; may be x
    int rows, heads, dim, silu;
    float eps;
};

// RWKV's token shift: y of a mix = x + (row before - x) o (weight + more).
// rows_shift_T: Grid (channels / 1024, tokens / 4, batch), 128 threads.
struct Shift {
    const float* x;        // [batch][tokens][channels]
    const float* before;   // [batch][channels]: before each entry's first row
    float* last;           // [batch][channels]: each entry's last row; not `before`
    const float* weights;  // [mixes][channels]
    const void* more;      // T, [mixes][batch][tokens][channels]; may be null
    void* y;               // T, [mixes][batch][tokens][channels]
    int tokens, channels, mixes;
};

// y = f(gate + gate_bias) (x + x_bias). rows_gate_T: Grid (rows * (channels / 8) / 256), 256 threads.
enum GateFunction { GATE_SILU, GATE_GELU, GATE_SIGMOID, GATE_RELU };
struct Gate {
    const void *gate, *x;             // T, rows of `channels`; may be the same
    const float *gate_bias, *x_bias;  // [channels]; may both be null
    void* y;                          // T, [rows][channels]; may be an input
    int rows, channels, gate_row, x_row, function;
};

// RWKV-7's values: y = x + (other - x) sigmoid(share + bias). rows_blend_T: grid and threads as rows_gate_T.
struct Blend {
    const void *x, *other, *share;  // T, [rows][channels]
    const float* bias;              // [channels]
    void* y;                        // T, [rows][channels]; may be an input
    int rows, channels;
};

// y <- y + bias. rows_bias_T: grid and threads as rows_gate_T.
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
