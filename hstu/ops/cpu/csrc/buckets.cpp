// Time buckets of the relative bias, from their thresholds: no logarithm per pair.
#include <cmath>
#include <limits>

#include "attention.h"

namespace hstu {
namespace {

// The least difference of each bucket, and the bucket of the least number of each sixteenth of an octave, which contains
// one bucket boundary at most.
struct Table {
    int64_t least[TIME_BUCKETS + 1];
    int32_t bucket[64 * 16];

    explicit Table(const int64_t* thresholds) {
        std::copy(thresholds, thresholds + TIME_BUCKETS, least);
        least[TIME_BUCKETS] = std::numeric_limits<int64_t>::max();
        for (int place = 0; place < 64 * 16; ++place) {
            const double low = std::ceil(std::ldexp(1.0 + (place % 16) / 16.0, place / 16));
            bucket[place] = int32_t(std::upper_bound(least, least + TIME_BUCKETS, std::min(low, 9.2e18)) - least) - 1;
        }
    }
};

// The buckets of the differences of a strip's query times and one key time.
void row_of_buckets(const Table& table, const int64_t* query_times, int64_t key_time, uint8_t* out) {
#if defined(__AVX512DQ__) && defined(__AVX512VL__)
    const __m512i key = _mm512_set1_epi64(key_time), one = _mm512_set1_epi64(1);
    for (int64_t lane = 0; lane < STRIP; lane += 8) {
        const __m512i differences = _mm512_sub_epi64(_mm512_loadu_si512(query_times + lane), key);
        const __m512i seconds = _mm512_max_epi64(_mm512_abs_epi64(differences), one);
        // Towards zero: exponent and leading bits of the float are those of the integer.
        const __m256 rounded = _mm512_cvt_roundepi64_ps(seconds, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
        const __m256i place = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(rounded), 19),
                                               _mm256_set1_epi32(127 * 16));
        const __m256i bucket = _mm256_i32gather_epi32(table.bucket, place, 4);
        const __m512i next = _mm512_i32gather_epi64(bucket, table.least + 1, 8);
        const __mmask8 above = _mm512_cmpge_epi64_mask(seconds, next);
        const __m256i found = _mm256_mask_add_epi32(bucket, above, bucket, _mm256_set1_epi32(1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + lane), _mm256_cvtepi32_epi8(found));
    }
#else
    for (int64_t lane = 0; lane < STRIP; ++lane) {
        const int64_t difference = query_times[lane] - key_time;
        const uint64_t x = difference < 0 ? uint64_t(0) - uint64_t(difference) : uint64_t(difference);
        const int64_t seconds = int64_t(std::min<uint64_t>(std::max<uint64_t>(x, 1), INT64_MAX - 1));
        const int power = 63 - __builtin_clzll(uint64_t(seconds));
        const int64_t digits = power < 4 ? seconds << (4 - power) : seconds >> (power - 4);
        const int bucket = table.bucket[16 * power + digits % 16];
        out[lane] = uint8_t(bucket + (seconds >= table.least[bucket + 1]));
    }
#endif
}

}  // namespace

void fill_buckets(const HstuAttention& a, int64_t sequence, const Strip& s, int64_t j, int64_t keys, uint8_t* out) {
    static const Table table(a.thresholds);
    const int64_t begin = a.offsets[sequence], length = a.offsets[sequence + 1] - begin;
    int64_t query_times[STRIP];
    for (int64_t lane = 0; lane < STRIP; ++lane)
        query_times[lane] = a.query_times[begin + std::min(s.first + lane, length - 1)];
    for (int64_t row = 0; row < keys; ++row) {
        const int64_t key_time = a.token_times[begin + std::min(j + row, length - 1)];
        row_of_buckets(table, query_times, key_time, out + row * STRIP);
    }
}

}  // namespace hstu

// Offset of each sequence's buckets in bytes, [B + 1] elements; the last one is the total. A sequence has STRIP bytes per
// key, strip after strip.
extern "C" void hstu_bucket_offsets(const HstuAttention* a, int64_t* offsets) {
    int64_t bytes = offsets[0] = 0;
    for (int64_t sequence = 0; sequence < a->sequences; ++sequence) {
        const int64_t length = a->offsets[sequence + 1] - a->offsets[sequence];
        for (int64_t first = 0; first < length; first += hstu::STRIP)
            bytes += hstu::make_strip(*a, first, length, length - a->candidates[sequence]).keys() * hstu::STRIP;
        offsets[sequence + 1] = bytes;
    }
}

// Fills a->buckets for all sequences.
extern "C" void hstu_fill_buckets(const HstuAttention* a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a->threads)
    for (int64_t rank = 0; rank < a->sequences; ++rank) {
        const int64_t sequence = a->order[rank], length = a->offsets[sequence + 1] - a->offsets[sequence];
        uint8_t* out = a->buckets + a->bucket_offsets[sequence];
        for (int64_t first = 0; first < length; first += hstu::STRIP) {
            const hstu::Strip strip = hstu::make_strip(*a, first, length, length - a->candidates[sequence]);
            hstu::fill_buckets(*a, sequence, strip, 0, strip.context_end, out);
            hstu::fill_buckets(*a, sequence, strip, strip.first_key, strip.end - strip.first_key,
                               out + strip.context_end * hstu::STRIP);
            out += strip.keys() * hstu::STRIP;
        }
    }
}
