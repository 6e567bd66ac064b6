/* What layers put out: of all rows and of those of each sequence, and the sums of a softmax over a row of logits. */
#include "module.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "chunk.h"
#include "floats.h"

typedef struct {
    const void *values;
    Py_ssize_t rows, columns, period; /* period: rows of one sequence */
    double square, low, high, square_beyond, low_beyond, high_beyond;
} Rows;

/* What a layer put out: of all rows, and of those beyond the first of each sequence. NaN in both extremes where there
 * is one. */
#define ROWS(NAME, CHUNK, STORED, START_LOW, START_HIGH, BACK)                                                         \
    INLINE void NAME(Rows *r) {                                                                                        \
        const STORED *values = r->values;                                                                              \
        Sums first = {0.0, 0.0, 0.0, START_LOW, START_HIGH}, beyond = first;                                           \
        double square_first = 0.0, square_beyond = 0.0;                                                                \
        for (Py_ssize_t row = 0; row < r->rows; row++, values += r->columns) {                                         \
            if (row % r->period == 0) {                                                                                \
                CHUNK(values, NULL, NULL, r->columns, NULL, &first, 0, 0, 0);                                          \
                square_first += first.norm;                                                                            \
            } else {                                                                                                   \
                CHUNK(values, NULL, NULL, r->columns, NULL, &beyond, 0, 0, 0);                                         \
                square_beyond += beyond.norm;                                                                          \
            }                                                                                                          \
        }                                                                                                              \
        r->square = square_first + square_beyond, r->square_beyond = square_beyond;                                    \
        r->low_beyond = BACK(beyond.low), r->high_beyond = BACK(beyond.high);                                          \
        r->low = BACK(first.low < beyond.low ? first.low : beyond.low);                                                \
        r->high = BACK(first.high > beyond.high ? first.high : beyond.high);                                           \
    }

ROWS(rows_float32, chunk_float32, float, INT32_MAX, INT32_MIN, BACK32)
ROWS(rows_float16, chunk_float16, uint16_t, INT32_MAX, INT32_MIN, BACK32)
ROWS(rows_bfloat16, chunk_bfloat16, uint16_t, INT32_MAX, INT32_MIN, BACK32)
ROWS(rows_float64, chunk_float64, double, INT64_MAX, INT64_MIN, from_ordered_wide)

FOR_EACH_DTYPE(rows, Rows)

PyObject *rows(PyObject *module, PyObject *args) {
    unsigned long long values;
    Rows r = {0};
    int dtype;
    if (!PyArg_ParseTuple(args, "Knnni", &values, &r.rows, &r.columns, &r.period, &dtype))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || r.rows <= 0 || r.columns <= 0 || r.period <= 0 || !values) {
        PyErr_SetString(PyExc_ValueError, "rows: expected a matrix of a known dtype, and rows of a sequence");
        return NULL;
    }
    r.values = (const void *)(uintptr_t)values;
    Py_BEGIN_ALLOW_THREADS;
    rows_by[dtype][instructions](&r);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddddd", r.square, r.low, r.high, r.square_beyond, r.low_beyond, r.high_beyond);
}

typedef struct {
    const void *values;
    Py_ssize_t count;
    double largest, second, total, weighted;
} Softmax;

/* e^x for -690 <= x <= 0, to 13 digits. */
INLINE double exp_of_negative(double x) {
    int32_t power = (int32_t)(x * 1.4426950408889634 - 0.5);
    double rest = x - (double)power * 0.6931471805599453, sum = 1.0 / 6227020800.0;
    sum = sum * rest + 1.0 / 479001600.0;
    sum = sum * rest + 1.0 / 39916800.0;
    sum = sum * rest + 1.0 / 3628800.0;
    sum = sum * rest + 1.0 / 362880.0;
    sum = sum * rest + 1.0 / 40320.0;
    sum = sum * rest + 1.0 / 5040.0;
    sum = sum * rest + 1.0 / 720.0;
    sum = sum * rest + 1.0 / 120.0;
    sum = sum * rest + 1.0 / 24.0;
    sum = sum * rest + 1.0 / 6.0;
    sum = sum * rest + 0.5;
    sum = sum * rest + 1.0;
    sum = sum * rest + 1.0;
    uint64_t bits = (uint64_t)((int64_t)power + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

enum { PIECE = 512 }; /* entries: what is done in one loop over them would not become vector instructions */

/* Of one row: the largest entry, the second, and with d = entry - largest the sums of e^d and of d e^d, where what is
 * 690 below the largest or more counts as that, and so for nothing. All NaN where an entry is, or the largest infinite.
 */
#define SOFTMAX(NAME, CHUNK, STORED, VALUE, ORDER, LOAD, ORDERED, START_LOW, START_HIGH, BACK)                         \
    INLINE void NAME(Softmax *s) {                                                                                     \
        const STORED *values = s->values;                                                                              \
        Sums sums = {0.0, 0.0, 0.0, START_LOW, START_HIGH};                                                            \
        CHUNK(values, NULL, NULL, s->count, NULL, &sums, 0, 0, 0);                                                     \
        const ORDER high = (ORDER)sums.high;                                                                           \
        double largest = BACK(sums.high), total = 0.0, weighted = 0.0;                                                 \
        s->largest = s->total = s->weighted = s->second = NAN;                                                         \
        if (!isfinite(largest) || isnan(BACK(sums.low)))                                                               \
            return;                                                                                                    \
        ORDER second = START_HIGH, most = 0;                                                                           \
        for (Py_ssize_t start = 0; start < s->count; start += PIECE) {                                                 \
            double below[PIECE];                                                                                       \
            Py_ssize_t count = s->count - start < PIECE ? s->count - start : PIECE;                                    \
            for (Py_ssize_t at = 0; at < count; at++) {                                                                \
                VALUE own = LOAD(values[start + at]);                                                                  \
                ORDER order = ORDERED(own), is_high = -(ORDER)(order == high);                                         \
                ORDER beside = (order & ~is_high) | (START_HIGH & is_high);                                            \
                second = beside > second ? beside : second;                                                            \
                most -= is_high;                                                                                       \
                double down = (double)own - largest;                                                                   \
                below[at] = down < -690.0 ? -690.0 : down;                                                             \
            }                                                                                                          \
            for (Py_ssize_t at = 0; at < count; at++) {                                                                \
                double weight = exp_of_negative(below[at]);                                                            \
                total += weight;                                                                                       \
                weighted += weight * below[at];                                                                        \
            }                                                                                                          \
        }                                                                                                              \
        s->largest = largest, s->total = total, s->weighted = weighted;                                                \
        s->second = most > 1 || s->count == 1 ? largest : BACK(second);                                                \
    }

SOFTMAX(softmax_float32, chunk_float32, float, float, int32_t, same, ordered, INT32_MAX, INT32_MIN, BACK32)
SOFTMAX(softmax_float16, chunk_float16, uint16_t, float, int32_t, from_float16, ordered, INT32_MAX, INT32_MIN, BACK32)
SOFTMAX(softmax_bfloat16, chunk_bfloat16, uint16_t, float, int32_t, from_bfloat16, ordered, INT32_MAX, INT32_MIN,
        BACK32)
SOFTMAX(softmax_float64, chunk_float64, double, double, int64_t, SAME_WIDE, ordered_wide, INT64_MAX, INT64_MIN,
        from_ordered_wide)

FOR_EACH_DTYPE(softmax, Softmax)

PyObject *softmax(PyObject *module, PyObject *args) {
    unsigned long long values;
    Softmax s = {0};
    int dtype;
    if (!PyArg_ParseTuple(args, "Kni", &values, &s.count, &dtype))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || s.count <= 0 || !values) {
        PyErr_SetString(PyExc_ValueError, "softmax: expected a row of a known dtype");
        return NULL;
    }
    s.values = (const void *)(uintptr_t)values;
    Py_BEGIN_ALLOW_THREADS;
    softmax_by[dtype][instructions](&s);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddd", s.largest, s.second, s.total, s.weighted);
}
