// What the kernels are given: one struct by value each, pointers first, then numbers of 4 bytes. Mirrored by the Rust side.
//
// T: the kind of an entry point, `_f16`, `_bf16` or `_f32`. All that is marked f32 is f32 with every kind. States are f32, read and
// written in place, laid out as the crate's `State`. `*_row`: numbers of T from one token's row to the next, so that an input may be
// columns of a wider matrix; the rows of a batch's entries follow each other (row = entry * tokens + token). Any tokens >= 1.
//
// Every kernel has two entry points a kind: `NAME_T`, for the shapes said below, and `NAME_any_T` for all others (and for few tokens,
// where the comment says so), with the same struct and its own grid. `/` rounds up in grids. Where dynamic shared memory is said,
// it must be allowed first (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
#pragma once

namespace hybrid {

// Mamba: h <- exp(dt A) h + dt B u, y = (C h + D u) silu(z), dt = softplus(steps + bias).
// selective_scan_T: states == 16. Grid (channels / 16, batch), 128 threads. Any tokens, decode too.
// selective_scan_any_T: states <= 256. Grid (channels / 4, batch), 128 threads.
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

// Mamba-2: H <- e^(dt a) H + dt B x', y = H' C + D x of each head, dt = min(max(softplus(steps + bias), step_min), step_max).
// ssd_T (f16, bf16): head_dim == 64, states == 64 or 128, all rows and pointers multiples of 8 numbers; worth it from 16 tokens on.
//   Grid (2, heads, batch), 256 threads, SSD_SHARED_64 or SSD_SHARED_128 bytes of dynamic shared memory.
// ssd_any_T: states <= 256, head_dim any. Grid (head_dim / 32, heads, batch), 128 threads. For decode, too.
struct Ssd {
    const void* x;                // T, rows of heads * head_dim
    const void *b, *c;            // T, rows of groups * states
    const void* steps;            // T, rows of `heads`
    const float *a, *d, *bias;    // [heads]; a: -exp(A_log)
    float* state;                 // [batch][heads][states][head_dim]
    void* y;                      // T, rows of heads * head_dim; may not be x
    int tokens, heads, head_dim, groups, states;
    int x_row, b_row, c_row, steps_row, y_row;
    float step_min, step_max;
};
constexpr int SSD_SHARED_64 = 69128, SSD_SHARED_128 = 112136;  // The latter is more than devices of 8.6 and 8.9 have (101376).

// RWKV-5 and 6: y = S' r + (r . (u o k)) v, then S <- diag(w) S + k v' of each head.
// w: in 5 `decay` itself, in 6 e^-e^(w + decay), all in f32.
// wkv5_T, wkv6_T (f16, bf16): dim == 64, all rows and pointers multiples of 8 numbers; worth it from 16 tokens on.
//   Grid (2, heads, batch), 192 threads, WKV_SHARED bytes of dynamic shared memory.
// wkv5_any_T, wkv6_any_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. For decode, too.
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
constexpr int WKV_SHARED = 101376;

// RWKV-7's delta rule with what its layer does to the keys before: per head, with rate = sigmoid(a + rate_bias),
//   removal = key o removal_scale, divided by its length (at least 1e-12); k = key o (1 + (rate - 1) o key_rate); added = rate o removal;
//   w = e^(-e^(-1/2) sigmoid(w + decay)); S <- diag(w) S - added (removal' S) + k v'; y = S' r; own = sum of r o k o own_scale.
// wkv7_T (f32, too): dim == 64, all rows and pointers multiples of 8 numbers. Grid (2, heads, batch), 128 threads.
// wkv7_any_T: dim <= 128. Grid (dim / 32, heads, batch), 128 threads. For decode, too.
struct Wkv7 {
    const void *r, *key, *v, *w, *a;                                       // T, rows of heads * dim; w, a: before bias and sigmoid
    const float *decay, *rate_bias, *removal_scale, *key_rate, *own_scale;  // [heads][dim]
    float* state;                                                          // [batch][heads][dim keys][dim values]
    void* y;                                                               // T, rows of heads * dim; none of the inputs
    float* own;                                                            // [batch][tokens][heads]; may be null
    int tokens, heads, dim;
    int r_row, key_row, v_row, w_row, a_row, y_row;
};

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

}  // namespace hybrid
