/* graph.h: what variants.c needs of graph.c. */
#ifndef VX_CPU_GRAPH_H
#define VX_CPU_GRAPH_H

#include "core/backend.h"

/* Gives the CPU's table, whose ops are complete, the members graph_*. */
void vx_cpu_add_graphs(vx_backend *table);

/* Fails with VX_EINVAL while a graph is recorded, when `what` cannot be; VX_OK otherwise. */
int vx_cpu_refuse_recording(const char *what);

#endif
