/* Loops that PyTorch has no operation for. The rest of the library works without this file, slower.

   Python hands over addresses, so whoever calls checks sizes and layout first: `masks._compiled` does.
   Every function leaves the GIL while it works. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

/* GCC on Linux compiles a loop once for each of these processors and picks one when the library is loaded.
   Elsewhere a loop is compiled for the processor that the compiler takes as its baseline. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDE
#endif

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
    {"zero_masked", zero_masked, METH_VARARGS, "Set numbers to zero where a mask is False"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
