// Time buckets of the relative bias: floor(ln(max(1, |difference|)) / 0.301) without a logarithm per pair.
#include <cmath>
#include <limits>

#include "attention.h"

namespace hstu {
namespace {

constexpr double BUCKET_WIDTH = 0.301;

// The least difference of each bucket floor(ln(max(1, x)) / 0.301), and the first bucket of each power of two.
struct Thresholds {
    int64_t least[TIME_BUCKETS + 4];
    uint8_t first_of_power[64];

    Thresholds() {
        const auto exact = [](int64_t x) { return int64_t(std::log(double(x)) / BUCKET_WIDTH); };
        for (int bucket = 0; bucket < TIME_BUCKETS + 4; ++bucket) least[bucket] = std::numeric_limits<int64_t>::max();
        for (int bucket = 0; bucket < TIME_BUCKETS; ++bucket) {
            const double guess = std::exp(bucket * BUCKET_WIDTH);
            if (guess > 9e18) break;
            int64_t x = std::max<int64_t>(1, int64_t(guess) - 2);
            if (guess < 1e15) {
                while (exact(x) < bucket) ++x;
            } else {  // beyond 2^53 neighbours round to one double: bisect the interval
                int64_t low = int64_t(guess * (1 - 1e-12)), high = int64_t(guess * (1 + 1e-12));
                while (low < high) {
                    const int64_t middle = low + (high - low) / 2;
                    if (exact(middle) < bucket) low = middle + 1;
                    else high = middle;
                }
                x = low;
            }
            least[bucket] = x;
        }
        for (int power = 0; power < 64; ++power) {
            int bucket = 0;
            const int64_t x = power < 63 ? int64_t(1) << power : std::numeric_limits<int64_t>::max();
            while (bucket + 1 < TIME_BUCKETS && least[bucket + 1] <= x) ++bucket;
            first_of_power[power] = uint8_t(bucket);
        }
    }
};

const Thresholds& thresholds() {
    static const Thresholds made;
    return made;
}

inline uint8_t bucket_of(const Thresholds& t, int64_t difference) {
    const uint64_t x = difference < 0 ? uint64_t(0) - uint64_t(difference) : uint64_t(difference);
    const int64_t seconds = int64_t(std::min<uint64_t>(std::max<uint64_t>(x, 1), INT64_MAX));
    const int bucket = t.first_of_power[63 - __builtin_clzll(uint64_t(seconds))];
    // An octave spans 2.3 buckets.
    const int further = (seconds >= t.least[bucket + 1]) + (seconds >= t.least[bucket + 2]) +
                        (seconds >= t.least[bucket + 3]);
    return uint8_t(std::min(bucket + further, TIME_BUCKETS - 1));
}

#if defined(__AVX512DQ__) && defined(__AVX512VL__)
// Each sixteenth of an octave contains one bucket boundary at most.
struct Sixteenths {
    int32_t bucket[64 * 16];

    explicit Sixteenths(const Thresholds& t) {
        for (int place = 0; place < 64 * 16; ++place) {
            const double low = std::ceil(std::ldexp(1.0 + (place % 16) / 16.0, place / 16));
            bucket[place] = low < 9.2e18 ? bucket_of(t, int64_t(low)) : TIME_BUCKETS - 1;
        }
    }
};

// The buckets of 8 differences.
inline void buckets_of(const Thresholds& t, const Sixteenths& sixteenths, __m512i differences, uint8_t* out) {
    const __m512i seconds = _mm512_max_epi64(_mm512_abs_epi64(differences), _mm512_set1_epi64(1));
    // Towards zero: exponent and leading bits of the float are those of the integer.
    const __m256 rounded = _mm512_cvt_roundepi64_ps(seconds, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const __m256i place = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(rounded), 19),
                                           _mm256_set1_epi32(127 * 16));
    const __m256i bucket = _mm256_i32gather_epi32(sixteenths.bucket, place, 4);
    const __m512i next = _mm512_i32gather_epi64(bucket, t.least + 1, 8);
    const __mmask8 above = _mm512_cmpge_epi64_mask(seconds, next);
    const __m256i found = _mm256_mask_add_epi32(bucket, above, bucket, _mm256_set1_epi32(1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_cvtepi32_epi8(found));
}

void row_of_buckets(const int64_t* query_times, int64_t key_time, uint8_t* out) {
    static const Sixteenths sixteenths(thresholds());
    const __m512i key = _mm512_set1_epi64(key_time);
    for (int64_t lane = 0; lane < STRIP; lane += 8)
        buckets_of(thresholds(), sixteenths, _mm512_sub_epi64(_mm512_loadu_si512(query_times + lane), key), out + lane);
}
#else
void row_of_buckets(const int64_t* query_times, int64_t key_time, uint8_t* out) {
    for (int64_t lane = 0; lane < STRIP; ++lane) out[lane] = bucket_of(thresholds(), query_times[lane] - key_time);
}
#endif

}  // namespace

int64_t bucket_bytes(const HstuAttention& a, int64_t sequence) {
    const int64_t length = a.offsets[sequence + 1] - a.offsets[sequence];
    int64_t bytes = 0;
    for (int64_t first = 0; first < length; first += STRIP)
        bytes += make_strip(a, first, length, length - a.candidates[sequence]).keys() * STRIP;
    return bytes;
}

void fill_buckets(const HstuAttention& a, int64_t sequence, const Strip& s, int64_t j, int64_t keys, uint8_t* out) {
    const int64_t begin = a.offsets[sequence], length = a.offsets[sequence + 1] - begin;
    int64_t query_times[STRIP];
    for (int64_t lane = 0; lane < STRIP; ++lane)
        query_times[lane] = a.query_times[begin + std::min(s.first + lane, length - 1)];
    for (int64_t row = 0; row < keys; ++row) {
        const int64_t key_time = a.token_times[begin + std::min(j + row, length - 1)];
        row_of_buckets(query_times, key_time, out + row * STRIP);
    }
}

}  // namespace hstu

// Offset of each sequence's buckets in bytes, [B + 1] elements; the last one is the total.
extern "C" void hstu_bucket_offsets(const HstuAttention* a, int64_t* offsets) {
    int64_t bytes = 0;
    for (int64_t sequence = 0; sequence < a->sequences; ++sequence) {
        offsets[sequence] = bytes;
        bytes += hstu::bucket_bytes(*a, sequence);
    }
    offsets[a->sequences] = bytes;
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
