// The C interface of slots.h: tables of ids and slots, one thread each.

#include "slots.h"


namespace {

using namespace slots;

struct New {
    int64_t id;
    int64_t count;
    int32_t slot;
};

struct Counters {
    int64_t lookups, hits, waiting, rejections, insertions, evictions;
};

class Table {
public:
    Table(int64_t capacity, bool lfu, int64_t* ids, int64_t* scores)
        : capacity_(capacity), policy_{lfu}, ids_(ids), scores_(scores), victims_(ids, scores, policy_) {
        rebuild(0);
    }

    void wait_in(Table* sightings, int64_t threshold) {
        sightings_ = sightings;
        threshold_ = threshold;
    }

    int64_t size() const { return size_; }

    void rebuild(int64_t size) {
        size_ = size;
        index_.clear(capacity_);
        victims_.clear();
        for (int64_t slot = 0; slot < size; ++slot) index_.insert(ids_[slot], index_.home(ids_[slot]))->slot = slot;
    }

    void lookup(const int64_t* ids, int64_t n, int64_t* slots) {
        size_t homes[kBlock];
        for (int64_t start = 0; start < n; start += kBlock) {
            int64_t length = prefetch(ids + start, std::min(kBlock, n - start), homes);
            for (int64_t i = 0; i < length; ++i) slots[start + i] = index_.find(ids[start + i], homes[i])->slot;
        }
    }

    // counts: occurrences of each id, which are distinct then; null: one each, repeats allowed.
    void assign(const int64_t* ids, const int64_t* counts, int64_t n, int64_t step, int64_t* slots, Counters* told) {
        fresh_.clear();
        taken_.clear();
        placed_.clear();
        find_all(ids, counts, n, step, slots, told);
        admit(step, told);
        place(step, told);
        forget();
        for (int64_t i = 0; i < n; ++i)
            if (slots[i] < kEmpty) slots[i] = fresh_[kFirstNew - slots[i]].slot;
    }

    const std::vector<int32_t>& placed() const { return placed_; }
    const std::vector<int64_t>& evicted() const { return evicted_; }
    const New& fresh(int64_t i) const { return fresh_[i]; }

private:
    static constexpr int64_t kBlock = 64;
    static constexpr int64_t kFirstNew = -2;  // new id k of a batch is in the index as kFirstNew - k

    int64_t prefetch(const int64_t* ids, int64_t length, size_t* homes) {
        for (int64_t i = 0; i < length; ++i) index_.prefetch(homes[i] = index_.home(ids[i]));
        return length;
    }

    void find_all(
        const int64_t* ids, const int64_t* counts, int64_t n, int64_t step, int64_t* slots, Counters* told) {
        size_t homes[kBlock];
        for (int64_t start = 0; start < n; start += kBlock) {
            index_.reserve(kBlock);
            int64_t length = prefetch(ids + start, std::min(kBlock, n - start), homes);
            for (int64_t i = 0; i < length; ++i) {
                Index::Entry* entry = index_.insert(ids[start + i], homes[i]);
                if (entry->slot == kEmpty) {
                    entry->slot = int32_t(kFirstNew - int64_t(fresh_.size()));
                    fresh_.push_back({ids[start + i], 0, kEmpty});
                } else if (entry->slot >= 0) {
                    __builtin_prefetch(&scores_[entry->slot], 1);
                }
                slots[start + i] = entry->slot;
            }
            for (int64_t i = start; i < start + length; ++i) {
                int64_t count = counts ? counts[i] : 1;
                told->lookups += count;
                if (slots[i] >= 0) {
                    int64_t& score = scores_[slots[i]];
                    score = policy_.score(policy_.count(score) + count, step);
                    told->hits += count;
                } else {
                    fresh_[kFirstNew - slots[i]].count += count;
                }
            }
        }
    }

    // Numbers of the new ids that may have a slot, to admitted_.
    void admit(int64_t step, Counters* told) {
        admitted_.clear();
        if (!sightings_) {
            for (size_t i = 0; i < fresh_.size(); ++i) admitted_.push_back(int32_t(i));
            return;
        }
        std::vector<int64_t> ids(fresh_.size()), counts(fresh_.size()), slots(fresh_.size());
        for (size_t i = 0; i < fresh_.size(); ++i) {
            ids[i] = fresh_[i].id;
            counts[i] = fresh_[i].count;
        }
        Counters not_told{};
        sightings_->assign(ids.data(), counts.data(), int64_t(ids.size()), step, slots.data(), &not_told);
        for (size_t i = 0; i < fresh_.size(); ++i) {
            int64_t sighted = slots[i] < 0 ? counts[i] : sightings_->policy_.count(sightings_->scores_[slots[i]]);
            if (sighted >= threshold_)
                admitted_.push_back(int32_t(i));
            else
                told->waiting += counts[i];
        }
    }

    // Slots for the admitted ids, or for as many as there are.
    void place(int64_t step, Counters* told) {
        int64_t unused = capacity_ - size_;
        victims_.pop(contenders(unused, step), size_, step, taken_);
        evicted_.clear();
        for (int32_t slot : taken_) evicted_.push_back(ids_[slot]);
        keep_most_seen(unused + int64_t(taken_.size()), told);
        size_t next_taken = 0;
        for (int32_t number : admitted_) {
            New& fresh = fresh_[number];
            fresh.slot = size_ < capacity_ ? int32_t(size_++) : taken_[next_taken++];
            ids_[fresh.slot] = fresh.id;
            scores_[fresh.slot] = policy_.score(fresh.count, step);
            placed_.push_back(number);
        }
        for (int32_t number : placed_) victims_.inserted(fresh_[number].slot);
        told->insertions += int64_t(placed_.size());
        told->evictions += int64_t(taken_.size());
    }

    // Scores of the admitted ids but the `unused` best, highest first. Under lru their order does not matter: any of
    // them is higher than what it is compared with.
    std::vector<int64_t> contenders(int64_t unused, int64_t step) const {
        std::vector<int64_t> scores;
        if (int64_t(admitted_.size()) <= unused) return scores;
        for (int32_t number : admitted_) scores.push_back(policy_.score(fresh_[number].count, step));
        if (policy_.lfu) std::sort(scores.begin(), scores.end(), std::greater<int64_t>());
        scores.erase(scores.begin(), scores.begin() + unused);
        return scores;
    }

    void keep_most_seen(int64_t room, Counters* told) {
        int64_t surplus = int64_t(admitted_.size()) - room;
        if (surplus <= 0) return;
        std::vector<Key> keys;
        for (int32_t number : admitted_)
            keys.push_back({std::min(fresh_[number].count, kMaxCount), mix(fresh_[number].id), number});
        std::sort(keys.begin(), keys.end());
        for (int64_t i = 0; i < surplus; ++i) told->rejections += fresh_[keys[i].slot].count;
        admitted_.clear();
        for (size_t i = size_t(surplus); i < keys.size(); ++i) admitted_.push_back(keys[i].slot);
        std::sort(admitted_.begin(), admitted_.end());
    }

    // The index tells what `place` has decided.
    void forget() {
        constexpr size_t kAhead = 16;
        for (size_t i = 0; i < fresh_.size(); ++i) {
            if (i + kAhead < fresh_.size()) index_.prefetch(index_.home(fresh_[i + kAhead].id));
            if (fresh_[i].slot != kEmpty) index_.find(fresh_[i].id, index_.home(fresh_[i].id))->slot = fresh_[i].slot;
        }
        for (size_t i = 0; i < evicted_.size(); ++i) {
            if (i + kAhead < evicted_.size()) index_.prefetch(index_.home(evicted_[i + kAhead]));
            index_.erase(evicted_[i]);
        }
        if (placed_.size() < fresh_.size())
            for (const New& fresh : fresh_)
                if (fresh.slot == kEmpty) index_.erase(fresh.id);
    }

    int64_t capacity_;
    Policy policy_;
    int64_t* ids_;
    int64_t* scores_;
    int64_t size_ = 0;
    Index index_;
    Victims victims_;
    Table* sightings_ = nullptr;
    int64_t threshold_ = 0;
    std::vector<New> fresh_;
    std::vector<int32_t> admitted_, placed_, taken_;
    std::vector<int64_t> evicted_;
};

}  // namespace

extern "C" {

void* hstu_slots_new(int64_t capacity, int32_t lfu, int64_t* ids, int64_t* scores) {
    return new Table(capacity, lfu != 0, ids, scores);
}

void hstu_slots_free(void* table) { delete static_cast<Table*>(table); }

void hstu_slots_wait_in(void* table, void* sightings, int64_t threshold) {
    static_cast<Table*>(table)->wait_in(static_cast<Table*>(sightings), threshold);
}

int64_t hstu_slots_size(const void* table) { return static_cast<const Table*>(table)->size(); }

void hstu_slots_rebuild(void* table, int64_t size) { static_cast<Table*>(table)->rebuild(size); }

void hstu_slots_lookup(void* table, const int64_t* ids, int64_t n, int64_t* slots) {
    static_cast<Table*>(table)->lookup(ids, n, slots);
}

// new_slots, new_ids, evicted_ids: room for min(n, capacity). counters: as in Counters; they say how many there are.
void hstu_slots_assign(
    void* handle, const int64_t* ids, int64_t n, int64_t step, int64_t* slots, int64_t* new_slots, int64_t* new_ids,
    int64_t* evicted_ids, int64_t* counters) {
    Table* table = static_cast<Table*>(handle);
    Counters told{};
    table->assign(ids, nullptr, n, step, slots, &told);
    for (int32_t number : table->placed()) {
        *new_slots++ = table->fresh(number).slot;
        *new_ids++ = table->fresh(number).id;
    }
    for (int64_t id : table->evicted()) *evicted_ids++ = id;
    const int64_t values[] = {told.lookups, told.hits, told.waiting, told.rejections, told.insertions, told.evictions};
    std::copy(std::begin(values), std::end(values), counters);
}
}
