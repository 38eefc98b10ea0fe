/* CPython module medge.quantize._ggml_blocks: GGUF's block quantizers, compiled once per instruction set and chosen
 * when the module loads. GNU C (gcc >= 12, clang >= 15): vector extensions, no assembly. Little-endian, as GGUF is.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000 /* one binary for CPython 3.11 and later */
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are only passed between inlined functions */

#define ALWAYS __attribute__((always_inline))
#define SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define PIECE 4096 /* values converted at once: they stay in the first cache */
#define LARGEST 0x1p28f /* no block type holds more (Q6_K: 65504 * 128 * 32), and no sum of squares overflows */
#define NORMAL 1.17549435e-38f /* the inverse of a smaller scale overflows; float16 makes 0 of it anyway */
#define ALL_ZERO 1e-15f /* ggml's GROUP_MAX_EPS */
typedef float v4 __attribute__((vector_size(16)));

enum { DONE, NOT_FINITE, BEYOND_HALF, NO_MEMORY };

static const float UNEVEN[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline ALWAYS uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline ALWAYS float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* float32 -> float16, to nearest even, infinity beyond 65504: ggml's arithmetic (github.com/Maratyszcza/FP16). */
static inline ALWAYS uint16_t half_of(float x) {
    const uint32_t w = bits_of(x), exponent = (w + w) & 0xff000000u;
    const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    const float base = (float_of(w & 0x7fffffffu) * 0x1p+112f) * 0x1p-110f;
    const uint32_t bits = bits_of(float_of((bias >> 1) + 0x07800000u) + base);
    return (uint16_t)((w & 0x80000000u) >> 16 | ((bits >> 13 & 0x7c00u) + (bits & 0xfffu)));
}
static inline ALWAYS float float_of_half(uint16_t half) { /* positive and finite */
    return half < 0x400u ? half * 0x1p-24f : float_of(((uint32_t)half << 13) + 0x38000000u);
}

typedef struct {
    int elements, bytes;
    int words;      /* of 4 bytes that a kernel writes, one lane a block */
    int short_word; /* the word of which 2 bytes are stored; -1: none */
    int half_word;  /* the word that holds float16 scales, */
    int two_halves; /* in its lower half, or in both */
} Layout;

enum { F16, BF16, Q8_0, Q4_0, Q4_1, Q5_1, IQ4_NL, Q4_K, Q5_K, Q6_K, TYPES };
static const Layout LAYOUTS[TYPES] = {
    [F16] = {1, 2},
    [BF16] = {1, 2},
    [Q8_0] = {32, 34},
    [Q4_0] = {32, 18, 5, 0, 0, 0},
    [Q4_1] = {32, 20, 5, -1, 0, 1},
    [Q5_1] = {32, 24, 6, -1, 0, 1},
    [IQ4_NL] = {32, 18, 5, 0, 0, 0},
    [Q4_K] = {256, 144, 36, -1, 0, 1},
    [Q5_K] = {256, 176, 44, -1, 0, 1},
    [Q6_K] = {256, 210, 53, 52, 52, 0},
};

typedef struct {
    int type, bfloat16, least_squares;
    const void *rows; /* (n, k) float32, or bfloat16 */
    uint8_t *out;     /* (n, bytes a row) */
    int64_t n, k;
    const float *importance; /* (k) or NULL */
} Job;

/* An instruction set brings its LANES, the blocks that are quantized at once, and what the compiler doesn't find by
 * itself: a minimum made of a comparison and a mask, and square roots. */
#define PASTE_(name, suffix) name##_##suffix
#define PASTE(name, suffix) PASTE_(name, suffix)
#define ISA(name) PASTE(name, SUFFIX)
#define vf ISA(vf)
#define vi ISA(vi)
#define vu ISA(vu)
#define Batch ISA(Batch)
#define splat ISA(splat)
#define pick ISA(pick)
#define absolute ISA(absolute)
#define integers ISA(integers)
#define floats ISA(floats)
#define reciprocal ISA(reciprocal)
#define halves ISA(halves)
#define from_halves ISA(from_halves)

#define SUFFIX base
#define LANES 4
#if defined(__x86_64__)
#include <immintrin.h>
#define MIN_(a, b) (vf) _mm_min_ps((__m128)(a), (__m128)(b))
#define MAX_(a, b) (vf) _mm_max_ps((__m128)(a), (__m128)(b))
#define SQRT_(x) (vf) _mm_sqrt_ps((__m128)(x))
#else
static inline ALWAYS v4 square_root(v4 x) {
    for (int lane = 0; lane < 4; lane++) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}
#define MIN_(a, b) pick((a) < (b), a, b)
#define MAX_(a, b) pick((a) > (b), a, b)
#define SQRT_(x) (vf) square_root((v4)(x))
#endif
#include "ggml_fit.h"
#include "ggml_kernels.h"

#if defined(__x86_64__)
#undef SUFFIX
#undef LANES
#undef MIN_
#undef MAX_
#undef SQRT_
#define STRING(...) #__VA_ARGS__
#ifdef __clang__
#define TARGET(features) _Pragma(STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define TARGET(features) _Pragma("GCC push_options") _Pragma(STRING(GCC target(features)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

TARGET("avx2")
#define SUFFIX avx2
#define LANES 8
#define MIN_(a, b) (vf) _mm256_min_ps((__m256)(a), (__m256)(b))
#define MAX_(a, b) (vf) _mm256_max_ps((__m256)(a), (__m256)(b))
#define SQRT_(x) (vf) _mm256_sqrt_ps((__m256)(x))
#include "ggml_fit.h"
#include "ggml_kernels.h"
END_TARGET

#undef SUFFIX
#undef LANES
#undef MIN_
#undef MAX_
#undef SQRT_
TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#define SUFFIX avx512
#define LANES 16
#define MIN_(a, b) (vf) _mm512_min_ps((__m512)(a), (__m512)(b))
#define MAX_(a, b) (vf) _mm512_max_ps((__m512)(a), (__m512)(b))
#define SQRT_(x) (vf) _mm512_sqrt_ps((__m512)(x))
#include "ggml_fit.h"
#include "ggml_kernels.h"
END_TARGET
#endif

typedef struct {
    const char *name;
    int (*run)(const Job *);
} Variant;
static Variant variants[3]; /* what this processor can run, the fastest first */
static int variant_count;

static void find_variants(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        variants[variant_count++] = (Variant){"avx512", run_avx512};
    if (__builtin_cpu_supports("avx2")) variants[variant_count++] = (Variant){"avx2", run_avx2};
#endif
    variants[variant_count++] = (Variant){"base", run_base};
}

/* quantize(type, bfloat16, least_squares, rows, n, k, importance | None, out, variant) -> status. Sizes are proven
 * here; what the numbers mean is ggml_blocks.py's. The interpreter's lock is released. */
static PyObject *quantize(PyObject *self, PyObject *args) {
    Job job = {0};
    Py_buffer rows = {0}, importance = {0}, out = {0};
    long long n, k;
    int variant, status = -1;
    if (!PyArg_ParseTuple(args, "iiiy*LLz*w*i", &job.type, &job.bfloat16, &job.least_squares, &rows, &n, &k,
                          &importance, &out, &variant))
        return NULL;
    const int known = job.type >= 0 && job.type < TYPES && variant >= 0 && variant < variant_count;
    const Layout *layout = LAYOUTS + (known ? job.type : 0);
    if (known && n >= 0 && k > 0 && k % layout->elements == 0 && n <= INT64_MAX / 4 / k &&
        rows.len == n * k * (job.bfloat16 ? 2 : 4) && out.len == n * (k / layout->elements) * layout->bytes &&
        (!importance.buf || importance.len == k * 4)) {
        job.rows = rows.buf, job.out = out.buf, job.importance = importance.buf, job.n = n, job.k = k;
        Py_BEGIN_ALLOW_THREADS status = variants[variant].run(&job);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&rows);
    if (importance.buf) PyBuffer_Release(&importance);
    PyBuffer_Release(&out);
    if (status < 0) return PyErr_Format(PyExc_ValueError, "sizes of the buffers contradict the type");
    if (status == NO_MEMORY) return PyErr_NoMemory();
    return PyLong_FromLong(status);
}

/* blocks() -> ((elements, bytes) of each type); instruction_sets() -> names, the fastest first. */
static PyObject *blocks(PyObject *self, PyObject *none) {
    PyObject *all = PyTuple_New(TYPES);
    for (int i = 0; all && i < TYPES; i++) {
        PyObject *one = Py_BuildValue("(ii)", LAYOUTS[i].elements, LAYOUTS[i].bytes);
        if (!one || PyTuple_SetItem(all, i, one)) Py_CLEAR(all);
    }
    return all;
}

static PyObject *instruction_sets(PyObject *self, PyObject *none) {
    PyObject *all = PyTuple_New(variant_count);
    for (int i = 0; all && i < variant_count; i++) {
        PyObject *one = PyUnicode_FromString(variants[i].name);
        if (!one || PyTuple_SetItem(all, i, one)) Py_CLEAR(all);
    }
    return all;
}

static PyMethodDef methods[] = {{"quantize", quantize, METH_VARARGS, NULL},
                                {"blocks", blocks, METH_NOARGS, NULL},
                                {"instruction_sets", instruction_sets, METH_NOARGS, NULL},
                                {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ggml_blocks", NULL, -1, methods};

PyMODINIT_FUNC PyInit__ggml_blocks(void) {
    find_variants();
    return PyModule_Create(&module);
}
