// Programmatic dependent launch, of compute capability 9.0: a kernel may start before the kernel
// before it in the stream has ended. Without the launch attribute these functions do nothing.
#pragma once

// Lets the next kernel start as soon as it finds free multiprocessors. That kernel waits for the end of
// this one. If this kernel has waited first, all kernels before it have ended, so the next kernel may
// read their results before it waits.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernels before this one have ended. Every thread that reads their results, or writes
// memory that they use, calls it first.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
