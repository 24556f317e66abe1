// A CUDA driver, runtime, cuBLAS and cuRAND that do nothing, to measure the host's share of a
// program without a GPU. Kernels do not run; memory is the host's, and copies from the device
// return zeros, so results have no meaning. Reports the numbers of calls at the end.
//
//     bash benches/gpu/null_driver.sh /tmp/null
//     LD_LIBRARY_PATH=/tmp/null perf record target/release/deps/trace-… --methods kivi-4
//
// Only the functions that this repository's programs link are here.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef unsigned long long Address;

// Memory is reserved from this size on, and only takes room when it is written.
static const size_t LARGE = 1 << 20;
static uint64_t launches, copies, copied_bytes, reads, allocations, waits;
static long something;  // what all handles point to

static Address allocate(size_t bytes) {
    const size_t all = bytes + 512;
    char* start = all > LARGE ? mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : malloc(all);
    const Address address = ((Address)start + 16 + 255) & ~255ull;
    ((uint64_t*)address)[-1] = (uint64_t)start, ((uint64_t*)address)[-2] = all;
    allocations++;
    return address;
}

static int release(Address address) {
    void* start = (void*)((uint64_t*)address)[-1];
    const size_t all = ((uint64_t*)address)[-2];
    if (all > LARGE) munmap(start, all);
    else free(start);
    return 0;
}

// Attributes of an H200 by their number in CUdevice_attribute; 1 for others.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;    // threads per block
        case 8: *value = 49152; break;   // shared memory per block
        case 10: *value = 32; break;     // threads per warp
        case 16: *value = 132; break;    // multiprocessors
        case 39: *value = 2048; break;   // threads per multiprocessor
        case 75: *value = 9; break;      // compute capability
        case 76: *value = 0; break;
        case 81: *value = 233472; break;  // shared memory per multiprocessor
        case 97: *value = 232448; break;  // shared memory per block, on request
        default: *value = 1;
    }
    return 0;
}

#define GIVES(NAME, TYPE, VALUE) int NAME(TYPE* out) { *out = VALUE; return 0; }
#define GIVES_HANDLE(NAME) GIVES(NAME, void*, &something)
#define DOES_NOTHING(NAME) int NAME() { return 0; }
#define WAITS(NAME) int NAME() { waits++; return 0; }

GIVES(cuDeviceGet, int, 0)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 2)
GIVES(cuOccupancyMaxActiveClusters, int, 30)
GIVES(cudaGetDevice, int, 0)
GIVES_HANDLE(cuCtxGetCurrent)
GIVES_HANDLE(cuDeviceGetDefaultMemPool)
GIVES_HANDLE(cuDevicePrimaryCtxRetain)
GIVES_HANDLE(cuEventCreate)
GIVES_HANDLE(cuModuleLoad)
GIVES_HANDLE(cuModuleLoadData)
GIVES_HANDLE(cuModuleGetFunction)
GIVES_HANDLE(cuStreamCreate)
GIVES_HANDLE(cublasCreate_v2)
GIVES_HANDLE(curandCreateGenerator)
WAITS(cuCtxSynchronize)
WAITS(cuStreamSynchronize)
DOES_NOTHING(cuCtxDestroy_v2)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuDevicePrimaryCtxRelease_v2)
DOES_NOTHING(cuEventDestroy_v2)
DOES_NOTHING(cuEventRecord)
DOES_NOTHING(cuEventSynchronize)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuGraphDestroy)
DOES_NOTHING(cuGraphExecDestroy)
DOES_NOTHING(cuGraphLaunch)
DOES_NOTHING(cuInit)
DOES_NOTHING(cuMemPoolSetAttribute)
DOES_NOTHING(cuMemcpyDtoDAsync_v2)
DOES_NOTHING(cuMemcpyPeerAsync)
DOES_NOTHING(cuMemsetD8Async)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuStreamBeginCapture_v2)
DOES_NOTHING(cuStreamDestroy_v2)
DOES_NOTHING(cuStreamWaitEvent)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasDgemmStridedBatched)
DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cudaFuncSetAttribute)
DOES_NOTHING(curandDestroyGenerator)
DOES_NOTHING(curandGenerateNormal)
DOES_NOTHING(curandGenerateNormalDouble)
DOES_NOTHING(curandSetPseudoRandomGeneratorSeed)
DOES_NOTHING(curandSetStream)
DOES_NOTHING(__cudaGetKernel)
DOES_NOTHING(__cudaLaunchKernel_ptsz)
DOES_NOTHING(__cudaPopCallConfiguration)
DOES_NOTHING(__cudaPushCallConfiguration)
DOES_NOTHING(__cudaRegisterFatBinaryEnd)
DOES_NOTHING(__cudaRegisterFunction)
DOES_NOTHING(__cudaRegisterVar)
DOES_NOTHING(__cudaUnregisterFatBinary)

void* __cudaRegisterFatBinary() { return &something; }
int cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
int cuStreamEndCapture(void* stream, void** graph) { *graph = &something; return 0; }
int cuGraphInstantiateWithFlags(void** graph) { *graph = &something; return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = attribute == 8 ? 0 : 1024; return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { *free = *total = (size_t)140 << 30; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error of the null driver"; return 0; }
int cuLaunchKernel() { launches++; return 0; }
int cuLaunchKernelEx() { launches++; return 0; }
int cuLaunchCooperativeKernel() { launches++; return 0; }
int cuMemAlloc_v2(Address* out, size_t bytes) { *out = allocate(bytes); return 0; }
int cuMemAllocAsync(Address* out, size_t bytes) { *out = allocate(bytes); return 0; }
int cuMemFree_v2(Address address) { return release(address); }
int cuMemFreeAsync(Address address) { return release(address); }
int cuMemHostAlloc(void** out, size_t bytes) { *out = calloc(1, bytes); return 0; }
int cuMemFreeHost(void* memory) { free(memory); return 0; }
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes) { reads++; memset(to, 0, bytes); return 0; }
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes) { copies++; copied_bytes += bytes; return 0; }

__attribute__((destructor)) static void report() {
    if (launches > 0)
        fprintf(stderr, "%lu launches, %lu copies to the device of %lu bytes, %lu from it, %lu allocations, %lu waits\n", launches, copies, copied_bytes, reads, allocations, waits);
}
