/* staged.h: see staged.c. */
#ifndef VX_STAGED_H
#define VX_STAGED_H

#include "group.h"
#include "internal.h"

/* Gives w a copy of x on the host as its data, and with `all` room for what is gathered there. */
int vx_stage(vx_comm_work *w, vx_tensor *x, vx_tensor *all);

/* Writes what a finished work brought to its tensor, and frees the copies. */
int vx_unstage(vx_comm_work *w);

#endif
