/* late.h: what the steps of late training share, forward and backward: rows of 3 that lie near codes, and tau so small
 * that most codes have no part in any float32 (kernels/quantize/smooth_cells.h says when that is). Codes come in cells
 * of 64 that have boxes (kernels/quantize/cells.h); a row needs the cells whose boxes are within its reach.
 *
 * How much that saves is the data's affair and not the machine's, so it is counted, and predictions are multiples of
 * it. Of all pairs of a row and a cell there are in reach, at least of one row of the same block,
 *     p  rows in blocks as they come
 *     q  rows in blocks, in the order of their nearest cells
 *     s  each row by itself
 */
#ifndef VX_LAB_LATE_H
#define VX_LAB_LATE_H

#include "quantize/smooth_cells.h"
#include "lab.h"

/* Codes and rows on the sphere, the codes by cell: `near.cells.code` says which code is at a place. */
typedef struct late {
    scratch memory;
    near_codes near; /* cells, and the bound */
    float *points;   /* (M,3) codes, one after the other */
    float *u, *a;    /* (N,3) rows; rows times log2(e) / tau */
    float *hat;      /* (M / 64, 3, 64) codes by cell */
    float *raw;      /* likewise as stored */
} late;

static inline late new_late(const problem *q)
{
    late l = {.memory = {.op = "lab"}};
    const smooth_call call = {.M = q->M, .D = 3, .codebook = q->codebook};
    const smooth_cpu cpu = {.narrow = 3, .scale = (float)(LOG2E / exp((double)*q->log_tau))};
    while (scratch_pass(&l.memory)) {
        carve_cells(&l.memory, &l.near.cells, q->M, 3);
        l.points = carve_f32(&l.memory, q->M * 3);
    }
    near_codes_of(&l.near, &call, &cpu, 0, l.points);
    l.u = on_sphere(q->z, q->N, 3, 1), l.a = on_sphere(q->z, q->N, 3, cpu.scale);
    l.hat = floats(q->M * 3), l.raw = floats(q->M * 3);
    for (int64_t i = 0; i < q->M * 3; i++) {
        const int64_t place = i / (3 * PANEL) * PANEL + i % PANEL, d = i / PANEL % 3, m = l.near.cells.code[place];
        l.hat[i] = l.points[m * 3 + d], l.raw[i] = q->codebook[m * 3 + d];
    }
    l.near.hat = l.hat;
    return l;
}

static inline void free_late(late *l) { scratch_free(&l->memory), free(l->u), free(l->a), free(l->hat), free(l->raw); }

/* Returns the square of the distance within which codes matter to row n, where its largest logit, to base 2, is not
 * below `largest`. */
static inline float reach(const late *l, int64_t n, double largest)
{
    const float *u = l->u + n * 3;
    return near_limit(&l->near, u[0] * u[0] + u[1] * u[1] + u[2] * u[2], largest);
}

/* Returns the cell whose box is nearest to row n; fills squares (padded cells) with the distances from all. */
static inline int64_t look_at_boxes(const late *l, int64_t n, float *squares)
{
    return nearest_box(3, &l->near.cells.cell, 0, l->near.cells.cell.padded, l->u + n * 3, squares);
}

/* Returns row n's largest logit among the codes of a cell. */
static inline float largest_of_cell(const late *l, int64_t n, int64_t cell)
{
    vf most = vf_set1(-INFINITY);
    for (int v = 0; v < PANEL; v += VX_LANES)
        most = vf_max(most, narrow_logits(3, 0, l->a + n * 3, l->hat + cell * PANEL * 3 + v));
    return vf_maximum(most);
}

/* Returns the rows in the order of their nearest cells, of equals as they come. */
static inline int32_t *rows_by_cell(const problem *q, const late *l)
{
    const int64_t cells = l->near.cells.cell.count;
    int32_t *home = take(q->N, sizeof *home), *order = take(q->N, sizeof *order), *at = take(cells + 1, sizeof *at);
#pragma omp parallel
    {
        float *squares = floats(l->near.cells.cell.padded);
#pragma omp for
        for (int64_t n = 0; n < q->N; n++) home[n] = (int32_t)look_at_boxes(l, n, squares);
        free(squares);
    }
    for (int64_t n = 0; n < q->N; n++) at[home[n] + 1]++;
    for (int64_t i = 0; i < cells; i++) at[i + 1] += at[i];
    for (int64_t n = 0; n < q->N; n++) order[at[home[n]]++] = (int32_t)n;
    free(home), free(at);
    return order;
}

/* Marks the cells within the reach of one of `rows` rows in `within` (cells); limits: their reaches. row NULL: rows
 * `first` and on. */
static inline void mark_cells(const late *l, const int32_t *row, int64_t first, int rows, const float *limits,
                              float *squares, uint8_t *within)
{
    const int64_t cells = l->near.cells.cell.count;
    memset(within, 0, (size_t)cells);
    for (int i = 0; i < rows; i++) {
        const int64_t n = row ? row[first + i] : first + i;
        look_at_boxes(l, n, squares);
        for (int64_t j = 0; j < cells; j++) within[j] |= squares[j] <= limits[n];
    }
}

/* Counts p, q and s for blocks of `rows` rows, whose largest logits are not below largest (N). */
static inline void count_shares(const problem *q, const late *l, int rows, const float *largest, double share[3])
{
    const int64_t cells = l->near.cells.cell.count;
    int32_t *order = rows_by_cell(q, l);
    float *limits = floats(q->N), *squares = floats(l->near.cells.cell.padded);
    uint8_t *within = take(cells, 1);
    for (int64_t n = 0; n < q->N; n++) limits[n] = reach(l, n, largest[n]);
    for (int way = 0; way < 3; way++) {
        const int block = way < 2 ? rows : 1;
        int64_t met = 0;
        for (int64_t n = 0; n < q->N; n += block) {
            mark_cells(l, way == 1 ? order : 0, n, block, limits, squares, within);
            for (int64_t j = 0; j < cells; j++) met += within[j];
        }
        share[way] = (double)(met * block) / (double)(q->N * cells);
    }
    free(order), free(limits), free(squares), free(within);
}

#endif
