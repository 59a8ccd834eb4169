/* bytes.c: a buffer that grows, and regular files (bytes.h). */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "core/internal.h"

enum { KEEP_BYTES = 64 << 20 }; /* a buffer above this is given back once it is far too large */

int vx_bytes_reserve(vx_bytes *b, size_t count)
{
    if (b->capacity > KEEP_BYTES && count < b->capacity / 4) vx_bytes_release(b);
    if (count <= b->capacity && b->data) return VX_OK;
    vx_bytes_release(b);
    return vx_bytes_extend(b, count);
}

int vx_bytes_extend(vx_bytes *b, size_t count)
{
    if (count <= b->capacity && b->data) return VX_OK;
    uint8_t *data = realloc(b->data, count ? count : 1);
    if (!data) return vx_fail(VX_ENOMEM, "out of memory for a buffer of %zu bytes", count);
    b->data = data;
    b->capacity = count;
    return VX_OK;
}

void vx_bytes_release(vx_bytes *b)
{
    free(b->data);
    b->data = NULL;
    b->capacity = 0;
}

int vx_open_regular(const char *path, int *fd, struct stat *about)
{
    if (!path) return vx_fail(VX_EINVAL, "no path");
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) return vx_fail(VX_EIO, "%s", strerror(errno));
    if (fstat(*fd, about)) {
        int error = errno;
        close(*fd);
        return vx_fail(VX_EIO, "%s", strerror(error));
    }
    if (S_ISREG(about->st_mode)) return VX_OK;
    close(*fd);
    return vx_fail(VX_EIO, "%s, not a file", S_ISDIR(about->st_mode) ? "a folder" : "a device or pipe");
}

int64_t vx_read_all(int fd, uint8_t *to, int64_t count)
{
    int64_t done = 0;
    while (done < count) {
        ssize_t got = read(fd, to + done, (size_t)(count - done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += got;
    }
    return done;
}
