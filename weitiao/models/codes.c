/* Weights out of nf4 codes, which models/quantized.py makes: 64 that follow each other share a scale. Included by
 * kernels.c. */

#define CODES 64 /* weights of a block: 32 bytes, the first of two in the high half */

/* The values of models/quantized.py; a test compares what comes out. */
static const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/* count blocks in bfloat16: a level times its block's scale, rounded once. */
static void spread_blocks(const uint8_t *codes, const float *scales, size count, bf16 *to) {
    __m512 levels = _mm512_loadu_ps(LEVELS);
    for (size i = 0; i < count; i++, codes += CODES / 2, to += CODES) {
        __m256i scaled = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scales[i])));
        __m512i table = _mm512_broadcast_i64x4(scaled); /* twice, so that a fifth bit of a place changes nothing */
        for (int half = 0; half < 2; half++) {
            __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + CODES / 4 * half)));
            __m512i places = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
            _mm512_storeu_si512(to + CODES / 2 * half, _mm512_permutexvar_epi16(places, table));
        }
    }
}

#define TAKEN 64 /* blocks that a thread takes at a time */

/* A whole weight of count blocks. */
void spread(const uint8_t *codes, const float *scales, size count, bf16 *to) {
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += TAKEN)
        spread_blocks(codes + i * CODES / 2, scales + i, count - i < TAKEN ? count - i : TAKEN, to + i * CODES);
}
