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

/* GCC on Linux compiles a function once for each of these processors and picks one when the library is loaded.
   Elsewhere it is compiled for the processor that the compiler takes as its baseline. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#if __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define SCALAR __attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize")))    /* gathers are slower */
#define UNROLL _Pragma("GCC unroll 8")
#else
#define WIDE
#define SCALAR
#define UNROLL
#endif

/* Vectors as a type: GCC from 12 on, and clang */
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define VECTORS
#pragma GCC diagnostic ignored "-Wpsabi"         /* vectors are passed between inlined functions only */
#define ALWAYS inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define ALWAYS __forceinline
#else
#define ALWAYS inline
#endif

#define POINTER(a) ((void *)(uintptr_t)(a))

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
    int64_t down, right;                         /* stride: a plane has every so many-th row and pixel */
    int64_t slot, pitch, plane;                  /* rows of an image in a plane; pixels of a row; pixels of a plane */
    int64_t y0, y1, x0, x1;                      /* rows and pixels of a plane at which there is an output */
    int64_t to_start, to_image, to_row, to_down, to_right;    /* where it goes, or its gradient is: steps in memory */
} images;
typedef struct { ptrdiff_t column, length, place; } run;

#define JOIN(a, b) a##_##b
#define NAMED(f, t) JOIN(f, t)
#define NAME(f) NAMED(f, T)
#define T float
#define LANES 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#include "_products.h"
#undef T
#undef LANES
#undef LOW
#undef HIGH
#define T double
#define LANES 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#include "_products.h"

/* True if rows lie within the values, and offsets rise within rows, from 0 to below `limit`: then nothing is read out of bounds */
WIDE static int is_index(const int32_t *crow, const int32_t *at, ptrdiff_t n_row, int64_t nnz, int64_t limit, int rises) {
    int bad = crow[0] < 0 || crow[n_row] > nnz;
    for (ptrdiff_t r = 0; r < n_row; r++) bad |= crow[r] > crow[r + 1];
    if (bad) return 0;
    for (ptrdiff_t r = 0; rises && r < n_row; r++)
        for (ptrdiff_t j = crow[r] + 1; j < crow[r + 1]; j++) bad |= at[j] <= at[j - 1];
    for (ptrdiff_t j = crow[0]; j < crow[n_row]; j++) bad |= (at[j] < 0) | (at[j] >= limit);
    return !bad;
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
    if (!is_index(POINTER(a[2]), POINTER(a[3]), a[12], a[4], a[ALL - 2], (int)a[ALL - 1])) failed = 2;
    else failed = a[0] == 4 ? run_job_float(a, (int)a[1]) : run_job_double(a, (int)a[1]);
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

static PyMethodDef methods[] = {
    {"product", product, METH_VARARGS, "Multiply a sparse matrix, or compute the gradient of its values"},
    {"zero_masked", zero_masked, METH_VARARGS, "Set numbers to zero where a mask is False"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void) {
    find_threads();
    return PyModule_Create(&definition);
}
