// Rows of a strided float32 or bfloat16 tensor to and from aligned float32 scratch memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace hstu {

// Uninitialised memory that grows and is kept, one per thread and use.
class Buffer {
  public:
    float* get(int64_t floats) {
        if (floats > size_) {
            data_.reset();
            size_ = 0;
            data_.reset(static_cast<float*>(std::aligned_alloc(64, size_t((floats * 4 + 127) / 64 * 64))));
            if (!data_) throw std::bad_alloc();
            size_ = floats;
        }
        return data_.get();
    }

  private:
    std::unique_ptr<float, decltype(&std::free)> data_{nullptr, std::free};
    int64_t size_ = 0;
};

typedef uint8_t vector_of_bytes __attribute__((vector_size(HSTU_LANES), aligned(1), may_alias));
typedef bfloat vector_of_bfloats __attribute__((vector_size(2 * HSTU_LANES), aligned(1), may_alias));
typedef uint32_t vector_of_bits __attribute__((vector_size(4 * HSTU_LANES)));

inline vf load(const bfloat* from) {
    const auto halves = *reinterpret_cast<const vector_of_bfloats*>(from);
    return (vf)(__builtin_convertvector(halves, vector_of_bits) << 16);
}
inline vf load(const uint8_t* from) {  // in steps of twice the width: GCC converts others number by number
    const auto bytes = *reinterpret_cast<const vector_of_bytes*>(from);
    const auto halves = __builtin_convertvector(bytes, vector_of_bfloats);
    return __builtin_convertvector((vi)__builtin_convertvector(halves, vector_of_bits), vf);
}
inline void store(bfloat* to, vf x) {
    const vector_of_bits bits = (vector_of_bits)x;
    const vector_of_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const vector_of_bits whole = x == x ? rounded : (bits >> 16) | 0x40;        // a NaN stays one
    *reinterpret_cast<vector_of_bfloats*>(to) = __builtin_convertvector(whole, vector_of_bfloats);
}

// As for floats (simd.h).
template <class T>
inline vf load_some(const T* from, int64_t count) {
    T whole[LANES] = {};
    std::copy(from, from + count, whole);
    return load(whole);
}
template <class T>
inline void store_some(T* to, vf x, int64_t count) {
    T whole[LANES];
    store(whole, x);
    std::copy(whole, whole + count, to);
}

// `rows` rows of `from`, then rows of zeros up to `padded_rows`; each padded with zeros to `stride` numbers, a multiple of
// LANES.
template <class T>
inline void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t width, float scale, float* to,
                      int64_t padded_rows, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* __restrict in = from + row * from_stride;
        float* __restrict out = to + row * stride;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(out + c, load(in + c) * scale);
        if (c < width) {
            store(out + c, load_some(in + c, width - c) * scale);
            c += LANES;
        }
        for (; c < stride; ++c) out[c] = 0.0f;
    }
    std::memset(to + rows * stride, 0, size_t(padded_rows - rows) * stride * sizeof(float));
}

template <class T>
inline void unpack_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float scale, T* to,
                        int64_t to_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* __restrict in = from + row * stride;
        T* __restrict out = to + row * to_stride;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(out + c, load(in + c) * scale);
        if (c < width) store_some(out + c, load_some(in + c, width - c) * scale, width - c);
    }
}

// The sum of all lanes, in all lanes.
inline vf sum_of_lanes(vf x) {
    const vi lane = lane_numbers();
#pragma GCC unroll 4
    for (int step = LANES / 2; step > 0; step /= 2) x += __builtin_shuffle(x, lane ^ step);
    return x;
}

inline vf only(vi lanes, vf x) { return (vf)((vi)x & lanes); }

// A vector of a row of `width` numbers; NARROW: there are fewer than LANES.
template <bool NARROW, class T>
inline vf get(const T* from, int64_t width) {
    return NARROW ? load_some(from, width) : load(from);
}
template <bool NARROW, class T>
inline void put(vf x, T* to, int64_t width) {
    NARROW ? store_some(to, x, width) : store(to, x);
}

// Calls visit(column, fresh) for the vectors of a row, none of which leaves it: the last one ends with the row and
// overlaps the one before. `fresh` are the lanes that no vector before has, which are those to sum.
template <class Visit>
inline void each_vector(int64_t width, Visit visit) {
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES) visit(column, ~vi{});
    if (column == width) return;
    const int64_t last = std::max<int64_t>(0, width - LANES);
    const vi number = lane_numbers() + int32_t(last);
    visit(last, (number >= int32_t(column)) & (number < int32_t(width)));
}

// [rows][stride], both multiples of LANES, to [columns][rows].
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t c = 0; c < columns; c += LANES)
            transpose_block(from + row * stride + c, stride, to + c * rows + row, rows);
}

}  // namespace hstu
