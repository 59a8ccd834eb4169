/* variants.c: chooses the CPU kernels' SIMD variant, and gives its table the host's memory functions. Compiled once.
 *
 * The best variant of variants.def that this processor runs is taken at the first use, if it is one of those to choose
 * from. VERTEX_SIMD=name forces another;
 * where it names none, or one that this processor cannot run, there is no CPU device, and whoever asks for it is told
 * so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "graph.h"

#define VX_SIMD(name, flags) extern const vx_backend vx_cpu_##name##_table;
/* The ops that an AMX variant has kernels of its own for: OP(variant, op). */
#define AMX_OPS(OP, variant)                                                                                           \
    OP(variant, assign)                                                                                                \
    OP(variant, smooth_forward)                                                                                        \
    OP(variant, smooth_backward)                                                                                       \
    OP(variant, gemm)                                                                                                  \
    OP(variant, conv1d)                                                                                                \
    OP(variant, conv1d_backward_input)                                                                                 \
    OP(variant, conv1d_backward_weight)                                                                                \
    OP(variant, conv2d)                                                                                                \
    OP(variant, conv2d_backward_input)                                                                                 \
    OP(variant, conv2d_backward_weight)                                                                                \
    OP(variant, conv3x3)                                                                                               \
    OP(variant, conv3x3_backward_input)                                                                                \
    OP(variant, conv3x3_backward_weight)                                                                               \
    OP(variant, sepconv2d)                                                                                             \
    OP(variant, sepconv2d_backward)
#define DECLARE_OP(variant, op) extern __typeof__(*((vx_backend *)0)->op) cpu_##variant##_##op;
#define TAKE_OP(variant, op) table->op = cpu_##variant##_##op;
#define VX_SIMD_AMX(variant, flags, base)                                                                              \
    AMX_OPS(DECLARE_OP, variant)                                                                                       \
    static void take_##variant(vx_backend *table)                                                                      \
    {                                                                                                                  \
        *table = vx_cpu_##base##_table;                                                                                \
        table->name = #variant;                                                                                        \
        AMX_OPS(TAKE_OP, variant)                                                                                      \
    }
#include "variants.def"
#undef VX_SIMD
#undef VX_SIMD_AMX

static vx_backend cpu; /* the chosen variant's table; its name is NULL where the choice was refused */
static char refusal[512], list[1024];

#ifdef __x86_64__
/* Says whether this processor has AMX's tiles and their bfloat16 product (CPUID 7.0 EDX 24, 22). */
static bool has_amx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1 && d >> 22 & 1;
}

/* Asks Linux for AMX's tiles, without which the first tile instruction ends the process. Where it refuses, as it does
 * where a thread's alternate signal stack is too small for their state, writes why to `refusal` and returns false. */
static bool permit_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILE_DATA = 18 };
    if (!syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILE_DATA)) return true;
    snprintf(refusal, sizeof refusal, "VERTEX_SIMD=amx: Linux does not let this process use AMX's tiles: %s",
             strerror(errno));
    return false;
}
#else
static bool permit_amx(void) { return true; }
#endif

/* Writes the features that `flags` name and this processor lacks to `lacks`, with commas. */
static void find_lacks(const char *flags, char *lacks, size_t size)
{
    *lacks = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    const struct {
        const char *flag, *name;
        bool there;
    } features[] = {
        {"-march=x86-64-v2", "x86-64-v2", __builtin_cpu_supports("x86-64-v2")},
        {"-march=x86-64-v3", "x86-64-v3 (AVX2, FMA)", __builtin_cpu_supports("x86-64-v3")},
        {"-march=x86-64-v4", "x86-64-v4 (AVX-512)", __builtin_cpu_supports("x86-64-v4")},
        {"-mavx512bf16", "AVX512_BF16", __builtin_cpu_supports("avx512bf16")},
        {"-mamx-bf16", "AMX_BF16", has_amx()},
    };
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        const size_t used = strlen(lacks);
        if (strstr(flags, features[i].flag) && !features[i].there)
            snprintf(lacks + used, size - used, "%s%s", used ? ", " : "", features[i].name);
    }
#else
    (void)flags, (void)size;
#endif
}

static void choose_variant(void)
{
#define VX_SIMD(name, flags) {#name, flags, &vx_cpu_##name##_table, 0},
#define VX_SIMD_AMX(name, flags, base) {#name, flags, 0, take_##name},
    const struct {
        const char *name, *flags;
        const vx_backend *chosen;   /* its table, where it may be chosen by itself, */
        void (*take)(vx_backend *); /* or what makes the table */
    } variants[] = {
#include "variants.def"
    };
#undef VX_SIMD
#undef VX_SIMD_AMX
    enum { COUNT = sizeof variants / sizeof *variants };
    const char *forced = getenv("VERTEX_SIMD");
    char known[128] = "", usable[128] = "", lacks[128], lacking[128] = "";
    bool there = false;
    if (forced && !*forced) forced = 0;
    for (int i = 0; i < COUNT; i++) {
        const bool named = forced && !strcmp(forced, variants[i].name);
        find_lacks(variants[i].flags, lacks, sizeof lacks);
        const bool runs = !*lacks;
        if (named) memcpy(lacking, lacks, sizeof lacking);
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s\t%s\t%d\t%d\n", variants[i].name, variants[i].flags, runs,
                 variants[i].chosen != 0);
        used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", variants[i].name);
        used = strlen(usable);
        if (runs) snprintf(usable + used, sizeof usable - used, "%s%s", used ? ", " : "", variants[i].name);
        there = there || named;
        if (!runs || (forced && !named)) continue;
        if (variants[i].chosen) cpu = *variants[i].chosen;
        else if (named && (!strstr(variants[i].flags, "-mamx") || permit_amx())) variants[i].take(&cpu);
    }
    if (cpu.name || *refusal) return;
    if (there)
        snprintf(refusal, sizeof refusal, "VERTEX_SIMD=%s: this processor runs %s only; it lacks %s", forced, usable,
                 lacking);
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

static int cpu_sync(int ordinal)
{
    (void)ordinal;
    return vx_cpu_refuse_recording("results cannot be read (item, totable, a copy to the host) nor waited for");
}

static int cpu_transfer(int ordinal, void *dst, const void *src, size_t bytes, int direction)
{
    const int status =
        direction == VX_TO_HOST ? cpu_sync(ordinal) : vx_cpu_refuse_recording("numbers of the host cannot be uploaded");
    if (!status) memmove(dst, src, bytes);
    return status;
}

static int cpu_threads(int n)
{
    if (n > 0) omp_set_num_threads(n);
    return omp_get_max_threads();
}

static void cpu_init(void)
{
    choose_variant();
    cpu.can = VX_CAN_HOST | VX_CAN_BF16;
    cpu.count = cpu_count;
    cpu.describe = cpu_describe;
    cpu.alloc = cpu_alloc;
    cpu.release = cpu_release;
    cpu.memory = cpu_memory;
    cpu.transfer = cpu_transfer;
    cpu.sync = cpu_sync;
    cpu.threads = cpu_threads;
    vx_cpu_add_graphs(&cpu);
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
