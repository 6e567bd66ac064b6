/* The same sweep as in `weight_sweep.c`, over a weight that is made, tile by tile: base + scale * left @ right. It is
 * rounded as torch.mm and the operators round it that would make it: each entry of the product is a chain of
 * multiply-adds in order, then come the scale and the base.
 *
 * A tile's products are in registers together, of so many rows and columns; and what is to be known of its entries is
 * found before they leave these, while the next tile is made: the two are for different units of the processor. */
#include "module.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "chunk.h"
#include "floats.h"
#include "sweep.h"

#ifdef AVX2
enum { TILE = 4, WIDTH = 2 * LANES };

/* What is known of the entries so far, in lanes. A NaN shows in `norm` alone. */
typedef struct {
    __m256d norm[2], drift[2], update[2];
    __m256 low, high;
} Known;

/* What was summed up so far is no part of another sum that the compiler forms: the same weight gives the same bits,
 * whether what moved is kept or not. A state is known again by them. */
#define IN_ORDER(sum) __asm__("" : "+x"(sum))

INLINE AVX2 void add_squares(__m256d *sums, __m256 values) {
    const __m256d near = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
    const __m256d far = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
    sums[0] = _mm256_fmadd_pd(near, near, sums[0]);
    sums[1] = _mm256_fmadd_pd(far, far, sums[1]);
    IN_ORDER(sums[0]); IN_ORDER(sums[1]);
}

INLINE AVX2 double total_of(const __m256d *sums) {
    double lanes[LANES / 2];
    _mm256_storeu_pd(lanes, _mm256_add_pd(sums[0], sums[1]));
    double near = lanes[0] + lanes[1], far = lanes[2] + lanes[3];
    IN_ORDER(near); IN_ORDER(far);
    return near + far;
}

/* `right` in strips as wide as a tile, one after the other: rows of it apart by powers of two would share few places in
 * the cache. */
static void cut_in_strips(const LowRank *m) {
    float *strip = m->strips;
    for (Py_ssize_t column = 0; column + WIDTH <= m->columns; column += WIDTH)
        for (Py_ssize_t k = 0; k < m->rank; k++, strip += WIDTH)
            memcpy(strip, m->right + k * m->columns + column, WIDTH * sizeof *strip);
}

INLINE AVX2 float base_at(const LowRank *m, Py_ssize_t at) {
    if (m->dtype == BFLOAT16) return from_bfloat16(((const uint16_t *)m->base)[at]);
    if (m->dtype == FLOAT16) return from_float16(((const uint16_t *)m->base)[at]);
    return ((const float *)m->base)[at];
}

/* The tile whose first entry is at `from`. moved: where W - W- of that goes. */
INLINE AVX2 void sweep_tile(const Sweep *s, const float *left, const float *strip, Py_ssize_t from, float *moved,
                            Known *known, int rows, int compared, int kept) {
    const LowRank *m = s->made;
    const float *first = (const float *)s->first + from, *base = (const float *)m->base + from;
    float *before = (float *)s->before + from, widened[TILE * WIDTH];
    Py_ssize_t columns = m->columns, apart = columns;
    if (m->dtype != FLOAT32) {
        for (int row = 0; row < rows; row++)
            for (int at = 0; at < WIDTH; at++) widened[row * WIDTH + at] = base_at(m, from + row * columns + at);
        base = widened, apart = WIDTH;
    }
    __m256 sums[TILE][2];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm256_setzero_ps();
    for (Py_ssize_t k = 0; k < m->rank; k++, strip += WIDTH) {
        const __m256 near = _mm256_loadu_ps(strip), far = _mm256_loadu_ps(strip + LANES);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            const __m256 own = _mm256_broadcast_ss(left + row * m->rank + k);
            sums[row][0] = _mm256_fmadd_ps(own, near, sums[row][0]);
            sums[row][1] = _mm256_fmadd_ps(own, far, sums[row][1]);
        }
    }
    if (m->scale != 1.0f) {
        const __m256 scale = _mm256_set1_ps(m->scale);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                sums[row][half] = _mm256_mul_ps(sums[row][half], scale);
                /* Rounded here: with the sum below it must become no multiply-add. */
                __asm__("" : "+x"(sums[row][half]));
            }
    }
    Known own = *known;
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Py_ssize_t at = row * columns + half * LANES;
            /* Of the next rows; with two more matrices to read the memory is as busy as it can be. */
            if (!compared && !half) _mm_prefetch((const char *)(base + (row + TILE) * apart), _MM_HINT_T0);
            const __m256 made = _mm256_add_ps(sums[row][half], _mm256_loadu_ps(base + row * apart + half * LANES));
            add_squares(own.norm, made);
            own.low = _mm256_min_ps(made, own.low); /* in this order a NaN leaves them as they are */
            own.high = _mm256_max_ps(made, own.high);
            if (compared) {
                const __m256 far = _mm256_sub_ps(made, _mm256_loadu_ps(first + at));
                const __m256 near = _mm256_sub_ps(made, _mm256_loadu_ps(before + at));
                add_squares(own.drift, far);
                add_squares(own.update, near);
                _mm256_storeu_ps(before + at, made);
                if (kept) _mm256_storeu_ps(moved + at, near);
            }
        }
    *known = own;
}

/* The columns of one row beyond its last tile. moved: as above. */
INLINE AVX2 void sweep_rest(const Sweep *s, Py_ssize_t row, Py_ssize_t column, float *moved, Sums *rest, int compared,
                            int kept) {
    const LowRank *m = s->made;
    Py_ssize_t from = row * m->columns + column, count = m->columns - column;
    const float *first = (const float *)s->first + from;
    float *before = (float *)s->before + from, made[WIDTH], unkept[WIDTH];
    Sums sums = *rest;
    for (Py_ssize_t at = 0; at < count; at++) {
        float sum = 0.0f;
        for (Py_ssize_t k = 0; k < m->rank; k++)
            sum = fmaf(m->left[row * m->rank + k], m->right[k * m->columns + column + at], sum);
        if (m->scale != 1.0f) {
            sum *= m->scale;
            __asm__("" : "+x"(sum));
        }
        made[at] = sum + base_at(m, from + at);
    }
    if (!compared) chunk_float32(made, NULL, NULL, count, NULL, &sums, 0, 0, 0);
    else chunk_float32(made, first, before, count, kept ? moved : unkept, &sums, 1, 1, 1);
    IN_ORDER(sums.norm); IN_ORDER(sums.drift); IN_ORDER(sums.update);
    rest->norm += sums.norm, rest->drift += sums.drift, rest->update += sums.update;
    IN_ORDER(rest->norm); IN_ORDER(rest->drift); IN_ORDER(rest->update);
    rest->low = sums.low, rest->high = sums.high;
}

/* A chunk has whole rows. */
INLINE AVX2 void sweep_low_rank(Sweep *s, int compared, int kept) {
    const LowRank *m = s->made;
    Py_ssize_t columns = m->columns, tiled = columns - columns % WIDTH, free = 0;
    Known known = {0};
    Sums rest = {0.0, 0.0, 0.0, INT32_MAX, INT32_MIN};
    known.low = _mm256_set1_ps(HUGE_VALF), known.high = _mm256_set1_ps(-HUGE_VALF);
    double most = -1.0;
    for (Py_ssize_t start = 0; start < s->count; start += s->chunk) {
        Py_ssize_t end = (s->count - start < s->chunk ? s->count : start + s->chunk) / columns;
        float *differences = kept ? (float *)s->moved + free * s->chunk - start : NULL; /* of entry 0, were it there */
        for (Py_ssize_t row = start / columns, held; row < end; row += held) {
            const float *left = m->left + row * m->rank;
            held = end - row < TILE ? 1 : TILE;
            for (Py_ssize_t column = 0; column < tiled; column += WIDTH) {
                Py_ssize_t from = row * columns + column;
                const float *strip = m->strips + column * m->rank;
                float *moved = kept ? differences + from : NULL;
                if (held == TILE) sweep_tile(s, left, strip, from, moved, &known, TILE, compared, kept);
                else sweep_tile(s, left, strip, from, moved, &known, 1, compared, kept);
            }
            for (Py_ssize_t each = row; tiled < columns && each < row + held; each++)
                sweep_rest(s, each, tiled, kept ? differences + each * columns + tiled : NULL, &rest, compared, kept);
        }
        double update = total_of(known.update) + rest.update;
        IN_ORDER(update);
        known.update[0] = known.update[1] = _mm256_setzero_pd(), rest.update = 0.0;
        s->update += update;
        if (kept && is_hotter(update, most)) {
            most = update;
            s->hottest = start, s->half = (int)free;
            free = 1 - free;
        }
    }
    IN_ORDER(rest.norm); IN_ORDER(rest.drift);
    s->norm = total_of(known.norm) + rest.norm, s->drift = total_of(known.drift) + rest.drift;
    float low[LANES], high[LANES];
    _mm256_storeu_ps(low, known.low), _mm256_storeu_ps(high, known.high);
    s->low = from_ordered((int32_t)rest.low), s->high = from_ordered((int32_t)rest.high);
    for (int lane = 0; lane < LANES; lane++) {
        s->low = tiled && !(s->low <= low[lane]) ? low[lane] : s->low;
        s->high = tiled && !(s->high >= high[lane]) ? high[lane] : s->high;
    }
    if (isnan(s->norm)) s->low = s->high = NAN;
}

/* Where `multiplies_and_adds`. */
AVX2 static void sweep_of_made(Sweep *s) {
    if (!s->first) sweep_low_rank(s, 0, 0);
    else if (!s->moved) sweep_low_rank(s, 1, 0);
    else sweep_low_rank(s, 1, 1);
}
#else
static void cut_in_strips(const LowRank *m) {}
static void sweep_of_made(Sweep *s) {}
#endif

PyObject *sweep_made(PyObject *module, PyObject *args) {
    unsigned long long base, left, right, strips, first, before, moved;
    LowRank made = {0};
    Sweep s = {0};
    if (!PyArg_ParseTuple(args, "KKKKfnniKKKnn", &base, &left, &right, &strips, &made.scale, &made.columns, &made.rank,
                          &made.dtype, &first, &before, &moved, &s.count, &s.chunk))
        return NULL;
    if (made.dtype < 0 || made.dtype >= FLOAT64 || made.columns <= 0 || made.rank <= 0 || s.chunk <= 0 ||
        s.count <= 0 || s.chunk % made.columns || s.count % made.columns || !base || !left || !right || !strips ||
        !first != !before || !multiplies_and_adds()) {
        PyErr_SetString(PyExc_ValueError,
                        "sweep_made: expected whole rows of a base, its factors, both references or none");
        return NULL;
    }
    made.base = (const void *)(uintptr_t)base;
    made.left = (const float *)(uintptr_t)left;
    made.right = (const float *)(uintptr_t)right;
    made.strips = (float *)(uintptr_t)strips;
    s.made = &made;
    s.first = (const void *)(uintptr_t)first;
    s.before = (void *)(uintptr_t)before;
    s.moved = (void *)(uintptr_t)moved;
    Py_BEGIN_ALLOW_THREADS;
    cut_in_strips(&made);
    sweep_of_made(&s);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddddni", s.norm, s.drift, s.update, s.low, s.high, s.hottest, s.half);
}
