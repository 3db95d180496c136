/* The expert FFNs as a function of Python's own, since what is called for every layer by way of ctypes costs more. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "layout.h"

static const char USAGE[] =
    "forward(layer, experts, counts, x, rows, y, scratch, scratch_bytes, format, threads, instructions)";

static int64_t number(PyObject *value) { return PyLong_AsLongLong(value); }

/* The list's numbers, to be freed; NULL with an exception. */
static int64_t *numbers(PyObject *list) {
    int64_t *values = PyMem_New(int64_t, PyList_GET_SIZE(list) + 1);
    if (!values) return (int64_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) values[i] = number(PyList_GET_ITEM(list, i));
    return values;
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
    if (arg_count != 11 || !PyList_Check(args[1]) || !PyList_Check(args[2]) ||
        PyList_GET_SIZE(args[1]) != PyList_GET_SIZE(args[2])) {
        PyErr_SetString(PyExc_TypeError, USAGE);
        return NULL;
    }
    const int indexed = PyBytes_Check(args[4]);
    const int64_t *index = indexed ? (const int64_t *)PyBytes_AS_STRING(args[4]) : NULL;
    const int64_t rows = indexed ? PyBytes_GET_SIZE(args[4]) / 8 : number(args[4]);
    int64_t *experts = numbers(args[1]), *counts = experts ? numbers(args[2]) : NULL;
    const Layer *layer = (const Layer *)number(args[0]);
    const Call call = {(const void *)number(args[3]), index,           (void *)number(args[5]), (char *)number(args[6]),
                       number(args[8]),               number(args[9]), number(args[10])};
    const int64_t count = PyList_GET_SIZE(args[1]), room = number(args[7]);
    int64_t needed = 0;
    if (counts && !PyErr_Occurred() && !sum_to(counts, count, rows))
        PyErr_SetString(PyExc_ValueError, "the experts' counts do not sum to the rows");
    if (counts && !PyErr_Occurred()) {
        needed = moeray_scratch(layer, rows, count, call.threads);
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

static PyMethodDef methods[] = {{"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, USAGE}, {NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "moeray.model.kernels._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
