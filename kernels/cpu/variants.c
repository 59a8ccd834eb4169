/* variants.c: chooses the CPU kernels' SIMD variant at run time, and gives its table the host's memory functions.
 * Compiled once. VERTEX_SIMD=avx512bf16|avx512|avx2|portable forces a variant that this processor can
 * run. */
#define _GNU_SOURCE
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/backend.h"

extern const vx_backend vx_cpu_portable_table;
#ifdef VX_X86_VARIANTS
extern const vx_backend vx_cpu_avx2_table, vx_cpu_avx512_table, vx_cpu_avx512bf16_table;
#endif

static vx_backend cpu;

static const vx_backend *best_variant(void)
{
    const char *forced = getenv("VERTEX_SIMD");
    if (forced && !strcmp(forced, "portable")) return &vx_cpu_portable_table;
#ifdef VX_X86_VARIANTS
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("x86-64-v3"), avx512 = __builtin_cpu_supports("x86-64-v4");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (forced && !strcmp(forced, "avx2") && avx2) return &vx_cpu_avx2_table;
    if (forced && !strcmp(forced, "avx512") && avx512) return &vx_cpu_avx512_table;
    if (bf16) return &vx_cpu_avx512bf16_table;
    if (avx512) return &vx_cpu_avx512_table;
    if (avx2) return &vx_cpu_avx2_table;
#endif
    return &vx_cpu_portable_table;
}

static int cpu_count(int *count)
{
    *count = 1;
    return VX_OK;
}

static int cpu_describe(int ordinal, char *text, size_t size)
{
    (void)ordinal;
    char model[128] = "", line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(model, sizeof model, "%s, ", strchr(line, ':') + 2);
            model[strcspn(model, "\n")] = 0;
            if (!strchr(model, ',')) strncat(model, ", ", sizeof model - strlen(model) - 1);
            break;
        }
    if (f) fclose(f);
    snprintf(text, size, "%s%s kernels, %d threads", model, cpu.name, omp_get_max_threads());
    return VX_OK;
}

/* Blocks of several huge pages ask for them: fewer faults and fewer TLB misses, a tenth of a training step at 64 x 64
 * pixels. */
static int cpu_alloc(int ordinal, size_t bytes, void **out)
{
    enum { HUGE_PAGE = 2 << 20 };
    (void)ordinal;
    *out = 0;
    const bool large = bytes >= 2 * HUGE_PAGE;
    if (posix_memalign(out, large ? HUGE_PAGE : 64, bytes ? bytes : 64)) return VX_ENOMEM;
#ifdef MADV_HUGEPAGE
    if (large) madvise(*out, bytes, MADV_HUGEPAGE); /* advice: where it is not taken, nothing is lost */
#endif
    return VX_OK;
}

static void cpu_release(int ordinal, void *data, size_t bytes)
{
    (void)ordinal, (void)bytes;
    free(data);
}

static int cpu_memory(int ordinal, int64_t *total, int64_t *available)
{
    (void)ordinal;
    *total = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    *available = (int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
    return VX_OK;
}

static int cpu_transfer(int ordinal, void *dst, const void *src, size_t bytes, int direction)
{
    (void)ordinal, (void)direction;
    memmove(dst, src, bytes);
    return VX_OK;
}

static int cpu_sync(int ordinal)
{
    (void)ordinal;
    return VX_OK;
}

static int cpu_threads(int n)
{
    if (n > 0) omp_set_num_threads(n);
    return omp_get_max_threads();
}

static void cpu_init(void)
{
    cpu = *best_variant();
    cpu.can = VX_CAN_HOST;
    cpu.count = cpu_count;
    cpu.describe = cpu_describe;
    cpu.alloc = cpu_alloc;
    cpu.release = cpu_release;
    cpu.memory = cpu_memory;
    cpu.transfer = cpu_transfer;
    cpu.sync = cpu_sync;
    cpu.threads = cpu_threads;
}

const vx_backend *vx_cpu_backend(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, cpu_init);
    return &cpu;
}
