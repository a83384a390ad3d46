// HSTU attention of bfloat16 tensors on processors that multiply pairs of bfloat16 numbers and sum in float32.
//
// Both operands of a product are packed in pairs along the summed dimension: channels for scores, keys for outputs and
// gradients of queries, queries for gradients of keys and values. Weights and gradients of scores are rounded to bfloat16
// before they enter a product. The bias gradients use them unrounded.
#include "attention_work.h"

namespace hstu {

#if defined(__AVX512BF16__)
namespace {

// Element (r, c) of a row-major [rows, columns] becomes one half of the pair (r / 2, c).
inline void pair_rows(const bfloat* __restrict from, int64_t rows, int64_t columns, uint32_t* __restrict to) {
    for (int64_t row = 0; row < rows; row += 2)
        for (int64_t c = 0; c < columns; ++c)
            to[row / 2 * columns + c] =
                uint32_t(from[row * columns + c]) | uint32_t(from[(row + 1) * columns + c]) << 16;
}

inline __m512i rounded(const float* from) {
    return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))));
}

template <int64_t W>
class Worker : public Work<Worker<W>, bfloat, W> {
    using Base = Work<Worker, bfloat, W>;
    using Base::a_, Base::rows_, Base::vectors_, Base::at;

  public:
    Worker(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch)
        : Base(a, sequence, head, scratch, a.alpha, a.inverse_n),
          depth_((a.width + 1) / 2),
          tile_pairs_(scratch.tile_pairs.get(BLOCK / 2 * STRIP)),
          tile_rows_(scratch.tile_rows.get(BLOCK * STRIP / 2)) {}

    // Rows of W bfloat16, which are rows of W / 2 pairs of channels. Rows outside [first, stop) are zero.
    const float* packed(const void* tensor, const int64_t* strides, int64_t first, int64_t stop, float, Buffer& buffer)
        const {
        bfloat* to = reinterpret_cast<bfloat*>(buffer.get(rows_ * W / 2));
        std::memset(to, 0, size_t(rows_ * W) * sizeof(bfloat));
        const bfloat* from = at(tensor, strides, 0);
        for (int64_t row = first; row < stop; ++row)
            std::memcpy(to + row * W, from + row * strides[0], size_t(a_.width) * sizeof(bfloat));
        return reinterpret_cast<const float*>(to);
    }

    const float* pairs(const float* rows, Buffer& buffer) const {
        float* to = buffer.get(rows_ / 2 * W);
        pair_rows(reinterpret_cast<const bfloat*>(rows), rows_, W, reinterpret_cast<uint32_t*>(to));
        return to;
    }

    // [pairs of channels][rows_]
    const float* columns(const float* rows, Buffer& buffer) const {
        const int64_t count = round_up(depth_, LANES);
        float* to = buffer.get(count * rows_);
        transpose(rows, W / 2, rows_, count, to);
        return to;
    }

    void scores(const Strip& strip, int64_t j, int64_t keys, int vector, const float* columns, const float* rows,
                float* tile) const {
        const int64_t lane = vector * LANES;
        product<W / 2, true>(keys, strip.vectors - vector, depth_, rows + j * (W / 2), 1,
                             columns + strip.first + lane, rows_, tile + lane, STRIP, false);
    }

    void add_over_keys(const Strip& strip, int64_t j, int64_t keys, int vector, const float* tile, const float* pairs,
                       float* out) const {
        const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
        for (int64_t key = 0; key < keys; key += 2)
            for (int64_t at = lane; at < lane + queries; at += LANES) {
                const __m512i low = rounded(tile + key * STRIP + at), high = rounded(tile + (key + 1) * STRIP + at);
                _mm512_storeu_si512(tile_pairs_ + key / 2 * STRIP + at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        product<1, true>(queries, vectors_, keys / 2, tile_pairs_ + lane, STRIP, pairs + j / 2 * W, W, out + lane * W, W,
                         true);
    }

    void add_over_queries(const Strip& strip, int64_t keys, int vector, const float* tile, const float* pairs,
                          float* out) const {
        const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
        for (int64_t key = 0; key < keys; ++key)
            for (int64_t at = lane; at < lane + queries; at += LANES)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile_rows_ + (key * STRIP + at) / 2),
                                    __m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(tile + key * STRIP + at))));
        product<STRIP / 2, true>(keys, vectors_, queries / 2, tile_rows_ + lane / 2, 1,
                                 pairs + (strip.first + lane) / 2 * W, W, out, W, true);
    }

  private:
    int64_t depth_;  // pairs of channels
    float *tile_pairs_, *tile_rows_;
};

}  // namespace

void attention_of_pairs(const HstuAttention& a, bool is_backward) {
    if (a.width <= 64) run_work<Worker<64>>(a, is_backward);
    else if (a.width <= 128) run_work<Worker<128>>(a, is_backward);
    else run_work<Worker<256>>(a, is_backward);
}
#endif

}  // namespace hstu
