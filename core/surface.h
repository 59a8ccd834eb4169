/* surface.h: all that Lua is told of C: the build embeds its text as vx_cdef(). Kernels and backends see vertex.h
 * alone, so that they need not be built again where something changes that is not theirs. */
#include "vertex.h"

#include "comm/comm.h"
