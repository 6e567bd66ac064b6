/* One sweep over a weight W and its two references, W0 (before any edit) and W- (before this edit).
 *
 * In one read of each: the sums of squares of W, W - W0 and W - W-, the extremes of W, how many entries are not finite,
 * the copy of W into W-, and where it is asked for the differences W - W- of the rows that moved most. What
 * `stabilitylab.probes.weight_pass` does in NumPy where this is not built; the same tests run over both.
 *
 * Differences are formed in the dtype of the values, of float16 and bfloat16 in float. Squares are summed in double: those
 * of floats neither overflow nor underflow there. The extremes are compared as integers in the order of the floats, so
 * that a NaN or an infinity of either sign shows as one of them, beyond all finite values.
 *
 * The instruction set is chosen as the program runs. Knows nothing of torch: it is given addresses.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _MSC_VER
#define INLINE static __forceinline
#define RESTRICT __restrict
#else
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c")))
#endif

typedef struct {
    double norm, drift, update; /* squared */
    int64_t low, high;          /* in the order of floats, or of doubles */
} Sums;

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float same(float value) { return value; }

INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* Without a multiplication of subnormal floats: a program may have asked for those to be taken as zero. */
INLINE float from_float16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, exponent = magnitude & 0x0f800000u;
    uint32_t normal = magnitude + 0x38000000u;
    uint32_t special = magnitude + 0x70000000u;
    uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
    uint32_t bits = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
    return float_of(bits | ((uint32_t)(half & 0x8000) << 16));
}

/* The bits of a float as an integer of the same order, and back: each is its own inverse. */
INLINE int32_t ordered(float value) {
    int32_t bits = (int32_t)bits_of(value);
    return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1);
}

INLINE int64_t ordered_wide(double value) {
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (int64_t)((uint64_t)(bits >> 63) >> 1);
}

static double from_ordered(int32_t order) {
    return (double)float_of((uint32_t)(order ^ (int32_t)((uint32_t)(order >> 31) >> 1)));
}

static double from_ordered_wide(int64_t order) {
    double value;
    int64_t bits = order ^ (int64_t)((uint64_t)(order >> 63) >> 1);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One chunk: `compared` and `kept` are constants where this is used. */
#define KERNEL(NAME, STORED, VALUE, ORDER, LOAD, ORDERED)                                                              \
    INLINE void NAME(const STORED *RESTRICT w, const STORED *RESTRICT first, STORED *RESTRICT before, Py_ssize_t count, \
                     VALUE *RESTRICT moved, Sums *sums, int compared, int copied, int kept) {                          \
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
#define SAME_WIDE(value) (value)
KERNEL(chunk_float64, double, double, int64_t, SAME_WIDE, ordered_wide)

/* A weight that is made as it is read: base + scale * left @ right in float. */
typedef struct {
    const void *base;          /* [rows, columns] */
    const float *left, *right; /* [rows, rank] and [rank, columns] */
    float *strips;             /* room for `right` */
    float scale;
    Py_ssize_t columns, rank;
    int dtype; /* of the base */
} LowRank;

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, DTYPES };

typedef struct {
    const void *weight, *first;
    const LowRank *made;  /* in place of a weight */
    void *before, *moved; /* moved: of two chunks, or NULL */
    Py_ssize_t count, chunk;
    int copied;
    double norm, drift, update, low, high;
    Py_ssize_t hottest; /* where the chunk begins that moved most */
    int half;           /* which half of `moved` has its differences */
} Sweep;

/* A chunk that is not finite is the hottest there is. */
INLINE int is_hotter(double square, double most) { return !(square <= most); }

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

#define BACK32(order) from_ordered((int32_t)(order))
SWEEP(sweep_float32, chunk_float32, float, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_float16, chunk_float16, uint16_t, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_bfloat16, chunk_bfloat16, uint16_t, float, INT32_MAX, INT32_MIN, BACK32)
SWEEP(sweep_float64, chunk_float64, double, double, INT64_MAX, INT64_MIN, from_ordered_wide)

#define SWEEPS(SUFFIX, TARGET)                                                                                         \
    TARGET static void float16_##SUFFIX(Sweep *s) { sweep_float16(s); }                                                \
    TARGET static void bfloat16_##SUFFIX(Sweep *s) { sweep_bfloat16(s); }                                              \
    TARGET static void float32_##SUFFIX(Sweep *s) { sweep_float32(s); }                                                \
    TARGET static void float64_##SUFFIX(Sweep *s) { sweep_float64(s); }                                                \
    static void (*const sweeps_##SUFFIX[DTYPES])(Sweep *) = {float16_##SUFFIX, bfloat16_##SUFFIX, float32_##SUFFIX,     \
                                                             float64_##SUFFIX};

SWEEPS(plain, )
#if defined(__x86_64__) && defined(__GNUC__)
SWEEPS(avx2, AVX2)
SWEEPS(avx512, AVX512)
#endif

#ifdef AVX2
/* The same sweep over a weight that is made, tile by tile. It is rounded as torch.mm and the operators round it that
 * would make it: each entry of the product is a chain of multiply-adds in order, then come the scale and the base.
 *
 * A tile's products are in registers together, of so many rows and columns; and what is to be known of its entries is
 * found before they leave these, while the next tile is made: the two are for different units of the processor. */
enum { TILE = 4, LANES = 8, WIDTH = 2 * LANES };

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
INLINE AVX2 void sweep_tile(const Sweep *s, const float *left, const float *strip, Py_ssize_t from, float *moved, Known *known,
                            int rows, int compared, int kept) {
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
                __asm__("" : "+x"(sums[row][half])); /* rounded here: with the sum below it must become no multiply-add */
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
INLINE AVX2 void sweep_rest(const Sweep *s, Py_ssize_t row, Py_ssize_t column, float *moved, Sums *rest, int compared, int kept) {
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

static const char *isa = "plain";
static void (*const *sweeps)(Sweep *) = sweeps_plain;

static void choose_instructions(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
        isa = "avx512", sweeps = sweeps_avx512;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        isa = "avx2", sweeps = sweeps_avx2;
#endif
}

/* Whether `sweep_made` and `grams` are of use: without such an instruction they would round otherwise, or take longer than
 * torch. */
static int multiplies_and_adds(void) {
#ifdef AVX2
    return sweeps != sweeps_plain;
#else
    return 0;
#endif
}

/* -- small tensors: one call in place of many -- */

typedef struct {
    const void *values;
    Py_ssize_t rows, columns, period; /* period: rows of one sequence */
    double square, low, high, square_beyond, low_beyond, high_beyond;
} Rows;

/* What a layer put out: of all rows, and of those beyond the first of each sequence. NaN in both extremes where there is
 * one. */
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

#define ROWS_OF(SUFFIX, TARGET)                                                                                        \
    TARGET static void rows_float16_##SUFFIX(Rows *r) { rows_float16(r); }                                             \
    TARGET static void rows_bfloat16_##SUFFIX(Rows *r) { rows_bfloat16(r); }                                           \
    TARGET static void rows_float32_##SUFFIX(Rows *r) { rows_float32(r); }                                             \
    TARGET static void rows_float64_##SUFFIX(Rows *r) { rows_float64(r); }                                             \
    static void (*const rows_##SUFFIX[DTYPES])(Rows *) = {rows_float16_##SUFFIX, rows_bfloat16_##SUFFIX,               \
                                                          rows_float32_##SUFFIX, rows_float64_##SUFFIX};

ROWS_OF(plain, )
#if defined(__x86_64__) && defined(__GNUC__)
ROWS_OF(avx2, AVX2)
ROWS_OF(avx512, AVX512)
#endif

static PyObject *rows(PyObject *module, PyObject *args) {
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
#if defined(__x86_64__) && defined(__GNUC__)
    if (sweeps == sweeps_avx512) rows_avx512[dtype](&r);
    else if (sweeps == sweeps_avx2) rows_avx2[dtype](&r);
    else
#endif
    rows_plain[dtype](&r);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddddd", r.square, r.low, r.high, r.square_beyond, r.low_beyond, r.high_beyond);
}

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
static PyObject *nonfinite(PyObject *module, PyObject *args) {
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

typedef struct {
    const void *values;
    void *met; /* of each column, the bits of all of its entries but their signs */
    uint8_t *lives; /* of each row, whether any entry is not 0 */
    Py_ssize_t rows, columns;
    double square;
} Factor;

#define FACTOR(NAME, VALUE, WORD, SIGNLESS)                                                                            \
    INLINE void NAME(Factor *f) {                                                                                      \
        const VALUE *values = f->values;                                                                               \
        WORD *RESTRICT met = f->met;                                                                                   \
        for (Py_ssize_t row = 0; row < f->rows; row++, values += f->columns) {                                         \
            double square = 0.0;                                                                                       \
            WORD any = 0;                                                                                              \
            for (Py_ssize_t at = 0; at < f->columns; at++) {                                                           \
                WORD bits;                                                                                             \
                memcpy(&bits, values + at, sizeof bits);                                                               \
                bits &= SIGNLESS;                                                                                      \
                met[at] |= bits;                                                                                       \
                any |= bits;                                                                                           \
                square += (double)values[at] * (double)values[at];                                                     \
            }                                                                                                          \
            f->square += square;                                                                                       \
            f->lives[row] = any != 0;                                                                                  \
        }                                                                                                              \
    }

FACTOR(factor_float32, float, uint32_t, 0x7fffffffu)
FACTOR(factor_float64, double, uint64_t, 0x7fffffffffffffffu)
#if defined(__x86_64__) && defined(__GNUC__)
AVX2 static void factor_float32_avx2(Factor *f) { factor_float32(f); }
AVX512 static void factor_float32_avx512(Factor *f) { factor_float32(f); }
#endif

static PyObject *factor(PyObject *module, PyObject *args) {
    unsigned long long values, lives;
    Factor f = {0};
    int wide;
    if (!PyArg_ParseTuple(args, "KKnnp", &values, &lives, &f.rows, &f.columns, &wide))
        return NULL;
    if (f.rows <= 0 || f.columns <= 0 || !values || !lives) {
        PyErr_SetString(PyExc_ValueError, "factor: expected a matrix, and a place for a byte a row");
        return NULL;
    }
    f.values = (const void *)(uintptr_t)values;
    f.lives = (uint8_t *)(uintptr_t)lives;
    size_t word = wide ? sizeof(uint64_t) : sizeof(uint32_t);
    f.met = PyMem_Calloc((size_t)f.columns, word);
    if (!f.met)
        return PyErr_NoMemory();
    Py_ssize_t silent = 0;
    Py_BEGIN_ALLOW_THREADS;
#if defined(__x86_64__) && defined(__GNUC__)
    if (!wide && sweeps == sweeps_avx512) factor_float32_avx512(&f);
    else if (!wide && sweeps == sweeps_avx2) factor_float32_avx2(&f);
    else
#endif
    if (wide) factor_float64(&f);
    else factor_float32(&f);
    for (Py_ssize_t at = 0; at < f.columns; at++)
        silent += wide ? ((uint64_t *)f.met)[at] == 0 : ((uint32_t *)f.met)[at] == 0;
    Py_END_ALLOW_THREADS;
    PyMem_Free(f.met);
    return Py_BuildValue("dn", f.square, silent);
}

typedef struct {
    const float *left, *right; /* of as many rows */
    Py_ssize_t rows, lefts, rights;
    double square, bound;
    const uint8_t *lives; /* which rows count in `least` and `most`, or NULL for all of them */
    float *grams;         /* zeros, of both: [2, rows, rows]; then room */
    double least, most;   /* of the squared norms of rows */
} Product;

INLINE double dot(const float *one, const float *other, Py_ssize_t count) {
    double sum = 0.0;
    for (Py_ssize_t at = 0; at < count; at++) sum += (double)one[at] * (double)other[at];
    return sum;
}

/* The squared norm of left^T right as the inner product of the two Gram matrices, and what no such product exceeds. Of
 * floats nothing in here over- or underflows. */
INLINE void product_of_rows(Product *p) {
    for (Py_ssize_t row = 0; row < p->rows; row++) {
        const float *left = p->left + row * p->lefts, *right = p->right + row * p->rights;
        double beside = 0.0;
        for (Py_ssize_t other = 0; other < row; other++)
            beside += dot(left, p->left + other * p->lefts, p->lefts) * dot(right, p->right + other * p->rights, p->rights);
        double own = dot(left, left, p->lefts) * dot(right, right, p->rights);
        p->square += own + 2.0 * beside;
        p->bound += sqrt(own);
    }
}

enum { GRAM_ENTRIES = 1 << 16, MOST_GRAM_ROWS = 1 << 12 }; /* which leaves columns enough for a vector */
#ifdef AVX2
/* So many rows meet so many others in registers, over columns of theirs that lie together in the second cache: where they
 * come from, rows apart by powers of two share few places in any. */
enum { GRAM_ROWS = 4, GRAM_OTHERS = 3 };

INLINE AVX2 void gram_tile(const float *own, const float *other, Py_ssize_t width, float *gram, Py_ssize_t across, int rows,
                           int others) {
    __m256 sums[GRAM_ROWS][GRAM_OTHERS], met[GRAM_OTHERS];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
        for (int beside = 0; beside < others; beside++) sums[row][beside] = _mm256_setzero_ps();
    for (Py_ssize_t at = 0; at < width; at += LANES) {
#pragma GCC unroll 3
        for (int beside = 0; beside < others; beside++) met[beside] = _mm256_loadu_ps(other + beside * width + at);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            const __m256 mine = _mm256_loadu_ps(own + row * width + at);
#pragma GCC unroll 3
            for (int beside = 0; beside < others; beside++)
                sums[row][beside] = _mm256_fmadd_ps(mine, met[beside], sums[row][beside]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
        for (int beside = 0; beside < others; beside++) {
            float lanes[LANES];
            _mm256_storeu_ps(lanes, sums[row][beside]);
            gram[row * across + beside] += ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
                                           ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        }
}

/* The lower triangle of F F^T, and some of the upper one. room: of GRAM_ENTRIES. */
INLINE AVX2 void add_gram(const float *factor, Py_ssize_t rows, Py_ssize_t columns, float *gram, float *room) {
    Py_ssize_t most = GRAM_ENTRIES / rows / LANES * LANES;
    for (Py_ssize_t start = 0; start < columns; start += most) {
        Py_ssize_t count = columns - start < most ? columns - start : most, width = (count + LANES - 1) / LANES * LANES;
        for (Py_ssize_t row = 0; row < rows; row++) {
            memcpy(room + row * width, factor + row * columns + start, (size_t)count * sizeof *room);
            for (Py_ssize_t at = count; at < width; at++) room[row * width + at] = 0.0f;
        }
        for (Py_ssize_t row = 0, held; row < rows; row += held) {
            held = rows - row < GRAM_ROWS ? 1 : GRAM_ROWS;
            const float *own = room + row * width;
            Py_ssize_t end = row + held, beside = 0;
            for (; held == GRAM_ROWS && beside < end && beside + GRAM_OTHERS <= rows; beside += GRAM_OTHERS)
                gram_tile(own, room + beside * width, width, gram + row * rows + beside, rows, GRAM_ROWS, GRAM_OTHERS);
            for (; beside < end; beside++)
                for (Py_ssize_t each = 0; each < held; each++)
                    gram_tile(own + each * width, room + beside * width, width, gram + (row + each) * rows + beside, rows, 1, 1);
        }
    }
}

/* The same as `product_of_rows` of more rows, from Gram matrices in float: each entry is a sum of few sums of few. */
AVX2 static void product_of_grams(Product *p) {
    float *left = p->grams, *right = left + p->rows * p->rows, *room = right + p->rows * p->rows;
    add_gram(p->left, p->rows, p->lefts, left, room);
    add_gram(p->right, p->rows, p->rights, right, room);
    p->least = HUGE_VAL, p->most = 0.0;
    for (Py_ssize_t row = 0; row < p->rows; row++, left += p->rows, right += p->rows) {
        double one = (double)left[row], other = (double)right[row];
        p->square += one * other + 2.0 * dot(left, right, row);
        p->bound += sqrt(one * other);
        if (p->lives && !p->lives[row]) continue;
        p->least = fmin(p->least, fmin(one, other));
        p->most = fmax(p->most, fmax(one, other));
    }
}
#else
static void product_of_grams(Product *p) {}
#endif

#if defined(__x86_64__) && defined(__GNUC__)
AVX2 static void product_avx2(Product *p) { product_of_rows(p); }
AVX512 static void product_avx512(Product *p) { product_of_rows(p); }
#endif

static PyObject *product(PyObject *module, PyObject *args) {
    unsigned long long left, right;
    Product p = {0};
    if (!PyArg_ParseTuple(args, "KKnnn", &left, &right, &p.rows, &p.lefts, &p.rights))
        return NULL;
    if (p.rows <= 0 || p.lefts <= 0 || p.rights <= 0 || !left || !right) {
        PyErr_SetString(PyExc_ValueError, "product: expected two matrices of as many rows");
        return NULL;
    }
    p.left = (const float *)(uintptr_t)left;
    p.right = (const float *)(uintptr_t)right;
    Py_BEGIN_ALLOW_THREADS;
#if defined(__x86_64__) && defined(__GNUC__)
    if (sweeps == sweeps_avx512) product_avx512(&p);
    else if (sweeps == sweeps_avx2) product_avx2(&p);
    else
#endif
    product_of_rows(&p);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dd", p.square, p.bound);
}

static PyObject *grams(PyObject *module, PyObject *args) {
    unsigned long long left, right, lives;
    Product p = {0};
    if (!PyArg_ParseTuple(args, "KKKnnn", &left, &right, &lives, &p.rows, &p.lefts, &p.rights))
        return NULL;
    if (p.rows <= 0 || p.rows > MOST_GRAM_ROWS || p.lefts <= 0 || p.rights <= 0 || !left || !right ||
        !multiplies_and_adds()) {
        PyErr_SetString(PyExc_ValueError, "grams: expected two matrices of as many rows, which are not too many");
        return NULL;
    }
    p.left = (const float *)(uintptr_t)left;
    p.right = (const float *)(uintptr_t)right;
    p.lives = (const uint8_t *)(uintptr_t)lives;
    p.grams = PyMem_Calloc(2 * (size_t)p.rows * (size_t)p.rows + GRAM_ENTRIES, sizeof *p.grams);
    if (!p.grams)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    product_of_grams(&p);
    Py_END_ALLOW_THREADS;
    PyMem_Free(p.grams);
    return Py_BuildValue("dddd", p.square, p.bound, p.least, p.most);
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
 * 690 below the largest or more counts as that, and so for nothing. All NaN where an entry is, or the largest infinite. */
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
SOFTMAX(softmax_bfloat16, chunk_bfloat16, uint16_t, float, int32_t, from_bfloat16, ordered, INT32_MAX, INT32_MIN, BACK32)
SOFTMAX(softmax_float64, chunk_float64, double, double, int64_t, SAME_WIDE, ordered_wide, INT64_MAX, INT64_MIN,
        from_ordered_wide)

#define SOFTMAX_OF(SUFFIX, TARGET)                                                                                     \
    TARGET static void softmax_float16_##SUFFIX(Softmax *s) { softmax_float16(s); }                                    \
    TARGET static void softmax_bfloat16_##SUFFIX(Softmax *s) { softmax_bfloat16(s); }                                  \
    TARGET static void softmax_float32_##SUFFIX(Softmax *s) { softmax_float32(s); }                                    \
    TARGET static void softmax_float64_##SUFFIX(Softmax *s) { softmax_float64(s); }                                    \
    static void (*const softmax_##SUFFIX[DTYPES])(Softmax *) = {softmax_float16_##SUFFIX, softmax_bfloat16_##SUFFIX,   \
                                                                softmax_float32_##SUFFIX, softmax_float64_##SUFFIX};

SOFTMAX_OF(plain, )
#if defined(__x86_64__) && defined(__GNUC__)
SOFTMAX_OF(avx2, AVX2)
SOFTMAX_OF(avx512, AVX512)
#endif

static PyObject *softmax(PyObject *module, PyObject *args) {
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
#if defined(__x86_64__) && defined(__GNUC__)
    if (sweeps == sweeps_avx512) softmax_avx512[dtype](&s);
    else if (sweeps == sweeps_avx2) softmax_avx2[dtype](&s);
    else
#endif
    softmax_plain[dtype](&s);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddd", s.largest, s.second, s.total, s.weighted);
}

/* Whether two matrices agree in so many bytes of each row, as far to the right again from row to row, and from the left
 * again. Without a branch on what is found, so that many rows are on their way from memory at once. */
static PyObject *alike(PyObject *module, PyObject *args) {
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

static PyObject *entering(PyObject *module, PyObject *args) {
    unsigned long long values, beside, mean, std;
    Entering e = {0};
    int kind;
    if (!PyArg_ParseTuple(args, "KKKKnnndi", &values, &beside, &mean, &std, &e.rows, &e.units, &e.others, &e.guard, &kind))
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

static PyObject *spread(PyObject *module, PyObject *args) {
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

static PyObject *sweep(PyObject *module, PyObject *args) {
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
    sweeps[dtype](&s);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dddddni", s.norm, s.drift, s.update, s.low, s.high, s.hottest, s.half);
}

static PyObject *sweep_made(PyObject *module, PyObject *args) {
    unsigned long long base, left, right, strips, first, before, moved;
    LowRank made = {0};
    Sweep s = {0};
    if (!PyArg_ParseTuple(args, "KKKKfnniKKKnn", &base, &left, &right, &strips, &made.scale, &made.columns, &made.rank,
                          &made.dtype, &first, &before, &moved, &s.count, &s.chunk))
        return NULL;
    if (made.dtype < 0 || made.dtype >= FLOAT64 || made.columns <= 0 || made.rank <= 0 || s.chunk <= 0 || s.count <= 0 ||
        s.chunk % made.columns || s.count % made.columns || !base || !left || !right || !strips || !first != !before || !multiplies_and_adds()) {
        PyErr_SetString(PyExc_ValueError, "sweep_made: expected whole rows of a base, its factors, both references or none");
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

static PyMethodDef methods[] = {
    {"sweep", sweep, METH_VARARGS,
     "sweep(weight, first, before, moved, count, chunk, dtype, copied) -> (|W|^2, |W-W0|^2, |W-W-|^2, low, high, "
     "where the chunk begins that moved most, which half of `moved` has it)"},
    {"sweep_made", sweep_made, METH_VARARGS,
     "sweep_made(base, left, right, strips, scale, columns, rank, dtype of the base, first, before, moved, count, chunk) -> "
     "what `sweep` gives of base + scale * left @ right in float, which W- becomes; strips: room for `right`; where MULTIPLIES_AND_ADDS"},
    {"rows", rows, METH_VARARGS,
     "rows(values, rows, columns, period, dtype) -> (sum of squares, low, high, and the same of the rows whose number is "
     "no multiple of the period)"},
    {"nonfinite", nonfinite, METH_VARARGS,
     "nonfinite(table, tensors): table [tensors, 5] of int64: address, count, step, dtype, and where to put how many of "
     "each step-th entry are NaN or infinite"},
    {"factor", factor, METH_VARARGS,
     "factor(values, lives, rows, columns, wide) -> (sum of squares, columns that are all 0); lives: a byte a row, "
     "whether any entry of it is not 0"},
    {"product", product, METH_VARARGS,
     "product(left, right, rows, lefts, rights) -> (|left^T right|^2, the sum over rows of |left_i| |right_i|) in floats"},
    {"grams", grams, METH_VARARGS,
     "grams(left, right, lives, rows, lefts, rights) -> what `product` gives, from sums in float, and the least and the "
     "largest squared norm of rows of either, of those only that have a byte in `lives`; where MULTIPLIES_AND_ADDS"},
    {"softmax", softmax, METH_VARARGS,
     "softmax(values, count, dtype) -> (largest, second, sum of e^d, sum of d e^d), d = value - largest"},
    {"alike", alike, METH_VARARGS,
     "alike(left, right, rows, width, sample) -> whether two matrices of rows of so many bytes agree in a sample of each"},
    {"entering", entering, METH_VARARGS,
     "entering(values, beside, mean, std, rows, units, others, guard, kind) -> (largest |value - mean| / (std + guard), "
     "its unit, the first unit where that is NaN), of the rows that are not all 0, nor all 0 beside; kind: 2 where the "
     "values are doubles, and 1 more where the statistics are"},
    {"spread", spread, METH_VARARGS,
     "spread(mean, std, units, wide) -> (least std, NaN where there is one; how many of std are 0, NaN, above 0, not "
     "finite; how many of mean are 0, NaN, not finite)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_weight_scan", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__weight_scan(void) {
    PyObject *module = PyModule_Create(&definition);
    choose_instructions();
    if (module && (PyModule_AddStringConstant(module, "ISA", isa) || PyModule_AddStringConstant(module, "SOURCE", SOURCE) ||
                   PyModule_AddIntConstant(module, "MULTIPLIES_AND_ADDS", multiplies_and_adds())))
        return NULL;
    return module;
}
