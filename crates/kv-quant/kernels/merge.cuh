// Merges the partial results of a launch's thread blocks.
#pragma once
#include "args.cuh"

namespace kvq {

// Writes a channel of a finished column, and for channel 0 also the log-sum-exp.
template <int D>
__device__ __forceinline__ void finish(const AttendArgs& args, long long row, int channel, float value, float lse2) {
    store(args.out, row * D + channel, args.out_kind, value);
    if (channel == 0 && args.lse) args.lse[row] = lse2 / LOG2E;
}

// Merges the partial results of a kv head and a block of columns. The weights are stored in shared
// memory first. If there are more threads than outputs, several threads compute one output.
template <int D, int N, int WARPS>
__device__ __forceinline__ void merge_splits(const AttendArgs& args, const Work& work, int valid, unsigned char* shared, float* tops, float* sums) {
    const long long first = (long long)work.first_part * (8 * N);
    const int splits = work.parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* lses = args.part_lse + first;
    const float* parts = args.part_out + first * D;
    float* weights = reinterpret_cast<float*>(shared);
    float4* sliced = reinterpret_cast<float4*>(weights + (MAX_SPLITS + 1) * 8 * N);
    for (int column = warp; column < valid; column += WARPS) {
        float top = -INFINITY, sum = 0.f;
        for (int s = lane; s < splits; s += 32) top = fmaxf(top, lses[s * 8 * N + column]);
#pragma unroll
        for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, i));
        for (int s = lane; s < splits; s += 32) {
            float weight = top > -INFINITY ? exp2_fast(lses[s * 8 * N + column] - top) : 0.f;
            weights[s * 8 * N + column] = weight, sum += weight;
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(FULL, sum, i);
        if (lane == 0) tops[column] = top, sums[column] = sum;
    }
    __syncthreads();
    const int items = valid * (D / 4), slices = max(1, WARPS * 32 / items);
    auto write = [&](int item, float4 x) {
        int column = item / (D / 4), channel = item % (D / 4) * 4;
        float sum = sums[column], factor = sum > 0.f ? 1.f / sum : 0.f;
        float lse2 = sum > 0.f ? tops[column] + log2f(sum) : -INFINITY;
        long long row = row_of(args, work, work.first_column + column);
        finish<D>(args, row, channel, x.x * factor, lse2), finish<D>(args, row, channel + 1, x.y * factor, lse2);
        finish<D>(args, row, channel + 2, x.z * factor, lse2), finish<D>(args, row, channel + 3, x.w * factor, lse2);
    };
    for (int i = threadIdx.x; i < items * slices; i += WARPS * 32) {
        int item = i % items, column = item / (D / 4);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (int s = i / items; s < splits; s += slices) {
            float weight = weights[s * 8 * N + column];
            float4 x = *reinterpret_cast<const float4*>(parts + (long long)s * 8 * N * D + item * 4);
            sum.x = fmaf(x.x, weight, sum.x), sum.y = fmaf(x.y, weight, sum.y), sum.z = fmaf(x.z, weight, sum.z), sum.w = fmaf(x.w, weight, sum.w);
        }
        if (slices == 1) write(item, sum);
        else sliced[i] = sum;
    }
    if (slices == 1) return;
    __syncthreads();
    for (int item = threadIdx.x; item < items; item += WARPS * 32) {
        float4 sum = sliced[item];
        for (int s = 1; s < slices; s++) {
            float4 x = sliced[s * items + item];
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        write(item, sum);
    }
}

}  // namespace kvq
