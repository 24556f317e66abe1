// Merges attention over two disjoint sets of entries.
#include <cstddef>
#include <cstdint>

struct MergeArgs {
    uint64_t out_a, lse_a;  // [rows, columns] and [rows], f32; lse is the natural log-sum-exp
    uint64_t out_b, lse_b;
    uint64_t out, lse;  // Output
    int64_t rows;
    int32_t columns;  // A multiple of 4
    int32_t unused;
};
static_assert(sizeof(MergeArgs) == 64 && offsetof(MergeArgs, rows) == 48, "as in src/merge.rs");

constexpr int THREADS = 256;

__device__ __forceinline__ float at(uint64_t x, int64_t i) { return reinterpret_cast<const float*>(x)[i]; }

// Grid: one warp for each row.
extern "C" __global__ void __launch_bounds__(THREADS) merge_states(const MergeArgs a) {
    const int64_t row = blockIdx.x * int64_t(THREADS / 32) + threadIdx.x / 32;
    if (row >= a.rows) return;
    const int lane = threadIdx.x % 32, pieces = a.columns / 4;
    const float lse_a = at(a.lse_a, row), lse_b = at(a.lse_b, row);
    const float top = fmaxf(lse_a, lse_b);
    // A row that sees nothing in either part keeps an output of zero.
    const float exp_a = top == -INFINITY ? 0.f : expf(lse_a - top), exp_b = top == -INFINITY ? 0.f : expf(lse_b - top);
    const float sum = exp_a + exp_b, scale = top == -INFINITY ? 0.f : 1.f / sum;
    const float weight_a = exp_a * scale, weight_b = exp_b * scale;
    const float4 *x = reinterpret_cast<const float4*>(a.out_a) + row * pieces, *y = reinterpret_cast<const float4*>(a.out_b) + row * pieces;
    float4* out = reinterpret_cast<float4*>(a.out) + row * pieces;
    for (int i = lane; i < pieces; i += 32) {
        float4 p = x[i];
        p.x *= weight_a, p.y *= weight_a, p.z *= weight_a, p.w *= weight_a;
        // In a mixed batch most rows see only one part.
        if (weight_b != 0.f) {
            const float4 q = y[i];
            p.x = fmaf(q.x, weight_b, p.x), p.y = fmaf(q.y, weight_b, p.y), p.z = fmaf(q.z, weight_b, p.z), p.w = fmaf(q.w, weight_b, p.w);
        }
        out[i] = p;
    }
    if (lane == 0) reinterpret_cast<float*>(a.lse)[row] = top == -INFINITY ? top : top + logf(sum);
}
