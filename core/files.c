/* files.c: files that appear whole or not at all, files that are read as they were when they were opened, and locks
 * between processes.
 *
 * What is saved is written under a temporary name beside its own, NAME.0.tmp, which the writer keeps locked. A
 * temporary file that nobody holds is the rest of a killed process: the next writer of NAME removes it. Where one is
 * held, another process writes NAME at this moment, and the next number is taken.
 *
 * Whoever has a file open keeps reading that one, whatever is renamed to its name meanwhile. So all that is read of a
 * file goes through one vx_reader.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"
#include "stored.h"

/* -- Locks --------------------------------------------------------------------------------------------------------- */

/* Locks an open file against other processes, without waiting. Where the file system knows no locks, all is free. */
static bool take_lock(int file)
{
    return flock(file, LOCK_EX | LOCK_NB) == 0 || (errno != EWOULDBLOCK && errno != EINTR);
}

int vx_lock(const char *path, int *file)
{
    *file = -1;
    if (!path) return vx_fail(VX_EINVAL, "lock: no path");
    int opened = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (opened < 0) return vx_fail(VX_EIO, "lock %s: %s", path, strerror(errno));
    if (take_lock(opened)) *file = opened;
    else close(opened);
    return VX_OK;
}

/* -- Writing ------------------------------------------------------------------------------------------------------- */

struct vx_writer {
    FILE *file;
    char *path, *temporary; /* path: where links lead to */
};

static void writer_free(vx_writer *w)
{
    free(w->path);
    free(w->temporary);
    free(w);
}

/* Follows symbolic links, also to a file that is not there yet. The result is the caller's; NULL and errno. */
static char *follow(const char *path)
{
    char *at = strdup(path), target[PATH_MAX];
    for (int links = 0; at; links++) {
        ssize_t length = readlink(at, target, sizeof target - 1);
        if (length < 0) return at; /* no link */
        target[length] = 0;
        const char *slash = strrchr(at, '/');
        int folder = slash && *target != '/' ? (int)(slash - at) + 1 : 0;
        char *next = NULL;
        if (links == 40) errno = ELOOP;
        else if (asprintf(&next, "%.*s%s", folder, at, target) < 0) next = NULL;
        free(at);
        at = next;
    }
    return NULL;
}

/* Creates `name` and locks it; removes first what a killed process left there. Returns its descriptor; -1 where it is
 * another writer's, -2 and errno where it cannot be had. */
static int create_locked(const char *name)
{
    for (;;) {
        int file = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        bool created = file >= 0;
        if (!created && errno != EEXIST) return -2;
        if (!created) file = open(name, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
        if (file < 0 && errno == ENOENT) continue; /* its writer has just ended */
        if (file < 0) return errno == EACCES ? -1 : -2;
        struct stat held, named;
        bool locked = take_lock(file);
        bool same = locked && fstat(file, &held) == 0 && lstat(name, &named) == 0 && held.st_ino == named.st_ino;
        if (same && created) return file;
        if (same) unlink(name);
        close(file);
        if (!locked && !created) return -1;
    }
}

/* Opens the temporary file, with the mode of the file that it replaces and, as far as allowed, its owner. */
static int open_temporary(vx_writer *w)
{
    struct stat old;
    bool replaces = stat(w->path, &old) == 0;
    if (replaces && !S_ISREG(old.st_mode))
        return vx_fail(VX_EIO, "write %s: it is %s", w->path, S_ISDIR(old.st_mode) ? "a folder" : "a device or pipe");
    if (replaces && faccessat(AT_FDCWD, w->path, W_OK, AT_EACCESS) != 0)
        return vx_fail(VX_EIO, "write %s: %s", w->path, strerror(errno));
    int file = -1;
    for (int n = 0; file == -1; n++) {
        free(w->temporary);
        if (asprintf(&w->temporary, "%s.%d.tmp", w->path, n) < 0) w->temporary = NULL;
        if (!w->temporary) return vx_fail(VX_ENOMEM, "write %s: out of memory", w->path);
        file = create_locked(w->temporary);
    }
    if (file >= 0 && replaces && (fchown(file, old.st_uid, old.st_gid) == 0 || errno == EPERM))
        fchmod(file, old.st_mode & 07777);
    if (file >= 0) w->file = fdopen(file, "wb");
    if (w->file) return VX_OK;
    int status = vx_fail(VX_EIO, "write %s: %s", w->path, strerror(errno));
    if (file >= 0) unlink(w->temporary);
    if (file >= 0) close(file);
    return status;
}

int vx_writer_open(vx_writer **out, const char *path)
{
    *out = NULL;
    if (!path) return vx_fail(VX_EINVAL, "write: no path");
    vx_writer *w = calloc(1, sizeof *w);
    if (!w) return vx_fail(VX_ENOMEM, "write %s: out of memory", path);
    w->path = follow(path);
    int status = w->path ? open_temporary(w) : vx_fail(VX_EIO, "write %s: %s", path, strerror(errno));
    if (!status) *out = w;
    else writer_free(w);
    return status;
}

int vx_writer_bytes(vx_writer *w, const void *bytes, size_t count)
{
    if (!w) return vx_fail(VX_EINVAL, "write: a closed writer");
    if (fwrite(bytes, 1, count, w->file) != count) return vx_fail(VX_EIO, "write %s: %s", w->path, strerror(errno));
    return VX_OK;
}

/* Narrows integers to uint16, which all must fit into. */
static int narrow_chunk(const vx_writer *w, const int32_t *from, int64_t first, int64_t count, uint16_t *to)
{
    for (int64_t i = 0; i < count; i++) {
        if (from[i] < 0 || from[i] > UINT16_MAX)
            return vx_fail(VX_EINVAL, "write %s: element %lld is %d, of 0 .. 65535 as uint16", w->path,
                           (long long)(first + i), (int)from[i]);
        to[i] = (uint16_t)from[i];
    }
    return VX_OK;
}

int vx_writer_tensor(vx_writer *w, const vx_tensor *x, int narrow)
{
    enum { CHUNK = 1 << 20 };
    if (!w) return vx_fail(VX_EINVAL, "write: a closed writer");
    if (!x) return vx_fail(VX_EINVAL, "write %s: a released tensor", w->path);
    if (narrow && x->dtype != VX_I32)
        return vx_fail(VX_EINVAL, "write %s: %s as uint16, expected i32", w->path, vx_dtype_name(x->dtype));
    vx_tensor *whole = (vx_tensor *)x;
    int status = VX_OK;
    if (!x->contiguous) {
        status = vx_new(&whole, x->device, x->dtype, x->ndim, x->shape);
        if (!status) status = vx_copy(whole, x);
    }
    size_t item = vx_dtype_bytes(x->dtype);
    char *chunk = status ? NULL : vx_scratch("write", CHUNK);
    if (!status && !chunk) status = VX_ENOMEM;
    for (int64_t done = 0; !status && done < x->numel;) {
        int64_t count = x->numel - done;
        if (count > (int64_t)(CHUNK / item)) count = (int64_t)(CHUNK / item);
        status = vx_read(whole, done, count, chunk);
        if (!status && narrow) status = narrow_chunk(w, (int32_t *)chunk, done, count, (uint16_t *)chunk);
        if (!status) status = vx_writer_bytes(w, chunk, (size_t)count * (narrow ? sizeof(uint16_t) : item));
        done += count;
    }
    vx_scratch_free(chunk);
    if (whole != x) vx_free(whole);
    return status;
}

/* Brings the folder's entry to the disk too: a power cut could leave the old name otherwise. */
static void sync_folder(const char *path)
{
    char folder[4096];
    const char *slash = strrchr(path, '/');
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    int fd = open(folder, O_RDONLY | O_DIRECTORY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

int vx_writer_commit(vx_writer *w)
{
    if (!w) return vx_fail(VX_EINVAL, "write: a closed writer");
    bool ok = fflush(w->file) == 0 && fsync(fileno(w->file)) == 0;
    int problem = errno;
    if (fclose(w->file) != 0 && ok) ok = false, problem = errno;
    if (ok && rename(w->temporary, w->path) != 0) ok = false, problem = errno;
    int status = ok ? VX_OK : vx_fail(VX_EIO, "write %s: %s", w->path, strerror(problem));
    if (ok) sync_folder(w->path);
    else unlink(w->temporary);
    writer_free(w);
    return status;
}

void vx_writer_abort(vx_writer *w)
{
    if (!w) return;
    fclose(w->file);
    unlink(w->temporary);
    writer_free(w);
}

/* -- Reading ------------------------------------------------------------------------------------------------------- */

int64_t vx_file_size(const char *path)
{
    struct stat s;
    return path && stat(path, &s) == 0 && S_ISREG(s.st_mode) ? (int64_t)s.st_size : -1;
}

int vx_reader_open(vx_reader **out, const char *path)
{
    struct stat s;
    *out = NULL;
    if (!path) return vx_fail(VX_EINVAL, "load: no path");
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe does not block */
    if (file < 0) return vx_fail(VX_EIO, "load %s: %s", path, errno == ENOENT ? "no such file" : strerror(errno));
    int status = VX_OK;
    if (fstat(file, &s) != 0) status = vx_fail(VX_EIO, "load %s: %s", path, strerror(errno));
    else if (!S_ISREG(s.st_mode))
        status = vx_fail(VX_EIO, "load %s: no such file (it is %s)", path,
                         S_ISDIR(s.st_mode) ? "a folder" : "a device or pipe");
    vx_reader *r = status ? NULL : calloc(1, sizeof *r);
    if (r) r->path = strdup(path);
    if (!status && (!r || !r->path)) status = vx_fail(VX_ENOMEM, "load %s: out of memory", path);
    if (status) {
        free(r);
        close(file);
        return status;
    }
    r->file = file, r->size = (int64_t)s.st_size;
    *out = r;
    return VX_OK;
}

int64_t vx_reader_size(const vx_reader *r) { return r ? r->size : -1; }

bool vx_reader_still_has(const vx_reader *r, int64_t bytes)
{
    struct stat s;
    return fstat(r->file, &s) == 0 && (int64_t)s.st_size >= bytes;
}

int vx_reader_bytes(const vx_reader *r, void *to, int64_t offset, int64_t count)
{
    if (!r) return vx_fail(VX_EINVAL, "read: a closed reader");
    for (int64_t done = 0; done < count;) {
        ssize_t got = pread(r->file, (char *)to + done, (size_t)(count - done), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return vx_fail(VX_EIO, "read %s: %s", r->path, strerror(errno));
        if (got == 0)
            return vx_fail(VX_EIO, "read %s: the file ends at byte %lld", r->path, (long long)(offset + done));
        done += got;
    }
    return VX_OK;
}

int vx_reader_tensor(const vx_reader *r, vx_tensor *x, int64_t offset, const char *format)
{
    enum { CHUNK = 1 << 16 };
    bool swapped;
    if (!r) return vx_fail(VX_EINVAL, "read: a closed reader");
    if (!x) return vx_fail(VX_EINVAL, "read %s: into a released tensor", r->path);
    if (!x->contiguous) return vx_fail(VX_EINVAL, "read %s: into a strided view", r->path);
    const vx_stored *stored = vx_stored_named("read", r->path, format, &swapped);
    if (!stored) return VX_EINVAL;
    size_t item = vx_dtype_bytes(x->dtype), bytes = (size_t)stored->bytes;
    char *raw = vx_scratch("read", CHUNK * (bytes + item)), *converted = raw ? raw + CHUNK * bytes : NULL;
    int status = raw ? VX_OK : VX_ENOMEM;
    for (int64_t done = 0; !status && done < x->numel;) {
        int64_t count = x->numel - done < CHUNK ? x->numel - done : CHUNK;
        status = vx_reader_bytes(r, raw, offset + done * stored->bytes, count * stored->bytes);
        if (!status)
            status = vx_stored_convert(stored, swapped, x->dtype, converted, raw, stored->bytes, count, done, r->path);
        if (!status) status = vx_write(x, done, count, converted);
        done += count;
    }
    vx_scratch_free(raw);
    return status;
}

void vx_reader_close(vx_reader *r)
{
    if (!r) return;
    close(r->file);
    free(r->path);
    free(r);
}
