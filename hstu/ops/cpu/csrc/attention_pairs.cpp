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
class Worker : public Work<bfloat, W> {
    using Base = Work<bfloat, W>;
    using Base::a_, Base::s_, Base::bias_, Base::length_, Base::rows_, Base::vectors_, Base::tile_, Base::grad_tile_;
    using Base::begin, Base::at, Base::put, Base::put_queries, Base::clear, Base::weigh, Base::differentiate;
    using Base::has_queries, Base::first_query_, Base::stop_query_;

  public:
    Worker(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch)
        : Base(a, sequence, head, scratch, a.alpha, a.inverse_n), depth_((a.width + 1) / 2) {
        q_ = packed(a_.q, a_.q_strides, first_query_, stop_query_, s_.q);
        k_ = packed(a_.k, a_.k_strides, 0, length_, s_.k);
        v_ = packed(a_.v, a_.v_strides, 0, length_, s_.v);
        q_columns_ = columns(q_, s_.q_columns);
        tile_pairs_ = s_.tile_pairs.get(BLOCK / 2 * STRIP);
        tile_rows_ = s_.tile_rows.get(BLOCK * STRIP / 2);
    }

    void forward() {
        const float* v_pairs = pairs(v_, s_.v_pairs);
        float* out = s_.out.get(STRIP * W);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(out, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                scores(strip, j, keys, vector, q_columns_, k_, tile_);
                weigh(strip, j, keys, vector);
                add_over_keys(strip, j, keys, vector, tile_, v_pairs, out);
            });
            put_queries(a_.out, a_.out_strides, strip, out, a_.inverse_n);
        }
    }

    void backward(double* grad_position, double* grad_time) {
        const float* grad = packed(a_.grad_out, a_.grad_out_strides, first_query_, stop_query_, s_.grad);
        const float *grad_columns = columns(grad, s_.grad_columns), *grad_pairs = pairs(grad, s_.grad_pairs);
        const float *q_pairs = pairs(q_, s_.q_pairs), *k_pairs = pairs(k_, s_.k_pairs);
        float *grad_q = s_.grad_q.get(STRIP * W), *grad_k = s_.grad_k.get(rows_ * W), *grad_v = s_.grad_v.get(rows_ * W);
        clear(grad_k, rows_);
        clear(grad_v, rows_);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(grad_q, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                scores(strip, j, keys, vector, q_columns_, k_, tile_);
                scores(strip, j, keys, vector, grad_columns, v_, grad_tile_);
                differentiate(strip, j, keys, vector);
                add_over_queries(strip, keys, vector, tile_, grad_pairs, grad_v + j * W);
                add_over_queries(strip, keys, vector, grad_tile_, q_pairs, grad_k + j * W);
                add_over_keys(strip, j, keys, vector, grad_tile_, k_pairs, grad_q);
                if (bias_.exists()) bias_.add_gradients(grad_tile_, keys, vector);
            });
            put_queries(a_.grad_q, a_.grad_q_strides, strip, grad_q, a_.alpha);
        }
        put(a_.grad_k, a_.grad_k_strides, 0, length_, grad_k, a_.alpha);
        put(a_.grad_v, a_.grad_v_strides, 0, length_, grad_v, a_.inverse_n);
        if (bias_.exists()) bias_.flush(grad_position, grad_time);
    }

  private:
    // Rows of W bfloat16, which are rows of W / 2 pairs of channels. Rows outside [first, stop) are zero.
    const float* packed(const void* tensor, const int64_t* strides, int64_t first, int64_t stop, Buffer& buffer) const {
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

    // out[query] += sum over the block's keys of tile[key][query] · rows[key]
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

    // out[key] += sum over the strip's queries of tile[key][query] · rows[query]
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

    int64_t depth_;  // pairs of channels
    const float *q_, *k_, *v_, *q_columns_;
    float *tile_pairs_, *tile_rows_;
};

}  // namespace

void attention_of_pairs(const HstuAttention& a, bool is_backward) {
    if (a.width <= 64) run_work<Worker<64>>(a, is_backward);
    else if (a.width <= 128) run_work<Worker<128>>(a, is_backward);
    else run_work<Worker<256>>(a, is_backward);
}
#else
void attention_of_pairs(const HstuAttention&, bool) {}
#endif

}  // namespace hstu
