/* A gradient's factors, whose product left^T right it is: what each of them holds, and the norm of the product that is
 * not made. */
#include "module.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "floats.h"

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
FOR_EACH_SET(factor_float32, Factor)
static void (*const factor_float32_by[INSTRUCTION_SETS])(Factor *) = EACH_SET(factor_float32);

PyObject *factor(PyObject *module, PyObject *args) {
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
    if (wide) factor_float64(&f);
    else factor_float32_by[instructions](&f);
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
            beside += dot(left, p->left + other * p->lefts, p->lefts) *
                      dot(right, p->right + other * p->rights, p->rights);
        double own = dot(left, left, p->lefts) * dot(right, right, p->rights);
        p->square += own + 2.0 * beside;
        p->bound += sqrt(own);
    }
}

FOR_EACH_SET(product_of_rows, Product)
static void (*const product_of_rows_by[INSTRUCTION_SETS])(Product *) = EACH_SET(product_of_rows);

enum { GRAM_ENTRIES = 1 << 16, MOST_GRAM_ROWS = 1 << 12 }; /* which leaves columns enough for a vector */
#ifdef AVX2
/* So many rows meet so many others in registers, over columns of theirs that lie together in the second cache: where
 * they come from, rows apart by powers of two share few places in any. */
enum { GRAM_ROWS = 4, GRAM_OTHERS = 3 };

INLINE AVX2 void gram_tile(const float *own, const float *other, Py_ssize_t width, float *gram, Py_ssize_t across,
                           int rows, int others) {
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
                    gram_tile(own + each * width, room + beside * width, width, gram + (row + each) * rows + beside,
                              rows, 1, 1);
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

PyObject *product(PyObject *module, PyObject *args) {
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
    product_of_rows_by[instructions](&p);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("dd", p.square, p.bound);
}

PyObject *grams(PyObject *module, PyObject *args) {
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
