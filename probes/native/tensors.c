/* Of tensors of any kind: how many entries are not finite, and whether two are alike. */
#include "module.h"

#include <stdint.h>
#include <string.h>

#include "floats.h"

typedef struct {
    int64_t address, count, step, dtype, bad;
} Tensor;

#define BAD(NAME, WORD, EXPONENT)                                                                                      \
    INLINE int64_t NAME(const WORD *words, int64_t count, int64_t step) {                                              \
        int64_t bad = 0;                                                                                               \
        if (step == 1)                                                                                                 \
            for (int64_t at = 0; at < count; at++) bad += (words[at] & EXPONENT) == EXPONENT;                          \
        else                                                                                                           \
            for (int64_t at = 0; at < count; at += step) bad += (words[at] & EXPONENT) == EXPONENT;                    \
        return bad;                                                                                                    \
    }

BAD(bad_float16, uint16_t, 0x7c00u)
BAD(bad_bfloat16, uint16_t, 0x7f80u)
BAD(bad_float32, uint32_t, 0x7f800000u)
BAD(bad_float64, uint64_t, 0x7ff0000000000000u)

/* Entries that are NaN or infinite, of each step-th entry of many tensors. */
PyObject *nonfinite(PyObject *module, PyObject *args) {
    unsigned long long table;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "Kn", &table, &count))
        return NULL;
    Tensor *tensors = (Tensor *)(uintptr_t)table;
    for (Py_ssize_t at = 0; at < count; at++)
        if (!tensors[at].address || tensors[at].step <= 0 || tensors[at].dtype < 0 || tensors[at].dtype >= DTYPES) {
            PyErr_SetString(PyExc_ValueError, "nonfinite: expected addresses, steps above 0 and known dtypes");
            return NULL;
        }
    Py_BEGIN_ALLOW_THREADS;
    for (Tensor *t = tensors; t < tensors + count; t++) {
        const void *values = (const void *)(uintptr_t)t->address;
        switch (t->dtype) {
        case FLOAT16: t->bad = bad_float16(values, t->count, t->step); break;
        case BFLOAT16: t->bad = bad_bfloat16(values, t->count, t->step); break;
        case FLOAT32: t->bad = bad_float32(values, t->count, t->step); break;
        default: t->bad = bad_float64(values, t->count, t->step);
        }
    }
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* Whether two matrices agree in so many bytes of each row, as far to the right again from row to row, and from the left
 * again. Without a branch on what is found, so that many rows are on their way from memory at once. */
PyObject *alike(PyObject *module, PyObject *args) {
    unsigned long long left, right;
    Py_ssize_t rows, width, sample, at = 0;
    uint64_t differ = 0;
    if (!PyArg_ParseTuple(args, "KKnnn", &left, &right, &rows, &width, &sample))
        return NULL;
    if (rows <= 0 || sample <= 0 || sample % (Py_ssize_t)sizeof differ || width < sample || !left || !right) {
        PyErr_SetString(PyExc_ValueError, "alike: expected two matrices, and whole words in each row");
        return NULL;
    }
    const char *a = (const char *)(uintptr_t)left, *b = (const char *)(uintptr_t)right;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t row = 0; row < rows; row++, a += width, b += width, at += sample) {
        at = at < width ? at : 0;
        Py_ssize_t start = at < width - sample ? at : width - sample;
        for (Py_ssize_t byte = start; byte < start + sample; byte += (Py_ssize_t)sizeof differ) {
            uint64_t one, other;
            memcpy(&one, a + byte, sizeof one);
            memcpy(&other, b + byte, sizeof other);
            differ |= one ^ other;
        }
    }
    Py_END_ALLOW_THREADS;
    return PyBool_FromLong(differ == 0);
}
