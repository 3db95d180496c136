/* Single numbers, for loops that the compiler turns into vectors, once for each set of instructions. */
#pragma once
#include "layout.h"

#if defined(__x86_64__)
#define CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONED
#endif
/* A product is rounded before it is added, as in torch, so that both give the same bits. */
#define UNFUSED __attribute__((optimize("fp-contract=off")))

INLINE float wide(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    return LOAD(float, &word);
}

/* To the nearest BF16, ties to even; NaN stays NaN. */
INLINE uint16_t narrow(float value) {
    uint32_t word = LOAD(uint32_t, &value);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}
