/* smooth_backward.cuh: the dense passes of the smoothed quantizer's backward, see smooth_backward_dense.cu. */
#ifndef VX_SMOOTH_BACKWARD_CUH
#define VX_SMOOTH_BACKWARD_CUH

#include "smooth.cuh"

typedef struct backward_in {
    const float *dy;        /* (N,depth) rows of the group */
    const float *raw_panel; /* (panels,depth,64) codes as stored; NULL on tensor cores */
    const float *start;     /* (N) minus the row's log2-sum: a row's logits relative to it are log2 pi */
    const float *mix_offset, *noisy, *pi_factor, *pi_offset; /* (N), as in smooth_backward.c */
    const float *ppl;                                        /* (Mp) b by code, or NULL */
    const int32_t *codes;                                    /* (N,G) */
} backward_in;

/* Makes dhat (N,depth), the sum over codes of x times the normalized code, and x_sum (N), the sum of x. */
void backward_rows(const group_call &c, const backward_in &in, float *dhat, float *x_sum);

/* Makes partial (ranges,2,Mp,depth), in c.row's order: over a range's rows, the sum of x times the scaled row, and that
 * of w times dy. */
void backward_columns(const group_call &c, const backward_in &in, float *partial, int64_t ranges);

#endif
