/* One sweep over a weight W and its two references, W0 (before any edit) and W- (before this edit).
 *
 * In one read of each: the sums of squares of W, W - W0 and W - W-, the extremes of W, the copy of W into W-,
 * and where it is asked for the differences W - W- of the rows that moved most. What `stabilitylab.probes.weight_pass`
 * does in NumPy where this is not built; the same tests run over both. */
#include "module.h"

#include <stdint.h>

#include "chunk.h"
#include "floats.h"
#include "sweep.h"

#define SWEEP(NAME, CHUNK, STORED, VALUE, START_LOW, START_HIGH, BACK)                                                 \
    INLINE void NAME(Sweep *s) {                                                                                       \
        const STORED *first = s->first;                                                                                \
        STORED *before = s->before;                                                                                    \
        VALUE *moved = s->moved;                                                                                       \
        Sums sums = {0.0, 0.0, 0.0, START_LOW, START_HIGH};                                                            \
        double most = -1.0;                                                                                            \
        int free = 0;                                                                                                  \
        for (Py_ssize_t at = 0; at < s->count; at += s->chunk) {                                                       \
            Py_ssize_t count = s->count - at < s->chunk ? s->count - at : s->chunk;                                    \
            const STORED *w = (const STORED *)s->weight + at;                                                          \
            if (!first) {                                                                                              \
                CHUNK(w, NULL, NULL, count, NULL, &sums, 0, 0, 0);                                                     \
            } else if (!s->copied) {                                                                                   \
                CHUNK(w, first + at, before + at, count, NULL, &sums, 1, 0, 0);                                        \
            } else if (!moved) {                                                                                       \
                CHUNK(w, first + at, before + at, count, NULL, &sums, 1, 1, 0);                                        \
            } else {                                                                                                   \
                CHUNK(w, first + at, before + at, count, moved + free * s->chunk, &sums, 1, 1, 1);                     \
                if (is_hotter(sums.update, most)) {                                                                    \
                    most = sums.update;                                                                                \
                    s->hottest = at, s->half = free;                                                                   \
                    free = 1 - free;                                                                                   \
                }                                                                                                      \
            }                                                                                                          \
            s->norm += sums.norm, s->drift += sums.drift, s->update += sums.update;                                    \
        }                                                                                                              \
        s->low = BACK(sums.low), s->high = BACK(sums.high);                                                            \
    }

SWEEP(sweep_float32, chunk_float32, float, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_float16, chunk_float16, uint16_t, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_bfloat16, chunk_bfloat16, uint16_t, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_float64, chunk_float64, double, double, INT64_MAX, INT64_MIN, from_ordered_wide)

FOR_EACH_DTYPE(sweep, Sweep)

PyObject *sweep(PyObject *module, PyObject *args) {
    unsigned long long weight, first, before, moved;
    Sweep s = {0};
    int dtype;
    if (!PyArg_ParseTuple(args, "KKKKnnip", &weight, &first, &before, &moved, &s.count, &s.chunk, &dtype, &s.copied))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || s.chunk <= 0 || s.count <= 0 || !weight || !first != !before) {
        PyErr_SetString(PyExc_ValueError, "sweep: expected a weight, both references or none, and a known dtype");
        return NULL;
    }
    s.weight = (const void *)(uintptr_t)weight;
    s.first = (const void *)(uintptr_t)first;
    s.before = (void *)(uintptr_t)before;
    s.moved = (void *)(uintptr_t)moved;
    Py_BEGIN_ALLOW_THREADS;
    sweep_by[dtype][instructions](&s);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddddni", s.norm, s.drift, s.update, s.low, s.high, s.hottest, s.half);
}
