#include "rg_lru.cuh"

namespace hybrid {
ENTRIES(rg_lru, (LRU_THREADS, LRU_BLOCKS), rg_lru, RgLru)
}
