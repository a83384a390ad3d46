// Softmax of a target against drawn rows of a pool. Two passes compute the loss and all gradients without gathering rows.
#include <cmath>
#include <limits>

#include "pack.h"

// Mirrors hstu/ops/cpu/softmax_loss.py. All tensors are contiguous.
extern "C" struct HstuSampledSoftmax {
    const float *queries, *positives, *pool;  // [M, width], [M, width], [S, width]
    const int32_t* draws;                     // [M, R], rows of the pool
    const int64_t *target_ids, *pool_ids;     // [M], [S]
    float *losses, *weights;                  // [M], [M, R]
    float *grad_queries, *grad_positives, *grad_pool;
    float* packed;   // [S, padded]: the pool with rows of whole vectors
    float* partial;  // [parts, S, padded], zeros; null: each thread takes a range of pool rows instead
    int64_t num_queries, num_draws, pool_size, width, padded, parts;
    float temperature;
    int32_t threads;
};

namespace hstu {
namespace {

constexpr int64_t QUERIES_AT_ONCE = 64;

// One vector of the sums of LANES vectors.
inline vf sums_of(vf* rows) {
    const vi lane = lane_numbers();
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2) {
        const vi own = (lane & bit) == 0 ? lane : lane + LANES;
        const vi other = (lane & bit) == 0 ? lane + bit : lane - bit + LANES;
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row += 2 * bit) {
            const vf x = rows[row], y = rows[row + bit];
            rows[row] = __builtin_shuffle(x, y, own) + __builtin_shuffle(x, y, other);
        }
    }
    return rows[0];
}

template <int64_t W>  // numbers of a packed row
class SampledSoftmax {
  public:
    explicit SampledSoftmax(const HstuSampledSoftmax& a) : a_(a) {}

    void run() const {
        pack();
#pragma omp parallel for schedule(dynamic, 1) num_threads(a_.threads)
        for (int64_t first = 0; first < a_.num_queries; first += QUERIES_AT_ONCE) {
            static thread_local Buffer scores;
            float* row = scores.get(a_.num_draws + LANES);
            for (int64_t query = first; query < std::min(first + QUERIES_AT_ONCE, a_.num_queries); ++query)
                one_query(query, row);
        }
        if (a_.partial) by_queries();
        else by_rows();
    }

  private:
    static constexpr int NV = W / LANES;

    void pack() const {
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t row = 0; row < a_.pool_size; ++row)
            pack_row(a_.pool + row * a_.width, a_.width, 1.0f, a_.packed + row * W, W);
    }

    void one_query(int64_t query, float* scores) const {
        alignas(64) float vector[W], positive[W], gradient[W];
        pack_row(a_.queries + query * a_.width, a_.width, 1.0f, vector, W);
        pack_row(a_.positives + query * a_.width, a_.width, 1.0f, positive, W);
        const int32_t* draws = a_.draws + query * a_.num_draws;
        const float inverse = 1 / a_.temperature;
        vf product = {};
        for (int v = 0; v < NV; ++v) product += load(vector + v * LANES) * load(positive + v * LANES);
        const double target = double(sum(product)) * inverse;

        const float peak = score(vector, draws, a_.target_ids[query], inverse, scores);
        double loss = 0;
        float scale = 0;
        if (peak > -std::numeric_limits<float>::infinity()) {
            vf total = {};
            const vf shift = splat(peak);
            for (int64_t r = 0; r < a_.num_draws; r += LANES) {
                // A score of -inf marks a draw that is no negative, or padding of the last vector.
                const vf score = load(scores + r);
                const vf e = select(score < -1e30f, vf{}, exp(score - shift));
                store(scores + r, e);
                total += e;
            }
            // Also exact for a well-learnt target, whose loss is far below 1.
            const double above = peak + std::log(double(sum(total))) - target;
            loss = above > 0 ? above + std::log1p(std::exp(-above)) : std::log1p(std::exp(above));
            scale = float(std::exp(peak - target - loss) * inverse);
        }
        a_.losses[query] = float(loss);
        if (!a_.grad_queries) return;

        const float pull = float(std::expm1(-loss) * inverse);
        vf sums[NV];
        for (int v = 0; v < NV; ++v) sums[v] = load(positive + v * LANES) * pull;
        float* weights = a_.weights + query * a_.num_draws;
        for (int64_t r = 0; r < a_.num_draws; ++r) {
            const float weight = scale > 0 ? scores[r] * scale : 0.0f;
            weights[r] = weight;
            const float* row = a_.packed + int64_t(draws[r]) * W;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sums[v] += load(row + v * LANES) * weight;
        }
        for (int v = 0; v < NV; ++v) store(gradient + v * LANES, sums[v]);
        for (int64_t c = 0; c < a_.width; ++c) {
            a_.grad_queries[query * a_.width + c] = gradient[c];
            a_.grad_positives[query * a_.width + c] = vector[c] * pull;
        }
    }

    // Scores of all draws, -inf where a draw is the target; returns the largest.
    float score(const float* vector, const int32_t* draws, int64_t target, float inverse, float* scores) const {
        const float hidden = -std::numeric_limits<float>::infinity();
        vf peaks = splat(hidden);
        for (int64_t first = 0; first < a_.num_draws; first += LANES) {
            const int64_t count = std::min<int64_t>(LANES, a_.num_draws - first);
            vf products[LANES];
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) {
                const float* row = a_.packed + int64_t(draws[first + (lane < count ? lane : 0)]) * W;
                products[lane] = vf{};
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) products[lane] += load(vector + v * LANES) * load(row + v * LANES);
            }
            store(scores + first, sums_of(products) * inverse);
            for (int64_t lane = 0; lane < LANES; ++lane)
                if (lane >= count || a_.pool_ids[draws[first + lane]] == target) scores[first + lane] = hidden;
            const vf now = load(scores + first);
            peaks = select(now > peaks, now, peaks);
        }
        float peak = hidden;
        for (int lane = 0; lane < LANES; ++lane) peak = std::max(peak, peaks[lane]);
        return peak;
    }

    // Adds the shares of queries [begin, end) to the gradients of pool rows [low, high).
    template <bool ALL>
    void add(int64_t begin, int64_t end, int64_t low, int64_t high, float* gradients) const {
        alignas(64) float vector[W];
        for (int64_t query = begin; query < end; ++query) {
            pack_row(a_.queries + query * a_.width, a_.width, 1.0f, vector, W);
            const int32_t* draws = a_.draws + query * a_.num_draws;
            const float* weights = a_.weights + query * a_.num_draws;
            for (int64_t r = 0; r < a_.num_draws; ++r) {
                const int64_t row = draws[r];
                if (!ALL && (row < low || row >= high)) continue;
                float* to = gradients + (row - low) * W;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    store(to + v * LANES, load(to + v * LANES) + load(vector + v * LANES) * weights[r]);
            }
        }
    }

    // A small pool: each part of the queries has its own sums, which are then added in order.
    void by_queries() const {
        if (!a_.grad_pool) return;
        const int64_t size = a_.pool_size * W, parts = a_.parts;
#pragma omp parallel for schedule(static, 1) num_threads(a_.threads)
        for (int64_t part = 0; part < parts; ++part)
            add<true>(a_.num_queries * part / parts, a_.num_queries * (part + 1) / parts, 0, a_.pool_size,
                      a_.partial + part * size);
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t row = 0; row < a_.pool_size; ++row)
            for (int64_t c = 0; c < a_.width; ++c) {
                float total = 0;
                for (int64_t part = 0; part < parts; ++part) total += a_.partial[part * size + row * W + c];
                a_.grad_pool[row * a_.width + c] = total;
            }
    }

    // A large pool: each part of its rows reads all draws. `packed` is no longer needed and holds the sums.
    void by_rows() const {
        if (!a_.grad_pool) return;
#pragma omp parallel for schedule(static, 1) num_threads(a_.threads)
        for (int64_t part = 0; part < a_.parts; ++part) {
            const int64_t low = a_.pool_size * part / a_.parts, high = a_.pool_size * (part + 1) / a_.parts;
            float* sums = a_.packed + low * W;
            std::memset(sums, 0, size_t(high - low) * W * sizeof(float));
            add<false>(0, a_.num_queries, low, high, sums);
            unpack_rows(sums, W, high - low, a_.width, 1.0f, a_.grad_pool + low * a_.width, a_.width);
        }
    }

    const HstuSampledSoftmax& a_;
};

}  // namespace
}  // namespace hstu

// Numbers of a packed row for vectors of this width, at most 256.
extern "C" int64_t hstu_packed_width(int64_t width) {
    int64_t packed = 16;
    while (packed < width) packed *= 2;
    return packed;
}

extern "C" void hstu_sampled_softmax(const HstuSampledSoftmax* a) {
    switch (a->padded) {
        case 16: return hstu::SampledSoftmax<16>(*a).run();
        case 32: return hstu::SampledSoftmax<32>(*a).run();
        case 64: return hstu::SampledSoftmax<64>(*a).run();
        case 128: return hstu::SampledSoftmax<128>(*a).run();
        case 256: return hstu::SampledSoftmax<256>(*a).run();
    }
}
