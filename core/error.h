/* error.h: how a failure is told. A function that can fail returns a status, and vx_error() holds the text. */
#ifndef VX_ERROR_H
#define VX_ERROR_H

#include "vertex.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sets this thread's vx_error() and returns status. */
int vx_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts format and ": " before the text of the failure that was just met, and returns status. */
int vx_fail_because(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Writes "(2,3,4)", or "(released)" for NULL, into text; returns text. */
char *vx_shape_text(const vx_tensor *x, char *text, size_t size);

const char *vx_dtype_name(int dtype);

#ifdef __cplusplus
}
#endif
#endif
