/* What compilers and processors differ in: how a function is declared that is to become vector instructions, and which
 * of them are used. The instruction set is chosen as the program runs. */
#ifndef INSTRUCTIONS_H
#define INSTRUCTIONS_H

#ifdef _MSC_VER
#define INLINE static __forceinline
#define RESTRICT __restrict
#else
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#endif
/* Of functions that several files share: another library's of that name is never called in place of one of them. */
#if defined(__GNUC__) && !defined(_WIN32)
#define HIDDEN __attribute__((visibility("hidden")))
#else
#define HIDDEN
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,f16c")))
enum { LANES = 8 }; /* floats in a register of AVX2 */
#endif

typedef enum { PLAIN, WITH_AVX2, WITH_AVX512, INSTRUCTION_SETS } Instructions;

HIDDEN extern Instructions instructions; /* of this processor */

/* Whether `sweep_made` and `grams` are of use: without such an instruction they would round otherwise, or take longer
 * than torch. */
HIDDEN int multiplies_and_adds(void);

/* The function NAME, which is INLINE, compiled for each instruction set; and these as a row of a table. */
#ifdef AVX2
#define FOR_EACH_SET(NAME, STATE)                                                                                      \
    static void NAME##_plain(STATE *s) { NAME(s); }                                                                    \
    AVX2 static void NAME##_avx2(STATE *s) { NAME(s); }                                                                \
    AVX512 static void NAME##_avx512(STATE *s) { NAME(s); }
#define EACH_SET(NAME) {NAME##_plain, NAME##_avx2, NAME##_avx512}
#else
#define FOR_EACH_SET(NAME, STATE)                                                                                      \
    static void NAME##_plain(STATE *s) { NAME(s); }
#define EACH_SET(NAME) {NAME##_plain}
#endif

#endif
