/* Matrix products with weights in eight bits, for processors that multiply four pairs of such at once (AVX-512 VNNI);
 * included by kernels.c.
 *
 * Weights are int8 codes as they lie in memory, one scale to an output; what they multiply is int8 too, one scale to a
 * row (rounded, in kernels.c). Sums are exact 32-bit integers until the scales come in; then they are float32, as those
 * of a LoRA in bfloat16, which is part of the same pass.
 */

#define HIGH 6  /* rows of a tile */
#define LANE 64 /* columns of a panel */
#define TURN 48 /* rows that pass by all panels together */
#define HELD (2 << 20) /* bytes of panels that are laid out together */

/* x [rows, depth] times the weight, [columns, depth] or, where it lies across, [depth, columns]: bytes where there are
 * row_scales, else bfloat16, of even depth. row_sums: of the bytes of a row of x, whose rows are filled up with zeros to
 * a multiple of four; column_scales may be missing. Steps count numbers. */
typedef struct {
    const void *x;
    size x_step, depth;
    const void *weight;
    size weight_step, across;
    const float *row_scales;
    const int32_t *row_sums;
    const float *column_scales;
} coded_part;

typedef struct {
    const float *bias;
    const void *onto;
    void *out;
    size wide, step, rows, columns; /* wide: onto and out are float32, else bfloat16 */
} coded_target;

INLINE size words(const coded_part *one) { return one->row_scales ? UP(one->depth, 4) / 4 : one->depth / 2; }

/* 4 x 64 bytes as 64 groups of four that stand in a column, each byte plus 128. */
INLINE void weave(__m512i a, __m512i b, __m512i c, __m512i d, uint32_t *to) {
    __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    __m512i one = _mm512_unpacklo_epi16(ab, cd), two = _mm512_unpackhi_epi16(ab, cd);
    __m512i three = _mm512_unpacklo_epi16(AB, CD), four = _mm512_unpackhi_epi16(AB, CD);
    __m512i even = _mm512_shuffle_i32x4(one, two, 0x88), odd = _mm512_shuffle_i32x4(one, two, 0xdd);
    __m512i EVEN = _mm512_shuffle_i32x4(three, four, 0x88), ODD = _mm512_shuffle_i32x4(three, four, 0xdd);
    __m512i shift = _mm512_set1_epi8((char)0x80);
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_shuffle_i32x4(even, EVEN, 0x88), shift));
    _mm512_storeu_si512(to + 16, _mm512_xor_si512(_mm512_shuffle_i32x4(odd, ODD, 0x88), shift));
    _mm512_storeu_si512(to + 32, _mm512_xor_si512(_mm512_shuffle_i32x4(even, EVEN, 0xdd), shift));
    _mm512_storeu_si512(to + 48, _mm512_xor_si512(_mm512_shuffle_i32x4(odd, ODD, 0xdd), shift));
}

/* Columns first .. first + LANE of a part's bytes as [depth / 4, LANE] groups of four along the sum, each byte plus 128:
 * the instruction multiplies bytes with a sign by bytes without one. What lies behind the last column is never kept, and
 * behind the last row it meets a zero. */
static void lay_bytes(const coded_part *one, size first, size columns, uint32_t *to) {
    size held = columns - first < LANE ? columns - first : LANE, depth = one->depth;
    const int8_t *weight = one->weight;
    if (one->across) {
        __mmask64 kept = held == 64 ? ~0ull : (1ull << held) - 1;
        for (size k = 0; k < depth; k += 4, to += LANE) {
            __m512i line[4];
            for (size i = 0; i < 4; i++) {
                size row = k + i < depth ? k + i : depth - 1;
                line[i] = _mm512_maskz_loadu_epi8(kept, weight + row * one->weight_step + first);
            }
            weave(line[0], line[1], line[2], line[3], to);
        }
        return;
    }
    for (size start = 0; start < LANE; start += 16)
        for (size k = 0; k < depth; k += 64) {
            __mmask64 kept = depth - k >= 64 ? ~0ull : (1ull << (depth - k)) - 1;
            __m512i line[16];
            for (size i = 0; i < 16; i++) {
                size column = start + i < held ? start + i : held - 1;
                line[i] = _mm512_maskz_loadu_epi8(kept, weight + (first + column) * one->weight_step + k);
                line[i] = _mm512_xor_si512(line[i], _mm512_set1_epi8((char)0x80));
            }
            turn16(line);
            size count = depth - k >= 64 ? 16 : UP(depth - k, 4) / 4;
            for (size i = 0; i < count; i++) _mm512_storeu_si512(to + (k / 4 + i) * LANE + start, line[i]);
        }
}

#define EACH                                                                                                           \
    _Pragma("GCC unroll 6") for (int m = 0; m < HIGH; m++) _Pragma("GCC unroll 4") for (int n = 0; n < 4; n++)

/* sum + four products each of bytes without a sign and bytes with one. The instruction by its name: around the intrinsic
 * GCC 12 moves the sums to memory and back. */
INLINE __m512i four_more(__m512i sum, __m512i bytes, __m512i codes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(codes));
    return sum;
}

/* kept [HIGH, LANE] (+)= the product of one part from its panel; x: the tile's rows. */
INLINE void tile_bytes(const coded_part *one, const size *lines, const uint32_t *panel, float (*kept)[LANE], int add,
                       const float *column_scales) {
    __m512i sum[HIGH][4];
    const uint32_t *x[HIGH];
#pragma GCC unroll 6
    for (int m = 0; m < HIGH; m++) x[m] = (const uint32_t *)((const int8_t *)one->x + lines[m] * one->x_step);
    EACH sum[m][n] = _mm512_set1_epi32(-128 * one->row_sums[lines[m]]);
    for (size k = 0, last = words(one); k < last; k++, panel += LANE) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) right[n] = _mm512_load_si512(panel + 16 * n);
#pragma GCC unroll 6
        for (int m = 0; m < HIGH; m++) {
            __m512i left = _mm512_set1_epi32((int)x[m][k]);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) sum[m][n] = four_more(sum[m][n], right[n], left);
        }
    }
    EACH {
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][n]), _mm512_set1_ps(one->row_scales[lines[m]]));
        if (column_scales) value = _mm512_mul_ps(value, _mm512_load_ps(column_scales + 16 * n));
        if (add) value = _mm512_add_ps(value, _mm512_load_ps(kept[m] + 16 * n));
        _mm512_store_ps(kept[m] + 16 * n, value);
    }
}

#ifdef __AVX512BF16__
/* The same for a part in bfloat16. */
INLINE void tile_pairs(const coded_part *one, const size *lines, const uint32_t *panel, float (*kept)[LANE], int add) {
    __m512 sum[HIGH][4];
    const uint32_t *x[HIGH];
#pragma GCC unroll 6
    for (int m = 0; m < HIGH; m++) x[m] = (const uint32_t *)((const bf16 *)one->x + lines[m] * one->x_step);
    EACH sum[m][n] = add ? _mm512_load_ps(kept[m] + 16 * n) : _mm512_setzero_ps();
    for (size k = 0, last = words(one); k < last; k++, panel += LANE) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) right[n] = (__m512bh)_mm512_load_si512(panel + 16 * n);
#pragma GCC unroll 6
        for (int m = 0; m < HIGH; m++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)x[m][k]);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
        }
    }
    EACH _mm512_store_ps(kept[m] + 16 * n, sum[m][n]);
}
#endif

/* 16 sums to where they belong, with the bias and what they are added to. */
INLINE void put_sums(const coded_target *to, size row, size column, __m512 value) {
    __mmask16 held = lanes(to->columns - column);
    size place = row * to->step + column;
    if (to->bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(held, to->bias + column));
    if (to->wide) {
        if (to->onto) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(held, (const float *)to->onto + place));
        _mm512_mask_storeu_ps((float *)to->out + place, held, value);
        return;
    }
#ifdef __AVX512BF16__
    if (to->onto) {
        __m512i past = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(held, (const bf16 *)to->onto + place));
        value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(past, 16)));
    }
    _mm256_mask_storeu_epi16((bf16 *)to->out + place, held, (__m256i)_mm512_cvtneps_pbh(value));
#endif
}

/* Rows from .. until of the panel that begins at column; behind the panel's words lie its columns' scales, part by part. */
static void coded_rows(const coded_part *parts, size count, const uint32_t *panel, const float *scales,
                       const coded_target *to, size from, size until, size column) {
    float kept[HIGH][LANE] __attribute__((aligned(64)));
    for (size row = from; row < until; row += HIGH) {
        const uint32_t *words_of = panel;
        size lines[HIGH];
        for (int m = 0; m < HIGH; m++) lines[m] = row + m < until ? row + m : until - 1;
        for (size one = 0; one < count; words_of += words(parts + one++) * LANE) {
            const coded_part *part = parts + one;
            if (part->row_scales)
                tile_bytes(part, lines, words_of, kept, one > 0, part->column_scales ? scales + one * LANE : 0);
#ifdef __AVX512BF16__
            else
                tile_pairs(part, lines, words_of, kept, one > 0);
#endif
        }
        for (int m = 0; m < HIGH && row + m < until; m++)
            for (int n = 0; n < 4; n++) put_sums(to, row + m, column + 16 * n, _mm512_load_ps(kept[m] + 16 * n));
    }
}

/* A panel of all parts, and its columns' scales. */
static void lay_coded(const coded_part *parts, size count, size column, size columns, uint32_t *line, float *scales) {
    for (size one = 0; one < count; line += words(parts + one++) * LANE) {
        const coded_part *it = parts + one;
        if (it->column_scales)
            for (size i = 0; i < LANE; i++)
                scales[one * LANE + i] = column + i < columns ? it->column_scales[column + i] : 0.0f;
        if (it->row_scales)
            lay_bytes(it, column, columns, line);
#ifdef __AVX512BF16__
        else {
            part pairs = {it->x, it->x_step, it->depth, it->weight, it->weight_step, it->across};
            lay(&pairs, column, columns, line);
        }
#endif
    }
}

/* out [rows, columns] = bias + onto + the sum of the parts' products; bias and onto, whose rows lie as those of out, may
 * be missing. Returns 0, or 1 for want of memory. */
int coded(const coded_part *parts, size count, const float *bias, const void *onto, void *out, size wide, size step,
          size rows, size columns) {
    size total = count, panels = UP(columns, LANE) / LANE;
    for (size one = 0; one < count; one++) total += words(parts + one);
    size bytes = 4 * total * LANE, together = bytes * panels <= HELD ? panels : HELD / bytes ? HELD / bytes : 1;
    uint32_t *packed = scratch(bytes * together);
    if (!packed) return 1;
    coded_target to = {bias, onto, out, wide, step, rows, columns};
#pragma omp parallel
    {
        size tiles = UP(rows, HIGH) / HIGH, threads = omp_get_num_threads();
        size blocks = threads * (UP(rows, threads * TURN) / (threads * TURN));
        for (size first = 0; first < panels; first += together) {
            size last = first + together < panels ? first + together : panels;
#pragma omp for schedule(static)
            for (size panel = first; panel < last; panel++) {
                uint32_t *line = packed + (panel - first) * total * LANE;
                lay_coded(parts, count, panel * LANE, columns, line, (float *)(line + (total - count) * LANE));
            }
#pragma omp for schedule(dynamic)
            for (size block = 0; block < blocks; block++) {
                size from = tiles * block / blocks * HIGH, until = tiles * (block + 1) / blocks * HIGH;
                if (until > rows) until = rows;
                for (size panel = first; panel < last; panel++) {
                    uint32_t *line = packed + (panel - first) * total * LANE;
                    coded_rows(parts, count, line, (float *)(line + (total - count) * LANE), &to, from, until,
                               panel * LANE);
                }
            }
        }
    }
    return 0;
}
