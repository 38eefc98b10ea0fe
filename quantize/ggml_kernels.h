/* The block types: each kernel turns LANES blocks into words of 4 bytes, lane by lane. Layouts: ggml-common.h.
 *
 * Included once per instruction set by ggml_blocks.c, after ggml_fit.h.
 */

static void ISA(q4_0)(const Batch *batch, vu *words) {
    vf amax, scale, levels[32];
    if (batch->importance || batch->least_squares) {
        vf w[32];
        ISA(weigh)(batch, 0, 32, batch->mean_square, w);
        scale = ISA(fit_symmetric)(batch->x, w, 32, 8, levels);
    } else {
        scale = ISA(extreme)(batch->x, 32, &amax) / -8.f;
        const vf inverse = reciprocal(scale);
        for (int j = 0; j < 32; j++) levels[j] = MIN_(batch->x[j] * inverse + 8.5f, splat(15));
    }
    words[0] = halves(scale);
    if (batch->least_squares) { /* levels of the scale that is stored */
        const vf inverse = reciprocal(from_halves(words[0]));
        for (int j = 0; j < 32; j++) levels[j] = ISA(level)(batch->x[j] * inverse, -8, 7) + 8.f;
    }
    ISA(nibbles)(levels, words + 1);
}

/* words[0] and the levels of Q4_1 and Q5_1. */
static inline ALWAYS void ISA(affine)(const Batch *batch, float top, vu *words, vf *levels) {
    const vf *x = batch->x;
    vf low = x[0], largest = x[0], scale;
    if (batch->importance || batch->least_squares) {
        vf w[32];
        ISA(weigh)(batch, 0, 32, batch->mean_square, w);
        scale = ISA(fit_affine)(x, w, top, -0.9f, 0.05f, 36, !batch->least_squares, &low, levels);
    } else {
        for (int j = 1; j < 32; j++) {
            low = pick(x[j] < low, x[j], low);
            largest = pick(x[j] > largest, x[j], largest);
        }
        scale = (largest - low) / top;
        const vf inverse = reciprocal(scale);
        for (int j = 0; j < 32; j++) levels[j] = MIN_((x[j] - low) * inverse + 0.5f, splat(top));
    }
    const vu half_scale = halves(scale), half_low = halves(low);
    words[0] = half_scale | half_low << 16;
    if (batch->least_squares) {
        const vf inverse = reciprocal(from_halves(half_scale)), stored = from_halves(half_low);
        for (int j = 0; j < 32; j++) levels[j] = ISA(level)((x[j] - stored) * inverse, 0, top);
    }
}

static void ISA(q4_1)(const Batch *batch, vu *words) {
    vf levels[32];
    ISA(affine)(batch, 15, words, levels);
    ISA(nibbles)(levels, words + 1);
}

static void ISA(q5_1)(const Batch *batch, vu *words) {
    vf levels[32];
    ISA(affine)(batch, 31, words, levels);
    vu high = {0};
    for (int j = 0; j < 32; j++) {
        const vu level = integers(levels[j]);
        high |= (level >> 4 & 1) << j;
        levels[j] = floats(level & 15);
    }
    words[1] = high;
    ISA(nibbles)(levels, words + 2);
}

static void ISA(iq4_nl)(const Batch *batch, vu *words) {
    const vf *x = batch->x;
    vf w[32], amax, index, levels[32], sum_squares = splat(0);
    for (int j = 0; j < 32; j++) sum_squares += x[j] * x[j];
    if (batch->importance || batch->least_squares)
        ISA(weigh)(batch, 0, 32, sum_squares * (2.f / 32), w);
    else
        for (int j = 0; j < 32; j++) w[j] = x[j] * x[j];
    const vf largest = ISA(extreme)(x, 32, &amax);
    const vi zero = amax < ALL_ZERO;
    const vf divisor = pick(zero, splat(1), largest);
    vf scale = splat(0), best = splat(0);
    for (int step = 0; step < 16; step++) { /* first the largest weight on the outermost level, then 15 around it */
        const vf inverse = step == 0 ? 1.f / (-largest / UNEVEN[0]) : (step - 8 + UNEVEN[0]) / divisor;
        vf sum_qx = splat(0), sum_q2 = splat(0);
        for (int j = 0; j < 32; j++) {
            const vf q = ISA(uneven)(inverse * x[j], &index), wq = w[j] * q;
            sum_qx += wq * x[j];
            sum_q2 += wq * q;
        }
        const vi better = step == 0 ? sum_q2 > 0.f : (sum_q2 > 0.f) & (sum_qx * sum_qx > best * sum_q2);
        scale = pick(better, sum_qx / sum_q2, scale);
        best = pick(better, sum_qx / sum_q2 * sum_qx, best);
    }
    scale = pick(zero, splat(0), scale);
    words[0] = halves(scale);
    const vf inverse = reciprocal(batch->least_squares ? from_halves(words[0]) : scale);
    for (int j = 0; j < 32; j++) ISA(uneven)(inverse * x[j], levels + j);
    ISA(nibbles)(levels, words + 1);
}

/* Q4_K and Q5_K: scales and lows of 8 sub-blocks of 32, then levels (256) rounded by what was stored of them. */
static inline ALWAYS void ISA(affine_super)(const Batch *batch, float top, vu *words, vf *levels) {
    vf scales[8], lows[8], sums[8], scale_levels[8], low_levels[8], w[32], block_scale, block_low;
    const int weighted = batch->importance || batch->least_squares;
    vf mean_square = splat(0);
    for (int j = 0; weighted && j < 256; j++) mean_square += batch->x[j] * batch->x[j];
    mean_square = 2.f * mean_square / 256.f;
    for (int block = 0; block < 8; block++) {
        const vf *x = batch->x + 32 * block;
        if (weighted) {
            ISA(weigh)(batch, 32 * block, 32, mean_square, w);
            sums[block] = splat(0);
            for (int j = 0; j < 32; j++) sums[block] += w[j];
            scales[block] = ISA(fit_affine)(x, w, top, -0.9f, 0.05f, 36, 1, lows + block, levels + 32 * block);
        } else {
            vf squares = splat(0);
            for (int j = 0; j < 32; j++) squares += x[j] * x[j];
            const vf root = SQRT_(squares / 32.f);
            for (int j = 0; j < 32; j++) w[j] = root + absolute(x[j]);
            const int fine = top == 31; /* ggml: 16 starts for Q5_K, 21 for Q4_K */
            scales[block] = ISA(fit_affine)(x, w, top, fine ? -0.5f : -1.f, 0.1f, fine ? 15 : 20, 1, lows + block,
                                            levels + 32 * block);
        }
        lows[block] = -lows[block];
    }
    if (weighted) {
        block_scale = ISA(fit_positive)(scales, sums, scale_levels);
        block_low = ISA(fit_positive)(lows, sums, low_levels);
    } else {
        vf largest_scale = splat(0), largest_low = splat(0);
        for (int b = 0; b < 8; b++) {
            largest_scale = pick(scales[b] > largest_scale, scales[b], largest_scale);
            largest_low = pick(lows[b] > largest_low, lows[b], largest_low);
        }
        const vf scale_inverse = pick(largest_scale > 0.f, 63.f / largest_scale, splat(0));
        const vf low_inverse = pick(largest_low > 0.f, 63.f / largest_low, splat(0));
        for (int b = 0; b < 8; b++) {
            scale_levels[b] = ISA(level)(scale_inverse * scales[b], 0, 63);
            low_levels[b] = ISA(level)(low_inverse * lows[b], 0, 63);
        }
        block_scale = largest_scale / 63.f;
        block_low = largest_low / 63.f;
    }
    const vu half_scale = halves(block_scale), half_low = halves(block_low);
    words[0] = half_scale | half_low << 16;
    words[1] = words[2] = words[3] = (vu){0};
    for (int b = 0; b < 4; b++) { /* get_scale_min_k4's layout: 6 bits each in 12 bytes */
        const vu s = integers(scale_levels[b]), m = integers(low_levels[b]);
        const vu s4 = integers(scale_levels[b + 4]), m4 = integers(low_levels[b + 4]);
        words[1] |= (s | s4 >> 4 << 6) << (8 * b);
        words[2] |= (m | m4 >> 4 << 6) << (8 * b);
        words[3] |= ((s4 & 15) | (m4 & 15) << 4) << (8 * b);
    }
    const vf stored_scale = from_halves(half_scale), stored_low = from_halves(half_low);
    for (int b = 0; b < 8; b++) {
        const vf scale = stored_scale * scale_levels[b], low = stored_low * low_levels[b];
        const vi kept = scale == 0.f;
        for (int j = 32 * b; j < 32 * b + 32; j++)
            levels[j] = pick(kept, levels[j], ISA(level)((batch->x[j] + low) / scale, 0, top));
    }
}

/* 256 levels 0..15 -> 32 words: in every 64, value i low and value i + 32 high. */
static inline ALWAYS void ISA(nibbles_super)(const vu *levels, vu *words) {
    for (int part = 0; part < 4; part++)
        for (int i = 0; i < 8; i++) {
            const vu *l = levels + 64 * part + 4 * i;
            vu word = {0};
            for (int b = 0; b < 4; b++) word |= (l[b] | l[b + 32] << 4) << (8 * b);
            words[8 * part + i] = word;
        }
}

static void ISA(q4_k)(const Batch *batch, vu *words) {
    vf levels[256];
    vu l[256];
    ISA(affine_super)(batch, 15, words, levels);
    for (int j = 0; j < 256; j++) l[j] = integers(levels[j]);
    ISA(nibbles_super)(l, words + 4);
}

static void ISA(q5_k)(const Batch *batch, vu *words) {
    vf levels[256];
    vu l[256];
    ISA(affine_super)(batch, 31, words, levels);
    for (int i = 0; i < 8; i++) words[4 + i] = (vu){0};
    for (int j = 0; j < 256; j++) { /* bit j / 32 of byte j % 32 is value j's fifth */
        l[j] = integers(levels[j]);
        words[4 + j % 32 / 4] |= (l[j] >> 4) << (8 * (j % 4) + j / 32);
        l[j] &= 15;
    }
    ISA(nibbles_super)(l, words + 12);
}

static void ISA(q6_k)(const Batch *batch, vu *words) {
    vf scales[16], levels[256], w[16], largest = splat(0), magnitude = splat(0);
    for (int block = 0; block < 16; block++) {
        const vf *x = batch->x + 16 * block;
        for (int j = 0; j < 16; j++) { /* an importance stands as it is here, in ggml too */
            const vf unweighted = batch->least_squares ? splat(1) : x[j] * x[j];
            w[j] = batch->importance ? batch->importance[16 * block + j] : unweighted;
        }
        scales[block] = ISA(fit_symmetric)(x, w, 16, 32, levels + 16 * block);
        const vf a = absolute(scales[block]);
        const vi larger = a > magnitude;
        magnitude = pick(larger, a, magnitude);
        largest = pick(larger, scales[block], largest);
    }
    const vi zero = magnitude < ALL_ZERO;
    const vf inverse = -128.f / pick(zero, splat(1), largest);
    const vu half = halves(pick(zero, splat(0), 1.f / inverse));
    const vf stored = from_halves(half);
    vu l[256];
    for (int i = 0; i < 52; i++) words[i] = (vu){0};
    for (int block = 0; block < 16; block++) {
        const vf scale_level = pick(zero, splat(0), MIN_(ISA(nearest)(inverse * scales[block]), splat(127)));
        const vf scale = stored * scale_level;
        const vi kept = scale == 0.f;
        words[48 + block / 4] |= (integers(scale_level) & 255) << (8 * (block % 4));
        for (int j = 16 * block; j < 16 * block + 16; j++) {
            const vf rounded = ISA(level)(batch->x[j] / scale, -32, 31) + 32;
            l[j] = integers(pick(zero, splat(0), pick(kept, levels[j], rounded)));
        }
    }
    for (int j = 0; j < 256; j++) {
        const int part = j / 128, quarter = j % 128 / 32, i = j % 32; /* 128 values: 64 low bytes, 32 high ones */
        words[16 * part + quarter % 2 * 8 + i / 4] |= (l[j] & 15) << (8 * (i % 4) + quarter / 2 * 4);
        words[32 + 8 * part + i / 4] |= (l[j] >> 4) << (8 * (i % 4) + 2 * quarter);
    }
    words[52] = half;
}

/* Largest magnitude as bits: beyond 0x7f7fffff there is an infinity or a NaN. Integers, since those vectorize. */
static uint32_t ISA(largest_bits)(const float *x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static void ISA(widen)(const uint16_t *src, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = float_of((uint32_t)src[i] << 16);
}

static int ISA(to_f16)(const float *x, uint16_t *out, int64_t n) {
    uint32_t beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        out[i] = half_of(x[i]);
        beyond |= (out[i] & 0x7c00u) == 0x7c00u;
    }
    return beyond ? BEYOND_HALF : 0;
}

static int ISA(to_bf16)(const float *x, uint16_t *out, int64_t n) {
    uint32_t beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(x[i]);
        out[i] = (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
        beyond |= (out[i] & 0x7f80u) == 0x7f80u;
    }
    return beyond ? BEYOND_HALF : 0;
}

/* One block at a time: 34 bytes for 32 values leave nothing to gain from lanes. */
static int ISA(to_q8_0)(const float *x, uint8_t *out, int64_t n, int least_squares) {
    uint32_t beyond = 0;
    for (int64_t i = 0; i < n; i += 32, out += 34) {
        const float *block = x + i;
        uint32_t largest = 0;
        for (int j = 0; j < 32; j++) {
            const uint32_t magnitude = bits_of(block[j]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float scale = float_of(largest) / 127;
        const uint16_t half = half_of(scale);
        const float divisor = least_squares ? float_of_half(half) : scale;
        float inverse = divisor >= NORMAL ? 1 / divisor : 0;
        if (float_of(largest) * inverse > 127.4f) inverse = 127.4f / float_of(largest); /* of a subnormal half */
        int8_t levels[32];
        for (int j = 0; j < 32; j++) { /* roundf: halves away from zero */
            const float scaled = block[j] * inverse;
            const int whole = (int)scaled;
            const float rest = scaled - (float)whole;
            levels[j] = (int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
        }
        beyond |= (half & 0x7c00u) == 0x7c00u;
        memcpy(out, &half, 2);
        memcpy(out + 2, levels, 32);
    }
    return beyond ? BEYOND_HALF : 0;
}

/* `count` values from the job's `first` on as float32; *status tells whether one is not finite, or beyond `limit`. */
static inline const float *ISA(values)(const Job *job, int64_t first, int64_t count, float limit, float *buffer,
                                       int *status) {
    const float *x = (const float *)job->rows + first;
    if (job->bfloat16) {
        ISA(widen)((const uint16_t *)job->rows + first, buffer, count);
        x = buffer;
    }
    const uint32_t largest = ISA(largest_bits)(x, count);
    *status = largest >= 0x7f800000u ? NOT_FINITE : largest > bits_of(limit) ? BEYOND_HALF : DONE;
    return x;
}

/* Types whose values (F16, BF16) or blocks (Q8_0) are converted where they lie. */
static int ISA(stream)(const Job *job) {
    float buffer[PIECE];
    const Layout *layout = LAYOUTS + job->type;
    uint8_t *out = job->out;
    const int64_t total = job->n * job->k;
    for (int64_t first = 0; first < total; first += PIECE) {
        const int64_t count = total - first < PIECE ? total - first : PIECE;
        int status;
        const float *x = ISA(values)(job, first, count, INFINITY, buffer, &status);
        if (status != DONE) return status;
        if (job->type == F16) status = ISA(to_f16)(x, (uint16_t *)out, count);
        if (job->type == BF16) status = ISA(to_bf16)(x, (uint16_t *)out, count);
        if (job->type == Q8_0) status = ISA(to_q8_0)(x, out, count, job->least_squares);
        if (status != DONE) return status;
        out += count / layout->elements * layout->bytes;
    }
    return DONE;
}

/* Each row's mean square, summed in ggml's order; four rows at once hide the additions' latency. */
static void ISA(mean_squares)(const Job *job, float *means) {
    for (int64_t row = 0; row < job->n; row += 4) {
        const float *x[4];
        const uint16_t *h[4];
        float sums[4] = {0};
        for (int i = 0; i < 4; i++) {
            const int64_t at = (row + i < job->n ? row + i : job->n - 1) * job->k;
            x[i] = (const float *)job->rows + at;
            h[i] = (const uint16_t *)job->rows + at;
        }
        for (int64_t j = 0; j < job->k; j++)
            for (int i = 0; i < 4; i++) {
                const float value = job->bfloat16 ? float_of((uint32_t)h[i][j] << 16) : x[i][j];
                sums[i] += value * value;
            }
        for (int i = 0; i < 4 && row + i < job->n; i++) means[row + i] = sums[i] / job->k;
    }
}

/* The importance of LANES blocks from `first` on, transposed as their values are. */
static void ISA(gather_importance)(const Job *job, int64_t first, int64_t blocks, const float *means, Batch *batch) {
    float rows[LANES * 256];
    const int elements = LAYOUTS[job->type].elements;
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t block = first + lane < blocks ? first + lane : blocks - 1;
        memcpy(rows + lane * elements, job->importance + block * elements % job->k, elements * sizeof(float));
        if (means) batch->mean_square[lane] = means[block * elements / job->k];
    }
    ISA(transpose)(rows, elements, elements, batch->importance);
}

static int ISA(store)(const Layout *layout, const vu *words, int lanes, uint8_t *out) {
    for (int lane = 0; lane < lanes; lane++) {
        const uint32_t scales = words[layout->half_word][lane];
        if ((scales & 0x7c00u) == 0x7c00u) return BEYOND_HALF;
        if (layout->two_halves && (scales & 0x7c000000u) == 0x7c000000u) return BEYOND_HALF;
        for (int i = 0; i < layout->words; i++) {
            const uint32_t word = words[i][lane];
            const int size = i == layout->short_word ? 2 : 4;
            memcpy(out, &word, size);
            out += size;
        }
    }
    return DONE;
}

static int ISA(blocks)(const Job *job, const float *means) {
    static void (*const kernels[TYPES])(const Batch *, vu *) = {
        [Q4_0] = ISA(q4_0), [Q4_1] = ISA(q4_1), [Q5_1] = ISA(q5_1), [IQ4_NL] = ISA(iq4_nl),
        [Q4_K] = ISA(q4_k), [Q5_K] = ISA(q5_k), [Q6_K] = ISA(q6_k),
    };
    const Layout *layout = LAYOUTS + job->type;
    const int elements = layout->elements;
    const int64_t blocks = job->n * job->k / elements;
    vf x[256], importance[256];
    vu words[64];
    float buffer[LANES * 256];
    Batch batch = {x, job->importance ? importance : NULL, splat(0), job->least_squares};
    for (int64_t first = 0; first < blocks; first += LANES) {
        const int lanes = blocks - first < LANES ? (int)(blocks - first) : LANES;
        int status;
        const float *rows = ISA(values)(job, first * elements, (int64_t)lanes * elements, LARGEST, buffer, &status);
        if (status != DONE) return status;
        if (lanes < LANES) { /* the last batch: idle lanes repeat its first block */
            memmove(buffer, rows, (size_t)lanes * elements * sizeof(float));
            for (int lane = lanes; lane < LANES; lane++)
                memcpy(buffer + lane * elements, buffer, elements * sizeof(float));
            rows = buffer;
        }
        ISA(transpose)(rows, elements, elements, x);
        if (job->importance) ISA(gather_importance)(job, first, blocks, means, &batch);
        kernels[job->type](&batch, words);
        status = ISA(store)(layout, words, lanes, job->out + first * layout->bytes);
        if (status != DONE) return status;
    }
    return DONE;
}

static int ISA(run)(const Job *job) {
    if (job->type <= Q8_0) return ISA(stream)(job);
    if (!job->importance || job->least_squares || LAYOUTS[job->type].elements != 32) return ISA(blocks)(job, NULL);
    float *means = malloc((size_t)job->n * sizeof(float));
    if (!means) return NO_MEMORY;
    ISA(mean_squares)(job, means);
    const int status = ISA(blocks)(job, means);
    free(means);
    return status;
}
