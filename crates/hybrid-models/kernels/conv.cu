#include "conv.cuh"

namespace hybrid {
ENTRIES(conv, (CONV_THREADS, 4), conv, Conv)
}
