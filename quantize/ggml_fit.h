/* Vector helpers and the fits of scales. Each lane of a vector is one block, so nothing is summed across
 * lanes, and every lane does the operations of ggml's scalar reference (ggml-quants.c, MIT) in its order. With
 * -ffp-contract=off the bytes therefore equal ggml_quantize_chunk's, on every instruction set.
 *
 * Included once per instruction set by ggml_blocks.c, which defines ISA(name), LANES, MIN_, MAX_ and SQRT_
 * before: a helper defined outside would have its vectors cut into SSE's before it is inlined.
 */

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

/* LANES blocks, transposed: lane i of x[j] is value j of block i. */
typedef struct {
    const vf *x;
    vf *importance; /* as x; NULL: none */
    vf mean_square; /* of each block's row; set for types of 32 values under an importance */
    int least_squares;
} Batch;

static inline ALWAYS vf splat(float x) { return x - (vf){0}; }
static inline ALWAYS vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline ALWAYS vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
static inline ALWAYS vu integers(vf x) { return (vu)__builtin_convertvector(x, vi); }
static inline ALWAYS vf floats(vu x) { return __builtin_convertvector((vi)x, vf); }

static inline ALWAYS vf reciprocal(vf x) { return pick(absolute(x) < NORMAL, splat(0), 1.f / x); }

/* float16 bits, to nearest even, infinity beyond 65504: half_of of every lane. */
static inline ALWAYS vu halves(vf x) {
    const vu w = (vu)x, exponent = (w + w) & 0xff000000u;
    const vu bias = (vu)pick((vi)(exponent < 0x71000000u), (vf)(0x71000000u - (vu){0}), (vf)exponent);
    const vf base = absolute(x) * 0x1p+112f * 0x1p-110f;
    const vu bits = (vu)((vf)((bias >> 1) + 0x07800000u) + base);
    return (w & 0x80000000u) >> 16 | ((bits >> 13 & 0x7c00u) + (bits & 0xfffu));
}

/* float16 bits of finite values -> float32. */
static inline ALWAYS vf from_halves(vu half) {
    const vu magnitude = half & 0x7fffu;
    const vf normal = (vf)((magnitude << 13) + 0x38000000u); /* exponents from bias 15 to 127 */
    const vf subnormal = floats(magnitude) * 0x1p-24f;
    return (vf)((vu)pick((vi)(magnitude < 0x400u), subnormal, normal) | (half & 0x8000u) << 16);
}

/* tile[j] becomes value j of LANES blocks whose first values are `stride` apart. */
static inline ALWAYS void ISA(transpose)(const float *src, int64_t stride, int count, vf *tile) {
    for (int j = 0; j < count; j += 4) {
        for (int lane = 0; lane < LANES; lane += 4) {
            v4 a, b, c, d;
            memcpy(&a, src + (lane + 0) * stride + j, 16);
            memcpy(&b, src + (lane + 1) * stride + j, 16);
            memcpy(&c, src + (lane + 2) * stride + j, 16);
            memcpy(&d, src + (lane + 3) * stride + j, 16);
            const v4 ab0 = SHUFFLE4(a, b, 0, 4, 1, 5), ab1 = SHUFFLE4(a, b, 2, 6, 3, 7);
            const v4 cd0 = SHUFFLE4(c, d, 0, 4, 1, 5), cd1 = SHUFFLE4(c, d, 2, 6, 3, 7);
            float *to = (float *)(tile + j) + lane;
            *(v4 *)(to + 0 * LANES) = SHUFFLE4(ab0, cd0, 0, 1, 4, 5);
            *(v4 *)(to + 1 * LANES) = SHUFFLE4(ab0, cd0, 2, 3, 6, 7);
            *(v4 *)(to + 2 * LANES) = SHUFFLE4(ab1, cd1, 0, 1, 4, 5);
            *(v4 *)(to + 3 * LANES) = SHUFFLE4(ab1, cd1, 2, 3, 6, 7);
        }
    }
}

/* Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. */
static inline ALWAYS vf ISA(nearest)(vf x) { return (x + 12582912.f) - 12582912.f; }

static inline ALWAYS vf ISA(level)(vf x, float low, float high) {
    return MAX_(MIN_(ISA(nearest)(x), splat(high)), splat(low));
}

/* The value of largest magnitude, the first of equals; its magnitude in *amax. */
static inline ALWAYS vf ISA(extreme)(const vf *x, int n, vf *amax) {
    vf largest = splat(0), magnitude = splat(0);
    for (int j = 0; j < n; j++) {
        const vf a = absolute(x[j]);
        const vi larger = a > magnitude;
        magnitude = pick(larger, a, magnitude);
        largest = pick(larger, x[j], largest);
    }
    *amax = magnitude;
    return largest;
}

/* make_qkx2_quants and make_qkx3_quants: x ~ scale * level + low, levels 0..top, weighted least squares from
 * steps + 1 starting scales; `below`: low is at most 0. Returns the scale; levels (32) are those of the best start. */
static inline ALWAYS vf ISA(fit_affine)(const vf *x, const vf *w, float top, float first, float delta, int steps,
                                        int below, vf *low_out, vf *levels) {
    const int n = 32;
    vf low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int j = 1; j < n; j++) {
        low = pick(x[j] < low, x[j], low);
        high = pick(x[j] > high, x[j], high);
        sum_w += w[j];
        sum_x += w[j] * x[j];
    }
    if (below) low = pick(low > 0.f, splat(0), low);
    const vi flat = high == low;
    const vf start_range = pick(flat, splat(1), high - low);
    vf scale_inverse = splat(top) / start_range, scale = 1.f / scale_inverse, least = splat(0);
    const vf start = low;
    for (int j = 0; j < n; j++) {
        const vf error = scale * ISA(level)(scale_inverse * (x[j] - low), 0, top) + low - x[j];
        least += w[j] * (error * error);
    }
    vf best_inverse = scale_inverse, best_low = low; /* what the best levels were rounded with */
    vf tried[32];
    for (int step = 0; step <= steps; step++) {
        /* ggml rounds with the low of the best fit so far, not with the least value */
        scale_inverse = (first + delta * step + top) / pick(flat, splat(1), high - low);
        vf sum_l = splat(0), sum_l2 = splat(0), sum_xl = splat(0);
        for (int j = 0; j < n; j++) {
            const vf l = ISA(level)(scale_inverse * (x[j] - low), 0, top), wl = w[j] * l;
            tried[j] = l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[j];
        }
        const vf determinant = sum_w * sum_l2 - sum_l * sum_l;
        vf this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        vf this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const vi above = below ? this_low > 0.f : (vi){0};
        this_scale = pick(above, sum_xl / sum_l2, this_scale);
        this_low = pick(above, splat(0), this_low);
        vf total = splat(0);
        for (int j = 0; j < n; j++) {
            const vf error = this_scale * tried[j] + this_low - x[j];
            total += w[j] * (error * error);
        }
        const vi better = (determinant > 0.f) & (total < least);
        least = pick(better, total, least);
        best_inverse = pick(better, scale_inverse, best_inverse);
        best_low = pick(better, low, best_low);
        scale = pick(better, this_scale, scale);
        low = pick(better, this_low, low);
    }
    for (int j = 0; j < n; j++)
        levels[j] = pick(flat, splat(0), ISA(level)(best_inverse * (x[j] - best_low), 0, top));
    *low_out = pick(flat, start, low);
    return pick(flat, splat(0), scale);
}

/* make_qx_quants, rmse_type 1: x ~ scale * (level - top), levels 0..2 top - 1, the best of 19 starting scales. */
static inline ALWAYS vf ISA(fit_symmetric)(const vf *x, const vf *w, int n, float top, vf *levels) {
    vf amax;
    const vf largest = ISA(extreme)(x, n, &amax);
    const vi zero = amax < ALL_ZERO;
    const vf divisor = pick(zero, splat(1), largest);
    vf wx[32], best_inverse = -top / divisor, scale = splat(0), best = splat(0);
    for (int j = 0; j < n; j++) wx[j] = w[j] * x[j];
    for (int step = 0; step < 19; step++) {
        const int shift = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9; /* 0, then -9..9 */
        const vf inverse = -(top + 0.1f * shift) / divisor;
        vf sum_lx = splat(0), sum_l2 = splat(0);
        for (int j = 0; j < n; j++) {
            const vf l = ISA(level)(inverse * x[j], -top, top - 1);
            sum_lx += wx[j] * l;
            sum_l2 += w[j] * l * l;
        }
        const vi better = step == 0 ? sum_l2 != 0.f : (sum_l2 > 0.f) & (sum_lx * sum_lx > best * sum_l2);
        const vf fitted = sum_lx / sum_l2;
        best_inverse = pick(better, inverse, best_inverse);
        scale = pick(better, fitted, scale);
        best = pick(better, fitted * sum_lx, best);
    }
    for (int j = 0; j < n; j++)
        levels[j] = pick(zero, splat(0), ISA(level)(best_inverse * x[j], -top, top - 1) + top);
    return pick(zero, splat(0), scale);
}

/* make_qp_quants with 8 values and levels 0..63: the scales, or the lows, of a super-block. Returns their scale. */
static inline ALWAYS vf ISA(fit_positive)(const vf *x, const vf *w, vf *levels) {
    const float top = 63;
    vf largest = splat(0);
    for (int j = 0; j < 8; j++) largest = pick(x[j] > largest, x[j], largest);
    const vi zero = largest < ALL_ZERO;
    const vf divisor = pick(zero, splat(1), largest);
    vf inverse = top / divisor, least = splat(0);
    for (int step = 0; step < 9; step++) {
        const int shift = step == 0 ? 0 : step <= 4 ? step - 5 : step - 4; /* 0, then -4..4 */
        const vf tried = (0.1f * shift + top) / divisor, scale = 1.f / tried;
        vf total = splat(0);
        for (int j = 0; j < 8; j++) {
            const vf error = x[j] - scale * MIN_(ISA(nearest)(tried * x[j]), splat(top));
            total += w[j] * error * error;
        }
        const vi better = step == 0 ? ~zero : total < least;
        least = pick(better, total, least);
        inverse = pick(better, tried, inverse);
    }
    vf sum_lx = splat(0), sum_l2 = splat(0);
    for (int j = 0; j < 8; j++) {
        const vf l = MIN_(ISA(nearest)(inverse * x[j]), splat(top));
        levels[j] = l;
        sum_lx += w[j] * x[j] * l;
        sum_l2 += w[j] * l * l;
    }
    for (int round = 0; round < 5; round++) { /* one level at a time, where that fits better */
        for (int j = 0; j < 8; j++) {
            vf lx = sum_lx - w[j] * x[j] * levels[j], l2 = sum_l2 - w[j] * levels[j] * levels[j];
            const vi usable = (lx > 0.f) & (l2 > 0.f);
            const vf l = MIN_(ISA(nearest)(x[j] * l2 / lx), splat(top));
            lx += w[j] * x[j] * l;
            l2 += w[j] * l * l;
            const vi better = usable & (l != levels[j]) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            levels[j] = pick(better, l, levels[j]);
            sum_lx = pick(better, lx, sum_lx);
            sum_l2 = pick(better, l2, sum_l2);
        }
    }
    for (int j = 0; j < 8; j++) levels[j] = pick(zero, splat(0), levels[j]);
    return pick(zero | ~(sum_l2 > 0.f), splat(0), sum_lx / sum_l2);
}

/* Index (0..15) of IQ4_NL's nearest level, and the level itself: of two as near, the upper, as ggml's search. */
static inline ALWAYS vf ISA(uneven)(vf x, vf *index) {
    vf value = splat(UNEVEN[0]), count = splat(0);
    for (int k = 1; k < 16; k++) {
        const vi upper = x >= (UNEVEN[k - 1] + UNEVEN[k]) * 0.5f;
        value = pick(upper, splat(UNEVEN[k]), value);
        count = pick(upper, splat(k), count);
    }
    *index = count;
    return value;
}

/* What an error of each of n values from `first` on costs; ggml's: importance * sqrt(mean square + x^2). */
static inline ALWAYS void ISA(weigh)(const Batch *batch, int first, int n, vf mean_square, vf *w) {
    const vf *x = batch->x + first;
    for (int j = 0; j < n; j++) {
        const vf importance = batch->importance ? batch->importance[first + j] : splat(1);
        w[j] = batch->least_squares ? importance : importance * SQRT_(mean_square + x[j] * x[j]);
    }
}

/* Levels 0..15 of 32 values -> 4 words: a byte holds value i low, value i + 16 high. */
static inline ALWAYS void ISA(nibbles)(const vf *levels, vu *words) {
    for (int i = 0; i < 4; i++) {
        vu word = {0};
        for (int b = 0; b < 4; b++)
            word |= (integers(levels[4 * i + b]) | integers(levels[4 * i + b + 16]) << 4) << (8 * b);
        words[i] = word;
    }
}
