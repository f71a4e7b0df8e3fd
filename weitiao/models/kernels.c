/* The elementwise parts of a training block, each in one pass over memory; the twin of every function is in kernels.py.
 *
 * The file includes itself once for each pair of types: E is what matrix products are computed in, R what the residual
 * stream is held in. Sums are float32. Rows are shared out among threads; a result does not depend on how many.
 */
#ifndef E

#include <math.h>
#include <stdint.h>
#include <string.h>
typedef uint16_t bf16;
typedef int64_t size;

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 512 /* numbers that are widened at once: they stay in the nearest cache */

INLINE float bits_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t float_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float get_bf16(bf16 value) { return bits_float((uint32_t)value << 16); }
INLINE float get_float(float value) { return value; }
INLINE float put_float(float value) { return value; }
INLINE bf16 put_bf16(float value) { /* to the nearest, ties to even */
    uint32_t bits = float_bits(value);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* e to the power of x, to two units in the last place; below -87 it is 0, above 88 it stops growing. */
INLINE float power_of_e(float x) {
    float clipped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x; /* a NaN passes */
    float turns = clipped * 1.44269504f, whole = rintf(turns);
    float rest = fmaf(clipped, 1.44269504f, -whole) + clipped * 1.92596299e-8f;
    float value = 1.54035304e-4f;
    value = fmaf(value, rest, 1.33335581e-3f);
    value = fmaf(value, rest, 9.61812911e-3f);
    value = fmaf(value, rest, 5.55041087e-2f);
    value = fmaf(value, rest, 2.40226507e-1f);
    value = fmaf(value, rest, 6.93147181e-1f);
    value = fmaf(value, rest, 1.0f);
    value *= bits_float((uint32_t)((int32_t)whole + 127) << 23);
    return x < -87.0f ? 0.0f : value;
}

/* A bijection of 32 bits that leaves no pattern to see. */
INLINE uint32_t mixed(uint32_t x) {
    x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu;
    return x ^ x >> 16;
}

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include "vectors.c"
#endif

#ifdef __AVX512BF16__
#include "attention.c"
#include "codes.c"
#include "decode.c"
#ifndef __AMX_BF16__ /* whose tiles multiply faster than anything here; oneDNN knows them */
#include "products.c"
#endif
#endif

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
#include "bytes.c"
#endif

#define JOIN(a, b, c) a##_##b##_##c
#define JOINED(a, b, c) JOIN(a, b, c)
#define NAME(name) JOINED(name, E, R)
#define CAT(a, b) a##b
#define CATTED(a, b) CAT(a, b)
#define GET_E CATTED(get_, E)
#define PUT_E CATTED(put_, E)
#define GET_R CATTED(get_, R)
#define PUT_R CATTED(put_, R)

#define E bf16
#define R bf16
#include "kernels.c"
#undef R
#define R float
#include "kernels.c"
#undef E
#define E float
#include "kernels.c"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "adapted.c"
#endif

#else

/* sum = x + delta (where there is a delta), out = weight * sum / rms(sum), inverse[row] = 1 / rms. */
void NAME(norm)(const R *x, const E *delta, const float *weight, float epsilon, R *sum, E *out, float *inverse,
                size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const R *in = x + row * width;
        E *o = out + row * width;
        float squares = 0.0f;
        if (delta) {
            const E *more = delta + row * width;
            R *kept = sum + row * width;
#pragma omp simd reduction(+ : squares)
            for (size i = 0; i < width; i++) {
                R value = PUT_R(GET_R(in[i]) + GET_E(more[i]));
                kept[i] = value;
                squares += GET_R(value) * GET_R(value);
            }
            in = kept;
        } else {
#pragma omp simd reduction(+ : squares)
            for (size i = 0; i < width; i++) squares += GET_R(in[i]) * GET_R(in[i]);
        }
        float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
        inverse[row] = scale;
#pragma omp simd
        for (size i = 0; i < width; i++) o[i] = PUT_E(GET_R(in[i]) * scale * weight[i]);
    }
}

/* out = weight * x * inverse: what norm gave, again. */
void NAME(normed)(const R *x, const float *weight, const float *inverse, E *out, size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const R *in = x + row * width;
        E *o = out + row * width;
        float scale = inverse[row];
#pragma omp simd
        for (size i = 0; i < width; i++) o[i] = PUT_E(GET_R(in[i]) * scale * weight[i]);
    }
}

/* out = residual + the gradient at x of norm, given its gradient at out; narrow (where wanted) is out in E; slopes
 * [parts, width] gather the gradient at weight, part by part of the rows. */
void NAME(norm_backward)(const E *gradient, const R *x, const float *weight, const float *inverse, const R *residual,
                         R *out, E *narrow, float *slopes, size parts, size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size part = 0; part < parts; part++) {
        float *slope = slopes ? slopes + part * width : 0;
        for (size row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const E *g = gradient + row * width;
            const R *in = x + row * width;
            R *o = out + row * width;
            float scale = inverse[row], inner = 0.0f;
#pragma omp simd reduction(+ : inner)
            for (size i = 0; i < width; i++) inner += GET_E(g[i]) * weight[i] * GET_R(in[i]);
            inner *= scale * scale / (float)width;
            if (slope) {
#pragma omp simd
                for (size i = 0; i < width; i++) slope[i] += GET_E(g[i]) * GET_R(in[i]) * scale;
            }
            if (residual) {
                const R *past = residual + row * width;
#pragma omp simd
                for (size i = 0; i < width; i++)
                    o[i] = PUT_R(GET_R(past[i]) + scale * (GET_E(g[i]) * weight[i] - GET_R(in[i]) * inner));
            } else {
#pragma omp simd
                for (size i = 0; i < width; i++)
                    o[i] = PUT_R(scale * (GET_E(g[i]) * weight[i] - GET_R(in[i]) * inner));
            }
            if (narrow) {
                E *n = narrow + row * width;
#pragma omp simd
                for (size i = 0; i < width; i++) n[i] = PUT_E(GET_R(o[i]));
            }
        }
    }
}

/* out = x + delta. */
void NAME(add)(const R *x, const E *delta, R *out, size count) {
#pragma omp parallel for simd schedule(static)
    for (size i = 0; i < count; i++) out[i] = PUT_R(GET_R(x[i]) + GET_E(delta[i]));
}

/* Rows of x, times scales column by column where there are any, in eight bits: the nearest of 127 steps either way to the
 * largest of the row, in rows of step numbers filled up with zeros; the size of a row's step, and the sum of its codes. A
 * row with a NaN or an infinity gets steps of NaN or infinity. */
void NAME(rounded)(const E *x, size x_step, const float *scales, int8_t *out, size step, float *sizes, int32_t *sums,
                   size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const E *in = x + row * x_step;
        int8_t *o = out + row * step;
        uint32_t most = 0;
        int32_t sum = 0;
#pragma omp simd reduction(max : most)
        for (size i = 0; i < width; i++) {
            uint32_t bits = float_bits(GET_E(in[i]) * (scales ? scales[i] : 1.0f)) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        float largest = bits_float(most), turn = most ? 127.0f / largest : 0.0f;
        sizes[row] = largest / 127.0f;
#pragma omp simd reduction(+ : sum)
        for (size i = 0; i < width; i++) {
            int32_t code = (int32_t)rintf(GET_E(in[i]) * (scales ? scales[i] : 1.0f) * turn);
            o[i] = (int8_t)code;
            sum += (int8_t)code;
        }
        memset(o + width, 0, step - width);
        sums[row] = sum;
    }
}

/* out = gate / (1 + e^-z) * up, where z = gate (slope + cubic gate^2): SiLU where z is the gate itself, and GELU in its
 * tanh form with other numbers. The rows of gate and up are step apart. */
void NAME(gated)(const E *gate, const E *up, E *out, float slope, float cubic, size step, size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const E *g = gate + row * step, *u = up + row * step;
        E *o = out + row * width;
#pragma omp simd
        for (size i = 0; i < width; i++) {
            float x = GET_E(g[i]);
            o[i] = PUT_E(x / (1.0f + power_of_e(-x * (slope + cubic * x * x))) * GET_E(u[i]));
        }
    }
}

/* The gradients at gate and up, one row of both [2 * width], given the one at the product; the product again, where it
 * is wanted. */
void NAME(gated_backward)(const E *gradient, const E *gate, const E *up, E *both, E *out, float slope, float cubic,
                          size step, size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const E *at = gradient + row * width, *g = gate + row * step, *u = up + row * step;
        E *at_gate = both + 2 * row * width, *at_up = at_gate + width, *o = out ? out + row * width : 0;
        float shares[BLOCK];
        for (size start = 0; start < width; start += BLOCK) {
            size end = start + BLOCK < width ? start + BLOCK : width;
#pragma omp simd
            for (size i = start; i < end; i++) {
                float x = GET_E(g[i]), steep = GET_E(at[i]), bend = cubic * x * x;
                float share = 1.0f / (1.0f + power_of_e(-x * (slope + bend)));
                shares[i - start] = share;
                at_gate[i] = PUT_E(steep * GET_E(u[i]) * share * (1.0f + x * (1.0f - share) * (slope + 3.0f * bend)));
                at_up[i] = PUT_E(steep * x * share);
            }
            if (o) {
#pragma omp simd
                for (size i = start; i < end; i++) o[i] = PUT_E(GET_E(g[i]) * shares[i - start] * GET_E(u[i]));
            }
        }
    }
}

/* Heads moved from one layout to another and turned by their position's angles on the way:
 * to[b, t, h, j, :] = turn(from[b, t, h, j, :]) * scale, where from and to have strides of their own for b, t, h, j. The
 * first 2 * half numbers of a head are turned, in pairs of neighbours where they are woven, else half apart; cosine and
 * sine [T, half] lie apart from one b to the next. direction -1 turns back; half 0 moves only. */
void NAME(turned)(const E *from, E *to, const float *cosine, const float *sine, size apart, float scale,
                  float direction, size batch, size length, size heads, size groups, size width, size half, size woven,
                  size from_b, size from_t, size from_h, size from_j, size to_b, size to_t, size to_h, size to_j) {
#pragma omp parallel for schedule(static)
    for (size place = 0; place < batch * length; place++) {
        size b = place / length, t = place % length;
        const float *c = cosine + b * apart + t * half, *s = sine + b * apart + t * half;
        for (size head = 0; head < heads * groups; head++) {
            size h = head / groups, j = head % groups;
            const E *in = from + b * from_b + t * from_t + h * from_h + j * from_j;
            E *o = to + b * to_b + t * to_t + h * to_h + j * to_j;
            if (woven) {
#pragma omp simd
                for (size i = 0; i < half; i++) {
                    float x = GET_E(in[2 * i]), y = GET_E(in[2 * i + 1]), turn = s[i] * direction;
                    o[2 * i] = PUT_E((x * c[i] - y * turn) * scale);
                    o[2 * i + 1] = PUT_E((y * c[i] + x * turn) * scale);
                }
            } else {
#pragma omp simd
                for (size i = 0; i < half; i++) {
                    float x = GET_E(in[i]), y = GET_E(in[i + half]), turn = s[i] * direction;
                    o[i] = PUT_E((x * c[i] - y * turn) * scale);
                    o[i + half] = PUT_E((y * c[i] + x * turn) * scale);
                }
            }
            if (scale == 1.0f) {
                memcpy(o + 2 * half, in + 2 * half, (width - 2 * half) * sizeof(E));
            } else {
#pragma omp simd
                for (size i = 2 * half; i < width; i++) o[i] = PUT_E(GET_E(in[i]) * scale);
            }
        }
    }
}

/* Scores [n, queries * groups, keys] to shares of what a query may see, in place: its keys up to start + query. */
void NAME(shares)(E *scores, size n, size queries, size groups, size keys, size start) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < n * queries * groups; row++) {
        size seen = start + row % (queries * groups) / groups + 1;
        E *line = scores + row * keys;
        float most = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : most)
        for (size i = 0; i < seen; i++) most = GET_E(line[i]) > most ? GET_E(line[i]) : most;
        float kept[BLOCK];
        for (size from = 0; from < seen; from += BLOCK) {
            size count = seen - from < BLOCK ? seen - from : BLOCK;
#pragma omp simd reduction(+ : total)
            for (size i = 0; i < count; i++) {
                kept[i] = power_of_e(GET_E(line[from + i]) - most);
                total += kept[i];
            }
            if (seen <= BLOCK) break; /* the usual case: rounded once */
#pragma omp simd
            for (size i = 0; i < count; i++) line[from + i] = PUT_E(kept[i]);
        }
        float scale = 1.0f / total;
        if (seen <= BLOCK) {
#pragma omp simd
            for (size i = 0; i < seen; i++) line[i] = PUT_E(kept[i] * scale);
        } else {
#pragma omp simd
            for (size i = 0; i < seen; i++) line[i] = PUT_E(GET_E(line[i]) * scale);
        }
        memset(line + seen, 0, (keys - seen) * sizeof(E));
    }
}

/* The gradient at the scores, in the place of the one at the shares. */
void NAME(shares_backward)(const E *shares, E *gradient, size n, size queries, size groups, size keys, size start) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < n * queries * groups; row++) {
        size seen = start + row % (queries * groups) / groups + 1;
        const E *share = shares + row * keys;
        E *line = gradient + row * keys;
        float inner = 0.0f;
#pragma omp simd reduction(+ : inner)
        for (size i = 0; i < seen; i++) inner += GET_E(share[i]) * GET_E(line[i]);
#pragma omp simd
        for (size i = 0; i < seen; i++) line[i] = PUT_E(GET_E(share[i]) * (GET_E(line[i]) - inner));
        memset(line + seen, 0, (keys - seen) * sizeof(E));
    }
}

/* Logits [rows, width] to log-probabilities of their targets; where steep is set, the logits become the gradient of that
 * number: one at the target, less the probabilities. */
void NAME(target_logps)(E *logits, const int64_t *targets, float *logps, size steep, size rows, size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        E *line = logits + row * width;
        float most = -INFINITY, total = 0.0f, wanted = GET_E(line[targets[row]]);
#pragma omp simd reduction(max : most)
        for (size i = 0; i < width; i++) most = GET_E(line[i]) > most ? GET_E(line[i]) : most;
#pragma omp simd reduction(+ : total)
        for (size i = 0; i < width; i++) total += power_of_e(GET_E(line[i]) - most);
        float shift = most + logf(total);
        logps[row] = wanted - shift;
        if (!steep) continue;
#pragma omp simd
        for (size i = 0; i < width; i++) line[i] = PUT_E(-power_of_e(GET_E(line[i]) - shift));
        line[targets[row]] = PUT_E(1.0f - power_of_e(wanted - shift));
    }
}

/* out = x, each number zero with probability dropped / 65536 and else times scale; added to out where add is set. The
 * same seed drops the same places. */
void NAME(dropped)(const E *x, E *out, size seed, size key, size dropped, float scale, size add, size rows,
                   size width) {
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const E *in = x + row * width;
        E *o = out + row * width;
        uint32_t state[32], limit = (uint32_t)dropped;
        uint32_t first = mixed((uint32_t)row ^ (uint32_t)seed) ^ (uint32_t)key;
#pragma omp simd
        for (int lane = 0; lane < 32; lane++) state[lane] = mixed(first + 0x9e3779b9u * (uint32_t)(lane + 1)) | 1u;
        for (size start = 0; start < width; start += 32) {
            float keep[32];
#pragma omp simd
            for (int lane = 0; lane < 32; lane++) {
                uint32_t drawn = state[lane];
                drawn ^= drawn << 13; drawn ^= drawn >> 17; drawn ^= drawn << 5;
                state[lane] = drawn;
                keep[lane] = (drawn >> 16) < limit ? 0.0f : scale;
            }
            size count = width - start < 32 ? width - start : 32;
            if (add) {
#pragma omp simd
                for (size i = 0; i < count; i++)
                    o[start + i] = PUT_E(GET_E(o[start + i]) + GET_E(in[start + i]) * keep[i]);
            } else {
#pragma omp simd
                for (size i = 0; i < count; i++) o[start + i] = PUT_E(GET_E(in[start + i]) * keep[i]);
            }
        }
    }
}

#endif
