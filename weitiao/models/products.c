/* Matrix products in bfloat16 with float32 sums, for processors that multiply pairs of it; included by kernels.c.
 *
 * One function computes a sum of products, so that a linear and its LoRA, or the three gradients that meet at one input,
 * are one pass: nothing between them is rounded or written. Weights are taken as they lie in memory; 64 of their columns
 * at a time are laid out as pairs, once for all rows.
 */

#define WIDE 64         /* columns of a panel: four registers of sums */
#define ROWS 48          /* rows that pass by all panels together: few, so that no thread waits long for another */
#define DEEP 4096       /* pairs along a sum: longer ones are made in slices */
#define SLICE 1024      /* pairs of a slice */
#define BROAD 4096      /* columns of a gradient that are paired up together: those of a head are many */
#define GROUP (2 << 20) /* bytes of panels that are laid out together */

/* One of the products that are summed up: x [rows, depth] times the weight, [columns, depth] or, where it lies across,
 * [depth, columns]. The numbers between one row and the next are the steps. Depths are even, but for one that lies
 * across and whose x has a zero there. */
typedef struct {
    const bf16 *x;
    size x_step, depth;
    const bf16 *weight;
    size weight_step, across;
} part;

#define PAIRS(depth) (((depth) + 1) / 2)

/* Columns first .. first + WIDE of a part's weight as [depth / 2, WIDE] pairs along the sum; what lies behind the last
 * column is zero. */
static void lay(const part *one, size first, size columns, uint32_t *to) {
    size held = columns - first < WIDE ? columns - first : WIDE, pairs = PAIRS(one->depth);
    if (one->across) {
        for (size k = 0; k < pairs; k++) {
            const bf16 *low = one->weight + 2 * k * one->weight_step + first;
            const bf16 *high = 2 * k + 1 < one->depth ? low + one->weight_step : low; /* times zero */
            uint32_t *line = to + k * WIDE;
#pragma omp simd
            for (size i = 0; i < held; i++) line[i] = (uint32_t)low[i] | (uint32_t)high[i] << 16;
            for (size i = held; i < WIDE; i++) line[i] = 0;
        }
        return;
    }
    for (size start = 0; start < WIDE; start += 16) {
        size k = 0;
        if (start + 16 <= held)
            for (; k + 16 <= pairs; k += 16) {
                __m512i line[16];
                for (int i = 0; i < 16; i++)
                    line[i] = _mm512_loadu_si512(one->weight + (first + start + i) * one->weight_step + 2 * k);
                turn16(line);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (k + i) * WIDE + start, line[i]);
            }
        for (; k < pairs; k++)
            for (size i = start; i < start + 16; i++) {
                uint32_t two = 0;
                if (i < held) memcpy(&two, one->weight + (first + i) * one->weight_step + 2 * k, 4);
                to[k * WIDE + i] = two;
            }
    }
}

/* What the products of one call go to. sums: where they are gathered, rows as in out without gaps, if they are so long
 * that they are made slice by slice. */
typedef struct {
    const float *bias;
    const bf16 *onto;
    bf16 *out;
    size step, rows, columns;
    float *sums;
    int turned;
} target;

/* [high, 16 * wide] sums of the parts' products from one panel, which begins at column; rows from until on are computed
 * and not kept. turned: x is [depth / 2, x_step] pairs already. */
INLINE void sum_tile(const int high, const int wide, const int turned, const part *parts, size count, const uint32_t *panel,
                     const target *to, size row, size until, size column, int begins, int ends) {
    __m512 sum[24][4];
    __mmask16 kept[4];
#pragma GCC unroll 4
    for (int n = 0; n < wide; n++) {
        kept[n] = lanes(to->columns - column - 16 * n);
        __m512 first = _mm512_setzero_ps();
        if (begins && to->bias) first = _mm512_maskz_loadu_ps(kept[n], to->bias + column + 16 * n);
#pragma GCC unroll 24
        for (int m = 0; m < high; m++) {
            sum[m][n] = first;
            if (!begins && row + m < until)
                sum[m][n] = _mm512_maskz_loadu_ps(kept[n], to->sums + (row + m) * to->columns + column + 16 * n);
        }
    }
    for (size one = 0; one < count; one++) {
        const uint32_t *x[24];
#pragma GCC unroll 24
        for (int m = 0; m < high; m++) {
            size line = row + m < until ? row + m : until - 1;
            x[m] = turned ? (const uint32_t *)parts[one].x + line
                          : (const uint32_t *)(parts[one].x + line * parts[one].x_step);
        }
        size pairs = PAIRS(parts[one].depth), step = turned ? parts[one].x_step : 1;
        for (size k = 0; k < pairs; k++, panel += WIDE) {
            __m512bh right[4];
#pragma GCC unroll 4
            for (int n = 0; n < wide; n++) right[n] = (__m512bh)_mm512_load_si512(panel + 16 * n);
#pragma GCC unroll 24
            for (int m = 0; m < high; m++) {
                __m512bh left = (__m512bh)_mm512_set1_epi32((int)x[m][k * step]);
#pragma GCC unroll 4
                for (int n = 0; n < wide; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
            }
        }
    }
#pragma GCC unroll 24
    for (int m = 0; m < high; m++)
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) {
            if (row + m >= until) continue;
            size place = (row + m) * to->step + column + 16 * n;
            __m512 value = sum[m][n];
            if (!ends) {
                _mm512_mask_storeu_ps(to->sums + (row + m) * to->columns + column + 16 * n, kept[n], value);
                continue;
            }
            if (to->onto) {
                __m512i past = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept[n], to->onto + place));
                value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(past, 16)));
            }
            _mm256_mask_storeu_epi16(to->out + place, kept[n], (__m256i)_mm512_cvtneps_pbh(value));
        }
}

#define TILES(high, wide)                                                                                              \
    for (size row = from; row < until; row += high)                                                                    \
        if (to->turned)                                                                                                \
            sum_tile(high, wide, 1, parts, count, panel, to, row, until, column, begins, ends);                        \
        else                                                                                                           \
            sum_tile(high, wide, 0, parts, count, panel, to, row, until, column, begins, ends)

/* Rows from .. until of one panel. */
static void sum_rows(const part *parts, size count, const uint32_t *panel, const target *to, size from, size until,
                     size column, int begins, int ends) {
    size left = to->columns - column;
    if (left > 48) {
        TILES(6, 4);
    } else if (left > 32) {
        TILES(8, 3);
    } else if (left > 16) {
        TILES(12, 2);
    } else {
        TILES(24, 1);
    }
}

/* The products of one slice of the parts, all of it laid out in memory for packed panels, together at a time. */
static void slice(const part *parts, size count, uint32_t *packed, size together, const target *to, int begins,
                  int ends) {
    size pairs = 0, panels = UP(to->columns, WIDE) / WIDE;
    for (size one = 0; one < count; one++) pairs += PAIRS(parts[one].depth);
#pragma omp parallel
    {
        size high = to->columns > 48 ? 6 : 24, tiles = UP(to->rows, high) / high, threads = omp_get_num_threads();
        size blocks = threads * (UP(to->rows, threads * ROWS) / (threads * ROWS));
        for (size first = 0; first < panels; first += together) {
            size last = first + together < panels ? first + together : panels;
#pragma omp for schedule(static)
            for (size panel = first; panel < last; panel++) {
                uint32_t *line = packed + (panel - first) * pairs * WIDE;
                for (size one = 0; one < count; line += PAIRS(parts[one++].depth) * WIDE)
                    lay(parts + one, panel * WIDE, to->columns, line);
            }
#pragma omp for schedule(dynamic)
            for (size block = 0; block < blocks; block++) {
                size from = tiles * block / blocks * high, until = tiles * (block + 1) / blocks * high;
                if (until > to->rows) until = to->rows;
                for (size panel = first; panel < last; panel++)
                    sum_rows(parts, count, packed + (panel - first) * pairs * WIDE, to, from, until, panel * WIDE,
                             begins, ends);
            }
        }
    }
}

/* out [rows, columns] = bias + onto + the sum of the parts' products; bias and onto, whose rows lie as those of out, may
 * be missing, and depths are even. Returns 0, or 1 for want of memory. */
int products(const part *parts, size count, const float *bias, const bf16 *onto, bf16 *out, size step, size rows,
             size columns) {
    size pairs = 0, panels = UP(columns, WIDE) / WIDE, deepest = 0;
    for (size one = 0; one < count; one++) {
        pairs += parts[one].depth / 2;
        deepest = parts[one].depth / 2 > deepest ? parts[one].depth / 2 : deepest;
    }
    int whole = deepest <= DEEP;
    size most = whole ? pairs : SLICE, bytes = 4 * most * WIDE;
    size together = bytes * panels <= GROUP ? panels : GROUP / bytes ? GROUP / bytes : 1;
    uint32_t *packed = scratch(bytes * together + (whole ? 0 : 4 * rows * columns));
    if (!packed) return 1;
    target to = {bias, onto, out, step, rows, columns, (float *)(packed + most * WIDE * together), 0};
    if (whole) {
        slice(parts, count, packed, together, &to, 1, 1);
        return 0;
    }
    for (size one = 0; one < count; one++)
        for (size from = 0; from < parts[one].depth / 2; from += SLICE) {
            part piece = parts[one];
            size left = piece.depth / 2 - from;
            piece.x += 2 * from;
            piece.weight += 2 * from * (piece.across ? piece.weight_step : 1);
            piece.depth = 2 * (left < SLICE ? left : SLICE);
            slice(&piece, 1, packed, together, &to, one == 0 && from == 0, one == count - 1 && left <= SLICE);
        }
    return 0;
}

/* out [columns of g, columns of x] in float32 = gᵀ x over all rows, added to what is there where add is set: a gradient at
 * a weight. Returns 0, or 1 for want of memory. */
int at_weight(const bf16 *g, size g_step, const bf16 *x, size x_step, float *out, size add, size rows, size g_width,
              size x_width) {
    size pairs = PAIRS(rows), panels = UP(x_width, WIDE) / WIDE, bytes = 4 * pairs * WIDE;
    size together = bytes * panels <= GROUP ? panels : GROUP / bytes ? GROUP / bytes : 1;
    size most = g_width < BROAD ? g_width : BROAD;
    uint32_t *packed = scratch(bytes * together + 4 * pairs * most), *laced = packed + together * pairs * WIDE;
    if (!packed) return 1;
    for (size first = 0; first < g_width; first += most) {
        size width = g_width - first < most ? g_width - first : most;
#pragma omp parallel for schedule(static)
        for (size k = 0; k < pairs; k++) {
            const bf16 *low = g + 2 * k * g_step + first, *high = low + g_step;
            uint32_t *line = laced + k * width;
            if (2 * k + 1 < rows) {
#pragma omp simd
                for (size i = 0; i < width; i++) line[i] = (uint32_t)low[i] | (uint32_t)high[i] << 16;
            } else {
                for (size i = 0; i < width; i++) line[i] = low[i];
            }
        }
        part one = {(const bf16 *)laced, width, rows, x, x_step, 1};
        target to = {0, 0, 0, 0, width, x_width, out + first * x_width, 1};
        slice(&one, 1, packed, together, &to, !add, 0);
    }
    return 0;
}

#define LINES 32 /* pairs of rows that stay in a core's cache while their columns pass */

/* sum[m][n] += the products of eight narrow columns with 32 of y, over pairs of rows; odd: the last has no second. */
INLINE void outer_tile(const uint32_t *x, size x_step, const bf16 *y, size y_step, __mmask32 kept, size pairs, int odd,
                       float *sums, size step) {
    static const uint16_t woven[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i near = _mm512_loadu_si512(woven), far = _mm512_loadu_si512(woven + 32);
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++)
        for (int n = 0; n < 2; n++) sum[m][n] = _mm512_loadu_ps(sums + m * step + 16 * n);
    for (size k = 0; k < pairs; k++) {
        const bf16 *line = y + 2 * k * y_step, *later = line + 2 * LINES * y_step;
        __builtin_prefetch(later); /* such strides are no pattern that the processor sees by itself */
        __builtin_prefetch(later + y_step);
        __m512i low = _mm512_maskz_loadu_epi16(kept, line);
        __m512i up = _mm512_maskz_loadu_epi16(odd && k == pairs - 1 ? 0 : kept, line + y_step);
        __m512bh one = (__m512bh)_mm512_permutex2var_epi16(low, near, up);
        __m512bh two = (__m512bh)_mm512_permutex2var_epi16(low, far, up);
#pragma GCC unroll 8
        for (int m = 0; m < 8; m++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)x[k * x_step + m]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], left, one);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], left, two);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++)
        for (int n = 0; n < 2; n++) _mm512_storeu_ps(sums + m * step + 16 * n, sum[m][n]);
}

/* out[i * out_x + j * out_y] = scale * the sum over rows of x[row, i] y[row, j]: a gradient at a LoRA's matrix, the one
 * or the other way round. The width of x is its rank, that of y the linear's. Returns 0, or 1 for want of memory. */
int outer(const bf16 *x, size x_step, size x_width, const bf16 *y, size y_step, size y_width, float *out, size out_x,
          size out_y, float scale, size rows) {
    size pairs = UP(rows, 2) / 2, high = UP(x_width, 8), panels = UP(y_width, 32) / 32, step = 32 * panels;
    uint32_t *laced = scratch(4 * (pairs * high + high * step));
    if (!laced) return 1;
    float *sums = (float *)(laced + pairs * high);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (size k = 0; k < pairs; k++)
            for (size i = 0; i < high; i++) {
                uint32_t low = i < x_width ? x[2 * k * x_step + i] : 0;
                uint32_t up = i < x_width && 2 * k + 1 < rows ? x[(2 * k + 1) * x_step + i] : 0;
                laced[k * high + i] = low | up << 16;
            }
        size own = omp_get_thread_num(), threads = omp_get_num_threads();
        size first = panels * own / threads * 32, last = panels * (own + 1) / threads * 32;
        for (size i = 0; i < high; i++) memset(sums + i * step + first, 0, (last - first) * sizeof(float));
        for (size k = 0; k < pairs; k += LINES) {
            size count = pairs - k < LINES ? pairs - k : LINES;
            int odd = k + count == pairs && rows % 2;
            for (size j = first; j < last; j += 32) {
                __mmask32 kept = y_width - j >= 32 ? 0xffffffffu : (1u << (y_width - j)) - 1;
                for (size i = 0; i < high; i += 8)
                    outer_tile(laced + k * high + i, high, y + 2 * k * y_step + j, y_step, kept, count, odd,
                               sums + i * step + j, step);
            }
        }
        last = last < y_width ? last : y_width;
        if (out_y == 1)
            for (size i = 0; i < x_width; i++)
                for (size j = first; j < last; j++) out[i * out_x + j] = scale * sums[i * step + j];
        else
            for (size j = first; j < last; j++)
                for (size i = 0; i < x_width; i++) out[i * out_x + j * out_y] = scale * sums[i * step + j];
    }
    return 0;
}
