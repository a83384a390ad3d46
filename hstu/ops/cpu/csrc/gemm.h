// Small matrix products that stay in registers: C[m][lane] (+)= sum over k of A(m, k) · B[k][lane].
//
// With PAIRS each 32-bit element of A and B holds two bfloat16 numbers, of k and of the next one, and depth counts pairs.
#pragma once
#include "simd.h"

namespace hstu {

// Rows of C that are computed together: they and the vectors of B fill the registers without spilling.
constexpr int rows_for(int vectors) { return LANES == 16 ? (vectors == 4 ? 4 : 8) : (vectors == 4 ? 2 : 4); }

template <bool PAIRS>
inline vf multiply_add(vf total, const float* x, vf row) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return vf(_mm512_dpbf16_ps(__m512(total), __m512bh(_mm512_set1_epi32(pair)), __m512bh(row)));
    }
#endif
    return total + splat(*x) * row;
}

// M rows of NV vectors. A(m, k) = a[m * AM + k * a_step]; AM is a constant, so that it becomes an address offset.
template <bool PAIRS, int M, int NV, int64_t AM>
inline void tile(int64_t depth, const float* a, int64_t a_step, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, bool add) {
    vf sums[M][NV];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[m][v] = add ? load(c + m * c_stride + v * LANES) : vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) row[v] = load(b + k * b_stride + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                sums[m][v] = multiply_add<PAIRS>(sums[m][v], a + m * AM + k * a_step, row[v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(c + m * c_stride + v * LANES, sums[m][v]);
}

// All `rows` (a multiple of 8) of NV vectors.
template <bool PAIRS, int NV, int64_t AM>
inline void strip(int64_t rows, int64_t depth, const float* a, int64_t a_step, const float* b, int64_t b_stride,
                  float* c, int64_t c_stride, bool add) {
    constexpr int M = rows_for(NV);
    for (int64_t m = 0; m < rows; m += M)
        tile<PAIRS, M, NV, AM>(depth, a + m * AM, a_step, b, b_stride, c + m * c_stride, c_stride, add);
}

// All `rows` (a multiple of 8) of `vectors` vectors.
template <int64_t AM, bool PAIRS = false>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_step, const float* b,
                    int64_t b_stride, float* c, int64_t c_stride, bool add) {
    while (vectors > 0) {
        const int64_t now = vectors > 4 ? (vectors == 5 || vectors == 6 ? 3 : 4) : vectors;
        switch (now) {
            case 1: strip<PAIRS, 1, AM>(rows, depth, a, a_step, b, b_stride, c, c_stride, add); break;
            case 2: strip<PAIRS, 2, AM>(rows, depth, a, a_step, b, b_stride, c, c_stride, add); break;
            case 3: strip<PAIRS, 3, AM>(rows, depth, a, a_step, b, b_stride, c, c_stride, add); break;
            default: strip<PAIRS, 4, AM>(rows, depth, a, a_step, b, b_stride, c, c_stride, add);
        }
        vectors -= now;
        b += now * LANES;
        c += now * LANES;
    }
}

}  // namespace hstu
