#include "format_kernels.cuh"

BALANCED(kvarn44_g128, Kvarn44)
BALANCED(kvarn42_g128, Kvarn42)
BALANCED(kvarn33_g128, Kvarn33)
BALANCED(kvarn22_g128, Kvarn22)
