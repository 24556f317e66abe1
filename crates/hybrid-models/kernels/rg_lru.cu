#include "rg_lru.cuh"

namespace hybrid {
ENTRIES(rg_lru, LRU_THREADS, rg_lru, RgLru)
}
