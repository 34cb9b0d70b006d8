// How an arena takes memory back: it carries out deferred unmaps and takes extents from the slots that need them least.
#include <array>
#include <unordered_map>
#include <utility>

#include "slot_lock.hpp"

namespace vattn {

// Carries out deferred unmaps of the given slots, with the mutex released meanwhile. A mapping at or behind the tail of
// its run lies where the run will grow: all of these are unmapped, and a demand waits for their fences. Of the other
// mappings, the oldest are unmapped, up to the first whose fences have not passed.
//
// Requires: the caller has locked the slots.
// Returns false when a mapping is left where a run will grow, because only a demand would wait for its fences.
// Throws what the driver throws; what is still mapped then stays a deferred unmap.
bool Arena::clear_the_way(Slots slots, Urgency urgency, Lock& lock) {
  std::vector<DeferredUnmap> in_the_way;
  std::vector<DeferredUnmap> others;
  std::size_t count = 0;
  for (const std::size_t index : slots) count += slots_[index].deferred.size();
  in_the_way.reserve(count);
  others.reserve(count);
  for (const std::size_t index : slots) {
    for (DeferredUnmap& loose : slots_[index].deferred) {
      const Address tail = address_of(index, loose.plane) + slots_[index].runs[loose.plane].tail;
      (loose.mapping.range().at >= tail ? in_the_way : others).push_back(std::move(loose));
    }
    slots_[index].deferred.clear();
  }
  if (in_the_way.empty() && others.empty()) return true;
  std::size_t done = 0;  // how many of `others` are unmapped, the oldest first: their fences pass first
  const auto put_back = [&] {
    others.erase(others.begin(), others.begin() + static_cast<std::ptrdiff_t>(done));
    for (auto* rest : {&in_the_way, &others}) defer_again(*rest);
  };
  lock.unlock();
  try {
    while (!in_the_way.empty()) {
      if (urgency != Urgency::demand && !passed(in_the_way.back().fences)) break;
      unmap_last(in_the_way);
    }
    for (; done < others.size() && passed(others[done].fences); ++done) others[done].mapping.unmap();
  } catch (...) {
    lock.lock();
    put_back();
    throw;
  }
  lock.lock();
  const bool clear = in_the_way.empty();
  put_back();
  return clear;
}

// Waits for the fences of memory whose unmap cannot be deferred, because there is no room to note it. Reports errors
// instead of throwing them.
void Arena::wait_quietly(const Fences& fences) const noexcept {
  try {
    for (const auto& fence : fences) fence->wait();
  } catch (const std::exception& error) {
    driver_->report(error);
  }
}

// Makes mappings that are in no run deferred unmaps of their slots. Where there is no room to note one, this function
// waits for its fences and unmaps it at once.
void Arena::defer_again(std::vector<DeferredUnmap>& loose) noexcept {
  for (DeferredUnmap& one : loose) {
    try {
      slots_[one.slot].deferred.push_back(std::move(one));
    } catch (const std::bad_alloc&) {  // a push_back that throws has not moved the mapping
      wait_quietly(one.fences);
    }
  }
  loose.clear();
}

void Arena::defer_unmap_of_run(Slot& slot, std::size_t index, std::size_t plane) noexcept {
  Run& run = slot.runs[plane];
  defer_unmap_from(slot, index, plane, 0);
  run = Run{};
}

// Takes the mappings from number `first` on out of a run, as deferred unmaps that wait for the slot's fences. Where
// there is no room to note them, this function waits for the fences and unmaps them at once.
void Arena::defer_unmap_from(Slot& slot, std::size_t index, std::size_t plane, std::size_t first) noexcept {
  Run& run = slot.runs[plane];
  const auto from = run.mappings.begin() + static_cast<std::ptrdiff_t>(std::min(first, run.mappings.size()));
  for (auto mapping = from; mapping != run.mappings.end(); ++mapping) run.tail -= mapping->bytes();
  try {
    const auto count = static_cast<std::size_t>(run.mappings.end() - from);
    std::vector<Fences> fences(count, slot.fences);
    make_room(slot.deferred, count);
    for (std::size_t i = 0; i < count; ++i)
      slot.deferred.push_back({index, plane, std::move(from[static_cast<std::ptrdiff_t>(i)]), std::move(fences[i])});
  } catch (const std::bad_alloc&) {
    wait_quietly(slot.fences);
  }
  run.mappings.erase(from, run.mappings.end());
}

// Mappings that were taken out of their runs to be unmapped, and the number of bytes that this frees. A shared extent
// counts once all its mappings are in the harvest.
class Arena::Harvest {
 public:
  explicit Harvest(std::size_t wanted) : wanted_(wanted) {}

  bool enough() const noexcept { return found_ >= wanted_; }
  // Makes room for a mapping, so that add() allocates nothing.
  void make_room_for(const Mapping& mapping) {
    make_room(loose_, 1);
    taken_[mapping.extent().get()];
  }
  void add(DeferredUnmap&& loose) noexcept {
    const auto& extent = loose.mapping.extent();
    if (++taken_.find(extent.get())->second == extent->mappings.load()) found_ += extent->bytes();
    loose_.push_back(std::move(loose));
  }
  std::vector<DeferredUnmap>& loose() noexcept { return loose_; }

 private:
  const std::size_t wanted_;
  std::size_t found_ = 0;
  std::vector<DeferredUnmap> loose_;
  std::unordered_map<const Extent*, std::size_t> taken_;
};

// Brings about `bytes` back to the pool from the slots that need them least, with the mutex released meanwhile. This
// function takes, in this order:
//   1. deferred unmaps;
//   2. what running slots have mapped past what they expect to need, from the slot that has most of it, and then parked
//      slots without a cached prefix, from the one that was parked longest ago; of all these extents, first those that
//      no other slot maps and that `wanted` can map as they are;
//   3. parked slots with a cached prefix, from the one that was parked or forked from longest ago; first the extents
//      that no other slot maps;
//   4. what running slots have mapped past what `keep` leaves them.
// Slots that another thread has locked are passed by. Of `mine`, the slots that the caller has locked, only deferred
// unmaps are taken.
//
// Returns true when the caller should plan again: something was unmapped, or another thread has finished reclaiming.
// Returns false when there was nothing to take or, unless this is a demand, nothing whose fences have passed.
// Throws what the driver throws; what is still mapped then stays a deferred unmap.
bool Arena::reclaim(std::size_t bytes, const std::vector<Step>& wanted, Slots mine, Keep keep, Urgency urgency,
                    Lock& lock) {
  Harvest harvest(bytes);
  std::optional<SlotLock> slot_lock;  // of the harvested slots that the caller has not locked
  std::vector<std::size_t> others;
  try {
    collect(harvest, wanted, mine, keep);
    if (harvest.loose().empty()) {
      if (reclaiming_ == 0 || urgency != Urgency::demand) return false;
      // Another thread is unmapping what it has harvested. It already has its slot locks, so it does not wait for this
      // thread.
      released_.wait(lock, [this] { return reclaiming_ == 0; });
      return true;
    }
    for (const DeferredUnmap& one : harvest.loose())
      if (!contains(mine, one.slot) && !contains(others, one.slot)) others.push_back(one.slot);
    slot_lock.emplace(*this, others, lock);
  } catch (...) {
    defer_again(harvest.loose());
    throw;
  }
  ++reclaiming_;
  bool some = false;
  const auto finish = [&] {
    --reclaiming_;
    released_.notify_all();
  };
  try {
    some = unmap_outside(std::move(harvest.loose()), urgency, lock);
  } catch (...) {
    finish();
    throw;
  }
  finish();
  for (const std::size_t index : others)
    if (slots_[index].state == State::parked && has_nothing(slots_[index])) set_state(slots_[index], State::bare);
  return some;
}

// Moves what reclaim() unmaps from the slots to the harvest, in the order that reclaim() describes.
void Arena::collect(Harvest& harvest, const std::vector<Step>& wanted, Slots mine, Keep keep) {
  const auto take_deferred = [&](Slot& slot) {
    while (!harvest.enough() && !slot.deferred.empty()) {
      harvest.make_room_for(slot.deferred.back().mapping);
      harvest.add(std::move(slot.deferred.back()));
      slot.deferred.pop_back();
    }
  };
  for (const std::size_t index : mine) take_deferred(slots_[index]);
  using Ranked = std::vector<std::pair<std::size_t, std::size_t>>;  // (rank, slot); the lowest rank loses memory first
  Ranked ranked;
  Ranked remembered;
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    Slot& slot = slots_[index];
    if (slot.locked || has_nothing(slot)) continue;
    take_deferred(slot);
    if (slot.state == State::parked && slot.cached != 0) {
      remembered.emplace_back(slot.parked_at, index);
      continue;
    }
    std::size_t kept = kNever / 2;
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const std::size_t needed = needed_end(slot, plane, Keep::expected);
      kept -= std::max(slot.runs[plane].tail, needed) - needed;
    }
    ranked.emplace_back(slot.state == State::parked ? kNever / 2 + slot.parked_at : kept, index);
  }
  std::sort(ranked.begin(), ranked.end());
  std::sort(remembered.begin(), remembered.end());
  std::array<std::size_t, ExtentPool::kClasses> counts{};
  for (const Step& step : wanted) ++counts[pool_.class_of(step.bytes)];
  for (std::size_t size_class = 0; size_class < counts.size(); ++size_class)
    counts[size_class] -= std::min(counts[size_class], pool_.pooled(size_class));
  const auto fits = [&](const Mapping& mapping) {
    if (mapping.shared()) return false;
    std::size_t& count = counts[pool_.class_of(mapping.bytes())];
    return count != 0 && count-- != 0;
  };
  const auto alone = [](const Mapping& mapping) { return !mapping.shared(); };
  const auto any = [](const Mapping&) { return true; };
  const auto strip_all = [&](const Ranked& slots, Keep kept, const std::function<bool(const Mapping&)>& such) {
    for (const auto& [rank, index] : slots) strip(index, kept, such, harvest);
  };
  strip_all(ranked, Keep::expected, fits);
  strip_all(ranked, Keep::expected, any);
  strip_all(remembered, Keep::expected, alone);
  strip_all(remembered, Keep::expected, any);
  if (keep != Keep::expected) strip_all(ranked, keep, any);
}

// Takes mappings that a slot does not need by `keep` off the ends of its runs, as long as `wanted` accepts the last one
// and the harvest is not enough.
void Arena::strip(std::size_t index, Keep keep, const std::function<bool(const Mapping&)>& wanted, Harvest& harvest) {
  Slot& slot = slots_[index];
  const bool remembered = slot.cached != 0;
  const auto note_taken = [&]() noexcept {
    for (std::size_t plane = 0; plane < geometry_.size() && slot.state != State::running; ++plane) {
      Run& run = slot.runs[plane];
      if (run.mappings.empty()) run.head = run.tail = 0;
      slot.cached = std::min(slot.cached, usable_rows(plane, run.tail));
    }
    if (remembered && slot.cached == 0 && slot.state == State::parked) drop_unwritable(slot, index);
    refresh(slot);
  };
  try {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      Run& run = slot.runs[plane];
      const std::size_t needed = std::max(needed_end(slot, plane, keep), run.head);
      while (!harvest.enough() && !run.mappings.empty() && run.tail - run.mappings.back().bytes() >= needed &&
             wanted(run.mappings.back())) {
        Fences fences = slot.fences;
        harvest.make_room_for(run.mappings.back());
        run.tail -= run.mappings.back().bytes();
        harvest.add({index, plane, std::move(run.mappings.back()), std::move(fences)});
        run.mappings.pop_back();
      }
    }
  } catch (...) {
    note_taken();
    throw;
  }
  note_taken();
}

// Waits for the fences of the last mapping in the list, unmaps it and removes it from the list; its extent goes back to
// the pool with its last owner. When this throws, the mapping is still mapped and in the list.
void Arena::unmap_last(std::vector<DeferredUnmap>& loose) {
  for (const auto& fence : loose.back().fences) fence->wait();
  loose.back().mapping.unmap();
  loose.pop_back();
}

void Arena::unmap(std::vector<DeferredUnmap>& loose) {
  while (!loose.empty()) unmap_last(loose);
}

// Unmaps mappings of locked slots with the mutex released meanwhile. A demand waits for their fences; otherwise only
// the mappings whose fences have passed are unmapped. Returns whether any was. Throws what the driver throws. What is
// still mapped in the end, also after an error, stays a deferred unmap.
bool Arena::unmap_outside(std::vector<DeferredUnmap> loose, Urgency urgency, Lock& lock) {
  const std::size_t before = loose.size();
  const auto put_back = [&] { defer_again(loose); };
  lock.unlock();
  try {
    const auto ready =
        urgency == Urgency::demand
            ? loose.begin()
            : std::partition(loose.begin(), loose.end(), [](const DeferredUnmap& one) { return !passed(one.fences); });
    for (auto left = loose.end() - ready; left > 0; --left) unmap_last(loose);
  } catch (...) {
    lock.lock();
    put_back();
    throw;
  }
  lock.lock();
  const bool some = loose.size() < before;
  if (!loose.empty()) post_maintenance(kPatience);
  put_back();
  return some;
}

}  // namespace vattn
