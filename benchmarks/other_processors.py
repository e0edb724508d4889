"""The kernel on processors that are not here, without Python there

    python benchmarks/other_processors.py 300 --cc "aarch64-linux-gnu-gcc -O3 -static" --run qemu-aarch64
    python benchmarks/other_processors.py 0 --cc "x86_64-w64-mingw32-gcc -O3 -static"          # compiles only

Writes down what the kernel here is given and gives for random layers, compiles `_kernels.c` as it is with a `Python.h` of a few lines, and has that program repeat all calls and compare. Fails at the first difference."""
import argparse, importlib.util, shlex, subprocess, sys, tempfile, warnings
from pathlib import Path
import numpy as np, torch
import sparsefast
from sparsefast.storage import kernels, planes

here = Path(__file__).parent
PYTHON_H = r'''
#include <stddef.h>
#include <stdarg.h>
#include <stdio.h>
typedef ptrdiff_t Py_ssize_t;
typedef struct { unsigned long long *numbers; Py_ssize_t n; unsigned long long number; const char *error; } PyObject;
typedef struct { const char *name; PyObject *(*f)(PyObject *, PyObject *); int flags; const char *doc; } PyMethodDef;
struct PyModuleDef { int head; const char *name; const char *doc; Py_ssize_t size; PyMethodDef *methods; void *a, *b, *c, *d; };
#define PyModuleDef_HEAD_INIT 0
#define METH_VARARGS 1
#define PyMODINIT_FUNC PyObject *
#define Py_BEGIN_ALLOW_THREADS {
#define Py_END_ALLOW_THREADS }
static PyObject stub_none, stub_item, stub_error = {0, 0, 0, "error"};
#define Py_RETURN_NONE return &stub_none
#define Py_RETURN_TRUE return &stub_none
#define Py_RETURN_FALSE return &stub_none
#define PyExc_TypeError 0
#define PyExc_ValueError 0
static Py_ssize_t PyTuple_Size(PyObject *t) { return t->n; }
static PyObject *PyTuple_GetItem(PyObject *t, Py_ssize_t i) { stub_item.number = t->numbers[i]; return &stub_item; }
static unsigned long long PyLong_AsUnsignedLongLongMask(PyObject *o) { return o->number; }
static PyObject *PyLong_FromSsize_t(Py_ssize_t n) { (void)n; return &stub_none; }
static int PyErr_Occurred(void) { return 0; }
static PyObject *PyErr_NoMemory(void) { return &stub_error; }
static PyObject *PyErr_Format(int type, const char *text, ...) { (void)type; fprintf(stderr, "%s\n", text); return &stub_error; }
static int PyArg_ParseTuple(PyObject *t, const char *format, ...) { (void)t; (void)format; return 0; }
static int PyModule_AddStringConstant(PyObject *m, const char *name, const char *text) { (void)m; (void)name; (void)text; return 0; }
#define Py_CLEAR(m) ((m) = 0)
static PyObject *PyModule_Create(struct PyModuleDef *d) { (void)d; return &stub_none; }
'''
REPLAY_C = r'''
#include "_kernels.c"
#include <math.h>
#include <stdio.h>
static void *array(FILE *f, int64_t *bytes) {
    if (fread(bytes, 8, 1, f) != 1) exit(3);
    void *p = *bytes ? malloc((size_t)*bytes) : NULL;                  /* of just this size, for a sanitizer */
    if (*bytes && fread(p, 1, (size_t)*bytes, f) != (size_t)*bytes) exit(3);
    return p;
}
int main(int argc, char **argv) {
    enum { SIZES = 8, REST = sizeof(images) / 8 + 2, ARRAYS = 9 };
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    int64_t sizes[SIZES + REST], bytes[ARRAYS];
    long calls = 0;
    PyInit__kernels();
    if (!f) return 3;
    while (fread(sizes, 8, SIZES + REST, f) == SIZES + REST) {
        void *p[ARRAYS];
        for (int i = 0; i < ARRAYS; i++) p[i] = array(f, bytes + i);
        unsigned long long a[17 + REST] = {(unsigned long long)sizes[0], (unsigned long long)sizes[1], 0, 0, (unsigned long long)sizes[2]};
        a[2] = (uintptr_t)p[0]; a[3] = (uintptr_t)p[1];
        for (int i = 0; i < 5; i++) a[5 + i] = (uintptr_t)p[2 + i];    /* values, bias, x, g, add */
        a[sizes[7] == 2 ? 11 : 10] = (uintptr_t)p[7];
        for (int i = 0; i < SIZES - 3 + (int)REST; i++) a[12 + i] = (unsigned long long)sizes[3 + i];
        PyObject args = {a, 17 + REST, 0, 0};
        if (product(NULL, &args)->error) { printf("call %ld: an error\n", calls); return 1; }
        int64_t n = bytes[8] / sizes[0];
        double most = 0;
        for (int64_t i = 0; i < n; i++) {
            double want = sizes[0] == 4 ? ((float *)p[8])[i] : ((double *)p[8])[i];
            if (isfinite(want) && fabs(want) > most) most = fabs(want);
        }
        for (int64_t i = 0; i < n; i++) {
            double want = sizes[0] == 4 ? ((float *)p[8])[i] : ((double *)p[8])[i], got = sizes[0] == 4 ? ((float *)p[7])[i] : ((double *)p[7])[i];
            if (isfinite(want) != isfinite(got) || fabs(want - got) > (sizes[0] == 4 ? 1e-4 : 1e-12) * most) {
                printf("call %ld: number %lld is %g, must be %g\n", calls, (long long)i, got, want);
                return 1;
            }
        }
        for (int i = 0; i < ARRAYS; i++) free(p[i]);
        calls++;
    }
    printf("%ld calls agree\n", calls);
    return 0;
}
'''

def recorded(run, file):
    "A `run_kernel` that writes down what it is given and gives"
    def f(crow, at, like, sizes, limit, values=None, bias=None, x=None, g=None, add=None, y=None, grads=None, relu=False, images=kernels._no_images):
        out,bits = y if grads is None else grads,torch.int32 if like.element_size()==4 else torch.int64
        before = torch.full_like(out, float('nan'))
        before.view(bits).add_(12345)                                        # a NaN that stays where nothing is written: a call may write a part
        new = before.clone()
        run(crow, at, like, sizes, limit, values, bias, x, g, add, None if y is None else new, None if grads is None else new, relu, images)
        out.copy_(torch.where(new.view(bits)==before.view(bits), out, new))
        numbers = like.element_size(), 1, len(at), *sizes, int(relu) if grads is None else 2, *images, limit, int(images is kernels._no_images)
        file.write(np.array(numbers, dtype=np.int64).tobytes())
        for t in (crow, at, values, bias, x, g, add, before, new):
            data = b'' if t is None else t.detach().contiguous().numpy().tobytes()
            file.write(np.int64(len(data)).tobytes()+data)
    return f

def main(n, seed, cc, run):
    warnings.filterwarnings('ignore')
    spec = importlib.util.spec_from_file_location('fuzz_kernels', here/'fuzz_kernels.py')
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d/'Python.h').write_text(PYTHON_H), (d/'replay.c').write_text(REPLAY_C)
        subprocess.run([*shlex.split(cc), '-Wall', '-Wextra', '-Wno-unused-function', '-Wno-missing-field-initializers', f'-I{d}', f'-I{Path(sparsefast.__file__).parent}', str(d/'replay.c'), '-o', str(d/'replay'), '-lm'], check=True)
        print('compiled')
        if not n: return
        with open(d/'calls', 'wb') as file:
            kernels.run_kernel = planes.run_kernel = recorded(kernels.run_kernel, file)
            for s in range(seed, seed+n): fuzz.check(s, most=1e6)
        sys.exit(subprocess.run([*shlex.split(run), str(d/'replay'), str(d/'calls')]).returncode)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('n', type=int)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--cc', default='gcc -O3')
    p.add_argument('--run', default='')
    main(**vars(p.parse_args()))
