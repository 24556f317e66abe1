// Quantizes and packs whole groups of keys and whole tiles of values. Results equal src/quantize.rs
// bit for bit: operations in f32, each rounded to f16; scale = range / (2^bits - 1); code =
// round((x - min) / scale), ties to even; code 0 if the scale is 0.
//
// A thread block loads keys of GROUP tokens x K_CHANNELS channels, or values of 32 tokens x D
// channels, into shared memory. A warp loads 16 columns of them as fragments of 8x8 matrices
// (values transposed). So in both cases a group is along the rows, and the codes are in the lanes
// that write them.
#pragma once
#include <cuda_bf16.h>
#include "fill.cuh"
#include "layout.cuh"
#include "ptx.cuh"

namespace kvq {

// Reports a group that contains NaN or infinity, or whose range exceeds f16's: bit 63, then 1 for
// values or 0 for keys, the row's tag, the entry (24 bits), the channel (9 bits).
__device__ __forceinline__ void report(const FillArgs& args, const FillRow& row, bool values, int entry, int channel) {
    unsigned long long at = 1ull << 63 | (unsigned long long)values << 62 | row.tag | (unsigned long long)(entry & 0xffffff) << 9 | channel;
    // The word can be in host memory, where some machines have no atomics. A store of eight bytes
    // is atomic everywhere.
    *reinterpret_cast<volatile unsigned long long*>(args.status + row.status) = at;
}

// Returns x / s with the same f16 rounding as an f32 division. A quotient of f16 numbers is never
// within 2^-24 of a rounding boundary of f16, unless it equals one. With one correction step the
// reciprocal's error is smaller than that.
__device__ __forceinline__ float divide(float x, float s, float reciprocal) {
    float q = x * reciprocal;
    return fmaf(fmaf(-q, s, x), reciprocal, q);
}

template <int KEY_BITS, int VALUE_BITS, int GROUP, int D>
struct Quantize {
    using L = Kivi<KEY_BITS, VALUE_BITS, GROUP, D>;
    static constexpr int THREADS = 128;
    static constexpr int K_CHANNELS = D < 8192 / GROUP ? D : 8192 / GROUP;
    static constexpr int K_PARTS = D / K_CHANNELS;
    // Bytes in shared memory, where codes of 3 bits are 4-bit fields: the codes of a tile's keys and
    // values, and all that a thread block writes.
    static constexpr int K_CODES = TILE * K_CHANNELS * L::KPack::FIELD / 8, V_CODES = TILE * D * L::VPack::FIELD / 8;
    static constexpr int K_OUT = L::TILES * K_CODES + 4 * K_CHANNELS, V_OUT = V_CODES + L::TILE_BYTES - L::V_SCALE;
    static constexpr int SOURCE = 2 * (GROUP * K_CHANNELS > TILE * D ? GROUP * K_CHANNELS : TILE * D);
    static constexpr int SHARED = SOURCE + (K_OUT > V_OUT ? K_OUT : V_OUT);

    // Copies the entries from `entry` on, TOKENS x CHANNELS, to shared memory as f16. The 16-byte
    // pieces of a row are permuted to avoid bank conflicts.
    template <int TOKENS, int CHANNELS>
    static __device__ __forceinline__ void load(unsigned char* source, const void* ring, const __half* new_rows, long long stride, const FillArgs& args, const FillRow& row,
                                                int entry, int channel) {
        constexpr int PIECES = CHANNELS / 8, EACH = TOKENS * PIECES / THREADS;
        uint4 x[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int piece = threadIdx.x + i * THREADS;
            int at = entry + piece / PIECES;
            const __half* from = at < row.first_new ? static_cast<const __half*>(ring) + (at + row.shift) % args.ring * D
                                                    : new_rows + (at - row.first_new) * stride;
            x[i] = *reinterpret_cast<const uint4*>(from + channel + piece % PIECES * 8);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int piece = threadIdx.x + i * THREADS, r = piece / PIECES, c = piece % PIECES;
            if (args.kind) x[i] = make_uint4(f16_of_bf16(x[i].x), f16_of_bf16(x[i].y), f16_of_bf16(x[i].z), f16_of_bf16(x[i].w));
            *reinterpret_cast<uint4*>(source + (r * PIECES + (c ^ r % 8)) * 16) = x[i];
        }
    }

    // Loads 32 rows x 16 columns as fragments: words [row / 8][column / 8].
    template <int CHANNELS, bool TRANSPOSED>
    static __device__ __forceinline__ void unit(uint32_t (&x)[4][2], const unsigned char* source, int row, int column) {
        constexpr int PIECES = CHANNELS / 8;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + half * 16 + lane / 8 % 2 * 8, c = column + lane / 16 * 8;
            int token = TRANSPOSED ? c + lane % 8 : r + lane % 8, piece = (TRANSPOSED ? r : c) / 8;
            uint32_t at = shared_address(source + (token * PIECES + (piece ^ token % 8)) * 16);
            uint32_t(&a)[2] = x[2 * half], (&b)[2] = x[2 * half + 1];
            load_matrices<TRANSPOSED>(a[0], b[0], a[1], b[1], at);
        }
    }

    // Computes the parameters of a lane's 4 columns (two pairs) over `UNITS` units of rows, and
    // replaces the numbers by codes.
    template <int BITS, int UNITS>
    static __device__ __forceinline__ void encode(uint32_t (&x)[UNITS][4][2], __half2 (&scale)[2], __half2 (&min)[2], bool& bad) {
        constexpr float LARGEST = (1 << BITS) - 1;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            __half2 low = half2_of(x[0][0][h]), high = low;
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int i = 0; i < 4; i++) low = __hmin2_nan(low, half2_of(x[u][i][h])), high = __hmax2_nan(high, half2_of(x[u][i][h]));
#pragma unroll
            for (int i = 4; i < 32; i *= 2) {
                low = __hmin2_nan(low, half2_of(__shfl_xor_sync(FULL, bits(low), i)));
                high = __hmax2_nan(high, half2_of(__shfl_xor_sync(FULL, bits(high), i)));
            }
            float2 range = __half22float2(__hsub2(high, low));
            bad |= !(range.x < INFINITY) || !(range.y < INFINITY);
            min[h] = low;
            scale[h] = __floats2half2_rn(__fdiv_rn(range.x, LARGEST), __fdiv_rn(range.y, LARGEST));
            float2 s = __half22float2(scale[h]);
            float2 r = make_float2(s.x > 0.f ? __frcp_rn(s.x) : 0.f, s.y > 0.f ? __frcp_rn(s.y) : 0.f);
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 y = __half22float2(__hsub2(half2_of(x[u][i][h]), low));
                    __half2 q = __floats2half2_rn(divide(y.x, s.x, r.x), divide(y.y, s.y, r.y));
                    // Between 1024 and 2047, f16 numbers are integers, so the addition rounds, and
                    // the low bits are the code.
                    q = __hadd2(__hmin2(q, __float2half2_rn(LARGEST)), __float2half2_rn(1024.f));
                    x[u][i][h] = bits(q) & 0x00ff00ffu;
                }
        }
    }

    // Writes this lane's words of a unit to shared memory, four words of a lane next to each other.
    template <class P>
    static __device__ __forceinline__ void write_codes(unsigned char* codes, int unit, const uint32_t (&x)[4][2]) {
        const int lane = threadIdx.x % 32;
        uint32_t row[4];
#pragma unroll
        for (int i = 0; i < 4; i++) row[i] = x[i][0] | x[i][1] << 8;
#pragma unroll
        for (int w = 0; w < P::WORDS; w++) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < P::ROWS; i++) word |= row[w * P::ROWS + i] << (P::FIELD * i);
            int at = unit * P::WORDS + w;
            *reinterpret_cast<uint32_t*>(codes + at / 4 * 512 + lane * 16 + at % 4 * 4) = word;
        }
    }

    static __device__ __forceinline__ void copy_out(unsigned char* to, const unsigned char* from, int bytes) {
        for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) *reinterpret_cast<uint4*>(to + i) = load16(from + i);
    }

    // Copies the codes of `channels` channels of a tile.
    template <int BITS>
    static __device__ __forceinline__ void copy_codes(unsigned char* to, const unsigned char* from, int channels) {
        if constexpr (BITS == 3) {
            using P = Packing<BITS>;
            for (int i = threadIdx.x; i < channels / 16 / P::UNITS * LANES; i += THREADS) {
                const int chunk = i / LANES, lane = i % LANES;
                const uint4 x = load16(from + (2 * chunk * LANES + lane) * 16), y = load16(from + ((2 * chunk + 1) * LANES + lane) * 16);
                const uint32_t words[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
                P::store(words, to, chunk, lane);
            }
        } else {
            copy_out(to, from, TILE * channels * BITS / 8);
        }
    }

    // Returns the address of a record. New records are not in the table until the launch ends.
    static __device__ __forceinline__ unsigned char* record_of(const FillArgs& args, const HeadRow& row, int record) {
        return reinterpret_cast<unsigned char*>(record < row.first_new_record ? row.table[record] : args.new_records[row.new_records + record - row.first_new_record]);
    }

    static __device__ __forceinline__ void keys(const FillArgs& args, const HeadRow& row, int record, int channel, unsigned char* shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        constexpr int UNITS = L::TILES;
        unsigned char* out = shared + SOURCE;
        __half* params = reinterpret_cast<__half*>(out + UNITS * K_CODES);
        load<GROUP, K_CHANNELS>(shared, row.ring_k, row.new_k, args.k_token, args, row, record * GROUP, channel);
        __syncthreads();
        for (int block = warp; block < K_CHANNELS / 16; block += THREADS / 32) {
            uint32_t x[UNITS][4][2];
            __half2 scale[2], min[2];
            bool bad = false;
#pragma unroll
            for (int u = 0; u < UNITS; u++) unit<K_CHANNELS, false>(x[u], shared, u * TILE, block * 16);
            encode<KEY_BITS, UNITS>(x, scale, min, bad);
            if (bad) report(args, row, false, record * GROUP, channel + block * 16 + 2 * t);
#pragma unroll
            for (int u = 0; u < UNITS; u++) write_codes<typename L::KPack>(out + u * K_CODES, block, x[u]);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int at = L::key_param_at(block * 16 + h * 8 + 2 * t);
                if (g == 0) *reinterpret_cast<__half2*>(params + at) = scale[h], *reinterpret_cast<__half2*>(params + K_CHANNELS + at) = min[h];
                if (!row.round) continue;
                float2 s = __half22float2(scale[h]), m = __half22float2(min[h]);
#pragma unroll
                for (int u = 0; u < UNITS; u++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int place = (record * GROUP + u * TILE + i * 8 + g + row.shift) % args.ring;
                        long long to = (long long)place * D + channel + block * 16 + h * 8 + 2 * t;
                        float low = fmaf(x[u][i][h] & 0xff, s.x, m.x), high = fmaf(x[u][i][h] >> 16, s.y, m.y);
                        uint32_t pair = args.kind ? bits_of(__floats2bfloat162_rn(low, high)) : bits(__floats2half2_rn(low, high));
                        *reinterpret_cast<uint32_t*>(static_cast<__half*>(row.ring_k) + to) = pair;
                    }
            }
        }
        __syncthreads();
        unsigned char* to = record_of(args, row, record);
        if (record >= row.first_new_record && channel == 0 && threadIdx.x == 0) row.table[record] = reinterpret_cast<unsigned long long>(to);
        copy_out(to + L::K_SCALE + 2 * channel, out + UNITS * K_CODES, 2 * K_CHANNELS);
        copy_out(to + L::K_MIN + 2 * channel, out + UNITS * K_CODES + 2 * K_CHANNELS, 2 * K_CHANNELS);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
            copy_codes<KEY_BITS>(to + L::HEADER + u * L::TILE_BYTES + L::K_CODES + channel * TILE * KEY_BITS / 8, out + u * K_CODES, K_CHANNELS);
    }

    static __device__ __forceinline__ void values(const FillArgs& args, const HeadRow& row, int tile, unsigned char* shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        constexpr int UNITS = L::VGROUP / 32;
        unsigned char* out = shared + SOURCE;
        __half* scales = reinterpret_cast<__half*>(out + V_CODES);
        __half* minima = reinterpret_cast<__half*>(out + V_CODES + L::V_MIN - L::V_SCALE);
        load<TILE, D>(shared, row.ring_v, row.new_v, args.v_token, args, row, tile * TILE, 0);
        __syncthreads();
        for (int task = warp; task < 2 * L::VGROUPS; task += THREADS / 32) {
            int half = task / L::VGROUPS, group = task % L::VGROUPS;
            uint32_t x[UNITS][4][2];
            __half2 scale[2], min[2];
            bool bad = false;
#pragma unroll
            for (int u = 0; u < UNITS; u++) unit<D, true>(x[u], shared, group * L::VGROUP + u * 32, half * 16);
            encode<VALUE_BITS, UNITS>(x, scale, min, bad);
            if (bad) report(args, row, true, tile * TILE + half * 16 + 2 * t, group * L::VGROUP);
#pragma unroll
            for (int u = 0; u < UNITS; u++) write_codes<typename L::VPack>(out, half * (D / 32) + group * UNITS + u, x[u]);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int at = L::value_param_at(half * 16 + h * 8 + 2 * t, group);
                if (g == 0) *reinterpret_cast<__half2*>(scales + at) = scale[h], *reinterpret_cast<__half2*>(minima + at) = min[h];
            }
        }
        __syncthreads();
        unsigned char* to = record_of(args, row, tile / L::TILES) + L::HEADER + tile % L::TILES * L::TILE_BYTES;
        copy_codes<VALUE_BITS>(to + L::V_CODES, out, D);
        copy_out(to + L::V_SCALE, out + V_CODES, L::TILE_BYTES - L::V_SCALE);
    }

    // Grid: (the largest number of key records * K_PARTS or of value tiles in a row, rows, 2).
    static __device__ __forceinline__ void run(const FillArgs& args) {
        extern __shared__ __align__(128) unsigned char shared[];
        const HeadRow row(args, blockIdx.y);
        const int block = blockIdx.x;
        if (blockIdx.z == 0) {
            if (block < row.key_records * K_PARTS) keys(args, row, row.key_record + block / K_PARTS, block % K_PARTS * K_CHANNELS, shared);
        } else if (block < row.value_tiles) {
            values(args, row, row.value_tile + block, shared);
        }
    }
};

}  // namespace kvq
