/* span_mask.h: the random numbers behind masks and distractors, which C and CUDA must draw alike.
 *
 * Row b of a batch of T frames has 1 + 2 F Philox blocks, F = ceil(T / 4), from (1 + 2 F) b on: word 0 of the first is
 * u; the next F hold a word for each start of a span, the last F one for each masked frame. The n starts drawn are the
 * first n in ascending order of (word, start), as a random permutation's first n would be; the frames kept likewise.
 */
#ifndef VX_SPAN_MASK_H
#define VX_SPAN_MASK_H

#include "common.h"

VX_INLINE uint64_t span_blocks(int64_t T) { return 1 + 2 * (uint64_t)((T + 3) / 4); }

/* Gives the block of the word w = t % 4 of a start t, or of a frame t where frame is 1. */
VX_INLINE uint64_t span_block(int64_t row, int64_t T, int64_t t, int frame)
{
    return (uint64_t)row * span_blocks(T) + 1 + (frame ? (uint64_t)((T + 3) / 4) : 0) + (uint64_t)(t / 4);
}

/* Gives the number of spans of a row of `length` frames, of which `starts` may begin one; u in [0, 1). */
VX_INLINE int64_t span_count(int64_t length, int64_t starts, double probability, int64_t span, int64_t least, double u)
{
    const int64_t n = (int64_t)(probability * (double)length / (double)span + u);
    return starts <= 0 ? 0 : vx_min64(starts, vx_max64(n, least));
}

/* Gives one of the `others` - 1 remaining places of a list first, ..., first + others - 1 that holds `own`: a multiple
 * of 2^-32 decides, so that a place's chance is off by less than others / 2^32 of itself. */
VX_INLINE int64_t distractor_of(uint32_t word, int64_t first, int64_t others, int64_t own)
{
    const int64_t at = first + (int64_t)((uint64_t)word * (uint64_t)(others - 1) >> 32);
    return at < own ? at : at + 1;
}

#endif
