// Keeps the memory of freed tensors for the next step. Returned to the system, it would fault in again page by page.
#include <cstdint>
#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

// Blocks of up to this many bytes (below 2^31) come from memory that the process keeps.
extern "C" void hstu_keep_freed_memory(int64_t bytes) {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, int(bytes));
    mallopt(M_TRIM_THRESHOLD, int(bytes));
    mallopt(M_TOP_PAD, 64 << 20);
#else
    (void)bytes;
#endif
}
