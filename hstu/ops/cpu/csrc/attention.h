// HSTU attention of jagged sequences: definitions shared by forward and backward.
//
// A sequence is processed in strips of 2 · LANES queries, one query per lane, against blocks of keys that some query of
// the strip may see. Scores are stored as [key][query], so that neither scores nor keys are padded to vectors.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm.h"

namespace hstu {

constexpr int STRIP = 2 * LANES;  // queries of a strip
constexpr int BLOCK = 64;         // keys of a block: its two tiles of scores stay in the first cache
constexpr int ROUND = 8;          // keys are rounded up to full register tiles
constexpr int TIME_BUCKETS = 128;

}  // namespace hstu

// Mirrors hstu/ops/cpu/attention.py: same names, same order. Strides count elements.
extern "C" struct HstuAttention {
    const void *q, *k, *v;  // [T, heads, width], channels contiguous
    int64_t q_strides[2], k_strides[2], v_strides[2];
    const void* grad_out;  // backward only
    int64_t grad_out_strides[2];
    void *out, *grad_q, *grad_k, *grad_v;  // [T, heads, width]
    int64_t out_strides[2], grad_q_strides[2], grad_k_strides[2], grad_v_strides[2];
    const float *position_weight, *time_weight;       // null without a bias
    double *grad_position_weight, *grad_time_weight;  // [bins, positions], [bins, TIME_BUCKETS]
    const int64_t *query_times, *token_times;
    const int64_t* thresholds;      // [TIME_BUCKETS]: least time difference of each bucket, the same in all calls
    uint8_t* buckets;               // kept time buckets, or null: computed again
    const int64_t* bucket_offsets;  // [B]: offset of a sequence's buckets
    const int64_t *offsets;         // [B + 1]
    const int64_t *candidates;      // [B]
    const int64_t *order;           // [B]: the most expensive sequences first
    int64_t sequences, heads, width, positions, bins;
    int64_t contextuals, group_tokens;
    int64_t max_span, full_tokens;  // as in AttentionConfig; a span below 0: there is none
    int64_t first_query, stop_query;  // tokens: q, grad_out, out and grad_q have no other rows
    float alpha, inverse_n;
    int32_t is_causal, contextual_mask, is_bfloat, threads;
};

namespace hstu {

// Query i of a sequence sees the keys [0, context), [from, history) and [own_group, i].
struct Visible {
    int32_t context[STRIP], from[STRIP], history[STRIP], own_group[STRIP];
};

struct Strip {
    int64_t first = 0, lanes = 0;  // queries [first, first + lanes)
    int vectors = 0;               // of queries: 1 or 2
    int64_t context_end = 0;        // keys [0, context_end) are for all vectors; below first_key, or 0
    int64_t first_key = 0;          // of the other keys
    int64_t both_end = 0, end = 0;  // keys [first_key, both_end) are for all vectors, [both_end, end) for the second
    int64_t all_from = 0, all_see = 0;       // keys [all_from, all_see) are seen by every query
    int64_t hidden_from = 0, hidden_to = 0;  // keys between history and candidates that no query sees
    bool has_candidates = false;
    Visible visible;

    // The keys are numbered without the gap between context and first_key.
    int64_t keys() const { return context_end + end - first_key; }
    int64_t number_of(int64_t key) const { return key < context_end ? key : context_end + key - first_key; }
};

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// The keys of context and history that a query sees: [0, context) and [from, to).
struct Range {
    int64_t context, from, to;
};

inline Range visible_history(const HstuAttention& a, int64_t i, int64_t history_end) {
    const int64_t position = std::min(i, history_end);
    const bool leads = a.contextual_mask && i < a.contextuals;
    const int64_t to = !a.is_causal || leads ? history_end : std::min(i + 1, history_end);
    const bool is_full = a.full_tokens > 0 && position >= history_end - a.full_tokens;
    if (a.max_span < 0 || leads || is_full) return {0, 0, to};
    const int64_t context = std::min(a.contextuals, to), from = std::max<int64_t>(0, position - a.max_span);
    const int64_t near = std::min(to, position + a.max_span + 1);
    if (from <= context) return {0, 0, std::max(context, near)};
    return {context, from, near};
}

inline Strip make_strip(const HstuAttention& a, int64_t first, int64_t length, int64_t history_end) {
    Strip s;
    s.first = first;
    s.lanes = std::min<int64_t>(STRIP, length - first);
    s.vectors = s.lanes > LANES ? 2 : 1;
    s.all_see = length;
    s.hidden_to = length;
    s.first_key = length;
    int64_t ends[2] = {0, 0};
    for (int64_t lane = 0; lane < STRIP; ++lane) {
        s.visible.context[lane] = s.visible.from[lane] = s.visible.history[lane] = 0;
        s.visible.own_group[lane] = INT32_MAX;
        const int64_t i = first + lane;
        if (lane >= s.lanes) continue;
        const Range range = visible_history(a, i, history_end);
        int64_t end = range.to;
        s.visible.context[lane] = int32_t(range.context);
        s.visible.from[lane] = int32_t(range.from);
        s.visible.history[lane] = int32_t(range.to);
        if (i >= history_end) {
            const int64_t group = history_end + (i - history_end) / a.group_tokens * a.group_tokens;
            s.visible.own_group[lane] = int32_t(group);
            s.hidden_to = std::min(s.hidden_to, group);
            s.has_candidates = true;
            end = i + 1;
        }
        s.context_end = std::max(s.context_end, range.context);
        s.first_key = std::min(s.first_key, range.from);
        s.all_from = std::max(s.all_from, range.from);
        s.all_see = std::min(s.all_see, range.to);
        s.hidden_from = std::max(s.hidden_from, range.to);
        ends[lane / LANES] = std::max(ends[lane / LANES], end);
    }
    s.context_end = round_up(s.context_end, ROUND);
    s.first_key = s.first_key / ROUND * ROUND;
    if (s.first_key <= s.context_end) s.first_key = s.context_end = 0;
    s.both_end = round_up(std::max(ends[0], s.first_key), ROUND);
    s.end = round_up(std::max(ends[0], ends[1]), ROUND);
    return s;
}

// Calls visit(first key, keys, first vector) for each block of keys that some query of the strip sees.
template <class Visit>
void for_each_block(const Strip& s, Visit visit) {
    for (int64_t j = 0; j < s.context_end; j += BLOCK) visit(j, std::min<int64_t>(BLOCK, s.context_end - j), 0);
    const int64_t cuts[3] = {s.first_key, s.vectors == 2 ? s.both_end : s.end, s.end};
    for (int part = 0; part < 2; ++part)
        for (int64_t j = cuts[part]; j < cuts[part + 1]; j += BLOCK) {
            const int64_t keys = std::min<int64_t>(BLOCK, cuts[part + 1] - j);
            if (j >= s.hidden_from && j + keys <= s.hidden_to) continue;
            visit(j, keys, part);
        }
}

// A vector's lanes that see key j.
inline vi sees(const Visible& visible, int vector, int64_t j, int64_t first) {
    const auto of_lanes = [&](const int32_t* values) { return load_int(values + vector * LANES); };
    const vi key = splat_int(int32_t(j));
    const vi query = lane_numbers() + int32_t(first + vector * LANES);
    const vi in_history = (of_lanes(visible.from) <= key) & (key < of_lanes(visible.history));
    return (key < of_lanes(visible.context)) | in_history | ((of_lanes(visible.own_group) <= key) & (key <= query));
}

// The buckets of keys [j, j + keys) for the queries of a strip, STRIP per key.
void fill_buckets(const HstuAttention& a, int64_t sequence, const Strip& s, int64_t j, int64_t keys, uint8_t* out);

}  // namespace hstu
