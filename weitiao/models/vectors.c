/* What all functions share that use AVX-512 by its own instructions; included by kernels.c. */

#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>

#define UP(value, to) (((value) + (to)-1) / (to) * (to))

INLINE __mmask16 lanes(size count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

static void *grown(void **memory, size *held, size bytes) {
    if (bytes > *held) {
        free(*memory);
        *held = UP(bytes, 1 << 16);
        *memory = aligned_alloc(64, *held);
        if (!*memory) *held = 0;
    }
    return *memory;
}

/* At least so many bytes of this thread's own, which it keeps for the next call. */
static void *scratch(size bytes) {
    static _Thread_local void *memory;
    static _Thread_local size held;
    return grown(&memory, &held, bytes);
}

/* 16 x 16 numbers of 32 bits, turned about their diagonal. */
INLINE void turn16(__m512i *line) {
    __m512i two[16];
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(line[i], line[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(line[i], line[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        line[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
        line[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
        line[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
        line[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* line[4 g + i]: columns i, 4 + i, 8 + i, 12 + i of rows 4 g .. 4 g + 3 */
        __m512i a = line[i], b = line[4 + i], c = line[8 + i], d = line[12 + i];
        __m512i ab = _mm512_shuffle_i32x4(a, b, 0x88), cd = _mm512_shuffle_i32x4(c, d, 0x88);
        __m512i AB = _mm512_shuffle_i32x4(a, b, 0xdd), CD = _mm512_shuffle_i32x4(c, d, 0xdd);
        two[i] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        two[8 + i] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        two[4 + i] = _mm512_shuffle_i32x4(AB, CD, 0x88);
        two[12 + i] = _mm512_shuffle_i32x4(AB, CD, 0xdd);
    }
    for (int i = 0; i < 16; i++) line[i] = two[i];
}

#ifdef __AVX512BF16__
/* Scratch again, beside that. */
static void *own_scratch(size bytes) {
    static _Thread_local void *memory;
    static _Thread_local size held;
    return grown(&memory, &held, bytes);
}

/* 16 numbers, rounded. */
INLINE void put16(bf16 *to, __m512 from) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(from)); }

/* 16 numbers of one row and 16 of the next, rounded, as pairs of neighbours in a column. */
INLINE void put_pairs(uint32_t *to, __m512 first, __m512 second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif
