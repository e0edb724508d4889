// SPDX-License-Identifier: Apache-2.0
/* Loops that PyTorch has no operation for. The rest of the library works without this file, slower.

   Python hands over addresses; sizes and layout have been checked there, and the index of a matrix is checked here.
   Every function leaves the GIL while it works. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                              /* for RTLD_DEFAULT */
#endif
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <dlfcn.h>
#endif

/* GCC on Linux compiles a loop once for each of these processors and picks one when the library is loaded */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif
/* Vectors as a type: GCC from 12 on, and clang. Others compile plain loops. */
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define VECTORS
#define ALWAYS inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define ALWAYS __forceinline
#else
#define ALWAYS inline
#endif
/* Ask for memory that a row a little further on needs; `write` is 1 if it is to be written */
#ifdef VECTORS
#define FETCH(p, write) __builtin_prefetch((p), write)
#else
#define FETCH(p, write)
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 16")
#define SCALAR __attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize")))    /* gathers are slower */
#pragma GCC diagnostic ignored "-Wpsabi"         /* vectors are passed between inlined functions only */
#else
#define UNROLL
#define SCALAR
#endif

#define GRAIN (1 << 18)                          /* products of two numbers for which another thread pays: some ten microseconds */
#define POINTER(a) ((void *)(uintptr_t)(a))
#define ALIGNED(p) POINTER(((uintptr_t)(p) + 63) & ~(uintptr_t)63)    /* a vector that spans two lines of the cache takes twice as long */

/* ---- threads: PyTorch's own pool, where its OpenMP is GNU's or LLVM's and can be found; else one ---- */
typedef void share(void *job, ptrdiff_t part, ptrdiff_t parts);
typedef struct { share *f; void *job; ptrdiff_t parts; } team_job;
static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void), (*team_size)(void);

static void member(void *data) {
    const team_job *t = data;
    for (ptrdiff_t part = thread_number(); part < t->parts; part += team_size()) t->f(t->job, part, t->parts);
}
static void in_parallel(share *f, void *job, int threads) {
    team_job t = {f, job, threads};
    if (threads > 1 && gomp_parallel) gomp_parallel(member, &t, (unsigned)threads, 0);
    else f(job, 0, 1);
}
static void find_threads(void) {
#ifndef _WIN32
    void *parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel"), *number = dlsym(RTLD_DEFAULT, "omp_get_thread_num"), *size = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (!parallel || !number || !size) return;
    memcpy(&gomp_parallel, &parallel, sizeof parallel);               /* ISO C has no cast from an object to a function */
    memcpy(&thread_number, &number, sizeof number);
    memcpy(&team_size, &size, sizeof size);
#endif
}

/* How images lie in planes of pixels, and where the columns of a product go. All but the first are 0 for examples of a linear layer. */
typedef struct {
    int64_t at_once, room;                       /* images in the planes at a time; numbers in all planes, or 0 if images lie so already */
    int64_t high, wide, top, left;               /* pixels of an image, and of the padding before it */
    int64_t down, right;                         /* stride: a plane has every `down`-th row and `right`-th pixel */
    int64_t slot, pitch, plane;                  /* rows of an image in a plane; pixels of a row; pixels of a plane */
    int64_t y0, y1, x0, x1;                      /* rows and pixels of a plane at which there is an output */
    int64_t to_start, to_image, to_row, to_down, to_right;    /* where it goes, or its gradient is: steps in memory */
} images;
typedef struct { ptrdiff_t column, length, place; } run;
static share *gather_float, *gather_double;      /* a product with one example that checks offsets itself, where there is one */

/* ---- the products: for each kind of processor, float and double ---- */
#define JOIN(a, b, c) a##_##b##_##c
#define NAMED(f, t, v) JOIN(f, t, v)
#define NAME(f) NAMED(f, T, VARIANT)
/* Numbers of two vectors in turn: their first halves, and their second ones */
#define LOW(a, b) NAMED(low, T, BYTES)(a, b)
#define HIGH(a, b) NAMED(high, T, BYTES)(a, b)
#define low_float_64(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define high_float_64(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define low_float_32(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define high_float_32(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define low_float_16(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define high_float_16(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define low_double_64 low_float_32
#define high_double_64 high_float_32
#define low_double_32 low_float_16
#define high_double_32 high_float_16
#define low_double_16(a, b) __builtin_shufflevector(a, b, 0, 2)
#define high_double_16(a, b) __builtin_shufflevector(a, b, 1, 3)

#if defined(VECTORS) && defined(__x86_64__)
#define BY_PROCESSOR
#define BYTES 64
#define TILE 256
#define VARIANT avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#include "_products.h"
#include <immintrin.h>
/* One example by gathers, which check the offsets as they go: faster on Intel's processors, slower on AMD's */
#define GATHERED(T, lanes, bits, kind) \
    TARGET static void gathered_##T(void *job, ptrdiff_t part, ptrdiff_t parts) { \
        job_##T##_avx512 *k = job; \
        const __m##bits##i below = _mm##bits##_set1_epi32((int)(k->n_in < INT32_MAX ? k->n_in : INT32_MAX)); \
        for (ptrdiff_t r = k->n_row * part / parts; r < k->n_row * (part + 1) / parts; r++) { \
            vector_##T##_avx512 s = {0}; \
            for (ptrdiff_t j = k->crow[r], end = k->crow[r + 1]; j < end; j += lanes) { \
                __mmask##lanes there = (__mmask##lanes)(end - j < lanes ? (1 << (end - j)) - 1 : (1 << lanes) - 1); \
                __m##bits##i at = _mm##bits##_maskz_loadu_epi32(there, k->at + j); \
                __mmask##lanes inside = _mm##bits##_mask_cmplt_epu32_mask(there, at, below); \
                if (inside != there) k->failed = 2; \
                s += _mm512_maskz_loadu_##kind(there, k->values + j) * _mm512_mask_i32gather_##kind(_mm512_setzero_##kind(), inside, at, k->x, sizeof(T)); \
            } \
            T sum = _mm512_reduce_add_##kind(s) + (k->bias ? k->bias[r] : 0) + (k->add ? k->add[r] : 0); \
            k->y[r] = k->relu && sum <= 0 ? 0 : sum; \
        } \
    }
GATHERED(float, 16, 512, ps)
GATHERED(double, 8, 256, pd)
#undef BYTES
#undef VARIANT
#undef TARGET
#define BYTES 32
#define VARIANT avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "_products.h"
#undef BYTES
#undef TILE
#undef VARIANT
#undef TARGET
#endif
#define BYTES 16
#define TILE 128
#define VARIANT plain
#define TARGET
#include "_products.h"

static int (*run_float)(const int64_t *, int) = run_job_float_plain, (*run_double)(const int64_t *, int) = run_job_double_plain;
static const char *variant = "plain";
static void find_processor(void) {
#ifdef BY_PROCESSOR
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
    run_float = run_job_float_avx2, run_double = run_job_double_avx2, variant = "AVX2";
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bw")) return;
    run_float = run_job_float_avx512, run_double = run_job_double_avx512, variant = "AVX-512";
    if (__builtin_cpu_is("intel")) gather_float = gathered_float, gather_double = gathered_double;
#endif
}

/* True if rows lie within the values, offsets are from 0 to below `limit`, and, where `rises` says so, rise within rows:
   then nothing is read out of bounds. Plain sums over all offsets, which compilers make vectors of. `at` is NULL if the product
   checks them itself. */
static int is_index(const int32_t *crow, const int32_t *at, ptrdiff_t n_row, int64_t nnz, int64_t limit, int rises) {
    uint32_t bad = crow[0] < 0 || crow[n_row] > nnz, falls = 0, may_fall = 0, below = (uint32_t)(limit < (int64_t)1 << 31 ? limit : (int64_t)1 << 31);
    for (ptrdiff_t r = 0; r < n_row; r++) bad |= crow[r] > crow[r + 1];
    if (bad || limit < 0) return 0;
    if (!at) return 1;
    ptrdiff_t first = crow[0], last = crow[n_row];
    for (ptrdiff_t j = first; j < last; j++) bad |= (uint32_t)at[j] >= below;
    if (!rises) return !bad;
    for (ptrdiff_t j = first + 1; j < last; j++) falls += at[j] <= at[j - 1];
    for (ptrdiff_t r = 1; r < n_row; r++)                             /* a row may begin below the end of the one before */
        if (crow[r] > first && crow[r] < crow[r + 1]) may_fall += at[crow[r]] <= at[crow[r] - 1];
    return !bad && falls == may_fall;
}

/* product(size, threads, crow, at, nnz, values, bias, x, g, add, y, grads, n_row, n_in, n, block, relu, *images, limit, rises)

   All are integers: bytes of a number, threads, then addresses (0 for what is not there) and sizes as in `job`. */
static PyObject *product(PyObject *module, PyObject *args) {
    enum { FIXED = 17, ALL = FIXED + sizeof(images) / sizeof(int64_t) + 2 };
    int64_t a[ALL];
    int failed = 0;
    (void)module;
    if (PyTuple_Size(args) != ALL) return PyErr_Format(PyExc_TypeError, "product takes %d integers, got %zd", (int)ALL, PyTuple_Size(args));
    for (Py_ssize_t i = 0; i < ALL; i++) a[i] = (int64_t)PyLong_AsUnsignedLongLongMask(PyTuple_GetItem(args, i));
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    int checks = a[14] == 1 && a[16] != 2 && !a[FIXED] && (a[0] == 4 ? gather_float : gather_double);
    if (!is_index(POINTER(a[2]), checks ? NULL : POINTER(a[3]), a[12], a[4], a[ALL - 2], a[ALL - 1] && a[14] > 1)) failed = 2;
    else failed = a[0] == 4 ? run_float(a, (int)a[1]) : run_double(a, (int)a[1]);
    Py_END_ALLOW_THREADS
    if (failed == 1) return PyErr_NoMemory();
    if (failed == 2) return PyErr_Format(PyExc_ValueError, "the index must have rows within its values and offsets that rise within each row, below %lld", (long long)a[ALL - 2]);
    Py_RETURN_NONE;
}
/* Set numbers to zero where the mask is 0. They are taken as integers, so that NaN and infinity become zero, too. */
#define ZERO_MASKED(type) \
    WIDE static void zero_masked_##type(type *numbers, const uint8_t *mask, ptrdiff_t n) { \
        for (ptrdiff_t i = 0; i < n; i++) numbers[i] = mask[i] ? numbers[i] : 0; \
    }
ZERO_MASKED(uint8_t)
ZERO_MASKED(uint16_t)
ZERO_MASKED(uint32_t)
ZERO_MASKED(uint64_t)

/* zero_masked(address of numbers, address of mask, how many, bytes of a number) */
static PyObject *zero_masked(PyObject *module, PyObject *args) {
    unsigned long long numbers, mask;
    Py_ssize_t n, size;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKnn", &numbers, &mask, &n, &size)) return NULL;
    if (n < 0 || (size != 1 && size != 2 && size != 4 && size != 8)) {
        PyErr_Format(PyExc_ValueError, "size must be 1, 2, 4 or 8 and n at least 0, got %zd and %zd", size, n);
        return NULL;
    }
    void *t = (void *)(uintptr_t)numbers;
    const uint8_t *m = (const uint8_t *)(uintptr_t)mask;
    Py_BEGIN_ALLOW_THREADS
    if (size == 1) zero_masked_uint8_t(t, m, n);
    if (size == 2) zero_masked_uint16_t(t, m, n);
    if (size == 4) zero_masked_uint32_t(t, m, n);
    if (size == 8) zero_masked_uint64_t(t, m, n);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* nonzero_at(address of numbers, how many, bytes of a number, address of positions, how many): True if one there is not zero, or is outside */
static PyObject *nonzero_at(PyObject *module, PyObject *args) {
    static const char zeros[16] = {0};
    unsigned long long numbers, positions;
    Py_ssize_t n, size, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "KnnKn", &numbers, &n, &size, &positions, &k)) return NULL;
    if (size < 1 || size > (Py_ssize_t)sizeof zeros) return PyErr_Format(PyExc_ValueError, "size must be 1 to 16, got %zd", size);
    const char *t = POINTER(numbers);
    const int64_t *at = POINTER(positions);
    for (Py_ssize_t i = 0; i < k; i++)
        if (!t || at[i] < 0 || at[i] >= n || memcmp(t + at[i] * size, zeros, (size_t)size)) Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

/* positions(address of a mask, how many, address of positions, room for how many): writes where the mask is not 0; returns how many those are */
static PyObject *positions(PyObject *module, PyObject *args) {
    unsigned long long mask, places;
    Py_ssize_t n, room, k = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "KnKn", &mask, &n, &places, &room)) return NULL;
    const uint8_t *m = POINTER(mask);
    int64_t *at = POINTER(places);
    Py_BEGIN_ALLOW_THREADS
    Py_ssize_t i = 0;
    for (; i + 8 <= n && k + 8 <= room; i += 8) {                      /* eight at a time, of which many are all zeros */
        uint64_t some;
        memcpy(&some, m + i, 8);
        if (some) for (int b = 0; b < 8; b++) at[k] = i + b, k += m[i + b] != 0;
    }
    for (; i < n && k < room; i++) at[k] = i, k += m[i] != 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(k);
}

static PyMethodDef methods[] = {
    {"product", product, METH_VARARGS, "Multiply a sparse matrix, or compute the gradient of its values"},
    {"nonzero_at", nonzero_at, METH_VARARGS, "True if one of a few numbers is not zero"},
    {"positions", positions, METH_VARARGS, "List the positions at which a mask is True"},
    {"zero_masked", zero_masked, METH_VARARGS, "Set numbers to zero where a mask is False"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void) {
    find_threads();
    find_processor();
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddStringConstant(module, "processor", variant)) Py_CLEAR(module);
    return module;
}
