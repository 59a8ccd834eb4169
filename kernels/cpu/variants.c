/* variants.c: chooses the CPU kernels' SIMD variant, and gives its table the host's memory functions. Compiled once.
 *
 * The best variant of variants.def that this processor runs is taken at the first use. VERTEX_SIMD=name forces another;
 * where it names none, or one that this processor cannot run, there is no CPU device, and whoever asks for it is told
 * so.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/backend.h"

#define VX_SIMD(name, flags, runs) extern const vx_backend vx_cpu_##name##_table;
#include "variants.def"
#undef VX_SIMD

static vx_backend cpu; /* the chosen variant's table; its name is NULL where the choice was refused */
static char refusal[256], list[1024];

static void choose_variant(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
#define HAS(feature) __builtin_cpu_supports(feature)
#define VX_SIMD(name, flags, runs) {#name, flags, runs, &vx_cpu_##name##_table},
    const struct {
        const char *name, *flags;
        bool runs;
        const vx_backend *table;
    } variants[] = {
#include "variants.def"
    };
#undef VX_SIMD
#undef HAS
    enum { COUNT = sizeof variants / sizeof *variants };
    const char *forced = getenv("VERTEX_SIMD");
    char known[128] = "", usable[128] = "";
    bool there = false;
    if (forced && !*forced) forced = 0;
    for (int i = 0; i < COUNT; i++) {
        const bool named = forced && !strcmp(forced, variants[i].name), runs = variants[i].runs;
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s\t%s\t%d\n", variants[i].name, variants[i].flags, runs);
        used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", variants[i].name);
        used = strlen(usable);
        if (runs) snprintf(usable + used, sizeof usable - used, "%s%s", used ? ", " : "", variants[i].name);
        there = there || named;
        if (runs && (!forced || named)) cpu = *variants[i].table;
    }
    if (cpu.name) return;
    if (there) snprintf(refusal, sizeof refusal, "VERTEX_SIMD=%s: this processor runs %s only", forced, usable);
    else snprintf(refusal, sizeof refusal, "VERTEX_SIMD=%.40s: expected one of %s", forced, known);
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
    choose_variant();
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

static pthread_once_t once = PTHREAD_ONCE_INIT;

const vx_backend *vx_cpu_backend(void)
{
    pthread_once(&once, cpu_init);
    if (cpu.name) return &cpu;
    vx_fail(VX_ENOSUP, "%s", refusal);
    return 0;
}

const char *vx_cpu_variants(void)
{
    pthread_once(&once, cpu_init);
    return list;
}
