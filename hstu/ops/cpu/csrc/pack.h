// Rows of a strided float32 or bfloat16 tensor to and from aligned float32 scratch memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace hstu {

// Uninitialised memory that grows and is kept, one per thread and use.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    float* get(int64_t floats) {
        if (floats > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            data_ = static_cast<float*>(std::aligned_alloc(64, size_t((floats * 4 + 127) / 64 * 64)));
            if (!data_) throw std::bad_alloc();
            size_ = floats;
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

inline int64_t whole_vectors(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

template <class T>
inline void pack_row(const T* __restrict from, int64_t width, float scale, float* __restrict to, int64_t padded) {
    if constexpr (sizeof(T) == sizeof(float)) {
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(to + c, load(from + c) * scale);
        if (c < width) {
            store_first(to + c, load_first(from + c, width - c) * scale, std::min<int64_t>(padded - c, LANES));
            c += LANES;
        }
        for (; c < padded; ++c) to[c] = 0.0f;
    } else {
        for (int64_t c = 0; c < width; ++c) to[c] = to_float(from[c]) * scale;
        for (int64_t c = width; c < padded; ++c) to[c] = 0.0f;
    }
}

// `rows` rows of `from`, then rows of zeros up to `padded_rows`; each padded with zeros to `stride` numbers.
template <class T>
inline void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t width, float scale, float* to,
                      int64_t padded_rows, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) pack_row(from + row * from_stride, width, scale, to + row * stride, stride);
    std::memset(to + rows * stride, 0, size_t(padded_rows - rows) * stride * sizeof(float));
}

template <class T>
inline void unpack_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float scale, T* to,
                        int64_t to_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* __restrict in = from + row * stride;
        T* __restrict out = to + row * to_stride;
        int64_t c = 0;
        if constexpr (sizeof(T) == sizeof(float)) {
            for (; c + LANES <= width; c += LANES) store(out + c, load(in + c) * scale);
            if (c < width) store_first(out + c, load_first(in + c, width - c) * scale, width - c);
        } else {
            for (; c < width; ++c) out[c] = from_float<T>(in[c] * scale);
        }
    }
}

// [rows][stride], both multiples of LANES, to [columns][rows].
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t c = 0; c < columns; c += LANES)
            transpose_block(from + row * stride + c, stride, to + c * rows + row, rows);
}

}  // namespace hstu
