/* draws.h: random numbers one after the other, as a recipe draws them: those of blocks `block`, `block` + 1, ... of a
 * Philox stream (core/rng.h). Start with vx_draws d = {.seed = ..., .stream = ..., .block = ...}. */
#ifndef VX_DRAWS_H
#define VX_DRAWS_H

#include "core/rng.h"

typedef struct vx_draws {
    uint64_t seed, stream, block;
    vx_philox4 words;
    int left; /* of words */
} vx_draws;

static inline uint32_t vx_draw_word(vx_draws *d)
{
    if (d->left == 0) {
        d->words = vx_philox(d->seed, d->stream, d->block++);
        d->left = 4;
    }
    return d->words.word[4 - d->left--];
}

/* Draws a uniform number of the open interval (0, 1). */
static inline float vx_draw_unit(vx_draws *d) { return vx_unit(vx_draw_word(d)); }

static inline float vx_draw_between(vx_draws *d, float low, float high) { return low + (high - low) * vx_draw_unit(d); }

/* Draws a uniform integer below n. */
static inline int vx_draw_pick(vx_draws *d, int n) { return (int)((uint64_t)vx_draw_word(d) * (uint32_t)n >> 32); }

#endif
