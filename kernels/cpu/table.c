/* table.c: the table of one SIMD variant, expanded from ops.def: an op without a kernel does not link. */
#include "cpu.h"

#define VX_STRING_(x) #x
#define VX_STRING(x) VX_STRING_(x)

const vx_backend VX_JOIN(vx_cpu_, VX_VARIANT, table) = {
    .name = VX_STRING(VX_VARIANT),
#define VX_OP(op, contract, text, tensors, numbers) .op = VX_CPU(op),
#include "core/ops.def"
#undef VX_OP
};
