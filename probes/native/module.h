/* Python's header, which each file begins with, and the module's functions: `module.c` says what each is given. */
#ifndef MODULE_H
#define MODULE_H

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "instructions.h"

HIDDEN PyObject *sweep(PyObject *module, PyObject *args);
HIDDEN PyObject *sweep_made(PyObject *module, PyObject *args);
HIDDEN PyObject *rows(PyObject *module, PyObject *args);
HIDDEN PyObject *softmax(PyObject *module, PyObject *args);
HIDDEN PyObject *factor(PyObject *module, PyObject *args);
HIDDEN PyObject *product(PyObject *module, PyObject *args);
HIDDEN PyObject *grams(PyObject *module, PyObject *args);
HIDDEN PyObject *entering(PyObject *module, PyObject *args);
HIDDEN PyObject *spread(PyObject *module, PyObject *args);
HIDDEN PyObject *nonfinite(PyObject *module, PyObject *args);
HIDDEN PyObject *alike(PyObject *module, PyObject *args);

#endif
