/* ops_macros.h: apply a macro to each argument of a list, so that one line of ops.def expands into prototypes, table
 * entries and dispatch. VX_MAP(f, a, b) is "f(a), f(b)"; VX_MAP_AFTER(f, a, b) is ", f(a), f(b)"; VX_EACH(f, a, b) is
 * "f(a) f(b)"; all are empty for an empty list. Lists travel in parentheses; VX_UNWRAP takes those off. */
#ifndef VX_OPS_MACROS_H
#define VX_OPS_MACROS_H

#define VX_UNWRAP(...) __VA_ARGS__
#define VX_TEXT(constant) VX_TEXT_(constant) /* "19" of a macro that is 19 */
#define VX_TEXT_(constant) #constant
#define VX_PARENS ()
#define VX_EXPAND(...) VX_EXPAND3(VX_EXPAND3(VX_EXPAND3(VX_EXPAND3(__VA_ARGS__))))
#define VX_EXPAND3(...) VX_EXPAND2(VX_EXPAND2(VX_EXPAND2(VX_EXPAND2(__VA_ARGS__))))
#define VX_EXPAND2(...) VX_EXPAND1(VX_EXPAND1(VX_EXPAND1(VX_EXPAND1(__VA_ARGS__))))
#define VX_EXPAND1(...) __VA_ARGS__

#define VX_MAP(f, ...) __VA_OPT__(VX_EXPAND(VX_MAP_STEP(f, __VA_ARGS__)))
#define VX_MAP_STEP(f, a, ...) f(a) __VA_OPT__(, VX_MAP_NEXT VX_PARENS(f, __VA_ARGS__))
#define VX_MAP_NEXT() VX_MAP_STEP

#define VX_MAP_AFTER(f, ...) __VA_OPT__(VX_EXPAND(VX_AFTER_STEP(f, __VA_ARGS__)))
#define VX_AFTER_STEP(f, a, ...) , f(a) __VA_OPT__(VX_AFTER_NEXT VX_PARENS(f, __VA_ARGS__))
#define VX_AFTER_NEXT() VX_AFTER_STEP

#define VX_EACH(f, ...) __VA_OPT__(VX_EXPAND(VX_EACH_STEP(f, __VA_ARGS__)))
#define VX_EACH_STEP(f, a, ...) f(a) __VA_OPT__(VX_EACH_NEXT VX_PARENS(f, __VA_ARGS__))
#define VX_EACH_NEXT() VX_EACH_STEP

/* A tensor argument is its name; a number is a pair (type, name). */
#define VX_DECLARE_TENSOR(name) vx_tensor *name
#define VX_NAME_TENSOR(name) name
#define VX_DECLARE_NUMBER(pair) VX_DECLARE_NUMBER_ pair
#define VX_DECLARE_NUMBER_(type, name) type name
#define VX_NAME_NUMBER(pair) VX_NAME_NUMBER_ pair
#define VX_NAME_NUMBER_(type, name) name
#define VX_DOUBLE_NUMBER(pair) VX_DOUBLE_NUMBER_ pair
#define VX_DOUBLE_NUMBER_(type, name) (double)name
#define VX_QUOTE_NUMBER(pair) VX_QUOTE_NUMBER_ pair
#define VX_QUOTE_NUMBER_(type, name) #name

/* An op on lists (VX_LIST_OP in ops.def): its parameters, and their names as arguments of a call. VX_TENSOR_AT and
 * VX_DOUBLE_AT are what stands at place i. */
#define VX_LIST_PARAMETERS(tensors, each, numbers)                                                                     \
    VX_MAP(VX_DECLARE_LIST, VX_UNWRAP tensors),                                                                        \
        int count VX_MAP_AFTER(VX_DECLARE_EACH, VX_UNWRAP each) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers)
#define VX_LIST_ARGUMENTS(tensors, each, numbers)                                                                      \
    VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors),                                                                         \
        count VX_MAP_AFTER(VX_NAME_NUMBER, VX_UNWRAP each) VX_MAP_AFTER(VX_NAME_NUMBER, VX_UNWRAP numbers)
#define VX_DECLARE_LIST(name) vx_tensor *const *name
#define VX_DECLARE_EACH(pair) VX_DECLARE_EACH_ pair
#define VX_DECLARE_EACH_(type, name) const type *name
#define VX_TENSOR_AT(name) name[i]
#define VX_DOUBLE_AT(pair) VX_DOUBLE_AT_ pair
#define VX_DOUBLE_AT_(type, name) (double)name[i]

#endif
