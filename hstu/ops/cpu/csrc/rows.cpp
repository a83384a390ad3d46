// The optimizers of tables: sums the gradients of each row and updates the rows that have one.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"

enum HstuRowOptimizer : int32_t { SGD, ADAGRAD, ADAM, PARTIAL_ROWWISE_ADAM };

// Mirrors hstu/ops/cpu/operators.py. All float32, contiguous; weight, first and second: [rows, width], but second of
// PARTIAL_ROWWISE_ADAM: [rows].
extern "C" struct HstuRowUpdate {
    const int64_t* rows;     // [count]: the row of each gradient; rows may repeat
    const float* gradients;  // [count, width], contiguous
    float *weight, *first, *second;  // first and second: the states of the optimizer, or null
    int64_t count, width;
    float rate, eps, beta1, beta2, correction1, correction2, max_gradient;
    int32_t optimizer, threads;
};

namespace hstu {
namespace {

constexpr int DIGIT_BITS = 11;
constexpr int64_t AHEAD = 8;  // rows whose memory is requested early: they are scattered over the table

struct Occurrence {
    int64_t row, place;
};

// The gradients by row; those of one row in their order.
std::vector<Occurrence> sorted_occurrences(const HstuRowUpdate& a) {
    std::vector<Occurrence> sorted(a.count), other;
    int64_t largest = 0;
    bool is_sorted = true;
    for (int64_t place = 0; place < a.count; ++place) {
        is_sorted = is_sorted && (place == 0 || a.rows[place - 1] <= a.rows[place]);
        largest = std::max(largest, a.rows[place]);
        sorted[place] = {a.rows[place], place};
    }
    if (is_sorted) return sorted;
    other.resize(a.count);
    for (int shift = 0; shift < 63 && largest >> shift; shift += DIGIT_BITS) {
        const auto digit = [shift](int64_t row) { return row >> shift & ((1 << DIGIT_BITS) - 1); };
        std::vector<int64_t> next((1 << DIGIT_BITS) + 1);
        for (const Occurrence& o : sorted) ++next[digit(o.row) + 1];
        for (int value = 0; value < 1 << DIGIT_BITS; ++value) next[value + 1] += next[value];
        for (const Occurrence& o : sorted) other[next[digit(o.row)]++] = o;
        sorted.swap(other);
    }
    return sorted;
}

template <int OPTIMIZER>
void update_row(const HstuRowUpdate& a, const float* __restrict gradient, float* __restrict w, float* __restrict m,
                float* __restrict v) {
    const auto clamped = [&](int64_t c) { return std::min(std::max(gradient[c], -a.max_gradient), a.max_gradient); };
    float deviation = 0;  // of the whole row
    if (OPTIMIZER == PARTIAL_ROWWISE_ADAM) {
        float squares = 0;
        for (int64_t c = 0; c < a.width; ++c) squares += clamped(c) * clamped(c);
        *v = *v * a.beta2 + (1 - a.beta2) * (squares / a.width);
        deviation = std::sqrt(*v / a.correction2) + a.eps;
    }
    for (int64_t c = 0; c < a.width; ++c) {
        const float g = clamped(c);
        if (OPTIMIZER == SGD) {
            w[c] -= a.rate * g;
        } else if (OPTIMIZER == ADAGRAD) {
            m[c] += g * g;
            w[c] -= a.rate * (g / (std::sqrt(m[c]) + a.eps));
        } else {
            m[c] += (1 - a.beta1) * (g - m[c]);
            if (OPTIMIZER == ADAM) {
                v[c] = v[c] * a.beta2 + (1 - a.beta2) * (g * g);
                deviation = std::sqrt(v[c] / a.correction2) + a.eps;
            }
            w[c] -= a.rate * ((m[c] / a.correction1) / deviation);
        }
    }
}

inline void request(const float* row, int64_t width) {
    if (!row) return;
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(row + c, 1);
    __builtin_prefetch(row + width - 1, 1);
}

// Each thread takes a run of rows, so the sums do not depend on the number of threads.
template <int OPTIMIZER>
void update_rows(const HstuRowUpdate& a) {
    const std::vector<Occurrence> sorted = sorted_occurrences(a);
    const int64_t second_width = OPTIMIZER == PARTIAL_ROWWISE_ADAM ? 1 : a.width;
    const auto at = [&](float* table, int64_t row) { return table ? table + row * a.width : nullptr; };
    const auto second_at = [&](int64_t row) { return a.second ? a.second + row * second_width : nullptr; };
    const auto run_start = [&](int64_t place) {  // the first place from here on at which a row begins
        while (place > 0 && place < a.count && sorted[place].row == sorted[place - 1].row) ++place;
        return place;
    };
#pragma omp parallel for schedule(static, 1) num_threads(a.threads)
    for (int64_t part = 0; part < a.threads; ++part) {
        std::vector<float> sum(a.width);
        int64_t place = run_start(a.count * part / a.threads);
        const int64_t end = run_start(a.count * (part + 1) / a.threads);
        while (place < end) {
            if (place + AHEAD < end) {
                const Occurrence& ahead = sorted[place + AHEAD];
                for (float* table : {a.weight, a.first}) request(at(table, ahead.row), a.width);
                request(second_at(ahead.row), second_width);
                request(a.gradients + ahead.place * a.width, a.width);
            }
            const int64_t row = sorted[place].row;
            const float* gradient = a.gradients + sorted[place].place * a.width;
            if (++place < a.count && sorted[place].row == row) {
                std::copy(gradient, gradient + a.width, sum.begin());
                for (; place < a.count && sorted[place].row == row; ++place) {
                    const float* more = a.gradients + sorted[place].place * a.width;
                    for (int64_t c = 0; c < a.width; ++c) sum[c] += more[c];
                }
                gradient = sum.data();
            }
            update_row<OPTIMIZER>(a, gradient, at(a.weight, row), at(a.first, row), second_at(row));
        }
    }
}

}  // namespace
}  // namespace hstu

extern "C" void hstu_update_rows(const HstuRowUpdate* a) {
    switch (a->optimizer) {
        case SGD: return hstu::update_rows<SGD>(*a);
        case ADAGRAD: return hstu::update_rows<ADAGRAD>(*a);
        case ADAM: return hstu::update_rows<ADAM>(*a);
        case PARTIAL_ROWWISE_ADAM: return hstu::update_rows<PARTIAL_ROWWISE_ADAM>(*a);
    }
}
