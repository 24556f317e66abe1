// A producer of wkv.cuh for decays that are the same for all tokens.
//
// A lane has 16 keys of two tokens: g = lane / 4, and its complement 15 - g. At each level, one of
// the two has the level's bit and supplies r; the other supplies k. Both are multiplied by the same
// power of the decays. So each lane has its part of the operands of all products from the start.
#pragma once
#include "wkv_stage.cuh"

namespace hybrid {

template <class T>
struct Wkv5Producer : WkvLoader<T, false> {
    typedef WkvLoader<T, false> Loader;
    typedef uint32_t Keys[8];  // Pairs of this lane's keys
    using Loader::chunks, Loader::lane, Loader::stage, Loader::producer, Loader::p, Loader::roles;
    const WkvConstants<T, false>& constants;
    const int g, column, first;  // first: this lane's first key
    Keys early, late, by8, by4;  // w^g, w^(15 - g); factors of levels 8 and 4

    __device__ Wkv5Producer(const Wkv& p, WkvStage<T, false>& stage, const WkvConstants<T, false>& constants)
        : Loader(p, stage), constants(constants), g(lane / 4), column(lane % 4), first(column * 16) {
        for (int i = lane; i < WKV_CHUNK * (WKV_CHUNK + PAD) / 2; i += 32) reinterpret_cast<uint32_t*>(stage.a)[i] = 0;
        get(early, constants.powers[g]), get(late, constants.powers[15 - g]);
        get(by8, constants.powers[7 - g]), get(by4, constants.powers[(g & 4 ? g : 15 - g) & 3]);
    }

    __device__ void get(Keys& x, const T* row) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t y[4];
            load16(y, row + first + 8 * h);
#pragma unroll
            for (int j = 0; j < 4; j++) x[4 * h + j] = y[j];
        }
    }
    __device__ void put(T* row, const Keys& x, const Keys& by) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] = times<T>(x[4 * h + j], by[4 * h + j]);
            store16(row + first + 8 * h, y);
        }
    }

    // Products of two levels, which share fragments of 16 rows. Rows are the tokens with the
    // level's bit, g or 15 - g. Columns are the tokens without it, n or 15 - n. Returns row g,
    // columns 2 * column and the next.
    template <int LOW, int HIGH>
    __device__ void levels(const Keys (&r)[2], const Keys (&k)[2], const Keys& by_low, const Keys& by_high, float2& low, float2& high) const {
        float c[4] = {}, d[4] = {};
        auto of_low = [&](uint32_t with, uint32_t without, int j) {
            const uint32_t x = g & LOW ? with : without;
            return LOW > 1 ? times<T>(x, by_low[j]) : x;
        };
        auto of_high = [&](uint32_t with, uint32_t without, int j) { return times<T>(g & HIGH ? with : without, by_high[j]); };
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const uint32_t a[4] = {of_low(r[0][j], r[1][j], j), of_high(r[0][j], r[1][j], j), of_low(r[0][j + 1], r[1][j + 1], j + 1),
                                   of_high(r[0][j + 1], r[1][j + 1], j + 1)};
            multiply<T>(c, a, of_low(k[1][j], k[0][j], j), of_low(k[1][j + 1], k[0][j + 1], j + 1));
            multiply<T>(d, a, of_high(k[1][j], k[0][j], j), of_high(k[1][j + 1], k[0][j + 1], j + 1));
        }
        low = make_float2(c[0], c[1]), high = make_float2(d[2], d[3]);
    }

    // Stores two adjacent elements of A of a level, if they belong to the same block of the
    // level.
    template <int BIT>
    __device__ void put_level(float2 x) const {
        const int n = 2 * column, t = g & BIT ? g : 15 - g;
        const bool turned = n & BIT;
        const int s = turned ? 14 - n : n;
        if (t / (2 * BIT) == s / (2 * BIT)) store4(&stage.a[t][s], turned ? packed<T>(x.y, x.x) : packed<T>(x.x, x.y));
    }

    __device__ void produce(int chunk) {
        const int half = this->half, left = p.tokens - chunk * WKV_CHUNK;
        const bool first_chunk = chunk == producer;
        Keys r[2], k[2], by2, u;
        await_copies<1>();
        __syncwarp();
        get(r[0], stage.input_r[half][g]), get(r[1], stage.input_r[half][15 - g]);
        get(k[0], stage.input_k[half][g]), get(k[1], stage.input_k[half][15 - g]);
        get(by2, constants.powers[(g & 2 ? g : 15 - g) & 1]), get(u, constants.u);
        float2 one, two, four, eight;
        levels<1, 2>(r, k, by2, by2, one, two), levels<4, 8>(r, k, by4, by8, four, eight);
        float own[2][4] = {};
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const uint32_t a[4] = {r[0][j], r[1][j], r[0][j + 1], r[1][j + 1]};
#pragma unroll
            for (int i = 0; i < 2; i++) multiply<T>(own[i], a, times<T>(k[i][j], u[j]), times<T>(k[i][j + 1], u[j + 1]));
        }
        if (!first_chunk) roles.wait_empty(producer);
        put(stage.r[g], r[0], early), put(stage.r[15 - g], r[1], late);
        if (left >= WKV_CHUNK) {
            put(stage.k[g], k[0], late), put(stage.k[15 - g], k[1], early);
        } else {
            Keys by[2];
            get(by[0], constants.powers[max(left - 1 - g, 0)]), get(by[1], constants.powers[max(left - 16 + g, 0)]);
            put(stage.k[g], k[0], by[0]), put(stage.k[15 - g], k[1], by[1]);
        }
        if (first_chunk || left < WKV_CHUNK) {
            for (int key = lane; key < HEAD; key += 32) {
                float power = 1;
                for (int t = 0; t < min(left, WKV_CHUNK); t++) power *= constants.decay[key];
                stage.decay[key] = power;
            }
        }
        put_level<8>(eight), put_level<4>(four), put_level<2>(two);
        if (column == g / 2) {
            // In column g of `own`, token g is in row g, and token 15 - g in row 8 + g. The token
            // before the odd one of the two is in column g ^ 1.
            const bool odd = g % 2;
            const float own_g = odd ? own[0][1] : own[0][0], own_other = odd ? own[1][3] : own[1][2], before = odd ? one.x : one.y;
            const int t = odd ? g : 15 - g;
            store4(&stage.a[t][t - 1], packed<T>(before, odd ? own_g : own_other));
            store4(&stage.a[15 - t][15 - t], packed<T>(odd ? own_other : own_g, 0.f));
        }
        __syncwarp();
        roles.arrive_full(producer / 2);
        this->load();
    }

    __device__ void run() {
        this->load(), this->load();
        for (int chunk = producer; chunk < chunks; chunk += roles.producers) produce(chunk);
        await_copies<0>();
    }
};

}  // namespace hybrid
