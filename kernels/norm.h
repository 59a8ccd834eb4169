/* norm.h: the two halves of group norm for one image, for kernels that apply it a few rows at a time (separable.c). */
#ifndef VX_NORM_H
#define VX_NORM_H

#include "cpu.h"

/* mean and rstd (G) of x (S,C); VX_ENOMEM. The same bits as the op group_norm. */
int VX_CPU(group_statistics)(float *mean, float *rstd, const float *x, int64_t S, int64_t C, int64_t G, float eps);

/* y = act(gamma (x - mean) rstd + beta) of x (S,C); channel (2 C) is working space. The same bits as the op group_norm. */
void VX_CPU(group_apply)(float *y, const float *x, const float *gamma, const float *beta, const float *mean, const float *rstd,
                         float *channel, int64_t S, int64_t C, int64_t G, int act);

#endif
