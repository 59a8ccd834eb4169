/* host.c: this library as the host of others, of backends above all: finds and opens them, hands each what it needs,
 * and opens their devices.
 *
 * Backends other than the CPU are known by their libraries' names alone: "NAME:2" is the third device of
 * libvertex_NAME.so, looked for in the folder VERTEX_BACKENDS, where that is set, and then beside this library. A
 * library stays open for the life of the process: tensors of its devices may be freed as late as finalizers run.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host.h"
#include "internal.h"

enum { MAX_BACKENDS = 16, NAME = 24, PATH = 4096 };

typedef struct library {
    char name[NAME];
    const vx_backend *backend;
} library;

static library libraries[MAX_BACKENDS];
static int library_count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* libraries, and who opens a device */

static int tf32;              /* vx_allow_tf32 */
static int autocast = VX_F32; /* vx_autocast */

static const vx_host host = {vx_fail, vx_error, vx_shape_text, vx_pool_alloc, vx_pool_free, &tf32, &autocast};

/* -- Finding libraries --------------------------------------------------------------------------------------------- */

/* Finds the folder of this library. */
static void own_folder(char *folder, size_t size)
{
    Dl_info info;
    char path[PATH] = "";
    if (dladdr((void *)(uintptr_t)&vx_device_open, &info) && info.dli_fname && !realpath(info.dli_fname, path))
        path[0] = 0;
    char *slash = strrchr(path, '/');
    if (slash) *slash = 0;
    snprintf(folder, size, "%s", slash ? path : ".");
}

/* Says whether a library NAME is no backend: those of comm/ join ranks. */
static bool joins_ranks(const char *name) { return !strcmp(name, "mpi") || !strcmp(name, "nccl"); }

/* Appends the names of the backend libraries in a folder: ", cuda, emu". */
static void list_folder(const char *folder, char *text, size_t size)
{
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) {
        char name[NAME];
        int end = 0;
        if (sscanf(e->d_name, "libvertex_%23[a-z0-9].so%n", name, &end) == 1 && end == (int)strlen(e->d_name) &&
            !joins_ranks(name)) {
            size_t used = strlen(text);
            snprintf(text + used, size - used, ", %s", name);
        }
    }
    if (d) closedir(d);
}

/* The folder that VERTEX_BACKENDS names, or NULL. */
static const char *backends_folder(void)
{
    const char *folder = getenv("VERTEX_BACKENDS");
    return folder && *folder ? folder : NULL;
}

static int no_library(const char *name, const char *wanted, const char *folder)
{
    char there[256] = "";
    const char *more = backends_folder();
    if (more) list_folder(more, there, sizeof there);
    list_folder(folder, there, sizeof there);
    return vx_fail(VX_ENOSUP,
                   "%s: expected \"cpu\", or \"NAME:0\" of a backend library; there is no libvertex_%s.so in %s%s%s "
                   "(backends there: %s)%s",
                   wanted, name, more ? more : "", more ? ", " : "", folder, there[0] ? there + 2 : "none",
                   !strcmp(name, "cuda")  ? "; ./setup.sh without --cpu builds it where nvcc is found"
                   : !strcmp(name, "emu") ? "; ./setup.sh without --cpu builds it"
                                          : "");
}

/* Writes the first declaration in which two signatures differ, as `ours` has it. */
static void first_difference(const char *ours, const char *theirs, char *text, size_t size)
{
    const char *from = ours, *s = ours;
    for (; *s && *s == *theirs; s++, theirs++)
        if (*s == ';') from = s + 1;
    from += strspn(from, " \n");
    snprintf(text, size, "%.*s", (int)strcspn(from, ";"), from);
}

/* Opens a library and gives its vx_KIND_entry, where both were built from the same declarations. */
static int read_library(const char *path, const char *kind, const char *ours, void **entry)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return vx_fail(VX_ENOSUP, "cannot open a %s: %s", kind, dlerror());
    char names[2][64];
    snprintf(names[0], sizeof names[0], "vx_%s_signature", kind);
    snprintf(names[1], sizeof names[1], "vx_%s_entry", kind);
    void *exported = dlsym(handle, names[0]);
    *entry = dlsym(handle, names[1]);
    const char *(*signature)(void);
    memcpy(&signature, &exported, sizeof signature); /* ISO C has no cast from an object's pointer to a function's */
    int status = VX_OK;
    if (!*entry || !signature) {
        status = vx_fail(VX_ENOSUP, "%s is no %s of this version: it has no %s%s", path, kind, names[*entry == NULL],
                         *entry ? ": rebuild both with ./setup.sh" : "");
    } else if (strcmp(signature(), ours)) {
        char different[96];
        first_difference(ours, signature(), different, sizeof different);
        status = vx_fail(VX_ENOSUP,
                         "%s was built from other declarations than this library, first '%s': rebuild both with "
                         "./setup.sh",
                         path, different);
    }
    if (status) dlclose(handle);
    return status;
}

/* Finds the file of library NAME. */
static bool find_library(const char *name, char *path, size_t size)
{
    char own[PATH];
    own_folder(own, sizeof own);
    const char *folders[] = {backends_folder(), own};
    for (int i = 0; i < 2; i++) {
        if (!folders[i]) continue;
        snprintf(path, size, "%s/libvertex_%s.so", folders[i], name);
        if (access(path, F_OK) == 0) return true;
    }
    return false;
}

int vx_library_entry(const char *name, const char *kind, const char *signature, void **entry)
{
    char path[PATH + 64];
    if (!find_library(name, path, sizeof path)) return vx_fail(VX_ENOSUP, "there is no %s", path);
    return read_library(path, kind, signature, entry);
}

/* Finds the backend called `name`; `wanted` begins the text of a failure. The mutex is held. */
static int find_backend(const char *name, const char *wanted, const vx_backend **out)
{
    if (!strcmp(name, "cpu")) {
        *out = vx_cpu_backend();
        return *out ? VX_OK : VX_ENOSUP;
    }
    for (int i = 0; i < library_count; i++)
        if (!strcmp(name, libraries[i].name)) {
            *out = libraries[i].backend;
            return VX_OK;
        }
    char own[PATH], path[PATH + 64];
    own_folder(own, sizeof own);
    if (joins_ranks(name) || !find_library(name, path, sizeof path)) return no_library(name, wanted, own);
    if (library_count == MAX_BACKENDS)
        return vx_fail(VX_ENOSUP, "%s: %d backends are open, no more fit", wanted, MAX_BACKENDS);
    void *exported;
    int status = read_library(path, "backend", vx_backend_signature(), &exported);
    if (status) return status;
    const vx_backend *(*entry)(const vx_host *);
    memcpy(&entry, &exported, sizeof entry);
    *out = entry(&host);
    library *l = &libraries[library_count++];
    snprintf(l->name, sizeof l->name, "%s", name);
    l->backend = *out;
    return VX_OK;
}

/* Splits a device's name: copies what stands before ':' to `name` and returns the ordinal behind it, 0 where there is
 * none; -1 where the text has no such form. */
static int split_name(const char *text, char *name)
{
    int length = (int)strspn(text, "abcdefghijklmnopqrstuvwxyz0123456789");
    if (length == 0 || length >= NAME) return -1;
    snprintf(name, NAME, "%.*s", length, text);
    if (!text[length]) return 0;
    const char *digits = text + length + 1;
    size_t n = strspn(digits, "0123456789");
    return text[length] == ':' && n > 0 && n < 5 && !digits[n] ? atoi(digits) : -1;
}

/* -- Devices of a name --------------------------------------------------------------------------------------------- */

static int open_device(const char *text, int *number)
{
    char name[NAME], full[NAME + 12], wanted[96];
    snprintf(wanted, sizeof wanted, "device '%.40s'", text);
    int ordinal = split_name(text, name);
    if (ordinal < 0) return vx_fail(VX_EINVAL, "%s: expected \"cpu\" or \"cuda:0\", \"cuda:1\", ...", wanted);
    if (!strcmp(name, "cpu")) snprintf(full, sizeof full, ordinal ? "cpu:%d" : "cpu", ordinal);
    else snprintf(full, sizeof full, "%s:%d", name, ordinal);
    int known = vx_device_find(full);
    if (known >= 0) {
        *number = known;
        return vx_device_check("device open", known);
    }
    const vx_backend *backend;
    int count, status = find_backend(name, wanted, &backend);
    if (status) return status;
    status = backend->count(&count);
    if (status) return vx_fail_because(status, "%s", wanted);
    if (ordinal >= count)
        return vx_fail(VX_ENOSUP, "%s: there %s %d %s device%s, counted from 0", wanted, count == 1 ? "is" : "are",
                       count, name, count == 1 ? "" : "s");
    return vx_device_add(full, backend, ordinal, number);
}

int vx_device_open(const char *name, int *number)
{
    if (!name) return vx_fail(VX_EINVAL, "device: no name, expected \"cpu\" or \"cuda:0\", \"cuda:1\", ...");
    pthread_mutex_lock(&mutex);
    int status = open_device(name, number);
    pthread_mutex_unlock(&mutex);
    return status;
}

const char *vx_backends(void) { return "cpu\ncuda\n"; }

/* Finds a backend by its name alone, for a question about all of it. */
static int backend_named(const char *name, const vx_backend **out)
{
    char checked[NAME], wanted[96];
    if (!name) return vx_fail(VX_EINVAL, "backend: no name, expected \"cpu\", \"cuda\", ...");
    snprintf(wanted, sizeof wanted, "backend '%.40s'", name);
    if (split_name(name, checked) || strcmp(name, checked))
        return vx_fail(VX_EINVAL, "%s: expected \"cpu\", \"cuda\", ...", wanted);
    pthread_mutex_lock(&mutex);
    int status = find_backend(name, wanted, out);
    pthread_mutex_unlock(&mutex);
    return status;
}

int vx_device_count(const char *name, int *count)
{
    const vx_backend *backend;
    *count = 0;
    int status = backend_named(name, &backend);
    return status ? status : backend->count(count);
}

int vx_backend_has(const char *name, const char *op, int *there)
{
    const vx_backend *backend;
    *there = 0;
    int status = backend_named(name, &backend);
    if (status) return status;
    if (!op) return vx_fail(VX_EINVAL, "backend has: no op's name");
#define VX_OP(known, contract, text, tensors, numbers)                                                                 \
    if (!strcmp(op, #known)) {                                                                                         \
        *there = backend->known != NULL;                                                                               \
        return VX_OK;                                                                                                  \
    }
#include "ops.def"
#undef VX_OP
    return vx_fail(VX_EINVAL, "'%s' is no op of ops.def", op);
}

/* -- Settings that backends read ----------------------------------------------------------------------------------- */

int vx_allow_tf32(int on)
{
    if (on >= 0) tf32 = on != 0;
    return tf32;
}

int vx_autocast(int dtype)
{
    if (dtype == VX_F32 || dtype == VX_BF16) autocast = dtype;
    return autocast;
}
