/* stored.h: numbers as files store them (safetensors, .npy), and their conversion to the dtypes of tensors. */
#ifndef VX_STORED_H
#define VX_STORED_H

#include "tensor.h"

/* One stored dtype, by the name that safetensors gives it. */
typedef struct vx_stored {
    const char *name;
    int bytes;                      /* of an element */
    int dtype;                      /* of the tensor it is read into; a safetensors file of ours holds it as it is */
    bool exact;                     /* dtype holds the stored bits as they are */
    double (*value)(const char *p); /* one element, little-endian; exact but for I64 and U64 beyond 2^53 */
} vx_stored;

/* Finds the stored dtype of a name. ">F32" is F32 with its bytes in big-endian order; *swapped: whether they are. NULL
 * where there is none, and vx_error() lists those there are; op and path begin that text. */
const vx_stored *vx_stored_named(const char *op, const char *path, const char *format, bool *swapped);

/* Converts the elements at from, from + step bytes, ... to to[0 .. count-1] of `dtype`. VX_EINVAL where a number lies
 * outside the range of dtype; the text calls the elements first, first + 1, ... of `path`. */
int vx_stored_convert(const vx_stored *s, bool swapped, int dtype, void *to, const char *from, int64_t step,
                      int64_t count, int64_t first, const char *path);

#endif
