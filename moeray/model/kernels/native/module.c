/* What is called for every layer, as functions of Python's own, since a call by way of ctypes costs more. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "combine.h"
#include "layout.h"

static const char USAGE[] =
    "forward(layer, experts, counts, x, rows, y, x_format, y_format, threads, instructions, scratch, scratch_bytes)";

static int64_t number(PyObject *value) { return PyLong_AsLongLong(value); }

/* The list's numbers, to be freed; NULL with an exception. */
static int64_t *numbers(PyObject *list) {
    int64_t *values = PyMem_New(int64_t, PyList_GET_SIZE(list) + 1);
    if (!values) return (int64_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) values[i] = number(PyList_GET_ITEM(list, i));
    return values;
}

/* Other threads may run meanwhile, unless one thread does the work: that takes less time than giving the lock away. */
static PyThreadState *unlock(int64_t threads) { return threads > 1 ? PyEval_SaveThread() : NULL; }

static PyObject *lock(PyThreadState *unlocked) {
    if (unlocked) PyEval_RestoreThread(unlocked);
    Py_RETURN_NONE;
}

/* Whether there are so many arguments, all of them integers; else with an exception. */
static int all_numbers(PyObject *const *args, Py_ssize_t given, int64_t *values, Py_ssize_t count, const char *usage) {
    if (given != count) {
        PyErr_SetString(PyExc_TypeError, usage);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) values[i] = number(args[i]);
    return !PyErr_Occurred();
}

/* Whether they are counts of so many rows. */
static int sum_to(const int64_t *counts, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; i++) {
        if (counts[i] < 0 || counts[i] > rows) return 0;
        rows -= counts[i];
    }
    return rows == 0;
}

/* layer, experts: addresses of Layer and Expert structures; x, y, scratch: of a Call's. rows: the row of x that each one
   is, int64 as bytes, or how many they are where they lie one after the other. Returns 0 when it is done, or how many
   bytes of scratch it takes where there are fewer. Other threads run meanwhile. */
static PyObject *forward(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    if (arg_count != 12 || !PyList_Check(args[1]) || !PyList_Check(args[2]) ||
        PyList_GET_SIZE(args[1]) != PyList_GET_SIZE(args[2])) {
        PyErr_SetString(PyExc_TypeError, USAGE);
        return NULL;
    }
    const int indexed = PyBytes_Check(args[4]);
    const int64_t *index = indexed ? (const int64_t *)PyBytes_AS_STRING(args[4]) : NULL;
    const int64_t rows = indexed ? PyBytes_GET_SIZE(args[4]) / 8 : number(args[4]);
    int64_t *experts = numbers(args[1]), *counts = experts ? numbers(args[2]) : NULL;
    const Layer *layer = (const Layer *)number(args[0]);
    const Call call = {(const void *)number(args[3]), index,           (void *)number(args[5]), (char *)number(args[10]),
                       number(args[6]),               number(args[7]), number(args[8]),         number(args[9])};
    const int64_t count = PyList_GET_SIZE(args[1]), room = number(args[11]);
    int64_t needed = 0;
    if (counts && !PyErr_Occurred() && !sum_to(counts, count, rows))
        PyErr_SetString(PyExc_ValueError, "the experts' counts do not sum to the rows");
    if (counts && !PyErr_Occurred()) {
        needed = moeray_scratch(layer, rows, count, &call);
        if (needed <= room) {
            Py_BEGIN_ALLOW_THREADS
            moeray_forward(layer, (const Expert *const *)experts, counts, count, &call);
            Py_END_ALLOW_THREADS
            needed = 0;
        }
    }
    PyMem_Free(experts);
    PyMem_Free(counts);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(needed);
}

static const char ATTEND_USAGE[] = "attend(call, scratch, scratch_bytes)";

/* call: an Attention structure as bytes, whose scratch is given beside it. Returns as forward does. */
static PyObject *attend(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    Attention call;
    int64_t n[2];
    if (arg_count != 3 || !PyBytes_Check(args[0]) || PyBytes_GET_SIZE(args[0]) != sizeof call) {
        PyErr_SetString(PyExc_TypeError, ATTEND_USAGE);
        return NULL;
    }
    if (!all_numbers(args + 1, 2, n, 2, ATTEND_USAGE)) return NULL;
    memcpy(&call, PyBytes_AS_STRING(args[0]), sizeof call);
    const int64_t needed = moeray_attention_scratch(&call);
    if (needed > n[1]) return PyLong_FromLongLong(needed);
    call.scratch = (char *)n[0];
    Py_BEGIN_ALLOW_THREADS
    moeray_attention(&call);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(0);
}

static const char COMBINE_USAGE[] =
    "combine(format, weights_format, weights, out, threads, rows, tokens, top_k, row_bytes, size)";

/* rows: the address of [tokens, top_k, size], each row `row_bytes` behind the one before. */
static PyObject *combine(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    int64_t n[10];
    if (!all_numbers(args, arg_count, n, 10, COMBINE_USAGE)) return NULL;
    const Combine call = {n[0], n[1], (const void *)n[2], (void *)n[3], n[4]};
    const int64_t count = n[6] * n[7];
    const void **rows = PyMem_New(const void *, count + 1);
    if (!rows) return PyErr_NoMemory();
    for (int64_t r = 0; r < count; r++) rows[r] = (const char *)n[5] + r * n[8];
    PyThreadState *unlocked = unlock(call.threads);
    moeray_combine(&call, rows, n[6], n[7], n[9]);
    PyObject *done = lock(unlocked);
    PyMem_Free(rows);
    return done;
}

static const char KEEP_USAGE[] = "keep(x, token, head, tokens, heads, bytes, slots, cache)";

static PyObject *keep(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    int64_t n[8];
    if (!all_numbers(args, arg_count, n, 8, KEEP_USAGE)) return NULL;
    moeray_keep((const char *)n[0], n[1], n[2], n[3], n[4], n[5], (const int64_t *)n[6], (char *)n[7]);
    Py_RETURN_NONE;
}

static const char NORM_USAGE[] = "norm(format, x, weight, rows, size, early, y, threads, eps)";

static PyObject *norm(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    int64_t n[8];
    if (!all_numbers(args, arg_count - 1, n, 8, NORM_USAGE)) return NULL;
    const float eps = (float)PyFloat_AsDouble(args[8]);
    if (PyErr_Occurred()) return NULL;
    PyThreadState *unlocked = unlock(n[7]);
    moeray_norm(n[0], (const void *)n[1], (const float *)n[2], n[3], n[4], eps, n[5], (void *)n[6], n[7]);
    return lock(unlocked);
}

static const char ROTATE_USAGE[] = "rotate(format, x, token, head, tokens, heads, size, cosine, sine, y, threads)";

static PyObject *rotate(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    int64_t n[11];
    if (!all_numbers(args, arg_count, n, 11, ROTATE_USAGE)) return NULL;
    PyThreadState *unlocked = unlock(n[10]);
    moeray_rotate(n[0], (const void *)n[1], n[2], n[3], n[4], n[5], n[6], (const void *)n[7], (const void *)n[8],
                  (void *)n[9], n[10]);
    return lock(unlocked);
}

static PyMethodDef methods[] = {{"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, USAGE},
                                {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, ATTEND_USAGE},
                                {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL, COMBINE_USAGE},
                                {"keep", (PyCFunction)(void (*)(void))keep, METH_FASTCALL, KEEP_USAGE},
                                {"norm", (PyCFunction)(void (*)(void))norm, METH_FASTCALL, NORM_USAGE},
                                {"rotate", (PyCFunction)(void (*)(void))rotate, METH_FASTCALL, ROTATE_USAGE},
                                {NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "moeray.model.kernels._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
