#include "selective_scan.cuh"
#include "selective_scan_generic.cuh"

namespace hybrid {
ENTRIES(selective_scan, (ScanUsual::THREADS, SCAN_BLOCKS), selective_scan, SelectiveScan)
ENTRIES(selective_scan_few, (ScanFew::THREADS, 1), selective_scan_few, SelectiveScan)
ENTRIES(selective_scan_generic, (SCAN_GENERIC_THREADS), selective_scan_generic, SelectiveScan)
}
