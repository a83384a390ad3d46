// Softmax of a target against drawn rows of a pool. Two passes compute the loss and all gradients; nothing is gathered.
#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.h"

// Mirrors hstu/ops/cpu/softmax_loss.py. All tensors are contiguous.
extern "C" struct HstuSampledSoftmax {
    const float *queries, *positives, *pool;  // [M, width], [M, width], [S, width]
    const int32_t* draws;                     // [M, R], rows of the pool
    const int64_t *target_ids, *pool_ids;     // [M], [S]
    const float* log_weights;                 // [S]: added to the scores; null: zeros
    const int32_t *first, *sequences, *positions;  // [B, S], [M], [M]: see SeenItems in hstu/ops/kernels.py; null: none
    float *losses, *weights;                  // [M], [M, R]
    float *grad_queries, *grad_positives, *grad_pool;
    uint8_t* tags;  // [S]: scratch for the last bytes of pool_ids, so few that they stay in the cache
    float* packed;  // [S, padded]: scratch for rows of whole vectors; null: rows are read and added to where they are
    int64_t num_queries, num_draws, pool_size, width, padded;  // width: at least 16
    float temperature;
    int32_t threads;
};

namespace hstu {
namespace {

constexpr int64_t QUERIES_AT_ONCE = 64;
constexpr float MOST_EXPONENT = 40;  // e^40 leaves room for sums

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

// A row is read as NV vectors. Where its width is no multiple of LANES, the last ones begin earlier and overlap those
// before them, so that nothing lies beyond the row. Queries have zeros in the lanes that are there twice.
// W: numbers of a packed row. PACKED: rows of the pool are copied to rows of W, each vector beside the one before it.
template <int64_t W, bool PACKED>
class SampledSoftmax {
  public:
    explicit SampledSoftmax(const HstuSampledSoftmax& a) : a_(a) {}

    void run() const {
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t row = 0; row < a_.pool_size; ++row) a_.tags[row] = uint8_t(a_.pool_ids[row]);
        if (PACKED) pack();
#pragma omp parallel for schedule(dynamic, 1) num_threads(a_.threads)
        for (int64_t first = 0; first < a_.num_queries; first += QUERIES_AT_ONCE) {
            static thread_local Buffer scores;
            float* row = scores.get(a_.num_draws + LANES);
            for (int64_t query = first; query < std::min(first + QUERIES_AT_ONCE, a_.num_queries); ++query)
                one_query(query, row);
        }
        if (a_.grad_pool) pool_gradient();
    }

  private:
    static constexpr int NV = W / LANES;
    static constexpr int64_t CHUNK = 4096 / W;  // draws whose rows fill half of a cache of 32 KB

    // Where vector v begins in a row of `width` numbers.
    static int64_t place(int v, int64_t width) { return std::min<int64_t>(v * LANES, width - LANES); }
    int64_t place(int v) const { return place(v, a_.width); }

    // The same in a row of the pool, and how far apart its rows are.
    static int64_t pool_place(int v, int64_t width) { return PACKED ? v * LANES : place(v, width); }
    static int64_t pitch(int64_t width) { return PACKED ? W : width; }

    // Vector v of a query, zero in the lanes that the one before it has.
    vf own_part(const float* query, int v) const {
        return select(lane_numbers() + int(place(v)) < v * LANES, vf{}, load(query + place(v)));
    }

    void pack() const {
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t row = 0; row < a_.pool_size; ++row)
            for (int v = 0; v < NV; ++v)
                store(a_.packed + row * W + v * LANES, load(a_.pool + row * a_.width + place(v)));
    }

    void one_query(int64_t query, float* scores) const {
        const float *vector = a_.queries + query * a_.width, *positive = a_.positives + query * a_.width;
        const int32_t* draws = a_.draws + query * a_.num_draws;
        const float* rows = PACKED ? a_.packed : a_.pool;
        const int64_t width = a_.width, pitch = SampledSoftmax::pitch(width), num_draws = a_.num_draws;
        const float inverse = 1 / a_.temperature;
        vf own[NV], sums[NV] = {}, total = {}, product = {};
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            own[v] = own_part(vector, v);
            product += own[v] * load(positive + place(v));
        }
        const float target = sum_of_lanes(product)[0] * inverse;
        for (int64_t r = 0; r < num_draws; r += 16) __builtin_prefetch(draws + 2 * num_draws + r);  // of a later query
        // Exponentials are relative to the target, or to the largest score of a chunk where that is much larger.
        float shift = target;
        for (int64_t first = 0; first < num_draws; first += CHUNK) {
            const int64_t end = std::min(first + CHUNK, num_draws);
            const float peak = score(own, draws, first, end, query, inverse, scores);
            if (peak > shift + MOST_EXPONENT) {
                const float factor = std::exp(shift - peak);
                total *= factor;
#pragma GCC unroll 16
                for (int v = 0; v < NV; ++v) sums[v] *= factor;
                for (int64_t r = 0; r < first; ++r) scores[r] *= factor;
                shift = peak;
            }
            for (int64_t r = first; r < end; r += LANES) {
                const vf e = exp_or_zero(load(scores + r) - shift);
                store(scores + r, e);
                total += e;
            }
            if (!a_.grad_queries) continue;
            for (int64_t r = first; r < end; ++r) {
                const float* row = rows + draws[r] * pitch;
#pragma GCC unroll 16
                for (int v = 0; v < NV; ++v) sums[v] += load(row + pool_place(v, width)) * scores[r];
            }
        }
        // log1p and this order are exact for a well-learnt target, whose loss is far below 1.
        const double negatives = sum_of_lanes(total)[0], one = shift == target ? 1.0 : std::exp(double(target) - shift);
        a_.losses[query] = float(double(shift) - target + std::log1p(negatives + (one - 1)));
        if (!a_.grad_queries) return;

        const float scale = float(inverse / (negatives + one)), pull = float(-negatives * inverse / (negatives + one));
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            const int64_t c = query * a_.width + place(v);
            store(a_.grad_queries + c, sums[v] * scale + load(positive + place(v)) * pull);
            store(a_.grad_positives + c, load(vector + place(v)) * pull);
        }
        float* weights = a_.weights + query * num_draws;
        for (int64_t r = 0; r < num_draws; ++r) weights[r] = scores[r] * scale;
    }

    // Scores of draws [begin, end) and their log weights, -inf where a draw is hidden; returns the largest.
    float score(const vf* own, const int32_t* draws, int64_t begin, int64_t end, int64_t query, float inverse,
                float* scores) const {
        const float hidden = -std::numeric_limits<float>::infinity();
        const float* rows = PACKED ? a_.packed : a_.pool;
        const int64_t width = a_.width, pitch = SampledSoftmax::pitch(width);
        const float* log_weights = a_.log_weights;
        vf peaks = splat(hidden);
        for (int64_t first = begin; first < end; first += LANES) {
            const int64_t count = std::min<int64_t>(LANES, end - first);
            vf products[LANES];
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) {
                const float* row = rows + draws[first + (lane < count ? lane : 0)] * pitch;
                products[lane] = vf{};
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) products[lane] += own[v] * load(row + pool_place(v, width));
            }
            vf now = sums_of(products) * inverse;
            if (log_weights) {
                vf shift = {};
#pragma GCC unroll 16
                for (int lane = 0; lane < LANES; ++lane) shift[lane] = log_weights[draws[first + (lane < count ? lane : 0)]];
                now += shift;
            }
            store(scores + first, now);
            for (int64_t lane = count; lane < LANES; ++lane) scores[first + lane] = hidden;
            hide(draws + first, count, query, scores + first);
            now = load(scores + first);
            peaks = select(now > peaks, now, peaks);
        }
        return largest(peaks);
    }

    // Makes the scores of draws that are no negatives of a query -inf: its target, and what its user has seen.
    void hide(const int32_t* draws, int64_t count, int64_t query, float* scores) const {
        const float hidden = -std::numeric_limits<float>::infinity();
        if (a_.first) {
            const int32_t* first = a_.first + a_.sequences[query] * a_.pool_size;
            const int32_t position = a_.positions[query];
            for (int64_t lane = 0; lane < count; ++lane)
                if (first[draws[lane]] <= position) scores[lane] = hidden;
            return;
        }
        const int64_t target = a_.target_ids[query];
        const uint8_t* tags = a_.tags;
        const uint8_t tag = uint8_t(target);
        for (int64_t lane = 0; lane < count; ++lane)
            if (tags[draws[lane]] == tag && a_.pool_ids[draws[lane]] == target) scores[lane] = hidden;
    }

    // Each number is the sum over queries in order, hence the same on any number of threads. Threads share the columns
    // of packed rows, or the rows where those are used in place.
    void pool_gradient() const {
        if (!PACKED) return in_place();
        constexpr int64_t most = std::min<int64_t>(W, 64);  // 4,000 rows of them fit a cache of 1 MiB
        if (a_.threads >= 4) return by_columns<std::min(most, std::max<int64_t>(W / 4, 16))>();
        if (a_.threads >= 2) return by_columns<std::min(most, std::max<int64_t>(W / 2, 16))>();
        by_columns<most>();
    }

    template <int64_t COLUMNS>
    void by_columns() const {
        constexpr int N = COLUMNS / LANES;
        const int64_t size = a_.pool_size * COLUMNS;  // packed rows are no longer needed: now [W / COLUMNS, S, COLUMNS]
#pragma omp parallel for schedule(static, 1) num_threads(a_.threads)
        for (int64_t block = 0; block < W / COLUMNS; ++block) {
            std::memset(a_.packed + block * size, 0, size * sizeof(float));
            add<N>(a_.packed + block * size, block * N, 0, a_.pool_size);
        }
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t row = 0; row < a_.pool_size; ++row)
            for (int v = NV - 1; v >= 0; --v)
                store(a_.grad_pool + row * a_.width + place(v),
                      load(a_.packed + v / N * size + row * COLUMNS + v % N * LANES));
    }

    void in_place() const {
#pragma omp parallel for schedule(static, 1) num_threads(a_.threads)
        for (int64_t range = 0; range < a_.threads; ++range) {
            const int64_t low = a_.pool_size * range / a_.threads, high = a_.pool_size * (range + 1) / a_.threads;
            std::memset(a_.grad_pool + low * a_.width, 0, (high - low) * a_.width * sizeof(float));
            add<NV>(a_.grad_pool, 0, low, high);
        }
    }

    // Adds vectors [first, first + N) of the queries' shares to rows [low, high).
    template <int N>
    void add(float* sums, int first, int64_t low, int64_t high) const {
        const bool all = PACKED || high - low == a_.pool_size;
        const int64_t num_draws = a_.num_draws, width = a_.width, pitch = PACKED ? N * LANES : width;
        for (int64_t query = 0; query < a_.num_queries; ++query) {
            vf own[N];
            for (int v = 0; v < N; ++v) own[v] = own_part(a_.queries + query * a_.width, first + v);
            const int32_t* draws = a_.draws + query * num_draws;
            const float* weights = a_.weights + query * num_draws;
            for (int64_t r = 0; r < num_draws; ++r) {
                if (!all && (draws[r] < low || draws[r] >= high)) continue;
                float* to = sums + draws[r] * pitch;
                vf shares[N];
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) shares[v] = load(to + pool_place(v, width)) + own[v] * weights[r];
                // The first vectors last: where the last ones overlap them, those have added nothing.
#pragma GCC unroll 4
                for (int v = N - 1; v >= 0; --v) store(to + pool_place(v, width), shares[v]);
            }
        }
    }

    const HstuSampledSoftmax& a_;
};

template <int64_t W>
void sampled_softmax(const HstuSampledSoftmax& a) {
    a.packed ? SampledSoftmax<W, true>(a).run() : SampledSoftmax<W, false>(a).run();
}

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
        case 16: return hstu::sampled_softmax<16>(*a);
        case 32: return hstu::sampled_softmax<32>(*a);
        case 64: return hstu::sampled_softmax<64>(*a);
        case 128: return hstu::sampled_softmax<128>(*a);
        case 256: return hstu::sampled_softmax<256>(*a);
    }
}
