/* One more token of every row through all blocks, for generation with few rows: every weight is read once. Included by
 * kernels.c. */

/* y = x weightᵀ + bias + (x aᵀ) bᵀ: weight [rows, columns], a [rank, columns], b [rows, rank], scaled. Where there are
 * scales, the weight is nf4 codes, and columns are a multiple of CODES. */
typedef struct {
    const void *weight;
    const float *bias;
    const bf16 *a, *b;
    size rank, rows, columns;
    const float *scales;
} linear;

/* A block; norms of queries and keys may be missing. keys and values [batch, heads, capacity, width]. */
typedef struct {
    linear q, k, v, o, gate, up, down;
    const float *input, *output, *q_norm, *k_norm;
    bf16 *keys, *values;
} layer;

/* What a step works in: [batch, ...] each. */
typedef struct {
    bf16 *normed, *seen, *product, *small;
    float *states;
} bench;

#define MOST_WIDTH 256 /* of a head, and queries that share one key, and rows */
#define MOST_GROUPS 16
#define MOST_BATCH 32
#define DOTS 4   /* rows of a weight, and of x, that are multiplied together */
#define SHARE 32 /* rows of a weight that a thread takes at a time */

/* The sums of four registers. */
INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* to[b * step + n * apart] (+)= the products of high rows of x with wide rows of a weight, DOTS or one, that are apart
 * rows from each other. */
INLINE void dot_tile(const int high, const int wide, const bf16 *x, size x_step, const bf16 *weight, size apart,
                     size columns, float *to, size step, int add) {
    __m512 sum[DOTS][DOTS];
    for (int b = 0; b < DOTS; b++)
        for (int n = 0; n < DOTS; n++) sum[b][n] = _mm512_setzero_ps();
    for (size k = 0; k < columns; k += 32) {
        __mmask32 kept = columns - k >= 32 ? 0xffffffffu : (1u << (columns - k)) - 1;
        __m512bh right[DOTS];
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++)
            right[n] = (__m512bh)_mm512_maskz_loadu_epi16(kept, weight + n * apart * columns + k);
#pragma GCC unroll 4
        for (int b = 0; b < high; b++) {
            __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(kept, x + b * x_step + k);
#pragma GCC unroll 4
            for (int n = 0; n < wide; n++) sum[b][n] = _mm512_dpbf16_ps(sum[b][n], left, right[n]);
        }
    }
    for (int one = 0; one < (wide == 1 ? 1 : high); one++) { /* row by row of x, or all rows at once */
        __m512 *line = sum[one];
        float four[DOTS];
        _mm_storeu_ps(four, wide == 1 ? four_sums(sum[0][0], sum[1][0], sum[2][0], sum[3][0])
                                      : four_sums(line[0], line[1], line[2], line[3]));
        for (int i = 0; i < (wide == 1 ? high : wide); i++) {
            float *place = wide == 1 ? to + i * step : to + one * step + i * apart;
            *place = add ? *place + four[i] : four[i];
        }
    }
}

#define DOT_ROWS(wide, n)                                                                                              \
    for (size b = 0; b < batch; b += DOTS) {                                                                           \
        const bf16 *rows = x + b * x_step, *line = weight + (n) * columns;                                             \
        float *place = to + b * step + (n);                                                                            \
        switch (batch - b) {                                                                                           \
        case 1: dot_tile(1, wide, rows, x_step, line, apart, columns, place, step, add); break;                        \
        case 2: dot_tile(2, wide, rows, x_step, line, apart, columns, place, step, add); break;                        \
        case 3: dot_tile(3, wide, rows, x_step, line, apart, columns, place, step, add); break;                        \
        default: dot_tile(4, wide, rows, x_step, line, apart, columns, place, step, add);                              \
        }                                                                                                              \
    }

/* to [batch, count] (+)= x [batch, columns] weightᵀ. Four rows of the weight at once, far from each other: each quarter is
 * read from its beginning to its end, which the processor fetches ahead twice as fast as neighbours in turn. */
static void dots(const bf16 *x, size x_step, size batch, const bf16 *weight, size columns, float *to, size step,
                 size count, int add) {
    size apart = count / DOTS;
    for (size n = 0; n < apart; n++) DOT_ROWS(DOTS, n)
    for (size n = DOTS * apart; n < count; n++) DOT_ROWS(1, n)
}

/* Rows from .. from + count of a linear's output, to [batch, count]; small [batch, rank] is x aᵀ; room for DOTS rows of
 * a weight that is codes. */
static void linear_rows(const linear *l, const bf16 *x, const bf16 *small, size small_step, size batch, size from,
                        size count, float *to, size step, bf16 *room) {
    size blocks = l->columns / CODES;
    if (!l->scales)
        dots(x, l->columns, batch, (const bf16 *)l->weight + from * l->columns, l->columns, to, step, count, 0);
    else
        for (size n = 0; n < count; n += DOTS) {
            size wide = count - n < DOTS ? count - n : DOTS;
            const uint8_t *codes = (const uint8_t *)l->weight + (from + n) * l->columns / 2;
            spread_blocks(codes, l->scales + (from + n) * blocks, wide * blocks, room);
            dots(x, l->columns, batch, room, l->columns, to + n, step, wide, 0);
        }
    if (l->rank) dots(small, small_step, batch, l->b + from * l->rank, l->rank, to, step, count, 1);
    if (l->bias)
        for (size b = 0; b < batch; b++)
            for (size n = 0; n < count; n++) to[b * step + n] += l->bias[from + n];
}

/* x aᵀ of linears that share an input, side by side in small [batch, all ranks]; to be called by all threads. */
static void narrow(const linear *const *all, size count, const bf16 *x, size batch, bf16 *small) {
    size total = 0, place = 0;
    for (size i = 0; i < count; i++) total += all[i]->rank;
    for (size i = 0; i < count; i++) {
        const linear *l = all[i];
#pragma omp for schedule(static) nowait
        for (size n = 0; n < l->rank; n++)
            for (size b = 0; b < batch; b++) {
                float found;
                dots(x + b * l->columns, l->columns, 1, l->a + n * l->columns, l->columns, &found, 1, 1, 0);
                small[b * total + place + n] = put_bf16(found);
            }
        place += l->rank;
    }
#pragma omp barrier
}

/* out = weight * x / rms(x). */
static void norm_row(const bf16 *x, const float *weight, float epsilon, size width, bf16 *out) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (size i = 0; i < width; i++) squares += get_bf16(x[i]) * get_bf16(x[i]);
    float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
#pragma omp simd
    for (size i = 0; i < width; i++) out[i] = put_bf16(get_bf16(x[i]) * scale * weight[i]);
}

/* A head's numbers normed (where there is a weight), turned by its position's angles, scaled and rounded. */
static void place_head(const float *from, const float *norm, float epsilon, const float *cosine, const float *sine,
                       size half, size width, float scale, bf16 *to) {
    float by = 1.0f, head[MOST_WIDTH];
    if (norm) {
        float squares = 0.0f;
        for (size i = 0; i < width; i++) squares += from[i] * from[i];
        by = 1.0f / sqrtf(squares / (float)width + epsilon);
    }
    for (size i = 0; i < width; i++) head[i] = from[i] * (norm ? by * norm[i] : 1.0f);
    for (size i = 0; i < half; i++) {
        to[i] = put_bf16((head[i] * cosine[i] - head[i + half] * sine[i]) * scale);
        to[i + half] = put_bf16((head[i + half] * cosine[i] + head[i] * sine[i]) * scale);
    }
    for (size i = 2 * half; i < width; i++) to[i] = put_bf16(head[i] * scale);
}

/* scale * the sum of seen values, each as often as its share says: 16 * wide numbers of each. */
INLINE void mean(const int wide, const float *shares, const bf16 *values, size seen, size width, float scale, bf16 *out) {
    __m512 sum[4];
    for (int n = 0; n < wide; n++) sum[n] = _mm512_setzero_ps();
    for (size k = 0; k < seen; k++) {
        __m512 share = _mm512_set1_ps(shares[k]);
        for (int n = 0; n < wide; n++) {
            __m256i half = _mm256_loadu_si256((const __m256i *)(values + k * width + 16 * n));
            __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            sum[n] = _mm512_fmadd_ps(share, value, sum[n]);
        }
    }
    for (int n = 0; n < wide; n++) put16(out + 16 * n, _mm512_mul_ps(sum[n], _mm512_set1_ps(scale)));
}

/* Attention of groups queries [groups, width] over seen keys and values [seen, width]; shares: room for [groups, seen]. */
static void look(const bf16 *query, const bf16 *keys, const bf16 *values, size seen, size groups, size width,
                 float *shares, bf16 *out) {
    for (size j = 0; j < groups; j++) {
        float *line = shares + j * seen, most = -INFINITY, total = 0.0f;
        dots(keys, width, seen, query + j * width, width, line, 1, 1, 0);
        for (size k = 0; k < seen; k++) most = line[k] > most ? line[k] : most;
#pragma omp simd reduction(+ : total)
        for (size k = 0; k < seen; k++) {
            line[k] = power_of_e(line[k] - most);
            total += line[k];
        }
        size i = 0;
        for (; i + 64 <= width; i += 64) mean(4, line, values + i, seen, width, 1.0f / total, out + j * width + i);
        for (; i < width; i += 16) mean(1, line, values + i, seen, width, 1.0f / total, out + j * width + i);
    }
}

/* x [batch, hidden], one token of every row, becomes what the blocks make of it. Row b has lengths[b] tokens before it,
 * and its keys and values are added to the block's, [batch, heads, capacity, width]. cosine and sine [batch, half] are
 * the angles of its position; epsilons are those of norms, of the last two of queries and keys. width is a multiple of
 * 16. Returns 0, or 1 for want of memory. */
int decode(const layer *layers, size count, bf16 *x, const float *cosine, const float *sine, const size *lengths,
           float epsilon, float scale, size batch, size hidden, size heads, size groups, size width, size half,
           size capacity) {
    size inner = 0, rank = 0, longest = 0, all = (groups + 2) * heads * width;
    for (size i = 0; i < count; i++) {
        const layer *l = layers + i;
        size ranks = l->q.rank + l->k.rank + l->v.rank, more = l->gate.rank + l->up.rank;
        ranks = ranks > more ? ranks : more;
        more = l->o.rank > l->down.rank ? l->o.rank : l->down.rank;
        ranks = ranks > more ? ranks : more;
        rank = ranks > rank ? ranks : rank;
        inner = l->gate.rows > inner ? l->gate.rows : inner;
    }
    size widest = groups * heads * width > inner ? groups * heads * width : inner;
    widest = DOTS * (widest > hidden ? widest : hidden);
    for (size b = 0; b < batch; b++) longest = lengths[b] + 1 > longest ? lengths[b] + 1 : longest;
    size narrowed = UP(batch * (hidden + groups * heads * width + inner + rank), 32);
    char *memory = scratch(2 * narrowed + 4 * batch * all);
    if (!memory) return 1;
    bench w = {(bf16 *)memory, 0, 0, 0, (float *)(memory + 2 * narrowed)};
    w.seen = w.normed + batch * hidden;
    w.product = w.seen + batch * groups * heads * width;
    w.small = w.product + batch * inner;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *shares = own_scratch(4 * (groups * longest + 2 * batch * SHARE) + 2 * widest);
        float *own = shares + groups * longest;
        bf16 *room = (bf16 *)(own + 2 * batch * SHARE);
        if (!shares) failed = 1;
        for (size i = 0; i < count; i++) {
            const layer *l = layers + i;
            const linear *const qkv[] = {&l->q, &l->k, &l->v}, *const pair[] = {&l->gate, &l->up};
            const linear *const o[] = {&l->o}, *const down[] = {&l->down};
            size ranks = l->q.rank + l->k.rank + l->v.rank, place = 0, small = 0;
#pragma omp for schedule(static)
            for (size b = 0; b < batch; b++) norm_row(x + b * hidden, l->input, epsilon, hidden, w.normed + b * hidden);
            if (ranks) narrow(qkv, 3, w.normed, batch, w.small);
            for (int part = 0; part < 3; part++) {
                size rows = qkv[part]->rows;
#pragma omp for schedule(dynamic) nowait
                for (size n = 0; n < rows; n += SHARE)
                    if (!failed)
                        linear_rows(qkv[part], w.normed, w.small + small, ranks, batch, n,
                                    rows - n < SHARE ? rows - n : SHARE, w.states + place + n, all, room);
                place += rows;
                small += qkv[part]->rank;
            }
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (size one = 0; one < batch * heads; one++) {
                size b = one / heads, head = one % heads, before = lengths[b];
                const float *states = w.states + b * all, *c = cosine + b * half, *s = sine + b * half;
                const float *key = states + (groups * heads + head) * width;
                bf16 *keys = l->keys + one * capacity * width, *values = l->values + one * capacity * width;
                bf16 query[MOST_GROUPS * MOST_WIDTH];
                for (size j = 0; j < groups; j++)
                    place_head(states + (head * groups + j) * width, l->q_norm, epsilon, c, s, half, width, scale,
                               query + j * width);
                place_head(key, l->k_norm, epsilon, c, s, half, width, 1.0f, keys + before * width);
                for (size d = 0; d < width; d++) values[before * width + d] = put_bf16(key[heads * width + d]);
                if (!failed)
                    look(query, keys, values, before + 1, groups, width, shares,
                         w.seen + (b * heads + head) * groups * width);
            }
            if (l->o.rank) narrow(o, 1, w.seen, batch, w.small);
#pragma omp for schedule(dynamic)
            for (size n = 0; n < hidden; n += SHARE) {
                size wide = hidden - n < SHARE ? hidden - n : SHARE;
                if (failed) continue;
                linear_rows(&l->o, w.seen, w.small, l->o.rank, batch, n, wide, own, wide, room);
                for (size b = 0; b < batch; b++)
                    for (size k = 0; k < wide; k++)
                        x[b * hidden + n + k] = put_bf16(get_bf16(x[b * hidden + n + k]) + own[b * wide + k]);
            }
#pragma omp for schedule(static)
            for (size b = 0; b < batch; b++)
                norm_row(x + b * hidden, l->output, epsilon, hidden, w.normed + b * hidden);
            ranks = l->gate.rank + l->up.rank;
            if (ranks) narrow(pair, 2, w.normed, batch, w.small);
            size middle = l->gate.rows;
#pragma omp for schedule(dynamic)
            for (size n = 0; n < middle; n += SHARE) {
                size wide = middle - n < SHARE ? middle - n : SHARE;
                float *up = own + batch * wide;
                if (failed) continue;
                linear_rows(&l->gate, w.normed, w.small, ranks, batch, n, wide, own, wide, room);
                linear_rows(&l->up, w.normed, w.small + l->gate.rank, ranks, batch, n, wide, up, wide, room);
                for (size b = 0; b < batch; b++)
#pragma omp simd
                    for (size k = 0; k < wide; k++) {
                        float g = own[b * wide + k];
                        w.product[b * middle + n + k] = put_bf16(g / (1.0f + power_of_e(-g)) * up[b * wide + k]);
                    }
            }
            if (l->down.rank) narrow(down, 1, w.product, batch, w.small);
#pragma omp for schedule(dynamic)
            for (size n = 0; n < hidden; n += SHARE) {
                size wide = hidden - n < SHARE ? hidden - n : SHARE;
                if (failed) continue;
                linear_rows(&l->down, w.product, w.small, l->down.rank, batch, n, wide, own, wide, room);
                for (size b = 0; b < batch; b++)
                    for (size k = 0; k < wide; k++)
                        x[b * hidden + n + k] = put_bf16(get_bf16(x[b * hidden + n + k]) + own[b * wide + k]);
            }
        }
    }
    return failed;
}

/* out [batch, rows] = x [batch, columns] weightᵀ, for few rows of x. */
void few(const bf16 *x, const bf16 *weight, bf16 *out, size batch, size rows, size columns) {
#pragma omp parallel for schedule(dynamic)
    for (size n = 0; n < rows; n += SHARE) {
        float own[MOST_BATCH * SHARE];
        size wide = rows - n < SHARE ? rows - n : SHARE;
        dots(x, columns, batch, weight + n * columns, columns, own, wide, wide, 0);
        for (size b = 0; b < batch; b++)
            for (size k = 0; k < wide; k++) out[b * rows + n + k] = put_bf16(own[b * wide + k]);
    }
}
