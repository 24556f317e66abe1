#include "format_kernels.cuh"

BALANCED(kvarn44_g64, Kvarn44Of64)
BALANCED(kvarn42_g64, Kvarn42Of64)
BALANCED(kvarn33_g64, Kvarn33Of64)
BALANCED(kvarn22_g64, Kvarn22Of64)
