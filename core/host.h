/* host.h: this library as the host of backend libraries.
 *
 * A backend NAME is a library libvertex_NAME.so, opened when a device "NAME:0" is first asked for (host.c). It links
 * nothing of this library: what it needs from here it is handed as a vx_host. It exports the two functions at the end.
 */
#ifndef VX_HOST_H
#define VX_HOST_H

#include "backend.h"

/* What a backend library needs of this one. */
typedef struct vx_host {
    int (*fail)(int status, const char *format, ...) __attribute__((format(printf, 2, 3))); /* vx_fail */
    const char *(*error)(void);                                                             /* vx_error */
    char *(*shape_text)(const vx_tensor *x, char *text, size_t size);                       /* vx_shape_text */
    int (*pool_alloc)(int device, size_t *bytes, void **out); /* rounds *bytes up to what the block holds */
    void (*pool_free)(int device, void *data, size_t bytes);  /* bytes: as pool_alloc left them */
    const int *tf32, *autocast; /* the settings of vx_allow_tf32 and vx_autocast, to be read at each op */
} vx_host;

#ifdef __cplusplus
extern "C" {
#endif

/* The declarations that two libraries must agree on: this header and what it includes, preprocessed. The build makes
 * the text (embed.cmake) and compiles it into each library. A backend whose text is another is refused, before anything
 * else of it is called. */
VX_API const char *vx_backend_signature(void);

/* What a backend library exports beside its signature: keeps host, which lives as long as the process, and returns its
 * table. */
VX_API const vx_backend *vx_backend_entry(const vx_host *host);

#ifdef __cplusplus
}
#endif
#endif
