#include "conv.cuh"

namespace hybrid {
ENTRIES(conv, CONV_THREADS, conv, Conv)
}
