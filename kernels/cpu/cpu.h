/* cpu.h: frame of the CPU kernels. Every file in kernels/ is compiled once per SIMD variant (variants.def), its name in
 * VX_VARIANT; VX_CPU(name) gives each copy its own names, and vx_cpu_backend() (variants.c) chooses one table at run
 * time. A kernel is therefore plain C with simd.h's vectors: no run-time dispatch inside.
 *
 * Determinism: the result may not depend on the number of threads. Reductions are cut into a number of parts that
 * depends on the sizes only, each part is summed in order, and the parts are added in order.
 */
#ifndef VX_CPU_H
#define VX_CPU_H

#include "core/backend.h"
#include "shared/common.h"

#define VX_JOIN_(a, b, c) a##b##_##c
#define VX_JOIN(a, b, c) VX_JOIN_(a, b, c)
#define VX_CPU(name) VX_JOIN(cpu_, VX_VARIANT, name)

#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    int VX_CPU(op)(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers));
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    int VX_CPU(op)(VX_LIST_PARAMETERS(tensors, each, numbers));
#include "core/ops.def"
#undef VX_OP

/* Says whether products round their factors to bf16: vx_autocast. */
static inline int vx_bf16_products(void) { return vx_autocast(-1) == VX_BF16; }

#endif
