/* smooth_select.cuh: the second pass of the smoothed quantizer's forward, over the columns of the logits, see
 * smooth_select.cu. */
#ifndef VX_SMOOTH_SELECT_CUH
#define VX_SMOOTH_SELECT_CUH

#include "smooth.cuh"

constexpr int MOST_NEIGHBOURS = 64; /* of a shard: a list and its slack are sorted in a warp's registers */

typedef struct columns_out {
    int64_t each, ranges, shards; /* neighbours of a shard; ranges of a shard's rows */
    unsigned long long *lists;    /* (shards ranges,Mp,each) descending; NULL: no neighbours are wanted */
    float *mean;                  /* (shards ranges,Mp) sums of pi by code; NULL: not wanted */
    const float *start;           /* (N) minus the row's reference */
    const float *inverse;         /* (N) 1 / sum of powers */
    const float *factor, *offset; /* (N) key = factor x + offset, x the logit (knn-ce) or the power (knn-l2) */
} columns_out;

/* Makes the lists and sums of each range of each shard, for the codes that v holds: those of the codebook, or the
 * vertices. */
void select_columns(const group_call &v, const columns_out &out);

/* Joins the ranges: near (S,K) = the rows of the group's lists, each shard's `each` behind one another; loss (shards,S)
 * = the sum of their divergences from the vertex. */
void merge_lists(const group_call &c, const columns_out &out, int32_t *near, double *loss);

#endif
