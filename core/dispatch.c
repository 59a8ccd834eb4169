/* dispatch.c: vx_<op>() for every line of ops.def: checks the contract, finds the backend, calls its kernel. And what
 * the library says of itself. */
#include <stdio.h>

#include "internal.h"

#ifndef VX_VERSION
#define VX_VERSION "0"
#endif

_Static_assert(VX_UNARY_KINDS == VX_UNARY_COUNT, "VX_UNARY_COUNT is the length of VX_UNARY_LIST");

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

static int not_implemented(const char *op, int device)
{
    char name[64];
    vx_device_name(device, name, sizeof name);
    return vx_fail(VX_ENOSUP, "%s: not implemented on %s", op, name);
}

static int record(const char *op, const char *contract, vx_tensor *const *tensors, int count)
{
    const int outputs = vx_output_count(contract);
    int status = vx_record_op(op, tensors, outputs, true);
    return status ? status : vx_record_op(op, tensors + outputs, count - outputs, false);
}

/* The arrays hold one unused entry at the end, since C has no empty ones. The first tensor decides the device; the
 * contract has made sure that it is there and that the others agree. */
#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    int vx_##op(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers))       \
    {                                                                                                                  \
        vx_tensor *const all[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                          \
        const char *const names[] = {NULL VX_MAP_AFTER(VX_QUOTE_NUMBER, VX_UNWRAP numbers)};                           \
        const double given[] = {0 VX_MAP_AFTER(VX_DOUBLE_NUMBER, VX_UNWRAP numbers)};                                  \
        int status = vx_check(#op, contract, all, COUNT(all), names + 1, given + 1, COUNT(given) - 1);                 \
        if (status) return status;                                                                                     \
        if (vx_recording >= 0 && (status = record(#op, contract, all, COUNT(all)))) return status;                     \
        int ordinal;                                                                                                   \
        const vx_backend *backend = vx_backend_of(all[0]->device, &ordinal);                                           \
        if (!backend->op) return not_implemented(#op, all[0]->device);                                                 \
        return backend->op(VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_NAME_NUMBER, VX_UNWRAP numbers)); \
    }

/* An op on lists is checked place by place. A place that is wrong is checked once more, under its name. */
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    int vx_##op(VX_LIST_PARAMETERS(tensors, each, numbers))                                                            \
    {                                                                                                                  \
        vx_tensor *const *const lists[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                 \
        const char *const names[] = {NULL VX_MAP_AFTER(VX_QUOTE_NUMBER, VX_UNWRAP each)                                \
                                         VX_MAP_AFTER(VX_QUOTE_NUMBER, VX_UNWRAP numbers)};                            \
        char place[64];                                                                                                \
        if (count <= 0) return VX_OK;                                                                                  \
        for (int i = 0; i < count; i++) {                                                                              \
            vx_tensor *const all[] = {VX_MAP(VX_TENSOR_AT, VX_UNWRAP tensors)};                                        \
            const double given[] = {0 VX_MAP_AFTER(VX_DOUBLE_AT, VX_UNWRAP each)                                       \
                                        VX_MAP_AFTER(VX_DOUBLE_NUMBER, VX_UNWRAP numbers)};                            \
            if (!vx_check(#op, contract, all, COUNT(all), names + 1, given + 1, COUNT(given) - 1)) continue;           \
            snprintf(place, sizeof place, #op "[%d]", i);                                                              \
            return vx_check(place, contract, all, COUNT(all), names + 1, given + 1, COUNT(given) - 1);                 \
        }                                                                                                              \
        int status = vx_check_lists(#op, contract, lists, COUNT(lists), count), ordinal;                               \
        for (int k = 0; !status && vx_recording >= 0 && k < COUNT(lists); k++)                                         \
            status = vx_record_op(#op, lists[k], count, k < vx_output_count(contract));                                \
        if (status) return status;                                                                                     \
        const vx_backend *backend = vx_backend_of(lists[0][0]->device, &ordinal);                                      \
        if (!backend->op) return not_implemented(#op, lists[0][0]->device);                                            \
        return backend->op(VX_LIST_ARGUMENTS(tensors, each, numbers));                                                 \
    }
#include "ops.def"
#undef VX_OP

const char *vx_version(void) { return VX_VERSION; }

/* The arguments as ops.def writes them: "(y, x)" and "((int, kind), (float, alpha))". */
const char *vx_ops(void)
{
    return
#define VX_OP(op, contract, text, tensors, numbers) #op "\t" contract "\t" text "\t" #tensors "\t" #numbers "\t\n"
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
#op "\t" contract "\t" text "\t" #tensors "\t" #numbers "\t" #each "\n"
#include "ops.def"
#undef VX_OP
        ;
}
