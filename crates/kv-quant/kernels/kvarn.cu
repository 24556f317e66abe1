#include "format_kernels.cuh"

BALANCED(kvarn44, Kvarn44)
BALANCED(kvarn42, Kvarn42)
BALANCED(kvarn22, Kvarn22)
