// The memory layout of a packed cache.
//
// The packed tokens of a kv head are stored in records of GROUP tokens. A record is contiguous:
//
//     header   scales of the keys    f16 [D]           one for each channel
//              minima of the keys    f16 [D]
//              factors of the values f16 [D]
//     tile     scales of the keys    f16 [32]          one for each token          } GROUP / 32 of these
//              minima of the keys    f16 [32]                                      }
//              codes of the keys     their bits each   32 tokens x D channels      }
//              codes of the values   their bits each   D channels x 32 tokens      }
//              scales of the values  f16 [32][VGROUPS] one for each token and VGROUP channels
//              minima of the values  f16 [32][VGROUPS]
//
// A warp copies it with 16-byte copies, and the elements are in the order of the tensor cores'
// fragments. A scheme has some of these parameters. Codes are in units of 32 rows x 16 columns. For
// keys, a unit is tokens x channels, in order of channels. For values, it is channels x tokens, in
// order of tokens, then channels. `Packing` defines the position of a code in its unit.
#pragma once
#include <stdint.h>

namespace kvq {

constexpr int TILE = 32;  // tokens of a tile
constexpr int LANES = 32;

// The number that a code represents, before its scale.
enum class Codes {
    INTEGERS,  // 0, 1, ...; a minimum is added
    SIGNED,    // -2^(bits - 1), ...
    LEVELS,    // the Lloyd-Max levels of the standard normal distribution
    E4M3,      // 8-bit floating-point numbers
    E5M2,
};

// The sets of numbers that share parameters.
enum class Params {
    CHANNELS,  // a scale and a minimum for each channel of a record
    TOKENS,    // a scale, and with INTEGERS a minimum, for each token
    // KVarN's: keys as CHANNELS and a factor for each token, values as TOKENS and a factor for each
    // channel of a record
    BALANCED,
    NONE,      // a scale for all numbers, an argument of the kernels
};

template <Codes CODES_, int BITS_, Params PARAMS_>
struct Scheme {
    static constexpr Codes CODES = CODES_;
    static constexpr Params PARAMS = PARAMS_;
    static constexpr int BITS = BITS_;
    static constexpr bool FLOATS = CODES == Codes::E4M3 || CODES == Codes::E5M2;
    static_assert(FLOATS || CODES == Codes::LEVELS ? BITS == (FLOATS ? 8 : BITS) : BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8);
    // Parameters per token are stored multiplied by 2^UP, so that they and their products with
    // probabilities are in f16's range.
    static constexpr int UP = PARAMS == Params::NONE ? 0 : CODES == Codes::E4M3 ? 8 : CODES == Codes::E5M2 ? 12 : 0;
};

// The positions of codes of BITS bits. A lane of a warp has WORDS words of a unit. UNITS units are
// stored together, CHUNK bytes for all lanes. The lower and the upper half of a word have the
// columns 2 (lane % 4) and 2 (lane % 4) + 1. The two bytes of a half have columns 8 apart. The
// fields of a byte have rows 8 apart, from lane / 4 on. Codes of 3 bits are stored as 4-bit fields
// split in two parts: one word has the lower two bits of two words, another word has the third bits
// of four words.
template <int BITS>
struct Packing {
    static constexpr int FIELD = BITS == 3 ? 4 : BITS;  // bits of a code in a word
    static constexpr int WORDS = FIELD / 2, ROWS = 8 / FIELD;
    static constexpr int UNITS = BITS == 3 ? 4 : 4 / WORDS, CHUNK = UNITS * LANES * 2 * BITS;

    static __device__ __forceinline__ void load(uint32_t (&words)[UNITS * WORDS], const unsigned char* codes, int chunk, int lane) {
        const unsigned char* from = codes + chunk * CHUNK;
        uint4 x = *reinterpret_cast<const uint4*>(from + lane * 16);
        if constexpr (BITS == 3) {
            uint2 third = *reinterpret_cast<const uint2*>(from + LANES * 16 + lane * 8);
            const uint32_t low[4] = {x.x, x.y, x.z, x.w}, high[2] = {third.x, third.y};
#pragma unroll
            for (int i = 0; i < 8; i++) words[i] = (low[i / 2] >> (i % 2 * 2) & 0x33333333u) | ((i % 4 < 2 ? high[i / 4] << (2 - i % 4) : high[i / 4] >> (i % 4 - 2)) & 0x44444444u);
        } else {
            words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
        }
    }

    static __device__ __forceinline__ void store(const uint32_t (&words)[UNITS * WORDS], unsigned char* codes, int chunk, int lane) {
        unsigned char* to = codes + chunk * CHUNK;
        if constexpr (BITS == 3) {
            uint32_t low[4] = {}, high[2] = {};
#pragma unroll
            for (int i = 0; i < 8; i++) low[i / 2] |= (words[i] & 0x33333333u) << (i % 2 * 2), high[i / 4] |= (words[i] >> 2 & 0x11111111u) << (i % 4);
            *reinterpret_cast<uint4*>(to + lane * 16) = make_uint4(low[0], low[1], low[2], low[3]);
            *reinterpret_cast<uint2*>(to + LANES * 16 + lane * 8) = make_uint2(high[0], high[1]);
        } else {
            *reinterpret_cast<uint4*>(to + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    // Packs a lane's words of a unit; `code(row, column)` returns the codes.
    template <class Code>
    static __device__ __forceinline__ void unit(uint32_t* words, int lane, Code code) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            words[w] = 0;
#pragma unroll
            for (int i = 0; i < 4 * ROWS; i++) {
                const int row = (w * ROWS + i % ROWS) * 8 + lane / 4, column = lane % 4 * 2 + i / ROWS % 2 * 8 + i / ROWS / 2;
                words[w] |= uint32_t(code(row, column)) << shift(row, column);
            }
        }
    }

    static __host__ __device__ constexpr int shift(int row, int column) { return column % 2 * 16 + column / 8 * 8 + row / 8 % ROWS * FIELD; }

    // Returns one code.
    static __device__ __forceinline__ uint32_t code(const unsigned char* codes, int unit, int row, int column) {
        uint32_t words[UNITS * WORDS];
        load(words, codes, unit / UNITS, row % 8 * 4 + column % 8 / 2);
        return words[unit % UNITS * WORDS + row / 8 / ROWS] >> shift(row, column) & ((1u << BITS) - 1);
    }
};

template <class Keys_, class Values_, int GROUP_, int D_>
struct Layout {
    using Keys = Keys_;
    using Values = Values_;
    using KPack = Packing<Keys::BITS>;
    using VPack = Packing<Values::BITS>;
    static constexpr int GROUP = GROUP_, D = D_;
    static_assert(GROUP % TILE == 0 && D % 64 == 0);

    static constexpr bool KIVI = Keys::PARAMS == Params::CHANNELS;
    static constexpr int VGROUP = KIVI && GROUP < D ? GROUP : D;
    static constexpr int VGROUPS = D / VGROUP;
    static constexpr int TILES = GROUP / TILE;

    static constexpr bool K_BY_CHANNEL = KIVI || Keys::PARAMS == Params::BALANCED;
    static constexpr bool K_BY_TOKEN = Keys::PARAMS == Params::TOKENS || Keys::PARAMS == Params::BALANCED;
    static constexpr bool K_TOKEN_MIN = Keys::PARAMS == Params::TOKENS && Keys::CODES == Codes::INTEGERS;
    static constexpr bool V_FACTORS = Values::PARAMS == Params::BALANCED;
    static constexpr bool V_BY_TOKEN = Values::PARAMS != Params::NONE;
    static constexpr bool V_TOKEN_MIN = V_BY_TOKEN && Values::CODES == Codes::INTEGERS;

    // Offsets in bytes within the header and within a tile.
    static constexpr int K_SCALE = 0, K_MIN = K_BY_CHANNEL ? 2 * D : 0, V_FACTOR = 2 * K_MIN, HEADER = V_FACTOR + (V_FACTORS ? 2 * D : 0);
    static constexpr int KT_SCALE = 0, KT_MIN = K_BY_TOKEN ? 2 * TILE : 0, K_CODES = KT_MIN + (K_TOKEN_MIN ? 2 * TILE : 0);
    static constexpr int V_CODES = K_CODES + TILE * D * Keys::BITS / 8, V_SCALE = V_CODES + TILE * D * Values::BITS / 8;
    static constexpr int V_MIN = V_SCALE + (V_BY_TOKEN ? 2 * TILE * VGROUPS : 0), TILE_BYTES = V_MIN + (V_TOKEN_MIN ? 2 * TILE * VGROUPS : 0);
    static constexpr int RECORD = HEADER + TILES * TILE_BYTES;

    static __device__ __forceinline__ uint32_t key_code(const unsigned char* tile, int token, int channel) {
        return KPack::code(tile + K_CODES, channel / 16, token, channel % 16);
    }
    static __device__ __forceinline__ uint32_t value_code(const unsigned char* tile, int token, int channel) {
        return VPack::code(tile + V_CODES, token / 16 * (D / 32) + channel / 32, channel % 32, token % 16);
    }

    // Returns the index of the scale and of the minimum of a channel's keys in their arrays.
    static __host__ __device__ constexpr int key_param_at(int channel) {
        int column = channel % 16;
        return channel / 32 * 32 + column % 8 / 2 * 8 + channel / 16 % 2 * 4 + column / 8 * 2 + column % 2;
    }
    // The same for a token's keys, and for the factor of a channel's values.
    static __host__ __device__ constexpr int key_token_at(int token) { return token % 8 * 4 + token / 8; }
    static __host__ __device__ constexpr int factor_at(int channel) { return channel % 8 * (D / 8) + channel / 8; }
    // The same for a token's values in a group of channels. A lane loads the parameters of PAIR
    // groups at once.
    static constexpr int PAIR = VGROUPS < 2 ? 1 : 2;
    static __host__ __device__ constexpr int value_param_at(int token, int group) {
        int row = token % 16;
        return token / 16 * 16 * VGROUPS + group / PAIR * 16 * PAIR + row % 8 / 2 * 4 * PAIR + group % PAIR * 4 + row / 8 * 2 + row % 2;
    }
};

// KIVI's layout: parameters of keys per channel, of values per token.
template <int KEY_BITS, int VALUE_BITS, int GROUP, int D>
using Kivi = Layout<Scheme<Codes::INTEGERS, KEY_BITS, Params::CHANNELS>, Scheme<Codes::INTEGERS, VALUE_BITS, Params::TOKENS>, GROUP, D>;

// Returns the factor of products of codes, for rows g + 8 `i` of a unit. A masked word of integer
// codes, read as two f16, is a pair of subnormal numbers code * 2^(shift - 24), which the tensor
// cores multiply exactly, so no conversion is needed. The bits of e4m3, read as f16, are 2^-8 times
// the number.
template <class S>
__host__ __device__ constexpr float unscale(int i) {
    constexpr int FIELD = Packing<S::BITS>::FIELD;
    if (S::CODES == Codes::INTEGERS || S::CODES == Codes::SIGNED) return float(1 << 24) / float(1 << (FIELD * (i % (8 / FIELD))));
    if (S::CODES == Codes::E4M3) return 256.f / float(1 << S::UP);
    return 1.f / float(1 << S::UP);
}

}  // namespace kvq
