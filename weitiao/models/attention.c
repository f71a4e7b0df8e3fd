/* Causal attention in bfloat16, for processors that multiply pairs of it; included by kernels.c. */

#define TILE 4     /* what rows of a product are a multiple of */
#define QUERIES 48 /* query rows that pass through all products together */

/* c [high, 16 * wide] (+)= a b, where a(m, k) at a[m * am + k * ak] is two neighbours along the sum, and so is b(k, n)
 * at b[k * bk + n]. */
INLINE void tile(const int high, const int wide, const uint32_t *a, size am, size ak, const uint32_t *b, size bk,
                 float *c, size cm, size pairs, int add) {
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (int m = 0; m < high; m++)
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) sum[m][n] = add ? _mm512_loadu_ps(c + m * cm + 16 * n) : _mm512_setzero_ps();
    for (size k = 0; k < pairs; k++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + k * bk + 16 * n);
#pragma GCC unroll 6
        for (int m = 0; m < high; m++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[m * am + k * ak]);
#pragma GCC unroll 4
            for (int n = 0; n < wide; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < high; m++)
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) _mm512_storeu_ps(c + m * cm + 16 * n, sum[m][n]);
}

#define TILED(high)                                                                                                    \
    switch (columns - n) {                                                                                             \
    case 16: tile(high, 1, left, am, ak, right, bk, to, cm, pairs, add); break;                                        \
    case 32: tile(high, 2, left, am, ak, right, bk, to, cm, pairs, add); break;                                        \
    case 48: tile(high, 3, left, am, ak, right, bk, to, cm, pairs, add); break;                                        \
    default: tile(high, 4, left, am, ak, right, bk, to, cm, pairs, add);                                               \
    }

/* The same for [rows, columns], multiples of TILE and 16; the sums of six rows fill the registers. */
static void product(size rows, size columns, const uint32_t *a, size am, size ak, const uint32_t *b, size bk, float *c,
                    size cm, size pairs, int add) {
    for (size n = 0; n < columns; n += 64) {
        const uint32_t *right = b + n, *left = a;
        float *to = c + n;
        for (size m = 0; m < rows; m += 6, left += 6 * am, to += 6 * cm) {
            if (rows - m >= 6) {
                TILED(6);
            } else if (rows - m == 4) {
                TILED(4);
            } else {
                TILED(2);
            }
        }
    }
}

/* [rows, width] numbers to [width / 2, apart] pairs of neighbours in a row; columns behind rows become zero. */
static void stand(const bf16 *from, size rows, size width, uint32_t *to, size apart) {
    for (size start = 0; start < apart; start += 16)
        for (size k = 0; k < width / 2; k++) {
            uint32_t *line = to + k * apart + start;
            for (size i = 0; i < 16; i++) {
                uint32_t two = 0;
                if (start + i < rows) memcpy(&two, from + (start + i) * width + 2 * k, 4);
                line[i] = two;
            }
        }
}

/* [rows, width] numbers to [count / 2, width] pairs of neighbours in a column; rows behind the last are zero. */
static void lace(const bf16 *from, size rows, size width, uint32_t *to, size count) {
    for (size row = 0; row < count; row += 2) {
        const bf16 *one = from + row * width, *two = one + width;
        uint32_t *line = to + row / 2 * width;
        if (row + 1 < rows) {
#pragma omp simd
            for (size i = 0; i < width; i++) line[i] = (uint32_t)one[i] | (uint32_t)two[i] << 16;
        } else {
            for (size i = 0; i < width; i++) line[i] = row < rows ? one[i] : 0;
        }
    }
}

/* e to the power of 16 numbers, none above 0, to three parts in a million; below -88 it is next to 0; a NaN passes. */
INLINE __m512 shrunk(__m512 x) {
    __m512 turns = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-88.0f), x), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(turns, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(turns, whole), value = _mm512_set1_ps(1.33335581e-3f);
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(9.61812911e-3f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(5.55041087e-2f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(2.40226507e-1f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(6.93147181e-1f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(value, whole);
}

/* Scores of one row to exponentials, in place; what it may not see becomes zero. Returns their sum. */
INLINE float exponentials(float *line, size seen, size columns) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (size i = 0; i < seen; i += 16)
        most = _mm512_mask_max_ps(most, lanes(seen - i), most, _mm512_loadu_ps(line + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (size i = 0; i < columns; i += 16) {
        __m512 share = _mm512_maskz_mov_ps(lanes(seen - i), shrunk(_mm512_sub_ps(_mm512_loadu_ps(line + i), most)));
        total = _mm512_add_ps(total, share);
        _mm512_storeu_ps(line + i, share);
    }
    return _mm512_reduce_add_ps(total);
}

/* The tokens that row s has in front and has in common with others, if there are fronts: fronts[s] is the first of them,
 * fronts[sequences + s] their number. They lie in the row itself, or in an earlier one, which alone has them. */
INLINE size borrowed(const size *fronts, const size *starts, size sequences, size s) {
    return fronts && fronts[s] != starts[s] ? fronts[sequences + s] : 0;
}

/* What lies in front, [count, width], and behind it the row's own, [own, width]. */
INLINE const bf16 *joined(const bf16 *front, size count, const bf16 *row, size own, size width, bf16 *to) {
    if (!count) return row;
    memcpy(to, front, count * width * sizeof(bf16));
    memcpy(to + count * width, row, own * width * sizeof(bf16));
    return to;
}

/* Causal attention within rows that lie end to end, row s from starts[s] to starts[s + 1]: query [heads, tokens * groups,
 * width], scaled, key and value [heads, tokens, width] to out [tokens, heads * groups, width]. Where lengths are given,
 * a row is the end of one of so many tokens, and keys and values are [sequences, heads, capacity, width]; fronts: see
 * above. Returns 0, or 1 for want of memory. width is a multiple of 16. */
int attend(const bf16 *query, const bf16 *key, const bf16 *value, bf16 *out, const size *starts, const size *fronts,
           const size *lengths, size capacity, size sequences, size heads, size groups, size width) {
    int failed = 0;
    size tokens = starts[sequences];
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (size one = 0; one < sequences * heads; one++) {
        size s = one / heads, start = starts[s], head = one % heads, asking = starts[s + 1] - start;
        size front = borrowed(fronts, starts, sequences, s), length = lengths ? lengths[s] : front + asking;
        size before = length - asking, place = lengths ? one * capacity : head * tokens + start;
        size apart = UP(length, 64), lines = UP(length, 2);
        const bf16 *q = query + (head * tokens + start) * groups * width;
        size bytes = 4 * (apart * width / 2 + lines / 2 * width + QUERIES * (apart + apart / 2 + width + width / 2) +
                          (front ? length * width : 0));
        uint32_t *keys = scratch(bytes), *values = keys + apart * width / 2;
        if (!keys) {
            failed = 1;
            continue;
        }
        size first = front ? (head * tokens + fronts[s]) * width : 0;
        bf16 *room = (bf16 *)(keys + bytes / 4) - 2 * length * width;
        const bf16 *k = joined(key + first, front, key + place * width, asking, width, room);
        const bf16 *v = joined(value + first, front, value + place * width, asking, width, room + length * width);
        float *scores = (float *)(values + lines / 2 * width), *sums = scores + QUERIES * apart;
        uint32_t *parts = (uint32_t *)(sums + QUERIES * width), *asked = parts + QUERIES * apart / 2;
        stand(k, length, width, keys, apart);
        lace(v, length, width, values, lines);
        for (size from = 0; from < asking * groups; from += QUERIES) {
            size rows = asking * groups - from < QUERIES ? asking * groups - from : QUERIES;
            size end = before + (from + rows - 1) / groups + 1, columns = UP(end, 64), full = UP(rows, TILE);
            float totals[QUERIES];
            memcpy(asked, q + from * width, rows * width * sizeof(bf16));
            memset((bf16 *)asked + rows * width, 0, (full - rows) * width * sizeof(bf16));
            product(full, columns, asked, width / 2, 1, keys, apart, scores, columns, width / 2, 0);
            for (size row = 0; row < full; row++) {
                float *line = scores + row * columns;
                totals[row] = exponentials(line, row < rows ? before + (from + row) / groups + 1 : 1, columns);
                bf16 *part = (bf16 *)parts + row * columns;
                for (size i = 0; i < columns; i += 16) put16(part + i, _mm512_loadu_ps(line + i));
            }
            product(full, width, parts, columns / 2, 1, values, width, sums, width, UP(end, 2) / 2, 0);
            for (size row = 0; row < rows; row++) {
                size t = start + (from + row) / groups, j = head * groups + (from + row) % groups;
                bf16 *o = out + (t * heads * groups + j) * width;
                __m512 scale = _mm512_set1_ps(1.0f / totals[row]);
                for (size i = 0; i < width; i += 16)
                    put16(o + i, _mm512_mul_ps(_mm512_loadu_ps(sums + row * width + i), scale));
            }
        }
    }
    return failed;
}

/* What rows have in common, the gradients at its keys and values: the sums of every row that sees it, in the order of the
 * rows, rounded once. Behind fronts lie, for every row, how many such tokens are in the rows before it, and then how many
 * in all: [heads, all, 2, width] is what is shared. */
static void gather(const float *shared, bf16 *at_key, bf16 *at_value, const size *starts, const size *fronts,
                   size sequences, size heads, size width) {
    const size *counts = fronts + sequences, *places = counts + sequences;
    size tokens = starts[sequences], total = places[sequences];
#pragma omp parallel for schedule(dynamic)
    for (size one = 0; one < sequences * heads; one++) {
        size s = one / heads, head = one % heads;
        if (fronts[s] != starts[s]) continue;
        for (size t = 0; t < counts[s]; t++)
            for (size i = 0; i < 2 * width; i += 16) {
                __m512 sum = _mm512_setzero_ps();
                for (size other = s; other < sequences; other++)
                    if (fronts[other] == starts[s] && t < counts[other])
                        sum = _mm512_add_ps(
                            sum, _mm512_loadu_ps(shared + (head * total + places[other] + t) * 2 * width + i));
                bf16 *to = i < width ? at_key + i : at_value + i - width;
                put16(to + (head * tokens + starts[s] + t) * width, sum);
            }
    }
}

/* Its gradients at query, key and value, laid out as these are, given the one at out. With fronts also where row s has its
 * sums among shared, for which there is room (see gather). */
int attend_backward(const bf16 *gradient, const bf16 *query, const bf16 *key, const bf16 *value, bf16 *at_query,
                    bf16 *at_key, bf16 *at_value, const size *starts, const size *fronts, float *shared,
                    size sequences, size heads, size groups, size width) {
    int failed = 0;
    size tokens = starts[sequences];
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (size one = 0; one < sequences * heads; one++) {
        size s = one / heads, start = starts[s], asking = starts[s + 1] - start, head = one % heads;
        size before = borrowed(fronts, starts, sequences, s), length = before + asking;
        size apart = UP(length, 64), lines = UP(length, TILE), place = (head * tokens + start) * width;
        const bf16 *q = query + place * groups;
        size bytes = 4 * (apart * width + lines / 2 * width + 2 * lines * width + QUERIES * (3 * apart + 4 * width) +
                          QUERIES / 2 * apart + (before ? length * width : 0));
        uint32_t *keys = scratch(bytes), *values = keys + apart * width / 2;
        if (!keys) {
            failed = 1;
            continue;
        }
        size first = before ? (head * tokens + fronts[s]) * width : 0;
        bf16 *room = (bf16 *)(keys + bytes / 4) - 2 * length * width;
        const bf16 *k = joined(key + first, before, key + place, asking, width, room);
        const bf16 *v = joined(value + first, before, value + place, asking, width, room + length * width);
        uint32_t *laced = values + apart * width / 2;
        float *key_sums = (float *)(laced + lines / 2 * width), *value_sums = key_sums + lines * width;
        float *shares = value_sums + lines * width, *slopes = shares + QUERIES * apart;
        uint32_t *laced_shares = (uint32_t *)(slopes + QUERIES * apart);
        uint32_t *laced_slopes = laced_shares + QUERIES / 2 * apart, *parts = laced_slopes + QUERIES / 2 * apart;
        float *sums = (float *)(parts + QUERIES / 2 * apart);
        uint32_t *asked = (uint32_t *)(sums + QUERIES * width), *given = asked + QUERIES * width / 2;
        uint32_t *laced_asked = given + QUERIES * width / 2, *laced_given = laced_asked + QUERIES / 2 * width;
        stand(k, length, width, keys, apart);
        stand(v, length, width, values, apart);
        lace(k, length, width, laced, lines);
        memset(key_sums, 0, 2 * lines * width * sizeof(float));
        for (size from = 0; from < asking * groups; from += QUERIES) {
            size rows = asking * groups - from < QUERIES ? asking * groups - from : QUERIES;
            size end = before + (from + rows - 1) / groups + 1, columns = UP(end, 64), full = UP(rows, TILE);
            memcpy(asked, q + from * width, rows * width * sizeof(bf16));
            for (size row = 0; row < rows; row++) {
                size t = start + (from + row) / groups, j = head * groups + (from + row) % groups;
                const bf16 *line = gradient + (t * heads * groups + j) * width;
                memcpy((bf16 *)given + row * width, line, width * sizeof(bf16));
            }
            memset((bf16 *)asked + rows * width, 0, (full - rows) * width * sizeof(bf16));
            memset((bf16 *)given + rows * width, 0, (full - rows) * width * sizeof(bf16));
            lace((bf16 *)asked, full, width, laced_asked, full);
            lace((bf16 *)given, full, width, laced_given, full);
            product(full, columns, asked, width / 2, 1, keys, apart, shares, columns, width / 2, 0);
            product(full, columns, given, width / 2, 1, values, apart, slopes, columns, width / 2, 0);
            for (size row = 0; row < full; row += 2) {
                __m512 scale[2], inner[2];
                for (int two = 0; two < 2; two++) {
                    float *share = shares + (row + two) * columns, *slope = slopes + (row + two) * columns;
                    size seen = row + two < rows ? before + (from + row + two) / groups + 1 : 1;
                    __m512 sum = _mm512_setzero_ps();
                    scale[two] = _mm512_set1_ps(1.0f / exponentials(share, seen, columns));
                    for (size i = 0; i < columns; i += 16)
                        sum = _mm512_fmadd_ps(_mm512_loadu_ps(share + i), _mm512_loadu_ps(slope + i), sum);
                    inner[two] = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), scale[two]);
                }
                for (size i = 0; i < columns; i += 16) {
                    __m512 share[2], slope[2];
                    for (int two = 0; two < 2; two++) {
                        size at = (row + two) * columns + i;
                        share[two] = _mm512_mul_ps(_mm512_loadu_ps(shares + at), scale[two]);
                        slope[two] = _mm512_mul_ps(share[two], _mm512_sub_ps(_mm512_loadu_ps(slopes + at), inner[two]));
                        put16((bf16 *)parts + at, slope[two]);
                    }
                    put_pairs(laced_shares + row / 2 * columns + i, share[0], share[1]);
                    put_pairs(laced_slopes + row / 2 * columns + i, slope[0], slope[1]);
                }
            }
            product(full, width, parts, columns / 2, 1, laced, width, sums, width, UP(end, 2) / 2, 0);
            for (size row = 0; row < rows; row++) {
                bf16 *o = at_query + place * groups + (from + row) * width;
                for (size i = 0; i < width; i += 16) put16(o + i, _mm512_loadu_ps(sums + row * width + i));
            }
            size ended = UP(end, TILE);
            product(ended, width, laced_shares, 1, columns, laced_given, width, value_sums, width, full / 2, 1);
            product(ended, width, laced_slopes, 1, columns, laced_asked, width, key_sums, width, full / 2, 1);
        }
        size common = fronts ? fronts[sequences + s] : 0;
        for (size t = 0; t < common; t++) {
            float *to = shared + (head * fronts[3 * sequences] + fronts[2 * sequences + s] + t) * 2 * width;
            memcpy(to, key_sums + t * width, width * sizeof(float));
            memcpy(to + width, value_sums + t * width, width * sizeof(float));
        }
        for (size t = common, to = place + (common - before) * width; t < length; t++, to += width)
            for (size i = 0; i < width; i += 16) {
                put16(at_key + to + i, _mm512_loadu_ps(key_sums + t * width + i));
                put16(at_value + to + i, _mm512_loadu_ps(value_sums + t * width + i));
            }
    }
    if (fronts && !failed) gather(shared, at_key, at_value, starts, fronts, sequences, heads, width);
    return failed;
}
