/* One read of consecutive entries: their sum of squares and extremes, and beside references what they moved.
 *
 * Differences are formed in the dtype of the values, of float16 and bfloat16 in float. Squares are summed in double:
 * those of floats neither overflow nor underflow there. The extremes are compared as integers in the order of the
 * floats, so that a NaN or an infinity of either sign shows as one of them, beyond all finite values. */
#ifndef CHUNK_H
#define CHUNK_H

#include "module.h"

#include <stddef.h>

#include "floats.h"

typedef struct {
    double norm, drift, update; /* squared */
    int64_t low, high;          /* in the order of floats, or of doubles */
} Sums;

/* One chunk: `compared` and `kept` are constants where this is used. */
#define KERNEL(NAME, STORED, VALUE, ORDER, LOAD, ORDERED)                                                              \
    INLINE void NAME(const STORED *RESTRICT w, const STORED *RESTRICT first, STORED *RESTRICT before,                  \
                     Py_ssize_t count, VALUE *RESTRICT moved, Sums *sums, int compared, int copied, int kept) {        \
        double norm = 0.0, drift = 0.0, update = 0.0;                                                                  \
        ORDER low = (ORDER)sums->low, high = (ORDER)sums->high;                                                        \
        for (Py_ssize_t at = 0; at < count; at++) {                                                                    \
            VALUE own = LOAD(w[at]);                                                                                   \
            ORDER order = ORDERED(own);                                                                                \
            norm += (double)own * (double)own;                                                                         \
            low = order < low ? order : low;                                                                           \
            high = order > high ? order : high;                                                                        \
            if (compared) {                                                                                            \
                VALUE far = own - LOAD(first[at]), near = own - LOAD(before[at]);                                      \
                drift += (double)far * (double)far;                                                                    \
                update += (double)near * (double)near;                                                                 \
                if (copied) before[at] = w[at];                                                                        \
                if (kept) moved[at] = near;                                                                            \
            }                                                                                                          \
        }                                                                                                              \
        sums->norm = norm, sums->drift = drift, sums->update = update, sums->low = low, sums->high = high;             \
    }

KERNEL(chunk_float32, float, float, int32_t, same, ordered)
KERNEL(chunk_float16, uint16_t, float, int32_t, from_float16, ordered)
KERNEL(chunk_bfloat16, uint16_t, float, int32_t, from_bfloat16, ordered)
KERNEL(chunk_float64, double, double, int64_t, SAME_WIDE, ordered_wide)

#endif
