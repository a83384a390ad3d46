// Slot tables and their C interface. A table must be used by one thread at a time.

#include "slots.h"

#include <new>
#include <tuple>

namespace {

using namespace slots;

struct New {
    int64_t id;
    int64_t count;
    size_t position;  // in the index, valid until something is erased there
    int32_t slot;
};

struct Counters {
    int64_t lookups, hits, waiting, rejections, insertions, evictions;
};

class Table {
public:
    Table(int64_t capacity, Policy policy, Record* records)
        : capacity_(capacity), policy_(policy), records_(records), victims_(records, policy_) {
        rebuild(0);
    }

    void set_admission(Table* sightings, int64_t threshold) {
        sightings_ = sightings;
        threshold_ = threshold;
    }

    int64_t size() const { return size_; }
    int64_t count_of(int64_t slot) const { return policy_.count(records_[slot].score); }

    void rebuild(int64_t size) {
        size_ = size;
        index_.clear(capacity_);
        victims_.clear();
        for (int32_t slot = 0; slot < size; ++slot) {
            uint32_t tag = Index::tag_of(records_[slot].id);
            index_.set(find(records_[slot].id, tag), {tag, slot});
            victims_.add(slot);
        }
    }

    void lookup(const int64_t* ids, int64_t n, int64_t* slots) {
        for_each_prefetched(ids, n, [&](int64_t i, uint32_t tag) { slots[i] = index_.slot(find(ids[i], tag)); });
    }

    // counts: how many occurrences each entry of ids stands for. Null: one. An id may have several.
    void assign(
        const int64_t* ids, const int64_t* counts, int64_t n, int64_t step, int64_t* slots, Counters* counters) {
        fresh_.clear();
        not_found_.clear();
        taken_.clear();
        placed_.clear();
        find_all(ids, counts, n, step, slots, counters);
        admit(step, counters);
        assign_slots(step, counters);
        update_index();
        for (int64_t i : not_found_) slots[i] = fresh_[kFirstNew - slots[i]].slot;
    }

    const std::vector<int32_t>& placed() const { return placed_; }
    const New& fresh(int64_t i) const { return fresh_[i]; }

private:
    static constexpr int32_t kFirstNew = -2;  // the index holds kFirstNew - k as the slot of the k-th new id of a batch

    size_t find(int64_t id, uint32_t tag) const {
        return index_.find(tag, [&](int32_t slot) {
            return id == (slot >= 0 ? records_[slot].id : fresh_[kFirstNew - slot].id);
        });
    }

    // Call visit(i, tag of the i-th id) for all ids, and prefetch what later calls will read: first the entry in the
    // index, then the record of the slot that the entry probably has.
    template <class Visit>
    void for_each_prefetched(const int64_t* ids, int64_t n, Visit visit) {
        tags_.resize(n);
        for (int64_t i = 0; i < n; ++i) tags_[i] = Index::tag_of(ids[i]);
        for (int64_t i = -2 * kAhead; i < n; ++i) {
            if (i + 2 * kAhead < n) index_.prefetch(tags_[i + 2 * kAhead]);
            int64_t next = i + kAhead;
            if (next >= 0 && next < n) __builtin_prefetch(&records_[std::max(0, index_.guess(tags_[next]))], 1);
            if (i >= 0) visit(i, tags_[i]);
        }
    }

    void find_all(
        const int64_t* ids, const int64_t* counts, int64_t n, int64_t step, int64_t* slots, Counters* counters) {
        int64_t lookups = 0, hits = 0;
        index_.reserve(n);
        for_each_prefetched(ids, n, [&](int64_t i, uint32_t tag) {
            size_t position = find(ids[i], tag);
            int32_t slot = index_.slot(position);
            int64_t count = counts ? counts[i] : 1;
            slots[i] = kEmpty;
            if (!count) return;
            lookups += count;
            if (slot >= 0) {
                int64_t& score = records_[slot].score;
                score = policy_.score(policy_.count(score) + count, step);
                hits += count;
            } else {
                not_found_.push_back(i);
                if (slot == kEmpty) {
                    slot = kFirstNew - int32_t(fresh_.size());
                    fresh_.push_back({ids[i], 0, position, kEmpty});
                    index_.set(position, {tag, slot});
                }
                fresh_[kFirstNew - slot].count += count;
            }
            slots[i] = slot;
        });
        counters->lookups += lookups;
        counters->hits += hits;
    }

    // Fill admitted_ with the numbers of the new ids that may have a slot.
    void admit(int64_t step, Counters* counters) {
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
        Counters ignored{};
        sightings_->assign(ids.data(), counts.data(), int64_t(ids.size()), step, slots.data(), &ignored);
        for (size_t i = 0; i < fresh_.size(); ++i) {
            int64_t sighted = slots[i] < 0 ? counts[i] : sightings_->count_of(slots[i]);
            if (sighted >= threshold_)
                admitted_.push_back(int32_t(i));
            else
                counters->waiting += counts[i];
        }
    }

    // Give slots to the admitted ids, as far as slots go.
    void assign_slots(int64_t step, Counters* counters) {
        int64_t unused = capacity_ - size_;
        if (policy_.evicts) victims_.pop(contenders(unused, step), step, taken_);
        evicted_.clear();
        for (int32_t slot : taken_) evicted_.push_back(records_[slot].id);
        keep_most_seen(unused + int64_t(taken_.size()), counters);
        size_t next_taken = 0;
        for (int32_t number : admitted_) {
            New& fresh = fresh_[number];
            fresh.slot = size_ < capacity_ ? int32_t(size_++) : taken_[next_taken++];
            records_[fresh.slot] = {fresh.id, policy_.score(fresh.count, step)};
            victims_.add(fresh.slot);
            placed_.push_back(number);
        }
        counters->insertions += int64_t(placed_.size());
        counters->evictions += int64_t(taken_.size());
    }

    // Scores of the admitted ids except the `unused` best ones, in descending order. Under lru they need no order, as
    // each is higher than any score that it is compared with.
    const std::vector<int64_t>& contenders(int64_t unused, int64_t step) {
        std::vector<int64_t>& scores = contenders_;
        scores.clear();
        if (int64_t(admitted_.size()) <= unused) return scores;
        for (int32_t number : admitted_) scores.push_back(policy_.score(fresh_[number].count, step));
        int64_t once = policy_.score(1, step);  // the score of most of them
        auto end = std::partition(scores.begin(), scores.end(), [&](int64_t score) { return score > once; });
        if (policy_.lfu) std::sort(scores.begin(), end, std::greater<int64_t>());
        scores.erase(scores.begin(), scores.begin() + unused);
        return scores;
    }

    void keep_most_seen(int64_t room, Counters* counters) {
        int64_t surplus = int64_t(admitted_.size()) - room;
        if (surplus <= 0) return;
        std::vector<std::tuple<int64_t, uint64_t, int32_t>> keys;  // count, hash, number
        for (int32_t number : admitted_)
            keys.emplace_back(std::min(fresh_[number].count, kMaxCount), mix(fresh_[number].id), number);
        std::sort(keys.begin(), keys.end());
        for (int64_t i = 0; i < surplus; ++i) counters->rejections += fresh_[std::get<2>(keys[i])].count;
        admitted_.clear();
        for (size_t i = size_t(surplus); i < keys.size(); ++i) admitted_.push_back(std::get<2>(keys[i]));
        std::sort(admitted_.begin(), admitted_.end());
    }

    // Update the index to the slots that assign_slots has given and taken.
    void update_index() {
        for (int32_t number : placed_) {
            const New& fresh = fresh_[number];
            index_.set(fresh.position, {Index::tag_of(fresh.id), fresh.slot});
        }
        for (int64_t i = 0; i < int64_t(taken_.size()); ++i) {
            if (i + kAhead < int64_t(taken_.size())) index_.prefetch(Index::tag_of(evicted_[i + kAhead]));
            index_.erase(index_.find(Index::tag_of(evicted_[i]), [&](int32_t slot) { return slot == taken_[i]; }));
        }
        if (placed_.size() < fresh_.size())
            for (const New& fresh : fresh_)
                if (fresh.slot == kEmpty) index_.erase(find(fresh.id, Index::tag_of(fresh.id)));
    }

    int64_t capacity_;
    Policy policy_;
    Record* records_;
    int64_t size_ = 0;
    Index index_;
    Victims victims_;
    Table* sightings_ = nullptr;
    int64_t threshold_ = 0;
    std::vector<uint32_t> tags_;
    std::vector<New> fresh_;
    std::vector<int32_t> admitted_, placed_, taken_;
    std::vector<int64_t> not_found_;  // positions in the batch
    std::vector<int64_t> contenders_, evicted_;
};

}  // namespace

extern "C" {

// policy: 0 lru, 1 lfu, 2 none, which scores as lfu. records: int64 [capacity, 2], id and score of each slot.
void* hstu_slots_new(int64_t capacity, int32_t policy, int64_t* records) {
    return new Table(capacity, Policy{policy != 0, policy != 2}, reinterpret_cast<Record*>(records));
}

void hstu_slots_free(void* table) { delete static_cast<Table*>(table); }

void hstu_slots_set_admission(void* table, void* sightings, int64_t threshold) {
    static_cast<Table*>(table)->set_admission(static_cast<Table*>(sightings), threshold);
}

int64_t hstu_slots_size(const void* table) { return static_cast<const Table*>(table)->size(); }

void hstu_slots_rebuild(void* table, int64_t size) { static_cast<Table*>(table)->rebuild(size); }

void hstu_slots_lookup(void* table, const int64_t* ids, int64_t n, int64_t* slots) {
    static_cast<Table*>(table)->lookup(ids, n, slots);
}

// new_slots and new_ids have room for min(n, capacity). counters: the fields of Counters in order; its insertions say how
// many of these are set.
void hstu_slots_assign(
    void* handle, const int64_t* ids, const int64_t* counts, int64_t n, int64_t step, int64_t* slots,
    int64_t* new_slots, int64_t* new_ids, int64_t* counters) {
    Table* table = static_cast<Table*>(handle);
    table->assign(ids, counts, n, step, slots, new (counters) Counters{});
    for (int32_t number : table->placed()) {
        *new_slots++ = table->fresh(number).slot;
        *new_ids++ = table->fresh(number).id;
    }
}
}
