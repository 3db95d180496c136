/* What lanes.c has for Python, and what it takes from rows.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "msgpack.h"

/* What frame.Header holds, or None: see read_rows. */
PyObject *moeray_read_header(In *in, int64_t header, int64_t payload);

/* A copy of the row index, if experts and counts go with it, and it with so many tokens; else None. */
PyObject *moeray_checked_index(PyObject *experts, PyObject *counts, const int64_t *from, int64_t rows, int64_t tokens);

PyObject *moeray_take_result(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *moeray_place_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *moeray_send_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *moeray_take_forward(PyObject *self, PyObject *const *args, Py_ssize_t count);
