/* bytes.h: what reading files into memory needs: a buffer that grows, and regular files opened and read whole. Failures
 * set the calling thread's vx_error() to the reason alone; who knows the file's name adds it. */
#ifndef VX_BYTES_H
#define VX_BYTES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

/* Bytes that grow and are used again. Zero-initialized is empty. */
typedef struct vx_bytes {
    size_t capacity;
    uint8_t *data;
} vx_bytes;

/* Makes room for count bytes at b->data, their content undefined. VX_ENOMEM. */
int vx_bytes_reserve(vx_bytes *b, size_t count);

/* Makes room for count bytes, and keeps those that are there. VX_ENOMEM. */
int vx_bytes_extend(vx_bytes *b, size_t count);
void vx_bytes_release(vx_bytes *b);

/* Opens a regular file; a named pipe neither blocks nor passes. */
int vx_open_regular(const char *path, int *fd, struct stat *about);

/* Reads up to count bytes. Returns how many, less than count at the end of the file; -1 and errno. */
int64_t vx_read_all(int fd, uint8_t *to, int64_t count);

#endif
