#include "format_kernels.cuh"

TOKENS(k8v4, K8V4)
TOKENS(levels4_whole4, FourBitNc)
TOKENS(levels3_whole4, K3V4Nc)
TOKENS(levels3_whole3, ThreeBitNc)
