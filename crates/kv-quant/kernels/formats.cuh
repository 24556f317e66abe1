// The packed layouts of all formats except KIVI. `Format` in src/format.rs describes them;
// src/cuda/kernels.rs has the kernels' names.
#pragma once
#include "layout.cuh"

namespace kvq {

using KeysE4m3 = Scheme<Codes::E4M3, 8, Params::TOKENS>;
using KeysE5m2 = Scheme<Codes::E5M2, 8, Params::TOKENS>;
using FixedE4m3 = Scheme<Codes::E4M3, 8, Params::NONE>;
using FixedE5m2 = Scheme<Codes::E5M2, 8, Params::NONE>;
template <int BITS>
using Whole = Scheme<Codes::INTEGERS, BITS, Params::TOKENS>;
template <int BITS>
using Signed = Scheme<Codes::SIGNED, BITS, Params::TOKENS>;
template <int BITS>
using Levels = Scheme<Codes::LEVELS, BITS, Params::TOKENS>;
template <int BITS>
using Balanced = Scheme<Codes::INTEGERS, BITS, Params::BALANCED>;

template <int D> using E4m3 = Layout<KeysE4m3, KeysE4m3, 64, D>;
template <int D> using E5m2 = Layout<KeysE5m2, KeysE5m2, 64, D>;
template <int D> using E4m3Fixed = Layout<FixedE4m3, FixedE4m3, 64, D>;
template <int D> using E5m2Fixed = Layout<FixedE5m2, FixedE5m2, 64, D>;
template <int D> using Signed4 = Layout<Signed<4>, Signed<4>, 64, D>;
template <int D> using Signed3 = Layout<Signed<3>, Signed<3>, 64, D>;
template <int D> using Whole4 = Layout<Whole<4>, Whole<4>, 32, D>;
template <int D> using Whole3 = Layout<Whole<3>, Whole<3>, 32, D>;
template <int D> using K8V4 = Layout<FixedE4m3, Whole<4>, 64, D>;
template <int D> using FourBitNc = Layout<Levels<4>, Whole<4>, 64, D>;
template <int D> using K3V4Nc = Layout<Levels<3>, Whole<4>, 64, D>;
template <int D> using ThreeBitNc = Layout<Levels<3>, Whole<3>, 64, D>;
// KVarN with tiles of 128 tokens, and with tiles of 64.
template <int D> using Kvarn44 = Layout<Balanced<4>, Balanced<4>, 128, D>;
template <int D> using Kvarn42 = Layout<Balanced<4>, Balanced<2>, 128, D>;
template <int D> using Kvarn33 = Layout<Balanced<3>, Balanced<3>, 128, D>;
template <int D> using Kvarn22 = Layout<Balanced<2>, Balanced<2>, 128, D>;
template <int D> using Kvarn44Of64 = Layout<Balanced<4>, Balanced<4>, 64, D>;
template <int D> using Kvarn42Of64 = Layout<Balanced<4>, Balanced<2>, 64, D>;
template <int D> using Kvarn33Of64 = Layout<Balanced<3>, Balanced<3>, 64, D>;
template <int D> using Kvarn22Of64 = Layout<Balanced<2>, Balanced<2>, 64, D>;

// The number of warps of an attention block, and of stages of a warp's ring. Three small blocks
// share a multiprocessor, so that one streams while others begin or merge their results.
template <class L>
__host__ __device__ constexpr int attend_warps() {
    return L::D == 64 || (L::D == 128 && L::Keys::BITS == 8) ? 8 : 4;
}
template <class L>
__host__ __device__ constexpr int attend_stages() {
    return attend_warps<L>() == 8 ? 2 : 3;
}

}  // namespace kvq
