/* The dtypes, and their values: as floats or doubles, and as integers in the order of these. */
#ifndef FLOATS_H
#define FLOATS_H

#include <stdint.h>
#include <string.h>

#include "instructions.h"

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, DTYPES };

/* NAME_by[dtype][instructions]: the functions NAME_float16 and so on, which are INLINE. */
#define FOR_EACH_DTYPE(NAME, STATE)                                                                                    \
    FOR_EACH_SET(NAME##_float16, STATE)                                                                                \
    FOR_EACH_SET(NAME##_bfloat16, STATE)                                                                               \
    FOR_EACH_SET(NAME##_float32, STATE)                                                                                \
    FOR_EACH_SET(NAME##_float64, STATE)                                                                                \
    static void (*const NAME##_by[DTYPES][INSTRUCTION_SETS])(STATE *) = {                                              \
        EACH_SET(NAME##_float16), EACH_SET(NAME##_bfloat16), EACH_SET(NAME##_float32), EACH_SET(NAME##_float64)};

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

/* Called once or twice in many entries: whether in line is left to the compiler. */
static inline double from_ordered(int32_t order) {
    return (double)float_of((uint32_t)(order ^ (int32_t)((uint32_t)(order >> 31) >> 1)));
}

static inline double from_ordered_wide(int64_t order) {
    double value;
    int64_t bits = order ^ (int64_t)((uint64_t)(order >> 63) >> 1);
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define SAME_WIDE(value) (value)
#define BACK32(order) from_ordered((int32_t)(order))

#endif
