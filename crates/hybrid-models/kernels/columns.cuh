// A head's matrix state [rows][columns] of any shape, for the `generic` kernels, which process
// token by token.
//
// A block has 32 columns. Columns share only a token's inputs. Four threads of a warp share a
// column; each keeps every fourth of its rows in registers, so that a warp reads 32 contiguous
// bytes of each of four rows.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int COLUMN_THREADS = 128, PARTS = 4;

struct Place {
    int part, column;
    __device__ Place() : part(threadIdx.x % 32 / 8), column(blockIdx.x * 32 + threadIdx.x / 32 * 8 + threadIdx.x % 8) {}
};

// Sums over the four threads of a column.
__device__ __forceinline__ float sum_of_parts(float x) {
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

// Rows part, part + PARTS, ... of a column, zero beyond the last row.
template <int N>
struct Column {
    float s[N];
    float* at;
    int rows, columns, part;
    bool used;

    __device__ Column(float* state, long long head, int rows, int columns, Place p)
        : at(state + head * rows * columns + p.column), rows(rows), columns(columns), part(p.part), used(p.column < columns) {
#pragma unroll
        for (int i = 0; i < N; i++) s[i] = has(i) ? at[row(i) * columns] : 0.f;
    }
    __device__ int row(int i) const { return part + i * PARTS; }
    __device__ bool has(int i) const { return used && row(i) < rows; }
    __device__ void store() {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (has(i)) at[row(i) * columns] = s[i];
        }
    }
};

}  // namespace hybrid
