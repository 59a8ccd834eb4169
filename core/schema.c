/* schema.c: checks the arguments of a call against its contract, once, for every backend. Ops have theirs in ops.def;
 * other functions on tensors (images, streams) pass theirs.
 *
 * Grammar of a contract
 *     outputs "<-" inputs [ ":" conditions ]
 *     argument   = name mark* "(" sizes ")"      mark: "?" may be NULL, "~" any strides; a dtype other than f32:
 *                                                ":i32" ":u8" ":any" ":body"
 *     sizes      = size { "," size }             size: a letter (bound at its first use), a number, "..." (a list of
 *                                                sizes, the same wherever it appears) or "*" (any list, unrelated)
 *     conditions = expression { ";" expression } with || && == != < <= > >= + - * / % over letters, numbers, names, inf
 * Arguments are listed in the order of the call. The texts name the op, both tensors with their shapes, and the size.
 * For an op on lists every place is such a call.
 */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { MAX_LETTERS = 26, TEXT = 160 };

typedef struct call {
    const char *op;
    int64_t letter[MAX_LETTERS]; /* -1: not bound yet */
    const vx_tensor *bound_by[MAX_LETTERS];
    const char *bound_name[MAX_LETTERS];
    int bound_length[MAX_LETTERS];
    const vx_tensor *list_by; /* who bound "...", which of its dimensions, and its name */
    int list_dims;
    const char *list_name;
    int list_length;
    const char *const *number_names;
    const double *numbers;
    int number_count;
} call;

/* -- Shapes -------------------------------------------------------------------------------------------------------- */

static const char *skip_spaces(const char *s)
{
    while (*s == ' ') s++;
    return s;
}

/* Fails with "op: x (2,3) ..., y (4) ...". */
static int disagree(const call *c, const char *name, int length, const vx_tensor *x, const char *other_name,
                    int other_length, const vx_tensor *other, const char *what, int what_length)
{
    char a[TEXT], b[TEXT];
    return vx_fail(VX_EINVAL, "%s: %.*s %s and %.*s %s disagree on %.*s", c->op, other_length, other_name,
                   vx_shape_text(other, a, sizeof a), length, name, vx_shape_text(x, b, sizeof b), what_length, what);
}

static int wrong_rank(const call *c, const char *name, int length, const vx_tensor *x, const char *sizes,
                      int sizes_length)
{
    char a[TEXT];
    return vx_fail(VX_EINVAL, "%s: %.*s %s should have the shape %.*s", c->op, length, name,
                   vx_shape_text(x, a, sizeof a), sizes_length, sizes);
}

/* Matches x against "(...,C)" or the like; sizes points at "(", the text ends with ")". */
static int match_sizes(call *c, const char *name, int length, const vx_tensor *x, const char *sizes, int sizes_length)
{
    int after_list = 0; /* sizes that follow "..." */
    bool list = false;
    for (const char *s = sizes + 1; *s != ')'; s++) {
        if (*s == '.') list = true;
        if (*s == '*') return VX_OK;
    }
    if (list) {
        const char *s = strstr(sizes, "...") + 3;
        for (; *s != ')'; s++) after_list += *s == ',';
    }
    int dim = 0;
    for (const char *s = sizes + 1; *s != ')';) {
        if (*s == ',') {
            s++;
        } else if (*s == '.') {
            s += 3;
            int count = x->ndim - after_list - dim;
            if (count < 0) return wrong_rank(c, name, length, x, sizes, sizes_length);
            if (!c->list_by) {
                c->list_by = x, c->list_dims = count, c->list_name = name, c->list_length = length;
            } else {
                bool same = count == c->list_dims;
                for (int i = 0; same && i < count; i++) same = x->shape[dim + i] == c->list_by->shape[i];
                if (!same)
                    return disagree(c, name, length, x, c->list_name, c->list_length, c->list_by, "their shape", 11);
            }
            dim += count;
        } else {
            if (dim >= x->ndim) return wrong_rank(c, name, length, x, sizes, sizes_length);
            int64_t size = x->shape[dim++];
            if (isdigit((unsigned char)*s)) {
                char *end;
                if (strtol(s, &end, 10) != size) return wrong_rank(c, name, length, x, sizes, sizes_length);
                s = end;
            } else {
                int i = *s - 'A';
                if (c->letter[i] < 0) {
                    c->letter[i] = size, c->bound_by[i] = x, c->bound_name[i] = name, c->bound_length[i] = length;
                } else if (c->letter[i] != size) {
                    return disagree(c, name, length, x, c->bound_name[i], c->bound_length[i], c->bound_by[i], s, 1);
                }
                s++;
            }
        }
    }
    return dim == x->ndim ? VX_OK : wrong_rank(c, name, length, x, sizes, sizes_length);
}

/* -- Conditions: a recursive-descent evaluator over doubles; / rounds down ----------------------------------------- */

static double any_of(const call *c, const char **s);

static bool is_infinity(const char *name, int length) { return length == 3 && !strncmp(name, "inf", 3); }

static double primary(const call *c, const char **s)
{
    *s = skip_spaces(*s);
    if (**s == '(') {
        (*s)++;
        double v = any_of(c, s);
        *s = skip_spaces(*s) + 1;
        return v;
    }
    if (isdigit((unsigned char)**s)) { /* no strtod: an op on lists comes by here for every tensor */
        double v = 0;
        while (isdigit((unsigned char)**s)) v = 10 * v + *(*s)++ - '0';
        return v;
    }
    int n = 0;
    while (isalnum((unsigned char)(*s)[n]) || (*s)[n] == '_') n++;
    const char *name = *s;
    *s += n;
    if (n == 1 && isupper((unsigned char)*name)) return (double)c->letter[*name - 'A'];
    if (is_infinity(name, n)) return INFINITY;
    for (int i = 0; i < c->number_count; i++)
        if ((int)strlen(c->number_names[i]) == n && !strncmp(c->number_names[i], name, (size_t)n)) return c->numbers[i];
    return NAN; /* a name ops.def does not know: every comparison with it fails, and a test would see it */
}

static double product(const call *c, const char **s)
{
    double v = primary(c, s);
    for (;;) {
        *s = skip_spaces(*s);
        char o = **s;
        if (o != '*' && o != '/' && o != '%') return v;
        (*s)++;
        double w = primary(c, s);
        v = o == '*' ? v * w : w == 0 ? NAN : o == '/' ? floor(v / w) : fmod(v, w);
    }
}

static double sum(const call *c, const char **s)
{
    double v = product(c, s);
    for (;;) {
        *s = skip_spaces(*s);
        char o = **s;
        if (o != '+' && o != '-') return v;
        (*s)++;
        double w = product(c, s);
        v = o == '+' ? v + w : v - w;
    }
}

static double comparison(const call *c, const char **s)
{
    double v = sum(c, s);
    *s = skip_spaces(*s);
    char o = **s;
    bool equal = (*s)[0] && (*s)[1] == '=';
    if (o != '<' && o != '>' && !((o == '=' || o == '!') && equal)) return v;
    *s += equal ? 2 : 1;
    double w = sum(c, s);
    switch (o) {
    case '<': return equal ? v <= w : v < w;
    case '>': return equal ? v >= w : v > w;
    case '=': return v == w;
    default: return v != w;
    }
}

static double all_of(const call *c, const char **s)
{
    double v = comparison(c, s);
    while (*s = skip_spaces(*s), **s == '&') {
        *s += 2;
        double w = comparison(c, s);
        v = v && w;
    }
    return v;
}

static double any_of(const call *c, const char **s)
{
    double v = all_of(c, s);
    while (*s = skip_spaces(*s), **s == '|') {
        *s += 2;
        double w = all_of(c, s);
        v = v || w;
    }
    return v;
}

/* Writes the values of the letters and numbers that a condition mentions: "C = 6, G = 4, stride = 3". */
static void values_text(const call *c, const char *from, const char *to, char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    const char *seen[16];
    int seen_count = 0;
    for (const char *s = from; s < to && seen_count < 16;) {
        int n = 0;
        while (s + n < to && (isalnum((unsigned char)s[n]) || s[n] == '_')) n++;
        if (n == 0) {
            s++;
            continue;
        }
        bool old = isdigit((unsigned char)*s) || is_infinity(s, n);
        for (int i = 0; i < seen_count; i++)
            old = old || (!strncmp(seen[i], s, (size_t)n) && !isalnum((unsigned char)seen[i][n]) && seen[i][n] != '_');
        if (!old) {
            const char *cursor = s;
            seen[seen_count++] = s;
            used +=
                (size_t)snprintf(text + used, size - used, "%s%.*s = %g", used ? ", " : "", n, s, primary(c, &cursor));
            if (used >= size) return;
        }
        s += n;
    }
}

static int check_conditions(const call *c, const char *s)
{
    while (*s) {
        s = skip_spaces(s);
        const char *start = s;
        double holds = any_of(c, &s);
        if (!(holds == holds && holds != 0)) {
            char values[256];
            values_text(c, start, s, values, sizeof values);
            return vx_fail(VX_EINVAL, "%s: needs %.*s, got %s", c->op, (int)(s - start), start, values);
        }
        s = skip_spaces(s);
        if (*s == ';') s++;
    }
    return VX_OK;
}

/* -- The whole call ------------------------------------------------------------------------------------------------ */

static int check_dtype(const call *c, const char *name, int length, const vx_tensor *x, const char *dtype,
                       int dtype_length)
{
    char a[TEXT];
    if (dtype_length == 3 && !strncmp(dtype, "any", 3)) return VX_OK;
    if (dtype_length == 4 && !strncmp(dtype, "body", 4)) {
        if (x->dtype == VX_BF16 && vx_device_has(x->device, VX_CAN_BF16)) return VX_OK;
        dtype = "f32", dtype_length = 3;
    }
    const char *is = vx_dtype_name(x->dtype);
    if ((int)strlen(is) == dtype_length && !strncmp(is, dtype, (size_t)dtype_length)) return VX_OK;
    return vx_fail(VX_EINVAL, "%s: %.*s %s is %s, expected %.*s", c->op, length, name, vx_shape_text(x, a, sizeof a),
                   is, dtype_length, dtype);
}

typedef struct argument {
    const char *name, *dtype, *sizes;
    int length, dtype_length, sizes_length; /* of these texts */
    bool output, optional, strided;
} argument;

/* Reads the argument at *contract, which moves on to the next. */
static argument next_argument(const char **contract)
{
    const char *s = skip_spaces(*contract);
    const char *arrow = strstr(s, "<-");
    argument a = {.dtype = "f32", .dtype_length = 3, .output = arrow && arrow != s};
    if (arrow == s) s = skip_spaces(s + 2);
    a.name = s;
    while (isalnum((unsigned char)*s) || *s == '_') s++;
    a.length = (int)(s - a.name);
    for (; *s != '('; s++) {
        if (*s == '?') a.optional = true;
        if (*s == '~') a.strided = true;
        if (*s == ':') {
            a.dtype = s + 1;
            a.dtype_length = 0;
            while (isalnum((unsigned char)a.dtype[a.dtype_length])) a.dtype_length++;
            s += a.dtype_length;
        }
    }
    a.sizes = s;
    while (*s != ')') s++;
    *contract = ++s;
    a.sizes_length = (int)(s - a.sizes);
    return a;
}

int vx_output_count(const char *contract)
{
    const char *arrow = strstr(contract, "<-");
    int count = 0;
    for (const char *s = contract; s < arrow; s++) count += *s == '(';
    return count;
}

int vx_check(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
             const char *const *number_names, const double *numbers, int number_count)
{
    call c = {.op = op, .number_names = number_names, .numbers = numbers, .number_count = number_count};
    for (int i = 0; i < MAX_LETTERS; i++) c.letter[i] = -1;
    const vx_tensor *first = NULL;
    argument of_first = {0};
    const char *s = contract;
    char text[TEXT];
    for (int i = 0; i < tensor_count; i++) {
        const argument a = next_argument(&s);
        const vx_tensor *x = tensors[i];
        if (!x) {
            if (a.optional) continue;
            return vx_fail(VX_EINVAL, "%s: %.*s is a released tensor", op, a.length, a.name);
        }
        int status = check_dtype(&c, a.name, a.length, x, a.dtype, a.dtype_length);
        if (!status) status = match_sizes(&c, a.name, a.length, x, a.sizes, a.sizes_length);
        if (status) return status;
        if (!a.strided && !x->contiguous)
            return vx_fail(VX_EINVAL, "%s: %.*s %s is a strided view, expected a contiguous tensor", op, a.length,
                           a.name, vx_shape_text(x, text, sizeof text));
        if (a.output && !x->contiguous && tensor_count > 1 && vx_shares_elements(x))
            return vx_fail(VX_EINVAL, "%s: elements of %.*s %s share memory, expected a tensor or view whose do not",
                           op, a.length, a.name, vx_shape_text(x, text, sizeof text));
        if (!first) first = x, of_first = a;
        if (x->device != first->device) {
            char there[64], here[64];
            vx_device_name(first->device, there, sizeof there);
            vx_device_name(x->device, here, sizeof here);
            return vx_fail(VX_EINVAL, "%s: %.*s is on %s, %.*s on %s", op, of_first.length, of_first.name, there,
                           a.length, a.name, here);
        }
    }
    s = strchr(s, ':');
    int status = s ? check_conditions(&c, s + 1) : VX_OK;
    for (int i = 0, outputs = vx_output_count(contract); !status && i < outputs; i++) vx_wrote(op, tensors[i]);
    return status;
}

int vx_check_host(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
                  const char *const *number_names, const double *numbers, int number_count)
{
    int status = vx_check(op, contract, tensors, tensor_count, number_names, numbers, number_count);
    for (int i = 0; !status && i < tensor_count; i++) {
        const argument a = next_argument(&contract);
        if (!tensors[i]) continue;
        if (vx_device_has(tensors[i]->device, VX_CAN_HOST)) {
            status = vx_sync(tensors[i]->device); /* refuses while a graph is recorded there */
            continue;
        }
        char name[64];
        vx_device_name(tensors[i]->device, name, sizeof name);
        return vx_fail(VX_EINVAL, "%s: %.*s is on %s, expected the CPU", op, a.length, a.name, name);
    }
    return status;
}

int vx_check_choice(const char *op, const char *name, const char *value, const char *const *choices, int *choice)
{
    char known[128] = "";
    size_t used = 0;
    for (int i = 0; choices[i]; i++) {
        if (value && !strcmp(value, choices[i])) {
            *choice = i;
            return VX_OK;
        }
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? " or " : "", choices[i]);
    }
    return vx_fail(VX_EINVAL, "%s: %s is '%.40s', expected %s", op, name, value ? value : "", known);
}

/* -- Lists --------------------------------------------------------------------------------------------------------- */

typedef struct place {
    const vx_tensor *x;
    const char *name;
    int length, index;
} place;

static bool in_call(const place *p, const place *q)
{
    return p->name != q->name ? p->name < q->name : p->index < q->index;
}

/* Orders by address, tensors at one address as in the call. */
static int compare_places(const void *a, const void *b)
{
    const place *p = a, *q = b;
    if (p->x->data != q->x->data) return p->x->data < q->x->data ? -1 : 1;
    return in_call(p, q) ? -1 : 1;
}

int vx_check_lists(const char *op, const char *contract, vx_tensor *const *const *lists, int list_count, int count)
{
    const vx_tensor *first = lists[0][0];
    argument of_first = {0};
    place *outputs = malloc(sizeof(place) * (size_t)list_count * (size_t)count);
    int status = outputs ? VX_OK : vx_fail(VX_ENOMEM, "%s: out of memory", op), used = 0;
    char a[TEXT], b[TEXT];
    for (int k = 0; !status && k < list_count; k++) {
        const argument of = next_argument(&contract);
        if (k == 0) of_first = of;
        for (int i = 0; !status && i < count; i++) {
            const vx_tensor *x = lists[k][i];
            if (!x) continue;
            if (x->device != first->device) {
                vx_device_name(first->device, a, sizeof a);
                vx_device_name(x->device, b, sizeof b);
                status = vx_fail(VX_EINVAL, "%s: %.*s[0] is on %s, %.*s[%d] on %s", op, of_first.length, of_first.name,
                                 a, of.length, of.name, i, b);
            }
            if (of.output && x->numel) outputs[used++] = (place){x, of.name, of.length, i};
        }
    }
    if (!status) qsort(outputs, (size_t)used, sizeof *outputs, compare_places);
    const place *p = NULL, *q = NULL;
    for (int i = 1; !status && i < used;
         i++) { /* where any two overlap, two neighbours do; the first of the call is named */
        const place *x = &outputs[i - 1], *y = &outputs[i];
        if (y->x->data >= x->x->data + vx_dtype_bytes(x->x->dtype) * (size_t)x->x->numel) continue;
        if (in_call(y, x)) y = x, x = &outputs[i];
        if (!p || in_call(x, p)) p = x, q = y;
    }
    if (p)
        status =
            vx_fail(VX_EINVAL, "%s: %.*s[%d] %s and %.*s[%d] %s share memory", op, p->length, p->name, p->index,
                    vx_shape_text(p->x, a, sizeof a), q->length, q->name, q->index, vx_shape_text(q->x, b, sizeof b));
    free(outputs);
    return status;
}
