/* The products of `_kernels.c` for one type of number: T is the type, NAME(f) the name of f for it, LANES how many
   numbers are in 64 bytes. A tile is a matrix with one input or output a row, and up to FULL columns: examples of a
   linear layer, pixels of a convolution. */
#define FULL (4 * LANES)

typedef struct {
    const int32_t *crow, *at;              /* rows of the matrix; where what an active weight multiplies begins */
    const T *values, *bias, *x, *g, *add;  /* the last two: gradients of outputs; what is added to the product */
    T *y, *grads;                          /* the product, or the gradients of values: one of them */
    ptrdiff_t n_row, n_in, n, block;       /* rows, inputs, examples; inputs (linear) or offsets (images) a block */
    int relu, sampled, failed;              /* sampled: the gradients are wanted */
    images im;
} NAME(job);

/* ---- y[row] += sum over active weights of value * x[offset * scale], in rows first to last, until offsets reach `bound` ----
   `next` has the place in each row from which it goes on. */
#ifdef VECTORS
typedef T NAME(whole) __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
typedef T NAME(half) __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
#define AT(kind, p) (*(NAME(kind) *)(p))
#define ROWS(f, kind, lanes, n, u) \
    static ALWAYS void NAME(f)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t last, int32_t *next, int32_t bound, const T *x, ptrdiff_t scale, T *y) { \
        const int32_t *at = k->at, *crow = k->crow; \
        const T *values = k->values; \
        for (ptrdiff_t r = first; r < last; r++, y += n * lanes) { \
            ptrdiff_t j = next[r], end = crow[r + 1]; \
            if (r + 4 < last) { __builtin_prefetch(at + next[r + 4]); __builtin_prefetch(values + next[r + 4]); } \
            if (j >= end || at[j] >= bound) continue; \
            NAME(kind) s[u][n]; \
            UNROLL for (int i = 0; i < n; i++) s[0][i] = AT(kind, y + i * lanes); \
            UNROLL for (int m = 1; m < u; m++) UNROLL for (int i = 0; i < n; i++) s[m][i] = (NAME(kind)){0}; \
            for (; j + u <= end && at[j + u - 1] < bound; j += u) \
                UNROLL for (int m = 0; m < u; m++) UNROLL for (int i = 0; i < n; i++) \
                    s[m][i] += values[j + m] * AT(kind, x + at[j + m] * scale + i * lanes); \
            for (; j < end && at[j] < bound; j++) UNROLL for (int i = 0; i < n; i++) \
                s[0][i] += values[j] * AT(kind, x + at[j] * scale + i * lanes); \
            UNROLL for (int m = 1; m < u; m++) UNROLL for (int i = 0; i < n; i++) s[0][i] += s[m][i]; \
            UNROLL for (int i = 0; i < n; i++) AT(kind, y + i * lanes) = s[0][i]; \
            next[r] = (int32_t)j; \
        } \
    }
ROWS(rows_4, whole, LANES, 4, 1)
ROWS(rows_2, whole, LANES, 2, 2)
ROWS(rows_1, whole, LANES, 1, 4)
ROWS(rows_half, half, LANES / 2, 1, 4)
static ALWAYS void NAME(rows)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t last, int32_t *next, int32_t bound, const T *x, ptrdiff_t scale, T *y, ptrdiff_t w) {
    if (w == FULL) NAME(rows_4)(k, first, last, next, bound, x, scale, y);
    else if (w == FULL / 2) NAME(rows_2)(k, first, last, next, bound, x, scale, y);
    else if (w == FULL / 4) NAME(rows_1)(k, first, last, next, bound, x, scale, y);
    else NAME(rows_half)(k, first, last, next, bound, x, scale, y);
}
#else
static void NAME(rows)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t last, int32_t *next, int32_t bound, const T *x, ptrdiff_t scale, T *y, ptrdiff_t w) {
    for (ptrdiff_t r = first; r < last; r++, y += w)
        for (; next[r] < k->crow[r + 1] && k->at[next[r]] < bound; next[r]++) {
            const T value = k->values[next[r]], *from = x + k->at[next[r]] * scale;
            for (ptrdiff_t i = 0; i < w; i++) y[i] += value * from[i];
        }
}
#endif

/* ---- grads[j] += dot product of row r of g and what value j multiplies, in the same order ---- */
#ifdef VECTORS
static ALWAYS NAME(half) NAME(folded)(const T *g, const T *x, ptrdiff_t w) {      /* whose sum is the dot product */
    NAME(whole) s = AT(whole, g) * AT(whole, x);
    for (ptrdiff_t i = LANES; i < w; i += LANES) s += AT(whole, g + i) * AT(whole, x + i);
    const T *both = (const T *)&s;
    return AT(half, both) + AT(half, both + LANES / 2);
}
/* Some vectors into one that has their sums */
static ALWAYS NAME(half) NAME(sums)(NAME(half) *v) {
    UNROLL for (int n = LANES / 4; n; n /= 2) UNROLL for (int i = 0; i < n; i++) v[i] = LOW(v[i], v[i + n]) + HIGH(v[i], v[i + n]);
    return v[0];
}
#endif
static ALWAYS void NAME(dots)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t last, int32_t *next, int32_t bound, const T *x, ptrdiff_t scale, const T *g, ptrdiff_t w) {
    const int32_t *at = k->at;
    T *grads = k->grads;
    for (ptrdiff_t r = first; r < last; r++, g += w) {
        ptrdiff_t j = next[r], end = k->crow[r + 1];
#ifdef VECTORS
        enum { S = LANES / 2 };
        for (; j + S <= end && at[j + S - 1] < bound; j += S) {
            NAME(half) v[S];
            UNROLL for (int m = 0; m < S; m++) v[m] = NAME(folded)(g, x + at[j + m] * scale, w);
            AT(half, grads + j) += NAME(sums)(v);
        }
#endif
        for (; j < end && at[j] < bound; j++) {
            const T *from = x + at[j] * scale;
            T sum = 0;
#ifdef VECTORS
            NAME(half) v = NAME(folded)(g, from, w);
            UNROLL for (int m = 0; m < S; m++) sum += v[m];
#else
            for (ptrdiff_t i = 0; i < w; i++) sum += g[i] * from[i];
#endif
            grads[j] += sum;
        }
        next[r] = (int32_t)j;
    }
}

/* ---- y[j, i] = x[i, j], for a matrix of n_row x n_col ---- */
static ALWAYS void NAME(turn)(const T *x, ptrdiff_t x_step, ptrdiff_t n_row, ptrdiff_t n_col, T *y, ptrdiff_t y_step) {
    ptrdiff_t i = 0, j;
#ifdef VECTORS
    enum { S = LANES / 2 };
    for (; i + S <= n_row; i += S) {
        for (j = 0; j + S <= n_col; j += S) {
            NAME(half) v[S], u[S];
            UNROLL for (int m = 0; m < S; m++) v[m] = AT(half, x + (i + m) * x_step + j);
            UNROLL for (int n = 1; n < S; n *= 2) {
                UNROLL for (int m = 0; m < S / 2; m++) { u[2 * m] = LOW(v[m], v[m + S / 2]); u[2 * m + 1] = HIGH(v[m], v[m + S / 2]); }
                UNROLL for (int m = 0; m < S; m++) v[m] = u[m];
            }
            UNROLL for (int m = 0; m < S; m++) AT(half, y + (j + m) * y_step + i) = v[m];
        }
        for (; j < n_col; j++) for (int m = 0; m < S; m++) y[j * y_step + i + m] = x[(i + m) * x_step + j];
    }
#endif
    for (; i < n_row; i++) for (j = 0; j < n_col; j++) y[j * y_step + i] = x[i * x_step + j];
}

/* ---- images: the padded planes of a channel, one for each phase of the stride, images one below the other ---- */
static ALWAYS void NAME(planes)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t n, T *out) {
    const images *im = &k->im;
    memset(out, 0, (size_t)im->room * sizeof(T));
    for (ptrdiff_t c = 0; c < k->n_in; c++) for (ptrdiff_t i = 0; i < n; i++) {
        const T *x = k->x + ((first + i) * k->n_in + c) * im->high * im->wide;
        for (ptrdiff_t row = 0; row < im->high; row++, x += im->wide) {
            ptrdiff_t q = row + im->top, phase = (c * im->down + q % im->down) * im->right;
            T *to = out + phase * im->plane + (i * im->slot + q / im->down) * im->pitch;
            if (im->right == 1) memcpy(to + im->left, x, (size_t)im->wide * sizeof(T));
            else for (ptrdiff_t p = 0; p < im->wide; p++) {
                ptrdiff_t at = p + im->left;
                to[at % im->right * im->plane + at / im->right] = x[p];
            }
        }
    }
}
/* The runs of output pixels among columns begin to end, of which those before `from` do not count */
static ALWAYS int NAME(runs)(const images *im, ptrdiff_t image, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t from, run *out) {
    int n = 0;
    for (ptrdiff_t line = (from > begin ? from : begin) / im->pitch; line * im->pitch < end; line++) {
        ptrdiff_t y = line % im->slot, left = line * im->pitch + im->x0, right = line * im->pitch + im->x1;
        if (y < im->y0 || y >= im->y1) continue;
        if (left < from) left = from;
        if (left < begin) left = begin;
        if (right > end) right = end;
        if (left >= right) continue;
        out[n].column = left - begin;
        out[n].length = right - left;
        out[n++].place = im->to_start + (image + line / im->slot) * im->to_image + y * im->to_down + left % im->pitch * im->to_right;
    }
    return n;
}

/* ---- a share of the work: some tiles, or some rows of all of them ---- */
static ALWAYS ptrdiff_t NAME(width)(ptrdiff_t left) {                 /* of the tile that comes next: at most a quarter idle, or the narrowest */
    ptrdiff_t w = FULL;
    while (w > FULL / 8 && w / 2 >= left) w /= 2;
    return w > FULL / 8 && left <= w / 4 * 3 ? w / 2 : w;
}
static ALWAYS void NAME(rectify)(T *y, ptrdiff_t n) { for (ptrdiff_t i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] : y[i] == y[i] ? 0 : y[i]; }

/* A tile of examples: t to t + used, of w columns */
static ALWAYS void NAME(examples)(const NAME(job) *k, ptrdiff_t t, ptrdiff_t used, ptrdiff_t w, ptrdiff_t first, ptrdiff_t last, int32_t *next, T *x, T *y) {
    ptrdiff_t block = k->block * FULL / w;
    if (used < w) memset(x, 0, (size_t)(block * w) * sizeof(T));
    if (k->sampled) {
        if (used < w) memset(y, 0, (size_t)((last - first) * w) * sizeof(T));
        NAME(turn)(k->g + t * k->n_row + first, k->n_row, used, last - first, y, w);
    }
    for (ptrdiff_t c = 0; c < k->n_in; c += block) {
        ptrdiff_t end = c + block < k->n_in ? c + block : k->n_in;
        NAME(turn)(k->x + t * k->n_in + c, k->n_in, used, end - c, x, w);
        if (k->sampled) NAME(dots)(k, first, last, next, (int32_t)end, x - c * w, w, y, w);
        else NAME(rows)(k, first, last, next, (int32_t)end, x - c * w, w, y, w);
    }
    if (k->sampled) return;
    NAME(turn)(y, w, last - first, used, k->y + t * k->n_row + first, k->n_row);
    if (k->add || k->relu) for (ptrdiff_t e = t; e < t + used; e++) {
        T *to = k->y + e * k->n_row + first;
        if (k->add) for (ptrdiff_t i = 0; i < last - first; i++) to[i] += k->add[e * k->n_row + first + i];
        if (k->relu) NAME(rectify)(to, last - first);
    }
}
/* A tile of the pixels of some images: columns t to t + w, of which from `from` to `end` count */
static ALWAYS void NAME(pixels)(const NAME(job) *k, ptrdiff_t image, ptrdiff_t t, ptrdiff_t from, ptrdiff_t end, ptrdiff_t w, ptrdiff_t first, ptrdiff_t last, int32_t *next, const T *x, T *y) {
    const images *im = &k->im;
    run all[FULL];
    int n = NAME(runs)(im, image, t, t + w < end ? t + w : end, from, all);
    if (k->sampled) {
        memset(y, 0, (size_t)((last - first) * w) * sizeof(T));
        for (ptrdiff_t r = first; r < last; r++) for (int m = 0; m < n; m++) {
            const T *g = k->g + r * im->to_row + all[m].place;
            T *to = y + (r - first) * w + all[m].column;
            for (ptrdiff_t i = 0; i < all[m].length; i++) to[i] = g[i];
        }
    }
    ptrdiff_t every = k->n_in * im->down * im->right * im->plane;
    for (ptrdiff_t c = 0; c < every; c += k->block) {
        int32_t bound = c + k->block < every ? (int32_t)(c + k->block) : INT32_MAX;
        if (k->sampled) NAME(dots)(k, first, last, next, bound, x + t, 1, y, w);
        else NAME(rows)(k, first, last, next, bound, x + t, 1, y, w);
    }
    if (k->sampled) return;
    for (ptrdiff_t r = first; r < last; r++, y += w) for (int m = 0; m < n; m++) {
        T *to = k->y + r * im->to_row + all[m].place, *sum = y + all[m].column;
        ptrdiff_t length = all[m].length;
        if (k->add) for (ptrdiff_t i = 0; i < length; i++) sum[i] += k->add[to - k->y + i];
        if (k->relu) NAME(rectify)(sum, length);
        if (im->to_right == 1) for (ptrdiff_t i = 0; i < length; i++) to[i] = sum[i];
        else for (ptrdiff_t i = 0; i < length; i++) to[i * im->to_right] = sum[i];
    }
}
static ALWAYS void NAME(begin)(const NAME(job) *k, ptrdiff_t first, ptrdiff_t last, ptrdiff_t w, int32_t *next, T *y) {
    memcpy(next + first, k->crow + first, (size_t)(last - first) * sizeof(int32_t));
    if (!k->sampled) for (ptrdiff_t r = first; r < last; r++) for (ptrdiff_t i = 0; i < w; i++) *y++ = k->bias ? k->bias[r] : 0;
}
WIDE static void NAME(share)(void *job, ptrdiff_t part, ptrdiff_t parts) {
    NAME(job) *k = job;
    const images *im = &k->im;
    ptrdiff_t groups = im->at_once ? (k->n + im->at_once - 1) / im->at_once : (k->n + FULL - 1) / FULL;
    ptrdiff_t first = 0, last = k->n_row, group = part, step = parts;  /* parts are groups of columns if there are enough, else rows */
    if (k->sampled || groups < parts) {
        first = k->n_row * part / parts, last = k->n_row * (part + 1) / parts, group = 0, step = 1;
    }
    size_t room = im->at_once ? (size_t)im->room : (size_t)(k->block * FULL);
    T *x = room ? malloc(room * sizeof(T)) : NULL, *y = malloc((size_t)(last - first + 1) * FULL * sizeof(T));
    int32_t *next = malloc((size_t)(k->n_row + 1) * sizeof(int32_t));
    if ((room && !x) || !y || !next) k->failed = 1;
    else for (; group < groups; group += step) {
        if (im->at_once) {
            ptrdiff_t image = group * im->at_once, n = k->n - image < im->at_once ? k->n - image : im->at_once;
            ptrdiff_t t = im->y0 * im->pitch, columns = ((n - 1) * im->slot + im->y1 - 1) * im->pitch + im->x1, from = t;
            const T *planes = x;
            if (room) NAME(planes)(k, image, n, x);
            else planes = k->x + image * k->n_in * im->plane;          /* they lie there already */
            for (ptrdiff_t w; from < columns; from = t) {
                w = NAME(width)(columns - t);
                if (k->sampled && w < LANES) w = LANES;
                if (!room && t + w > im->plane) t = im->plane - w;     /* nothing is read past the end */
                NAME(begin)(k, first, last, w, next, y);
                NAME(pixels)(k, image, t, from, columns, w, first, last, next, planes, y);
                t += w;
            }
        } else {
            ptrdiff_t end = (group + 1) * FULL < k->n ? (group + 1) * FULL : k->n;
            for (ptrdiff_t t = group * FULL, w; t < end; t += w) {
                w = NAME(width)(end - t);
                if (k->sampled && w < LANES) w = LANES;
                NAME(begin)(k, first, last, w, next, y);
                NAME(examples)(k, t, end - t < w ? end - t : w, w, first, last, next, x, y);
            }
        }
    }
    free(x); free(y); free(next);
}
/* One example: spmv */
SCALAR static void NAME(vector)(void *job, ptrdiff_t part, ptrdiff_t parts) {
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
        k->y[r] = sum;
        if (k->relu) NAME(rectify)(k->y + r, 1);
    }
}
static int NAME(run_job)(const int64_t *a, int threads) {
    NAME(job) k = {POINTER(a[2]), POINTER(a[3]), POINTER(a[5]), POINTER(a[6]), POINTER(a[7]), POINTER(a[8]), POINTER(a[9]), POINTER(a[10]), POINTER(a[11]),
                   a[12], a[13], a[14], a[15], a[16] == 1, a[16] == 2, 0, {0}};
    memcpy(&k.im, a + 17, sizeof k.im);
    if (k.sampled && a[4]) memset(k.grads, 0, (size_t)a[4] * sizeof(T));
    if (k.n == 1 && !k.im.at_once && !k.sampled) in_parallel(NAME(vector), &k, threads);
    else in_parallel(NAME(share), &k, threads);
    return k.failed;
}
#undef FULL
