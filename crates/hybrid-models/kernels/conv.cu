#include "conv.cuh"

namespace hybrid {
ENTRIES(conv, (CONV_THREADS, CONV_BLOCKS), conv, Conv)
}
