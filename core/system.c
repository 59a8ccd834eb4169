/* system.c: what LuaJIT lacks of the operating system: files that appear whole or not at all, interrupts as a flag, a
 * thread, a clock, and what the terminal is. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "stored.h"

/* -- Writing ------------------------------------------------------------------------------------------------------- */

struct vx_writer {
    FILE *file;
    char *path, *temporary;
};

static void writer_free(vx_writer *w)
{
    free(w->path);
    free(w->temporary);
    free(w);
}

int vx_writer_open(vx_writer **out, const char *path)
{
    *out = NULL;
    vx_writer *w = calloc(1, sizeof *w);
    if (!w) return vx_fail(VX_ENOMEM, "write %s: out of memory", path);
    w->path = strdup(path);
    if (asprintf(&w->temporary, "%s.%ld.tmp", path, (long)getpid()) < 0) w->temporary = NULL;
    if (w->path && w->temporary) w->file = fopen(w->temporary, "wb");
    if (!w->file) {
        int status = vx_fail(VX_EIO, "write %s: %s", path, strerror(errno));
        writer_free(w);
        return status;
    }
    *out = w;
    return VX_OK;
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
    return stat(path, &s) == 0 && S_ISREG(s.st_mode) ? (int64_t)s.st_size : -1;
}

int vx_file_read(vx_tensor *x, const char *path, int64_t offset, const char *format)
{
    enum { CHUNK = 1 << 16 };
    bool swapped;
    if (!x) return vx_fail(VX_EINVAL, "read %s: into a released tensor", path);
    if (!x->contiguous) return vx_fail(VX_EINVAL, "read %s: into a strided view", path);
    const vx_stored *stored = vx_stored_named("read", path, format, &swapped);
    if (!stored) return VX_EINVAL;
    FILE *f = fopen(path, "rb");
    if (!f) return vx_fail(VX_EIO, "read %s: %s", path, strerror(errno));
    size_t item = vx_dtype_bytes(x->dtype), bytes = (size_t)stored->bytes;
    char *raw = vx_scratch("read", CHUNK * (bytes + item)), *converted = raw ? raw + CHUNK * bytes : NULL;
    int status = raw ? VX_OK : VX_ENOMEM;
    if (!status && fseeko(f, (off_t)offset, SEEK_SET) != 0)
        status = vx_fail(VX_EIO, "read %s: %s", path, strerror(errno));
    for (int64_t done = 0; !status && done < x->numel;) {
        int64_t count = x->numel - done < CHUNK ? x->numel - done : CHUNK;
        if (fread(raw, bytes, (size_t)count, f) != (size_t)count) {
            status = vx_fail(VX_EIO, "read %s: the file ends at element %lld of %lld", path, (long long)done,
                             (long long)x->numel);
        } else {
            status = vx_stored_convert(stored, swapped, x->dtype, converted, raw, stored->bytes, count, done, path);
            if (!status) status = vx_write(x, done, count, converted);
        }
        done += count;
    }
    vx_scratch_free(raw);
    fclose(f);
    return status;
}

/* -- Interrupts ---------------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t interrupted;
static struct sigaction before_int, before_term;
static int catching;
static struct {
    int (*volatile f)(void *, void *, int, int);
    void *a, *b;
    int c, d;
    pthread_t thread;
} besides;

static void on_signal(int number)
{
    if (interrupted && catching == 1) {
        signal(number, SIG_DFL);
        raise(number);
    }
    interrupted = 1;
    if (catching != 2 || !besides.f) return;
    if (pthread_equal(pthread_self(), besides.thread)) {
        int problem = errno;
        besides.f(besides.a, besides.b, besides.c, besides.d);
        errno = problem;
    } else {
        pthread_kill(besides.thread, number); /* it may wait in a system call, which this ends */
    }
}

int vx_interrupt_catch(int how)
{
    if (how < 0 || how > 2) return vx_fail(VX_EINVAL, "interrupt_catch: %d, expected 0, 1 or 2", how);
    if (catching && how != catching) {
        sigaction(SIGINT, &before_int, NULL);
        if (catching == 1) sigaction(SIGTERM, &before_term, NULL);
    }
    interrupted = 0;
    if (how && how != catching) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = on_signal;
        sigaction(SIGINT, &action, &before_int);
        if (how == 1) sigaction(SIGTERM, &action, &before_term);
    }
    catching = how;
    return VX_OK;
}

int vx_interrupted(void) { return interrupted; }

int vx_interrupt_calls(int (*f)(void *, void *, int, int), void *a, void *b, int c, int d)
{
    besides.f = NULL; /* the handler may run between any two of these lines */
    besides.a = a, besides.b = b, besides.c = c, besides.d = d;
    besides.thread = pthread_self();
    besides.f = f;
    return VX_OK;
}

/* -- Threads ------------------------------------------------------------------------------------------------------- */

struct job {
    int (*f)(void *, void *, void *);
    void *a, *b, *c;
};

static void *run_job(void *argument)
{
    struct job job = *(struct job *)argument;
    free(argument);
    job.f(job.a, job.b, job.c);
    return NULL;
}

int vx_thread(int (*f)(void *, void *, void *), void *a, void *b, void *c)
{
    if (!f) return vx_fail(VX_EINVAL, "thread: no function");
    struct job *job = malloc(sizeof *job);
    if (!job) return vx_fail(VX_ENOMEM, "thread: out of memory");
    *job = (struct job){f, a, b, c};
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited by the new thread */
    pthread_t thread;
    int problem = pthread_create(&thread, NULL, run_job, job);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (problem) {
        free(job);
        return vx_fail(VX_ENOMEM, "thread: %s", strerror(problem));
    }
    pthread_detach(thread);
    return VX_OK;
}

/* -- Clock, terminal ----------------------------------------------------------------------------------------------- */

double vx_time(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int vx_is_tty(int fd) { return isatty(fd); }

int vx_terminal_columns(void)
{
    struct winsize w;
    for (int fd = 2; fd >= 1; fd--)
        if (ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 0) return w.ws_col;
    return 0;
}
