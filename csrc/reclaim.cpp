// How an arena takes memory back: what is retired, and from slots that need it least.
#include <array>
#include <unordered_map>
#include <utility>

#include "slot_lock.hpp"

namespace vattn {

// Unmaps, of what the held slots have retired, whatever has passed its fences or lies where they will grow. False when
// something lies there that only a demand would wait for.
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
  std::size_t done = 0;  // of the others, from the oldest on: those are through first
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

// Waits for what uses some memory, where there is no room to note that it is to be waited for.
void Arena::wait_quietly(const Fences& fences) const noexcept {
  try {
    for (const auto& fence : fences) fence->wait();
  } catch (const std::exception& error) {
    driver_->report(error);
  }
}

// Takes mappings back that are in no run. Where there is no room for one it goes at once, when nothing uses it.
void Arena::defer_again(std::vector<DeferredUnmap>& loose) noexcept {
  for (DeferredUnmap& one : loose) {
    try {
      slots_[one.slot].deferred.push_back(std::move(one));
    } catch (const std::bad_alloc&) {  // which has not moved it
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

// Takes a run's mappings from the given one on out of it. Where there is no room for them they go at once, when nothing
// uses them.
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

// Mappings that are taken out of their runs, and the bytes that come free with them: those of a shared extent once all
// its mappings are among them.
class Arena::Harvest {
 public:
  explicit Harvest(std::size_t wanted) : wanted_(wanted) {}

  bool enough() const noexcept { return found_ >= wanted_; }
  // Sees to it that a mapping can be added without an allocation.
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

// Brings about `bytes` back to the pool from whoever needs them least: what is retired, then what running slots have
// mapped past what they expect, from who has most of it on, and parked slots from the longest parked on, and then those
// of them that are known to hold rows; of those extents first such as `wanted` can map as they are, and such as nobody
// else has mapped. What running slots keep is taken as far as `keep` allows. Of the slots the caller holds, `mine`,
// only what is retired. False when there was nothing.
bool Arena::reclaim(std::size_t bytes, const std::vector<Step>& wanted, Slots mine, Keep keep, Urgency urgency,
                    Lock& lock) {
  Harvest harvest(bytes);
  std::optional<SlotLock> slot_lock;  // of those whose mappings are harvested
  std::vector<std::size_t> others;
  try {
    collect(harvest, wanted, mine, keep);
    if (harvest.loose().empty()) {
      if (reclaiming_ == 0 || urgency != Urgency::demand) return false;
      // Somebody else has it in hand, and will not wait for us.
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

// What reclaim() takes out of the runs.
void Arena::collect(Harvest& harvest, const std::vector<Step>& wanted, Slots mine, Keep keep) {
  const auto take_deferred = [&](Slot& slot) {
    while (!harvest.enough() && !slot.deferred.empty()) {
      harvest.make_room_for(slot.deferred.back().mapping);
      harvest.add(std::move(slot.deferred.back()));
      slot.deferred.pop_back();
    }
  };
  for (const std::size_t index : mine) take_deferred(slots_[index]);
  using Ranked = std::vector<std::pair<std::size_t, std::size_t>>;  // by rank: the less, the earlier its memory goes
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

// Takes mappings that a slot does not need off the ends of its runs, while they are `wanted` and not enough.
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

// Waits for the fences of the last of them, unmaps it and pools its extent. When it throws, it is still mapped.
void Arena::unmap_last(std::vector<DeferredUnmap>& loose) {
  for (const auto& fence : loose.back().fences) fence->wait();
  loose.back().mapping.unmap();
  loose.pop_back();
}

void Arena::unmap(std::vector<DeferredUnmap>& loose) {
  while (!loose.empty()) unmap_last(loose);
}

// The same with the mutex released meanwhile, for mappings of held slots; true when some were unmapped. What the driver
// refuses, and what only a demand would wait for, stays retired.
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
