/* What lanes.c has for Python. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *moeray_take_result(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *moeray_place_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *moeray_send_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count);
