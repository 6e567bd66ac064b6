/* What an editor's normaliser is given and has learnt: the largest entry that leaves it, and how its statistics are. */
#include "module.h"

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "instructions.h"

typedef struct {
    const void *values, *beside, *mean, *std; /* beside: of the same rows, or none */
    Py_ssize_t rows, units, others;
    double guard, largest;
    Py_ssize_t unit, lost; /* the unit of the largest, and the first that is NaN: none where it is `units` */
} Entering;

#define SPEAKS(NAME, VALUE)                                                                                            \
    INLINE int NAME(const void *row, Py_ssize_t count) {                                                               \
        const VALUE *values = row;                                                                                     \
        for (Py_ssize_t at = 0; at < count; at++)                                                                      \
            if (values[at] != 0) return 1; /* a NaN too */                                                             \
        return 0;                                                                                                      \
    }

SPEAKS(speaks_float32, float)
SPEAKS(speaks_float64, double)

#define ENTERING(NAME, VALUE, STATISTIC, SPEAKS_OF)                                                                    \
    static void NAME(Entering *e) {                                                                                    \
        const VALUE *row = e->values, *beside = e->beside;                                                             \
        const STATISTIC *mean = e->mean, *std = e->std;                                                                \
        for (Py_ssize_t at = 0; at < e->rows; at++, row += e->units, beside += beside ? e->others : 0) {               \
            if (!SPEAKS_OF(row, e->units) || (beside && !SPEAKS_OF(beside, e->others))) continue;                      \
            for (Py_ssize_t unit = 0; unit < e->units; unit++) {                                                       \
                double size = ((double)row[unit] - (double)mean[unit]) / ((double)std[unit] + e->guard);               \
                size = size < 0 ? -size : size;                                                                        \
                if (size != size) e->lost = unit < e->lost ? unit : e->lost;                                           \
                else if (size > e->largest || (size == e->largest && unit < e->unit)) {                                \
                    e->largest = size;                                                                                 \
                    e->unit = unit;                                                                                    \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

ENTERING(entering_ff, float, float, speaks_float32)
ENTERING(entering_fd, float, double, speaks_float32)
ENTERING(entering_df, double, float, speaks_float64)
ENTERING(entering_dd, double, double, speaks_float64)
static void (*const enterings[])(Entering *) = {entering_ff, entering_fd, entering_df, entering_dd};

PyObject *entering(PyObject *module, PyObject *args) {
    unsigned long long values, beside, mean, std;
    Entering e = {0};
    int kind;
    if (!PyArg_ParseTuple(args, "KKKKnnndi", &values, &beside, &mean, &std, &e.rows, &e.units, &e.others, &e.guard,
                          &kind))
        return NULL;
    if (e.rows < 0 || e.units <= 0 || e.others < 0 || kind < 0 || kind > 3 || (e.rows && !values) || !mean || !std) {
        PyErr_SetString(PyExc_ValueError, "entering: expected rows of units, a mean and a std of each unit");
        return NULL;
    }
    e.values = (const void *)(uintptr_t)values;
    e.beside = (const void *)(uintptr_t)beside;
    e.mean = (const void *)(uintptr_t)mean;
    e.std = (const void *)(uintptr_t)std;
    e.lost = e.units;
    enterings[kind](&e);
    return Py_BuildValue("dnn", e.largest, e.unit, e.lost);
}

typedef struct {
    double least; /* NaN where there is one */
    Py_ssize_t zeros, lost, positive, nonfinite, centres_zero, centres_lost, centres_nonfinite;
} Spread;

#define SPREAD(NAME, VALUE)                                                                                            \
    static void NAME(Spread *s, const void *mean, const void *std, Py_ssize_t units) {                                 \
        const VALUE *centre = mean, *value = std;                                                                      \
        double least = (double)value[0];                                                                               \
        for (Py_ssize_t at = 0; at < units; at++) {                                                                    \
            double spread = (double)value[at], middle = (double)centre[at];                                            \
            if (spread < least) least = spread;                                                                        \
            s->zeros += spread == 0;                                                                                   \
            s->lost += spread != spread;                                                                               \
            s->positive += spread > 0;                                                                                 \
            s->nonfinite += !(spread >= -DBL_MAX && spread <= DBL_MAX);                                                \
            s->centres_zero += middle == 0;                                                                            \
            s->centres_lost += middle != middle;                                                                       \
            s->centres_nonfinite += !(middle >= -DBL_MAX && middle <= DBL_MAX);                                        \
        }                                                                                                              \
        s->least = s->lost ? (double)NAN : least;                                                                      \
    }

SPREAD(spread_float32, float)
SPREAD(spread_float64, double)

PyObject *spread(PyObject *module, PyObject *args) {
    unsigned long long mean, std;
    Py_ssize_t units;
    Spread s = {0};
    int wide;
    if (!PyArg_ParseTuple(args, "KKnp", &mean, &std, &units, &wide))
        return NULL;
    if (units <= 0 || !mean || !std) {
        PyErr_SetString(PyExc_ValueError, "spread: expected a mean and a std of each unit");
        return NULL;
    }
    (wide ? spread_float64 : spread_float32)(&s, (const void *)(uintptr_t)mean, (const void *)(uintptr_t)std, units);
    return Py_BuildValue("dnnnnnnn", s.least, s.zeros, s.lost, s.positive, s.nonfinite, s.centres_zero, s.centres_lost,
                         s.centres_nonfinite);
}
