// How a packed cache lies in memory.
//
// One kv head's packed tokens are a row of records, one for each GROUP tokens, with all that attention needs of them in one piece:
//
//     header   scales of the keys   f16 [D]           one for each channel
//              minima of the keys   f16 [D]
//     tile     codes of the keys    BITS each         32 tokens x D channels          } GROUP / 32 of these
//              codes of the values  BITS each         D channels x 32 tokens          }
//              scales of the values f16 [32][VGROUPS] one for each token and VGROUP channels
//              minima of the values f16 [32][VGROUPS]
//
// so that a warp streams it with 16-byte copies and finds every number where the tensor cores want it. Codes come in units of
// 32 rows x 16 columns (keys: tokens x channels, units in order of channels; values: channels x tokens, units in order of tokens,
// then channels): BITS / 2 words of 32 bits for each lane of a warp. `code_at` says where a code lies. A masked word, read as two
// f16, is a pair of subnormal numbers code * 2^(shift - 24), which the tensor cores multiply exactly: nothing is converted.
#pragma once
#include <stdint.h>

namespace kvq {

constexpr int TILE = 32;  // tokens of a tile
constexpr int LANES = 32;

template <int BITS_, int GROUP_, int D_>
struct Layout {
    static constexpr int BITS = BITS_, GROUP = GROUP_, D = D_;
    static_assert(BITS == 2 || BITS == 4 || BITS == 8);
    static_assert(GROUP % TILE == 0 && D % 64 == 0);

    static constexpr int VGROUP = GROUP < D ? GROUP : D;
    static constexpr int VGROUPS = D / VGROUP;
    static constexpr int TILES = GROUP / TILE;
    static constexpr int WORDS = BITS / 2;  // of a lane, in a unit

    // Offsets in bytes within the header and within a tile.
    static constexpr int K_SCALE = 0, K_MIN = 2 * D, HEADER = 4 * D;
    static constexpr int CODES = TILE * D * BITS / 8;
    static constexpr int K_CODES = 0, V_CODES = CODES, V_SCALE = 2 * CODES, V_MIN = V_SCALE + 2 * TILE * VGROUPS;
    static constexpr int TILE_BYTES = V_MIN + 2 * TILE * VGROUPS;
    static constexpr int RECORD = HEADER + TILES * TILE_BYTES;

    // Where a code lies: the byte offset of its word in the array of codes, and its shift within the word.
    struct Place {
        int byte, shift;
    };
    static __host__ __device__ constexpr Place code_at(int unit, int row, int column) {
        int word = unit * WORDS + row / (64 / BITS);
        int lane = row % 8 * 4 + column % 8 / 2;
        return {word / 4 * (LANES * 16) + lane * 16 + word % 4 * 4, column % 2 * 16 + column / 8 * 8 + row % (64 / BITS) / 8 * BITS};
    }
    static __host__ __device__ constexpr Place key_at(int token, int channel) { return code_at(channel / 16, token, channel % 16); }
    static __host__ __device__ constexpr Place value_at(int token, int channel) {
        return code_at(token / 16 * (D / 32) + channel / 32, channel % 32, token % 16);
    }

    // Where the scale and the minimum of a channel's keys lie in their arrays, in elements.
    static __host__ __device__ constexpr int key_param_at(int channel) {
        int column = channel % 16;
        return channel / 32 * 32 + column % 8 / 2 * 8 + channel / 16 % 2 * 4 + column / 8 * 2 + column % 2;
    }
    // The same for a token's values in a group of channels. Lanes take the parameters of PAIR groups in one load.
    static constexpr int PAIR = VGROUPS < 2 ? 1 : 2;
    static __host__ __device__ constexpr int value_param_at(int token, int group) {
        int row = token % 16;
        return token / 16 * 16 * VGROUPS + group / PAIR * 16 * PAIR + row % 8 / 2 * 4 * PAIR + group % PAIR * 4 + row / 8 * 2 + row % 2;
    }
};

// What a subnormal product has to be multiplied with, for rows g + 8 `i` of a unit.
template <int BITS>
__host__ __device__ constexpr float unscale(int i) {
    return float(1 << 24) / float(1 << (BITS * (i % (8 / BITS))));
}

}  // namespace kvq
