/* files.h: a file that is open for reading, as others of core use it; files.c has the rest. */
#ifndef VX_FILES_H
#define VX_FILES_H

#include "tensor.h"

struct vx_reader {
    char *path;
    int file;
    int64_t size; /* when it was opened */
};

/* Returns false where the file has become shorter than `bytes` since it was opened, or cannot be asked. */
bool vx_reader_still_has(const vx_reader *r, int64_t bytes);

#endif
