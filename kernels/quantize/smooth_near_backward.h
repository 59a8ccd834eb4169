/* smooth_near_backward.h: smooth_backward.c's pass for narrow rows that meet only the cells of codes near them
 * (smooth_cells.h).
 *
 * Rows are taken in segments. A segment's rows are listed by cell, each pair of a row and a cell having a number; then
 * every cell meets its rows in runs, in ascending order, as narrow_panel() lets a panel meet a chunk. So a code's
 * gradient is summed by one thread at a time, over the rows in their order, and the codes stay in registers for a whole
 * run. What a row gets of a cell is kept by the pair's number, and added up over the row's cells in ascending order. So
 * the bits of every sum are those that the row or the code alone would give, whatever threads there are and however
 * segments are cut.
 *
 * Working space: NEAR_PAIRS pairs of D + 3 numbers (or 96 of each cell), and for each of at most NEAR_ROWS rows what
 * a chunk has.
 */
#ifndef VX_SMOOTH_NEAR_BACKWARD_H
#define VX_SMOOTH_NEAR_BACKWARD_H

#include <omp.h>

#include "smooth_chunk.h"

enum {
    NEAR_ROWS = 96 * 96, /* most rows of a segment: of whole chunks, which have at most 96 rows */
    NEAR_PAIRS = 1 << 16 /* pairs of a segment */
};

/* What threads share for a segment of rows. */
typedef struct segment {
    worker rows;      /* arrays of the segment's rows, as a worker has them for a chunk */
    int64_t most;     /* rows that the arrays hold, */
    int64_t capacity; /* and pairs */
    uint16_t *mask;   /* (most, groups) a bit for each cell that a row meets */
    int32_t *pair;    /* (most + 1) where a row's pairs begin in number */
    int32_t *number;  /* (capacity) the pairs of each row, cells ascending */
    int32_t *row;     /* (capacity) by the pairs' numbers: their rows */
    int32_t *at;      /* (chunks of a segment, cells) the next number of a chunk's pairs with a cell */
    int32_t *first;   /* (cells + 1) where a cell's pairs begin in number */
    float *part;      /* (capacity, narrow + 1) what a row gets of a cell */
} segment;

/* Says how many rows a segment may have. */
static inline int64_t segment_rows(const backward *b) { return vx_min64(b->chunks, NEAR_ROWS / b->chunk) * b->chunk; }

static inline void carve_segment(scratch *a, const backward *b, segment *s)
{
    const int64_t cells = b->c.panels, D = b->cpu.narrow;
    s->most = segment_rows(b);
    s->capacity = vx_max64(NEAR_PAIRS, b->chunk * cells);
    worker *t = &s->rows;
    t->z = carve_f32(a, s->most * D), t->dy = carve_f32(a, s->most * D), t->dhat = carve_f32(a, s->most * D);
    t->start = carve_f32(a, s->most);
    t->mix_offset = carve_f32(a, s->most), t->pi_factor = carve_f32(a, s->most), t->pi_offset = carve_f32(a, s->most);
    t->noisy = carve_f32(a, s->most);
    t->x_sum = carve(a, s->most, sizeof(vf));
    s->mask = carve(a, s->most * vx_ceil_div(cells, GROUP), sizeof(uint16_t));
    s->pair = carve_i32(a, s->most + 1);
    s->number = carve_i32(a, s->capacity), s->row = carve_i32(a, s->capacity);
    s->at = carve_i32(a, s->most / b->chunk * cells);
    s->first = carve_i32(a, cells + 1);
    s->part = carve_f32(a, s->capacity * (D + 1));
}

/* Returns a worker whose arrays begin at row i of the segment's. */
static inline worker rows_from(const backward *b, const segment *s, int64_t i)
{
    const int64_t D = b->cpu.narrow;
    const worker *t = &s->rows;
    return (worker){.z = t->z + i * D,
                    .dy = t->dy + i * D,
                    .dhat = t->dhat + i * D,
                    .start = t->start + i,
                    .mix_offset = t->mix_offset + i,
                    .pi_factor = t->pi_factor + i,
                    .pi_offset = t->pi_offset + i,
                    .noisy = t->noisy + i,
                    .x_sum = t->x_sum + i};
}

/* Fills mask (groups) with the cells that row n meets. Returns their number. */
VX_INLINE int64_t mask_cells(const int D, const backward *b, int64_t n, uint16_t *mask)
{
    const smooth_call *c = &b->c;
    const boxes *groups = &b->cells.cells.group, *cells = &b->cells.cells.cell;
    const int64_t row = n * c->G + b->g;
    float u[NARROW_MAX], square = 0;
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
        u[d] = d < c->D ? c->z[row * c->D + d] / b->norms[row] : 0;
        square += u[d] * u[d];
    }
    const float limit = near_limit(&b->cells, square, b->lse[row * 2] * LOG2E);
    int64_t met = 0;
    memset(mask, 0, sizeof *mask * (size_t)groups->count);
    for (int64_t i = 0; i < groups->padded; i += VX_LANES) {
        float squares[GROUP];
        vf_store(squares, box_distances(D, groups, i, u));
        for (uint32_t bits = boxes_within(squares, VX_LANES, limit); bits; bits &= bits - 1) {
            const int64_t group = i + __builtin_ctz(bits);
            for (int l = 0; l < GROUP; l += VX_LANES)
                vf_store(squares + l, box_distances(D, cells, group * GROUP + l, u));
            mask[group] = (uint16_t)boxes_within(squares, GROUP, limit);
            met += __builtin_popcount(mask[group]);
        }
    }
    return met;
}

static int64_t mask_row(const backward *b, int64_t n, uint16_t *mask)
{
    switch (b->cpu.narrow) {
    case 3: return mask_cells(3, b, n, mask);
    case 4: return mask_cells(4, b, n, mask);
    default: return mask_cells(8, b, n, mask);
    }
}

/* Makes cells of group g's codes, for fill_codebook(), and says whether its rows should meet near cells only. */
static int choose_near(backward *b, const segment *s)
{
    const smooth_call *c = &b->c;
    const int D = b->cpu.narrow;
    near_codes_of(&b->cells, c, &b->cpu, b->g, b->points);
    int64_t met = 0;
    for (int64_t i = 0; i < NEAR_TRIAL; i++) met += mask_row(b, i * (c->N / NEAR_TRIAL), s->mask);
    /* in vectors of operations a row */
    const double fixed = (double)b->cells.cells.group.padded / VX_LANES * (5 * D + 8) + 200,
                 one = VECTORS * (5 * D + 13), all = (double)c->panels * one;
    return fixed + (double)met / NEAR_TRIAL * (one + 150) < 0.9 * all;
}

/* Lists the pairs of a segment that begins at chunk `first`, of at most `chunks` chunks. Returns how many chunks it
 * has. All threads of a parallel region call it together. */
static int64_t list_pairs(const backward *b, const segment *s, int64_t first, int64_t chunks, int64_t *found)
{
    const smooth_call *c = &b->c;
    const int64_t cells = c->panels, groups = vx_ceil_div(cells, GROUP);
#pragma omp for schedule(dynamic, 1)
    for (int64_t j = 0; j < chunks; j++) {
        int32_t *count = s->at + j * cells;
        memset(count, 0, sizeof *count * (size_t)cells);
        for (int64_t i = j * b->chunk; i < vx_min64((j + 1) * b->chunk, c->N - first * b->chunk); i++) {
            uint16_t *mask = s->mask + i * groups;
            s->pair[i + 1] = (int32_t)mask_row(b, first * b->chunk + i, mask);
            for (int64_t g = 0; g < groups; g++)
                for (uint32_t bits = mask[g]; bits; bits &= bits - 1) count[g * GROUP + __builtin_ctz(bits)]++;
        }
    }
#pragma omp single
    {
        int64_t rows = 0, kept = 0;
        s->pair[0] = 0;
        for (int64_t j = 0; j < chunks; j++) {
            const int64_t end = vx_min64((j + 1) * b->chunk, c->N - first * b->chunk);
            for (; rows < end; rows++) s->pair[rows + 1] += s->pair[rows];
            if (s->pair[end] > s->capacity) break;
            kept++;
        }
        int32_t number = 0;
        for (int64_t cell = 0; cell < cells; cell++) {
            s->first[cell] = number;
            for (int64_t j = 0; j < kept; j++) {
                int32_t *at = s->at + j * cells + cell, count = *at;
                *at = number;
                number += count;
            }
        }
        s->first[cells] = number;
        *found = kept;
    }
    const int64_t kept = *found;
#pragma omp for schedule(dynamic, 1)
    for (int64_t j = 0; j < kept; j++) {
        int32_t *at = s->at + j * cells;
        for (int64_t i = j * b->chunk; i < vx_min64((j + 1) * b->chunk, c->N - first * b->chunk); i++) {
            const uint16_t *mask = s->mask + i * groups;
            int32_t *number = s->number + s->pair[i];
            for (int64_t g = 0; g < groups; g++)
                for (uint32_t bits = mask[g]; bits; bits &= bits - 1) {
                    const int32_t next = at[g * GROUP + __builtin_ctz(bits)]++;
                    s->row[next] = (int32_t)i;
                    *number++ = next;
                }
        }
    }
    return kept;
}

/* Lets a cell meet the segment's rows that are listed for it. */
static void near_cell(const backward *b, const segment *s, int64_t cell)
{
    const worker *t = &s->rows;
    const int64_t D = b->cpu.narrow;
    float z[RUN * NARROW_MAX], dy[RUN * NARROW_MAX], start[RUN], mix_offset[RUN], pi_factor[RUN], zero[RUN] = {0};
    vf dhat[RUN * (NARROW_MAX + 1)];
    for (int64_t from = s->first[cell]; from < s->first[cell + 1]; from += RUN) {
        const int64_t rows = vx_min64(RUN, s->first[cell + 1] - from),
                      even = vx_ceil_div(rows, NARROW_ROWS) * NARROW_ROWS;
        for (int64_t j = 0; j < rows; j++) {
            const int64_t i = s->row[from + j];
            for (int64_t d = 0; d < D; d++) z[j * D + d] = t->z[i * D + d], dy[j * D + d] = t->dy[i * D + d];
            start[j] = t->start[i], mix_offset[j] = t->mix_offset[i], pi_factor[j] = t->pi_factor[i];
        }
        for (int64_t j = rows; j < even; j++) {
            for (int64_t d = 0; d < D; d++) z[j * D + d] = dy[j * D + d] = 0;
            start[j] = PADDING, mix_offset[j] = pi_factor[j] = 0;
        }
        memset(dhat, 0, sizeof(vf) * (size_t)(even * (D + 1)));
        const narrow_run run = {.z = z,
                                .dy = dy,
                                .start = start,
                                .mix_offset = mix_offset,
                                .pi_factor = pi_factor,
                                .pi_offset = zero,
                                .noisy = zero,
                                .noise = zero,
                                .dhat = dhat,
                                .rows = even};
        meet_run(b, &run, cell);
        for (int64_t j = 0; j < rows; j++)
            for (int64_t d = 0; d <= D; d++) s->part[(from + j) * (D + 1) + d] = vf_sum(dhat[j * (D + 1) + d]);
    }
}

/* Takes all rows of the group through its cells. All threads of a parallel region call it together. */
static void backward_near(const backward *b, const segment *s, int64_t *found)
{
    const smooth_call *c = &b->c;
    const int64_t D = b->cpu.narrow;
    const int64_t most = s->most / b->chunk;
    for (int64_t first = 0, kept, guess = most; first < b->chunks; first += kept, guess = kept + kept / 8 + 1) {
        kept = list_pairs(b, s, first, vx_min64(vx_min64(guess, most), b->chunks - first), found);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < kept; j++) {
            const int64_t begin = (first + j) * b->chunk, rows = vx_min64(b->chunk, c->N - begin);
            worker t = rows_from(b, s, j * b->chunk);
            load_chunk(b, &t, begin, rows);
            load_row_numbers(b, &t, begin, rows);
            for (int64_t i = 0; i < rows; i++) t.mix_offset[i] += t.pi_offset[i];
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t cell = 0; cell < c->panels; cell++) near_cell(b, s, cell);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < kept; j++) {
            const int64_t begin = (first + j) * b->chunk, rows = vx_min64(b->chunk, c->N - begin);
            worker t = rows_from(b, s, j * b->chunk);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t row = j * b->chunk + i;
                for (int32_t p = s->pair[row]; p < s->pair[row + 1]; p++) {
                    const float *part = s->part + s->number[p] * (D + 1);
                    for (int64_t d = 0; d < D; d++) t.dhat[i * D + d] += part[d];
                    t.x_sum[i][0] += part[D];
                }
            }
            b->dlog_tau[first + j] += finish_chunk(b, &t, begin, rows);
        }
    }
}

#endif
