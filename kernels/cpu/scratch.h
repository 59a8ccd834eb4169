/* scratch.h: an op's working memory: one block, of which every array begins at a cache line.
 *
 * The arrays are listed once, in a loop that runs twice. The first pass only counts, and hands out nothing that may be
 * looked at; then the block is taken; the second pass hands out its parts:
 *
 *     scratch memory = {.op = "foo"};
 *     while (scratch_pass(&memory)) {
 *         order = carve_i32(&memory, N);
 *         sums = carve_f64(&memory, parts * D);
 *     }
 *     if (!memory.base) return VX_ENOMEM;
 *     ...
 *     scratch_free(&memory);
 */
#ifndef VX_SCRATCH_H
#define VX_SCRATCH_H

#include "cpu.h"

typedef struct scratch {
    const char *op; /* named where there is no memory */
    char *base;     /* NULL in the first pass, and where there is no memory */
    size_t used;    /* bytes handed out in this pass */
    int passes;
} scratch;

/* Begins the next pass. Returns 0 where there is none: after the second, or where no memory was found for it. */
static inline int scratch_pass(scratch *s)
{
    const int pass = s->passes++;
    if (pass == 1) s->base = vx_scratch(s->op, s->used);
    s->used = 0;
    return pass == 0 || (pass == 1 && s->base);
}

static inline void scratch_free(scratch *s) { vx_scratch_free(s->base); }

/* Hands out `count` elements of `size` bytes; NULL in the first pass. */
static inline void *carve(scratch *s, int64_t count, size_t size)
{
    enum { CACHE_LINE = 64 };
    void *p = s->base ? s->base + s->used : 0;
    s->used += ((size_t)count * size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return p;
}

static inline float *carve_f32(scratch *s, int64_t count) { return carve(s, count, sizeof(float)); }
static inline double *carve_f64(scratch *s, int64_t count) { return carve(s, count, sizeof(double)); }
static inline int32_t *carve_i32(scratch *s, int64_t count) { return carve(s, count, sizeof(int32_t)); }
static inline uint32_t *carve_u32(scratch *s, int64_t count) { return carve(s, count, sizeof(uint32_t)); }
static inline uint64_t *carve_u64(scratch *s, int64_t count) { return carve(s, count, sizeof(uint64_t)); }

#endif
