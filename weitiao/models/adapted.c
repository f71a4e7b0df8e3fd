/* A whole block whose own weights are frozen, with LoRA on any of its linears, in bfloat16: the calls that whole.py makes
 * one by one, in the same order and to the last bit the same, without a word of Python between them. Included by
 * kernels.c. */

/* y = x weightᵀ + bias + scale * (x aᵀ) bᵀ: weight [rows, columns], a [rank, columns], b [rows, rank] and the gradients
 * at these two. */
typedef struct {
    const bf16 *weight;
    const float *bias, *a, *b, *scale;
    float *at_a, *at_b;
    size rank, rows, columns;
} adapted;

/* The block, and what its rows are: n tokens, sequences of them from starts on (see attend). */
typedef struct {
    adapted linears[7]; /* q, k, v, o, gate, up, down */
    const float *input, *output, *cosine, *sine;
    const size *starts, *fronts;
    size n, sequences, hidden, inner, heads, groups, width, half, woven;
    bf16 *casts, *kept, *room; /* adapters in bfloat16; what the backward pass reads; what neither needs afterwards */
    float *inverses, *shared;
} adapted_block;

enum { Q, K, V, O, GATE, UP, DOWN };
static const size GROUPED[] = {Q, O, GATE, DOWN, 7}; /* the first linear of those that share an input */

INLINE size even(size rank) { return rank + rank % 2; }

static bf16 *taken(bf16 **memory, size count) {
    bf16 *place = *memory;
    *memory += UP(count, 32);
    return place;
}

/* Linears that share an input, and where a pass finds what belongs to their adapters: the as one below the other, small =
 * x aᵀ [n, ranks]. */
typedef struct {
    const adapted *linears;
    size count, ranks, columns;
    bf16 *a, *b[3], *small;
} adapted_group;

typedef struct {
    adapted_group groups[4];
    bf16 *query, *key, *value, *seen, *middle, *gate, *up;
} adapted_state;

/* Where all lies in casts and kept. */
static adapted_state placed(const adapted_block *w) {
    adapted_state s;
    bf16 *casts = w->casts, *kept = w->kept;
    size states = w->n * w->heads * w->width;
    for (size i = 0; i < 4; i++) {
        adapted_group *g = s.groups + i;
        *g = (adapted_group){w->linears + GROUPED[i], GROUPED[i + 1] - GROUPED[i], 0, w->linears[GROUPED[i]].columns};
        for (size j = 0; j < g->count; j++) g->ranks += even(g->linears[j].rank);
        g->a = taken(&casts, g->ranks * g->columns);
        for (size j = 0; j < g->count; j++) g->b[j] = taken(&casts, g->linears[j].rows * even(g->linears[j].rank));
        g->small = taken(&kept, w->n * g->ranks);
    }
    s.query = taken(&kept, states * w->groups);
    s.key = taken(&kept, states);
    s.value = taken(&kept, states);
    s.seen = taken(&kept, states * w->groups);
    s.middle = taken(&kept, w->n * w->hidden);
    s.gate = taken(&kept, w->n * w->inner);
    s.up = taken(&kept, w->n * w->inner);
    return s;
}

/* Adapters in bfloat16, b scaled, ranks made even by zeros. */
static void cast(const adapted_group *g) {
    bf16 *a = g->a;
    for (size j = 0; j < g->count; j++) {
        const adapted *l = g->linears + j;
        size rank = even(l->rank);
        for (size i = 0; i < rank; i++, a += g->columns) {
            const float *line = l->a + i * g->columns;
            if (i == l->rank) memset(a, 0, g->columns * sizeof(bf16));
            else
#pragma omp simd
                for (size k = 0; k < g->columns; k++) a[k] = put_bf16(line[k]);
        }
        for (size k = 0; k < l->rows; k++)
            for (size i = 0; i < rank; i++)
                g->b[j][k * rank + i] = i < l->rank ? put_bf16(l->b[k * l->rank + i] * *l->scale) : 0;
    }
}

/* What the linears make of x [n, columns]; onto, if there is any, comes on top. */
static int forth(const adapted_group *g, const bf16 *x, const bf16 *onto, bf16 *const *outs, size n) {
    size place = 0, columns = g->columns;
    part narrow = {x, columns, columns, g->a, columns, 0};
    int failed = g->ranks && products(&narrow, 1, 0, 0, g->small, g->ranks, n, g->ranks);
    for (size j = 0; j < g->count; j++) {
        const adapted *l = g->linears + j;
        size rank = even(l->rank);
        part parts[] = {{x, columns, columns, l->weight, columns, 0}, {g->small + place, g->ranks, rank, g->b[j], rank, 0}};
        failed |= products(parts, rank ? 2 : 1, l->bias, onto, outs[j], l->rows, n, l->rows);
        place += rank;
    }
    return failed;
}

/* The gradient at the input, where it is wanted, given those at the outputs, whose rows are step apart; inner [n, ranks]:
 * those between the two matrices of each adapter. */
static int towards(const adapted_group *g, bf16 *const *at, const size *steps, bf16 *inner, bf16 *at_x, size n) {
    size place = 0, columns = g->columns, count = g->count;
    part parts[4];
    int failed = 0;
    for (size j = 0; j < count; j++) {
        const adapted *l = g->linears + j;
        size rank = even(l->rank);
        part narrow = {at[j], steps[j], l->rows, g->b[j], rank, 1};
        parts[j] = (part){at[j], steps[j], l->rows, l->weight, columns, 1};
        if (rank) failed |= products(&narrow, 1, 0, 0, inner + place, g->ranks, n, rank);
        place += rank;
    }
    parts[count] = (part){inner, g->ranks, g->ranks, g->a, columns, 1};
    return failed | (at_x && products(parts, count + (g->ranks > 0), 0, 0, at_x, columns, n, columns));
}

/* The gradients at the adapters of linears whose input was x; those at the as follow each other. */
static int at_adapters(const adapted_group *g, bf16 *const *at, const size *steps, const bf16 *inner, const bf16 *x,
                       size n) {
    size place = 0, columns = g->columns, odd = 0;
    float *first = 0;
    for (size j = g->count; j--;) {
        odd |= g->linears[j].rank % 2;
        if (g->linears[j].rank) first = g->linears[j].at_a;
    }
    int failed = first && !odd && outer(inner, g->ranks, g->ranks, x, columns, columns, first, columns, 1, 1.0f, n);
    for (size j = 0; j < g->count; j++) {
        const adapted *l = g->linears + j;
        if (!l->rank) continue;
        if (odd) failed |= outer(inner + place, g->ranks, l->rank, x, columns, columns, l->at_a, columns, 1, 1.0f, n);
        failed |= outer(g->small + place, g->ranks, l->rank, at[j], steps[j], l->rows, l->at_b, 1, l->rank, *l->scale, n);
        place += even(l->rank);
    }
    return failed;
}

/* Heads side by side [n, heads * groups * width], turned, to or, where they go back, from [heads, n * groups, width]. */
static void turn(const adapted_block *w, bf16 *flat, bf16 *folded, size groups, size half, float scale, int backward) {
    size row = w->heads * groups * w->width, own = groups * w->width;
    if (backward)
        turned_bf16_bf16(folded, flat, w->cosine, w->sine, 0, scale, -1.0f, 1, w->n, w->heads, groups, w->width, half,
                         w->woven, 0, own, w->n * own, w->width, 0, row, own, w->width);
    else
        turned_bf16_bf16(flat, folded, w->cosine, w->sine, 0, scale, 1.0f, 1, w->n, w->heads, groups, w->width, half,
                         w->woven, 0, row, own, w->width, 0, own, w->n * own, w->width);
}

/* x [n, hidden] to out. Returns 0, or 1 for want of memory. */
int block_forward(const adapted_block *w, const bf16 *x, bf16 *out, float first, float second, float scale, float slope,
                  float cubic) {
    adapted_state s = placed(w);
    size n = w->n, states = n * w->heads * w->width;
    bf16 *room = w->room, *normed = taken(&room, n * w->hidden);
    bf16 *flat[] = {room, room + states * w->groups, room + states * (w->groups + 1)}, *pair[] = {s.gate, s.up};
    for (size i = 0; i < 4; i++) cast(s.groups + i);
    norm_bf16_bf16(x, 0, w->input, first, 0, normed, w->inverses, n, w->hidden);
    int failed = forth(s.groups, normed, 0, flat, n);
    turn(w, flat[Q], s.query, w->groups, w->half, scale, 0);
    turn(w, flat[K], s.key, 1, w->half, 1.0f, 0);
    turn(w, flat[V], s.value, 1, 0, 1.0f, 0);
    failed |= attend(s.query, s.key, s.value, s.seen, w->starts, w->fronts, 0, 0, w->sequences, w->heads, w->groups,
                     w->width);
    failed |= forth(s.groups + 1, s.seen, 0, &room, n);
    norm_bf16_bf16(x, room, w->output, second, s.middle, normed, w->inverses + n, n, w->hidden);
    failed |= forth(s.groups + 2, normed, 0, pair, n);
    gated_bf16_bf16(s.gate, s.up, room, slope, cubic, w->inner, n, w->inner);
    return failed | forth(s.groups + 3, room, s.middle, &out, n);
}

/* The gradients at the adapters, and at x, where it is wanted, given the one at out. */
int block_backward(const adapted_block *w, const bf16 *x, bf16 *gradient, bf16 *at_x, float scale, float slope,
                   float cubic) {
    adapted_state s = placed(w);
    size n = w->n, hidden = w->hidden, inner = w->inner, states = n * w->heads * w->width, all = 0;
    size own = w->heads * w->width, wide[] = {2 * inner, 2 * inner}, heads[] = {own * w->groups, own, own};
    for (size i = 0; i < 4; i++) all = s.groups[i].ranks > all ? s.groups[i].ranks : all;
    bf16 *room = w->room, *narrow = taken(&room, n * all), *normed = taken(&room, n * hidden);
    bf16 *at_normed = taken(&room, n * hidden), *at_middle = taken(&room, n * hidden);

    bf16 *both = room, *at_product = both + 2 * n * inner, *product = at_product + n * inner;
    bf16 *pair[] = {both, both + inner};
    int failed = towards(s.groups + 3, &gradient, &hidden, narrow, at_product, n);
    gated_backward_bf16_bf16(at_product, s.gate, s.up, both, product, slope, cubic, inner, n, inner);
    failed |= at_adapters(s.groups + 3, &gradient, &hidden, narrow, product, n);
    failed |= towards(s.groups + 2, pair, wide, narrow, at_normed, n);
    normed_bf16_bf16(s.middle, w->output, w->inverses + n, normed, n, hidden);
    failed |= at_adapters(s.groups + 2, pair, wide, narrow, normed, n);
    norm_backward_bf16_bf16(at_normed, s.middle, w->output, w->inverses + n, gradient, at_middle, 0, 0, 16, n, hidden);

    size asked = states * w->groups;
    bf16 *at_seen = room, *folded = at_seen + asked, *at[3] = {folded + asked + 2 * states};
    at[K] = at[Q] + asked;
    at[V] = at[K] + states;
    failed |= towards(s.groups + 1, &at_middle, &hidden, narrow, at_seen, n);
    failed |= at_adapters(s.groups + 1, &at_middle, &hidden, narrow, s.seen, n);
    failed |= attend_backward(at_seen, s.query, s.key, s.value, folded, folded + asked, folded + asked + states,
                              w->starts, w->fronts, w->shared, w->sequences, w->heads, w->groups, w->width);
    turn(w, at[Q], folded, w->groups, w->half, scale, 1);
    turn(w, at[K], folded + asked, 1, w->half, 1.0f, 1);
    turn(w, at[V], folded + asked + states, 1, 0, 1.0f, 1);
    failed |= towards(s.groups, at, heads, narrow, at_x ? at_normed : 0, n);
    normed_bf16_bf16(x, w->input, w->inverses, normed, n, hidden);
    failed |= at_adapters(s.groups, at, heads, narrow, normed, n);
    if (at_x) norm_backward_bf16_bf16(at_normed, x, w->input, w->inverses, at_middle, at_x, 0, 0, 16, n, hidden);
    return failed;
}
