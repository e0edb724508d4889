// SPDX-License-Identifier: Apache-2.0
/* The products of `_kernels.c`, for one kind of processor and one type of number: VARIANT is the processor, BYTES and
   TARGET its vectors, T the type, NAME(f) the name of f for both. A tile is a matrix with one input or output a row, and up to
   FULL columns: examples of a linear layer, pixels of a convolution. */
#ifndef T
#define T float
#include "_products.h"
#undef T
#define T double
#include "_products.h"
#undef T
#else

#define LANES ((ptrdiff_t)(BYTES / sizeof(T)))
#define FULL ((ptrdiff_t)(TILE / sizeof(T)))
#define INSIDE TARGET static ALWAYS

typedef struct {
    const int32_t *crow, *at;              /* rows of the matrix; where what an active weight multiplies begins */
    const T *values, *bias, *x, *g, *add;  /* the last two: gradients of outputs; what is added to the product */
    T *y, *grads;                          /* the product, or the gradients of values: one of them */
    ptrdiff_t n_row, n_in, n, block;       /* rows, inputs, examples; inputs (linear) or offsets (images) a block */
    int relu, sampled, failed;              /* sampled: the gradients are wanted */
    images im;
} NAME(job);
typedef struct {                            /* what one thread has: some rows, and memory of its own */
    const NAME(job) *k;
    ptrdiff_t first, last, w;               /* rows; columns of the tile */
    int32_t *next;                          /* place in each row from which it goes on */
    T *x, *y;                               /* inputs; sums, or gradients of outputs, of the tile */
} NAME(part);

/* ---- y[row] += sum over active weights of value * x[offset * scale], until offsets reach `bound`; the first block begins with biases ---- */
#ifdef VECTORS
typedef T NAME(vector) __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
typedef T NAME(half) __attribute__((vector_size(BYTES / 2), aligned(sizeof(T)), may_alias));
#if BYTES > 16
typedef T NAME(quarter) __attribute__((vector_size(BYTES / 4), aligned(sizeof(T)), may_alias));
#endif
#define AT(p) (*(NAME(vector) *)(p))
#define ROWS(n, u) \
    INSIDE void NAME(rows_##n)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale, int is_first) { \
        const int32_t *at = p->k->at, *crow = p->k->crow; \
        int32_t *next = p->next; \
        const T *values = p->k->values, *bias = p->k->bias; \
        T *y = p->y; \
        for (ptrdiff_t r = p->first, last = p->last; r < last; r++, y += n * LANES) { \
            ptrdiff_t j = next[r], end = crow[r + 1]; \
            if (r + 4 < last) for (int i = 0; i < 64; i += 16) { FETCH(at + next[r + 4] + i, 0); FETCH(values + next[r + 4] + i, 0); } \
            if (!is_first && (j >= end || at[j] >= bound)) continue; \
            NAME(vector) s[u][n]; \
            const T begin = bias ? bias[r] : 0; \
            if (is_first) UNROLL for (int i = 0; i < n; i++) s[0][i] = (NAME(vector)){0} + begin; \
            else UNROLL for (int i = 0; i < n; i++) s[0][i] = AT(y + i * LANES); \
            UNROLL for (int m = 1; m < u; m++) UNROLL for (int i = 0; i < n; i++) s[m][i] = (NAME(vector)){0}; \
            for (; j + u <= end && at[j + u - 1] < bound; j += u) \
                UNROLL for (int m = 0; m < u; m++) UNROLL for (int i = 0; i < n; i++) \
                    s[m][i] += values[j + m] * AT(x + at[j + m] * scale + i * LANES); \
            for (; j < end && at[j] < bound; j++) UNROLL for (int i = 0; i < n; i++) \
                s[0][i] += values[j] * AT(x + at[j] * scale + i * LANES); \
            UNROLL for (int m = 1; m < u; m++) UNROLL for (int i = 0; i < n; i++) s[0][i] += s[m][i]; \
            UNROLL for (int i = 0; i < n; i++) AT(y + i * LANES) = s[0][i]; \
            next[r] = (int32_t)j; \
        } \
    }
ROWS(1, 4)
ROWS(2, 2)
ROWS(4, 2)
ROWS(8, 1)
INSIDE void NAME(rows)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale, int is_first) {
    if (p->w == 8 * LANES) NAME(rows_8)(p, bound, x, scale, is_first);
    else if (p->w == 4 * LANES) NAME(rows_4)(p, bound, x, scale, is_first);
    else if (p->w == 2 * LANES) NAME(rows_2)(p, bound, x, scale, is_first);
    else NAME(rows_1)(p, bound, x, scale, is_first);
}
#else
INSIDE void NAME(rows)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale, int is_first) {
    T *y = p->y;
    for (ptrdiff_t r = p->first; r < p->last; r++, y += p->w) {
        if (is_first) for (ptrdiff_t i = 0; i < p->w; i++) y[i] = p->k->bias ? p->k->bias[r] : 0;
        for (int32_t *j = p->next + r; *j < p->k->crow[r + 1] && p->k->at[*j] < bound; ++*j) {
            const T value = p->k->values[*j], *from = x + p->k->at[*j] * scale;
            for (ptrdiff_t i = 0; i < p->w; i++) y[i] += value * from[i];
        }
    }
}
#endif

/* ---- grads[j] += dot product of row r of g and what value j multiplies, in the same order ---- */
#ifdef VECTORS
#define FOLD(a, b) (LOW(a, b) + HIGH(a, b))         /* sums of neighbours, those of a and b in turn */
#define DOTS(n) \
    INSIDE NAME(vector) NAME(dot_##n)(const NAME(vector) *g, const T *x) {            /* a vector whose sum is the dot product */ \
        NAME(vector) s = g[0] * AT(x); \
        UNROLL for (int i = 1; i < n; i++) s += g[i] * AT(x + i * LANES); \
        return s; \
    } \
    INSIDE void NAME(dots_##n)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale) { \
        enum { S = LANES, G = S < 4 ? S : 4 }; \
        static const int reversed[16] = {0, S / 2, S / 4, S / 4 * 3, S / 8, S / 8 * 5, S / 8 * 3, S / 8 * 7, 1, 9, 5, 13, 3, 11, 7, 15}; \
        const int32_t *at = p->k->at; \
        const T *g = p->y; \
        T *grads = p->k->grads; \
        for (ptrdiff_t r = p->first; r < p->last; r++, g += n * LANES) { \
            ptrdiff_t j = p->next[r], end = p->k->crow[r + 1]; \
            if (r + 4 < p->last) for (int i = 0; i < 64; i += 16) { FETCH(at + p->next[r + 4] + i, 0); FETCH(grads + p->next[r + 4] + i, 1); } \
            if (j >= end || at[j] >= bound) continue; \
            NAME(vector) row[n]; \
            UNROLL for (int i = 0; i < n; i++) row[i] = AT(g + i * LANES); \
            for (; j + S <= end && at[j + S - 1] < bound; j += S) { \
                NAME(vector) v[5]; \
                int d = 0; \
                UNROLL for (int m = 0; m < S; m++) { \
                    NAME(vector) s = NAME(dot_##n)(row, x + at[j + reversed[m]] * scale); \
                    UNROLL for (int bit = 1; m & bit; bit *= 2) { d--; s = FOLD(v[d], s); } \
                    v[d++] = s; \
                } \
                AT(grads + j) += v[0]; \
            } \
            for (ptrdiff_t k; j < end && at[j] < bound; j += k) {    /* of those left over, four at a time, or fewer */ \
                for (k = 1; k < G && j + k < end && at[j + k] < bound; k++) ; \
                NAME(vector) v[G]; \
                UNROLL for (int m = 0; m < G; m++) v[m] = NAME(dot_##n)(row, x + at[j + (m < k ? m : 0)] * scale); \
                UNROLL for (int m = G / 2; m; m /= 2) UNROLL for (int i = 0; i < m; i++) v[i] = FOLD(v[i], v[i + m]); \
                UNROLL for (int m = G; m < S; m *= 2) v[0] = FOLD(v[0], v[0]); \
                UNROLL for (int m = 0; m < G; m++) if (m < k) grads[j + m] += v[0][m * (S / G)]; \
            } \
            p->next[r] = (int32_t)j; \
        } \
    }
DOTS(1)
DOTS(2)
DOTS(4)
DOTS(8)
INSIDE void NAME(dots)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale) {
    if (p->w == 8 * LANES) NAME(dots_8)(p, bound, x, scale);
    else if (p->w == 4 * LANES) NAME(dots_4)(p, bound, x, scale);
    else if (p->w == 2 * LANES) NAME(dots_2)(p, bound, x, scale);
    else NAME(dots_1)(p, bound, x, scale);
}
#else
INSIDE void NAME(dots)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale) {
    const T *g = p->y;
    for (ptrdiff_t r = p->first; r < p->last; r++, g += p->w)
        for (int32_t *j = p->next + r; *j < p->k->crow[r + 1] && p->k->at[*j] < bound; ++*j) {
            const T *from = x + p->k->at[*j] * scale;
            T sum = 0;
            for (ptrdiff_t i = 0; i < p->w; i++) sum += g[i] * from[i];
            p->k->grads[*j] += sum;
        }
}
#endif

/* ---- y[j, i] = x[i, j], for a matrix of n_row x n_col ---- */
#ifdef VECTORS
INSIDE void NAME(turn_square)(const T *x, ptrdiff_t x_step, T *y, ptrdiff_t y_step) {
    enum { S = LANES };
    NAME(vector) v[S], u[S];
    UNROLL for (int m = 0; m < S; m++) v[m] = AT(x + m * x_step);
    UNROLL for (int n = 1; n < S; n *= 2) {
        UNROLL for (int m = 0; m < S / 2; m++) { u[2 * m] = LOW(v[m], v[m + S / 2]); u[2 * m + 1] = HIGH(v[m], v[m + S / 2]); }
        UNROLL for (int m = 0; m < S; m++) v[m] = u[m];
    }
    UNROLL for (int m = 0; m < S; m++) AT(y + m * y_step) = v[m];
}
#endif
INSIDE void NAME(turn)(const T *x, ptrdiff_t x_step, ptrdiff_t n_row, ptrdiff_t n_col, T *y, ptrdiff_t y_step) {
    ptrdiff_t i = 0, j = 0;
#ifdef VECTORS
    ptrdiff_t rows = n_row / LANES * LANES, cols = n_col / LANES * LANES;
    if (x_step > y_step) for (; i < rows; i += LANES) for (j = 0; j < cols; j += LANES) NAME(turn_square)(x + i * x_step + j, x_step, y + j * y_step + i, y_step);
    else for (; j < cols; j += LANES) for (i = 0; i < rows; i += LANES) NAME(turn_square)(x + i * x_step + j, x_step, y + j * y_step + i, y_step);
    for (i = 0; i < rows; i++) for (j = cols; j < n_col; j++) y[j * y_step + i] = x[i * x_step + j];
#endif
    for (; i < n_row; i++) for (j = 0; j < n_col; j++) y[j * y_step + i] = x[i * x_step + j];
}

/* ---- images: the padded planes of a channel, one for each phase of the stride, images one below the other ---- */
INSIDE T *NAME(image_rows)(const images *im, const T *x, const T *end, T *to) {          /* one image without a stride; returns where it ends */
    ptrdiff_t gap = im->pitch - im->wide;
    for (ptrdiff_t row = 0; row < im->high; row++, x += im->wide, to += im->pitch) {
#ifdef VECTORS
        if (gap <= LANES && end - x >= im->wide + LANES) {             /* vectors that end after the row: zeros, and what comes later, */
            for (ptrdiff_t p = 0; p < im->wide; p += LANES) AT(to + p) = AT(x + p);              /* are written over them */
            AT(to + im->wide) = (NAME(vector)){0};
            continue;
        }
#endif
        memcpy(to, x, (size_t)im->wide * sizeof(T));
        if (row + 1 < im->high) memset(to + im->wide, 0, (size_t)gap * sizeof(T));
    }
    return to - gap;
}
INSIDE void NAME(phases)(const images *im, const T *x, T *to, ptrdiff_t i) {             /* one image with a stride, among zeros */
    for (ptrdiff_t row = 0; row < im->high; row++, x += im->wide) {
        ptrdiff_t q = row + im->top;
        T *line = to + q % im->down * im->right * im->plane + (i * im->slot + q / im->down) * im->pitch;
        if (im->right == 1) memcpy(line + im->left, x, (size_t)im->wide * sizeof(T));
        else for (ptrdiff_t p = 0; p < im->right && p < im->wide; p++) {                   /* every `right`-th pixel is of one phase */
            ptrdiff_t at = p + im->left, count = (im->wide - p - 1) / im->right + 1;
            T *phase = line + at % im->right * im->plane + at / im->right;
            if (im->right == 2) for (ptrdiff_t k = 0; k < count; k++) phase[k] = x[p + 2 * k];
            else for (ptrdiff_t k = 0; k < count; k++) phase[k] = x[p + im->right * k];
        }
    }
}
INSIDE void NAME(planes)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t n, T *out) {
    const images *im = &k->im;
    const T *end = k->x + k->n * k->n_in * im->high * im->wide;
    int whole = im->down == 1 && im->right == 1;
    T *done = out;                                                     /* everything before it is written */
    if (!whole) memset(out, 0, (size_t)im->room * sizeof(T));
    for (ptrdiff_t c = 0; c < k->n_in; c++) for (ptrdiff_t i = 0; i < n; i++) {
        const T *x = k->x + ((first + i) * k->n_in + c) * im->high * im->wide;
        if (!whole) { NAME(phases)(im, x, out + c * im->down * im->right * im->plane, i); continue; }
        T *to = out + c * im->plane + (i * im->slot + im->top) * im->pitch + im->left;
        memset(done, 0, (size_t)(to - done) * sizeof(T));
        done = NAME(image_rows)(im, x, end, to);
    }
    if (whole) memset(done, 0, (size_t)(out + im->room - done) * sizeof(T));
}
/* The runs of output pixels among columns begin to end, of which those before `from` do not count */
INSIDE int NAME(runs)(const images *im, ptrdiff_t image, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t from, run *out) {
    int n = 0;
    for (ptrdiff_t line = (from > begin ? from : begin) / im->pitch; line * im->pitch < end; line++) {
        ptrdiff_t y = line % im->slot, left = line * im->pitch + im->x0, right = line * im->pitch + im->x1;
        if (y < im->y0 || y >= im->y1) continue;
        if (left < from) left = from;
        if (left < begin) left = begin;
        if (right > end) right = end;
        if (left >= right) continue;
        run a = {left - begin, right - left, im->to_start + (image + line / im->slot) * im->to_image + y * im->to_down + left % im->pitch * im->to_right};
        run *b = out + (n ? n - 1 : 0);                                /* which may end where this one begins */
        if (n && b->column + b->length == a.column && b->place + b->length * im->to_right == a.place) b->length += a.length;
        else out[n++] = a;
    }
    return n;
}

/* ---- a share of the work: some tiles, or some rows of all of them ---- */
INSIDE ptrdiff_t NAME(width)(ptrdiff_t left) {                 /* of the tile that comes next: at most a quarter idle, or the narrowest */
    ptrdiff_t w = FULL;
    while (w > LANES && w / 2 >= left) w /= 2;
    return w > LANES && left <= w / 4 * 3 ? w / 2 : w;
}

/* ---- to = relu(sum + add): the end of a row. Where memory differs, the last numbers are written twice, as a vector that ends with the row ---- */
#define STORE(t, i) { \
        t v = *(t *)(sum + (i)); \
        if (add) v += *(t *)(add + (i)); \
        if (relu) v = (t)((__typeof__(v > (T)0))v & ((v > (T)0) | (v != v))); \
        *(t *)(to + (i)) = v; \
    }
INSIDE void NAME(finish)(T *to, const T *sum, const T *add, int relu, ptrdiff_t n) {
    ptrdiff_t i = 0;
#ifdef VECTORS
    for (; i + LANES <= n; i += LANES) STORE(NAME(vector), i)
    if (i < n && to != sum) {
        if (n >= LANES) STORE(NAME(vector), n - LANES)
        else if (n >= LANES / 2) { STORE(NAME(half), 0) STORE(NAME(half), n - LANES / 2) }
#if BYTES > 16
        else if (n >= LANES / 4) { STORE(NAME(quarter), 0) STORE(NAME(quarter), n - LANES / 4) }
#endif
        i = n >= LANES / (BYTES > 16 ? 4 : 2) ? n : 0;
    }
#endif
    for (; i < n; i++) {
        T v = sum[i];
        if (add) v += add[i];
        to[i] = relu && v <= 0 ? 0 : v;
    }
}
#undef STORE

INSIDE void NAME(block)(const NAME(part) *p, int32_t bound, const T *x, ptrdiff_t scale, int is_first) {
    if (is_first) memcpy(p->next + p->first, p->k->crow + p->first, (size_t)(p->last - p->first) * sizeof(int32_t));
    if (p->k->sampled) NAME(dots)(p, bound, x, scale);
    else NAME(rows)(p, bound, x, scale, is_first);
}

/* A tile of examples, t to t + used */
INSIDE void NAME(examples)(const NAME(part) *p, ptrdiff_t t, ptrdiff_t used) {
    const NAME(job) *k = p->k;
    ptrdiff_t w = p->w, n_in = k->n_in, n_row = k->n_row, block = k->block * FULL / w, rows = p->last - p->first;
    if (used < w) memset(p->x, 0, (size_t)(block * w) * sizeof(T));
    if (k->sampled && used < w) memset(p->y, 0, (size_t)(rows * w) * sizeof(T));
    if (k->sampled) NAME(turn)(k->g + t * n_row + p->first, n_row, used, rows, p->y, w);
    for (ptrdiff_t c = 0; !c || c < n_in; c += block) {              /* once at least: the first block begins the rows */
        ptrdiff_t end = c + block < n_in ? c + block : n_in;
        NAME(turn)(k->x + t * n_in + c, n_in, used, end - c, p->x, w);
        NAME(block)(p, (int32_t)end, p->x - c * w, w, !c);
    }
    if (k->sampled) return;
    NAME(turn)(p->y, w, rows, used, k->y + t * n_row + p->first, n_row);
    if (k->add || k->relu) for (ptrdiff_t e = t; e < t + used; e++) {
        ptrdiff_t place = e * n_row + p->first;
        NAME(finish)(k->y + place, k->y + place, k->add ? k->add + place : NULL, k->relu, rows);
    }
}
/* A tile of the pixels of some images: columns t to t + w, of which from `from` to `end` count */
INSIDE void NAME(pixels)(const NAME(part) *p, const T *x, ptrdiff_t image, ptrdiff_t t, ptrdiff_t from, ptrdiff_t end) {
    const NAME(job) *k = p->k;
    const images *im = &k->im;
    ptrdiff_t every = k->n_in * im->down * im->right * im->plane;
    run all[FULL];
    int n = NAME(runs)(im, image, t, t + p->w < end ? t + p->w : end, from, all);
    T *y = p->y;
    if (k->sampled && (n != 1 || all[0].length < p->w)) memset(y, 0, (size_t)((p->last - p->first) * p->w) * sizeof(T));
    if (k->sampled) for (ptrdiff_t r = p->first; r < p->last; r++, y += p->w) for (int m = 0; m < n; m++) {
        const T *g = k->g + r * im->to_row + all[m].place;
        for (ptrdiff_t i = 0; i < all[m].length; i++) y[all[m].column + i] = g[i];
    }
    for (ptrdiff_t c = 0; !c || c < every; c += k->block)
        NAME(block)(p, c + k->block < every ? (int32_t)(c + k->block) : INT32_MAX, x + t, 1, !c);
    if (!k->sampled) for (ptrdiff_t r = p->first; r < p->last; r++, y += p->w) for (int m = 0; m < n; m++) {
        ptrdiff_t place = r * im->to_row + all[m].place, length = all[m].length, step = im->to_right;
        T *sum = y + all[m].column, *to = k->y + place;
        ptrdiff_t ahead = step == 1 ? 8 : 4;                          /* rows; measured */
        if (r + ahead < p->last) for (ptrdiff_t i = ahead * im->to_row; i < ahead * im->to_row + length; i += 64 / (ptrdiff_t)sizeof(T)) {
            FETCH(to + i, 1);
            if (k->add) FETCH(k->add + place + i, 0);
        }
        if (step == 1) NAME(finish)(to, sum, k->add ? k->add + place : NULL, k->relu, length);
        else for (ptrdiff_t i = 0; i < length; i++) to[i * step] = sum[i];    /* a gradient: nothing is added */
    }
}
INSIDE void NAME(group_of_examples)(NAME(part) *p, ptrdiff_t group) {
    ptrdiff_t end = (group + 1) * FULL < p->k->n ? (group + 1) * FULL : p->k->n;
    for (ptrdiff_t t = group * FULL; t < end; t += p->w) {
        p->w = NAME(width)(end - t);
        NAME(examples)(p, t, end - t < p->w ? end - t : p->w);
    }
}
INSIDE void NAME(group_of_images)(NAME(part) *p, ptrdiff_t group) {
    const NAME(job) *k = p->k;
    const images *im = &k->im;
    ptrdiff_t image = group * im->at_once, n = k->n - image < im->at_once ? k->n - image : im->at_once;
    ptrdiff_t t = im->y0 * im->pitch, columns = ((n - 1) * im->slot + im->y1 - 1) * im->pitch + im->x1;
    const T *x = p->x ? p->x : k->x + image * k->n_in * im->plane;    /* without memory of its own: images lie in planes already */
    if (p->x) NAME(planes)(k, image, n, p->x);
    for (ptrdiff_t from = t; from < columns; from = t += p->w) {
        p->w = NAME(width)(columns - t);
        if (!p->x && t + p->w > im->plane) t = im->plane - p->w;       /* nothing is read past the end */
        NAME(pixels)(p, x, image, t, from, columns);
    }
}
TARGET static void NAME(share)(void *job, ptrdiff_t part, ptrdiff_t parts) {
    NAME(job) *k = job;
    ptrdiff_t at_once = k->im.at_once ? k->im.at_once : FULL, groups = (k->n + at_once - 1) / at_once;
    int by_rows = k->sampled || groups < parts;                        /* else threads share groups of columns */
    ptrdiff_t first = by_rows ? k->n_row * part / parts : 0, last = by_rows ? k->n_row * (part + 1) / parts : k->n_row;
    size_t room = k->im.at_once ? (size_t)k->im.room : (size_t)(k->block * FULL);
    void *x = room ? malloc(room * sizeof(T) + 64) : NULL, *y = malloc((size_t)(last - first + 1) * FULL * sizeof(T) + 64);
    int32_t *next = malloc((size_t)(k->n_row + 1) * sizeof(int32_t));
    NAME(part) p = {k, first, last, FULL, next, room ? ALIGNED(x) : NULL, ALIGNED(y)};
    if ((room && !x) || !y || !next) k->failed = 1;
    else for (ptrdiff_t group = by_rows ? 0 : part; group < groups; group += by_rows ? 1 : parts)
        if (k->im.at_once) NAME(group_of_images)(&p, group);
        else NAME(group_of_examples)(&p, group);
    free(x); free(y); free(next);
}
/* One example: spmv */
TARGET SCALAR static void NAME(one)(void *job, ptrdiff_t part, ptrdiff_t parts) {
    const NAME(job) *k = job;
    const T *v = k->values, *x = k->x;
    const int32_t *at = k->at;
    for (ptrdiff_t r = k->n_row * part / parts; r < k->n_row * (part + 1) / parts; r++) {
        T s[8] = {0};
        ptrdiff_t j = k->crow[r], end = k->crow[r + 1];
        for (; j + 8 <= end; j += 8) UNROLL for (int i = 0; i < 8; i++) s[i] += v[j + i] * x[at[j + i]];
        for (; j < end; j++) s[0] += v[j] * x[at[j]];
        T sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
        sum += (k->bias ? k->bias[r] : 0) + (k->add ? k->add[r] : 0);
        k->y[r] = k->relu && sum <= 0 ? 0 : sum;
    }
}
static int NAME(run_job)(const int64_t *a, int threads) {
    NAME(job) k = {POINTER(a[2]), POINTER(a[3]), POINTER(a[5]), POINTER(a[6]), POINTER(a[7]), POINTER(a[8]), POINTER(a[9]), POINTER(a[10]), POINTER(a[11]),
                   a[12], a[13], a[14], a[15], a[16] == 1, a[16] == 2, 0, {0}};
    memcpy(&k.im, a + 17, sizeof k.im);
    int64_t columns = k.im.at_once ? k.n * k.im.slot * k.im.pitch : k.n, enough = 1 + a[4] * (columns > 8 ? columns : 8) / GRAIN;
    if (threads > enough) threads = (int)enough;
    if (k.sampled && a[4]) memset(k.grads, 0, (size_t)a[4] * sizeof(T));
    share *gathers = sizeof(T) == 4 ? gather_float : gather_double;
    if (k.n == 1 && !k.im.at_once && !k.sampled) in_parallel(gathers ? gathers : NAME(one), &k, threads);
    else in_parallel(NAME(share), &k, threads);
    return k.failed;
}
#undef FULL
#undef LANES
#undef INSIDE
#undef AT
#undef ROWS
#undef DOTS
#undef FOLD
#endif
