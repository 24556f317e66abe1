#include "ssd/ssd.cuh"
#include "ssd/ssd_generic.cuh"
#include "ssd/ssd_wgmma.cuh"

namespace hybrid {
static_assert(sizeof(SsdShared<__half, 128>) == SSD_SHARED_128 && sizeof(SsdShared<__half, 64>) == SSD_SHARED_64, "as args.cuh says");
static_assert(sizeof(SsdWgmmaShared<__half, 128>) == SSD_WGMMA_SHARED_128 && sizeof(SsdWgmmaShared<__half, 64>) == SSD_WGMMA_SHARED_64, "as args.cuh says");
static_assert(sizeof(SsdGroupTiles<__half, 128>) == SSD_GROUP_TILES_128 && sizeof(SsdGroupTiles<__half, 64>) == SSD_GROUP_TILES_64, "as args.cuh says");
ENTRY(ssd, (SSD_THREADS, 2), ssd, Ssd, f16, __half)
ENTRY(ssd, (SSD_THREADS, 2), ssd, Ssd, bf16, __nv_bfloat16)
ENTRY(ssd_group_tiles, (SSD_GROUP_TILES_THREADS), ssd_group_tiles, Ssd, f16, __half)
ENTRY(ssd_group_tiles, (SSD_GROUP_TILES_THREADS), ssd_group_tiles, Ssd, bf16, __nv_bfloat16)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SSD_CLUSTERS __cluster_dims__(SSD_CLUSTER, 1, 1)
#else
#define SSD_CLUSTERS
#endif
ENTRY(ssd_wgmma, (SSD_WGMMA_THREADS, 1) SSD_CLUSTERS, ssd_wgmma, Ssd, f16, __half)
ENTRY(ssd_wgmma, (SSD_WGMMA_THREADS, 1) SSD_CLUSTERS, ssd_wgmma, Ssd, bf16, __nv_bfloat16)
ENTRIES(ssd_generic, (COLUMN_THREADS), ssd_generic, Ssd)
}
