// Vectors of floats as wide as the machine's registers, written with the vector extensions of GCC and Clang, so that
// one source serves AVX-512, AVX2 and anything else. Intrinsics are used only where the extensions lack an operation.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define HSTU_LANES 16
#elif defined(__AVX2__)
#define HSTU_LANES 8
#else
#define HSTU_LANES 4
#endif

namespace hstu {

constexpr int LANES = HSTU_LANES;
typedef float vf __attribute__((vector_size(4 * HSTU_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * HSTU_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * HSTU_LANES), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * HSTU_LANES), aligned(4), may_alias));

inline vi load_int(const int32_t* from) { return *reinterpret_cast<const vi_unaligned*>(from); }
inline vf load(const float* from) { return *reinterpret_cast<const vf_unaligned*>(from); }
inline void store(float* to, vf x) { *reinterpret_cast<vf_unaligned*>(to) = x; }
inline vf splat(float x) { return x - vf{}; }
inline vi splat_int(int32_t x) { return x - vi{}; }
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

inline vi lane_numbers() {
    vi numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
    return numbers;
}

// The first `count` <= LANES numbers, then zeros; touches no memory beyond them.
inline vf load_some(const float* from, int64_t count) {
#if defined(__AVX512F__)
    return vf(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#elif defined(__AVX2__)
    return vf(_mm256_maskload_ps(from, __m256i(lane_numbers() < splat_int(int32_t(count)))));
#else
    vf x = {};
    for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
    return x;
#endif
}

inline void store_some(float* to, vf x, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(x));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(to, __m256i(lane_numbers() < splat_int(int32_t(count))), __m256(x));
#else
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
#endif
}

// e^x for x in [-87, 88], relative error below 2e-7. e^x = 2^n · e^r with |r| <= ln 2 / 2; ln 2 in two parts
// keeps r exact, and adding 1.5 · 2^23 rounds to an integer, which is then in the lowest bits.
inline vf exp_unclamped(vf x) {
    const vf magic = splat(12582912.0f);
    const vf shifted = x * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return (vf)((vi)y + ((vi)shifted << 23));
}

// The same for any x, clamped to that range.
inline vf exp(vf x) {
    const vf most = splat(88.0f), least = splat(-87.0f);
    x = select(x > most, most, x);
    return exp_unclamped(select(x < least, least, x));
}

// The same for x <= 88, but 0 for x < -87: e^-87 is about the least normal number.
inline vf exp_or_zero(vf x) { return select(x < -87.0f, vf{}, exp_unclamped(x)); }

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The largest number of a vector, in log2(LANES) steps.
inline float largest(vf x) {
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2) {
        const vf other = __builtin_shuffle(x, lane_numbers() ^ bit);
        x = select(other > x, other, x);
    }
    return x[0];
}

typedef uint16_t bfloat;  // the upper half of a float

// LANES x LANES floats, transposed from rows `in_stride` apart to rows `out_stride` apart.
inline void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    vf rows[LANES];
    for (int row = 0; row < LANES; ++row) rows[row] = load(in + row * in_stride);
    const vi lane = lane_numbers();
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2) {
        // Swaps the off-diagonal squares of side `bit`: lanes from LANES on are those of the second operand.
        const vi upper = (lane & bit) == 0 ? lane : lane - bit + LANES;
        const vi lower = (lane & bit) == 0 ? lane + bit : lane + LANES;
#pragma GCC unroll 16
        for (int row = 0; row < LANES; ++row) {
            if (row & bit) continue;
            const vf x = rows[row], y = rows[row | bit];
            rows[row] = __builtin_shuffle(x, y, upper);
            rows[row | bit] = __builtin_shuffle(x, y, lower);
        }
    }
    for (int row = 0; row < LANES; ++row) store(out + row * out_stride, rows[row]);
}

}  // namespace hstu
