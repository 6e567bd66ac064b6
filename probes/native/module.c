/* Reductions as native code, as a module for Python. Knows nothing of torch: it is given addresses. */
#include "module.h"

Instructions instructions = PLAIN;

static void choose_instructions(void) {
#ifdef AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
        instructions = WITH_AVX512;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        instructions = WITH_AVX2;
#endif
}

int multiplies_and_adds(void) { return instructions != PLAIN; }

static PyMethodDef methods[] = {
    {"sweep", sweep, METH_VARARGS,
     "sweep(weight, first, before, moved, count, chunk, dtype, copied) -> (|W|^2, |W-W0|^2, |W-W-|^2, low, high, "
     "where the chunk begins that moved most, which half of `moved` has it)"},
    {"sweep_made", sweep_made, METH_VARARGS,
     "sweep_made(base, left, right, strips, scale, columns, rank, dtype of the base, first, before, moved, count, "
     "chunk) -> what `sweep` gives of base + scale * left @ right in float, which W- becomes; strips: room for "
     "`right`; where MULTIPLIES_AND_ADDS"},
    {"rows", rows, METH_VARARGS,
     "rows(values, rows, columns, period, dtype) -> (sum of squares, low, high, and the same of the rows whose number "
     "is no multiple of the period)"},
    {"nonfinite", nonfinite, METH_VARARGS,
     "nonfinite(table, tensors): table [tensors, 5] of int64: address, count, step, dtype, and where to put how many "
     "of each step-th entry are NaN or infinite"},
    {"factor", factor, METH_VARARGS,
     "factor(values, lives, rows, columns, wide) -> (sum of squares, columns that are all 0); lives: a byte a row, "
     "whether any entry of it is not 0"},
    {"product", product, METH_VARARGS,
     "product(left, right, rows, lefts, rights) -> (|left^T right|^2, the sum over rows of |left_i| |right_i|) in "
     "floats"},
    {"grams", grams, METH_VARARGS,
     "grams(left, right, lives, rows, lefts, rights) -> what `product` gives, from sums in float, and the least and "
     "the largest squared norm of rows of either, of those only that have a byte in `lives`; where "
     "MULTIPLIES_AND_ADDS"},
    {"softmax", softmax, METH_VARARGS,
     "softmax(values, count, dtype) -> (largest, second, sum of e^d, sum of d e^d), d = value - largest"},
    {"alike", alike, METH_VARARGS,
     "alike(left, right, rows, width, sample) -> whether two matrices of rows of so many bytes agree in a sample of "
     "each"},
    {"entering", entering, METH_VARARGS,
     "entering(values, beside, mean, std, rows, units, others, guard, kind) -> (largest |value - mean| / (std + "
     "guard), its unit, the first unit where that is NaN), of the rows that are not all 0, nor all 0 beside; kind: 2 "
     "where the values are doubles, and 1 more where the statistics are"},
    {"spread", spread, METH_VARARGS,
     "spread(mean, std, units, wide) -> (least std, NaN where there is one; how many of std are 0, NaN, above 0, not "
     "finite; how many of mean are 0, NaN, not finite)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_weight_scan", NULL, -1, methods, NULL, NULL, NULL,
                                        NULL};

static const char *const names[INSTRUCTION_SETS] = {"plain", "avx2", "avx512"}; /* of instruction sets */

PyMODINIT_FUNC PyInit__weight_scan(void) {
    PyObject *module = PyModule_Create(&definition);
    choose_instructions();
    if (module && (PyModule_AddStringConstant(module, "ISA", names[instructions]) ||
                   PyModule_AddStringConstant(module, "SOURCE", SOURCE) ||
                   PyModule_AddIntConstant(module, "MULTIPLIES_AND_ADDS", multiplies_and_adds())))
        return NULL;
    return module;
}
