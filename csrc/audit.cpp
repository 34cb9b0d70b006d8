// What an arena reports about itself: its slots, its statistics, and the check of its invariants.
#include <unordered_map>
#include <unordered_set>

#include "slot_lock.hpp"

namespace vattn {

std::vector<Arena::SlotInfo> Arena::map() const {
  const Lock lock = locked();
  std::vector<SlotInfo> infos;
  infos.reserve(options_.slots);
  for (std::size_t index = 0; index < options_.slots; ++index) {
    const Slot& slot = slots_[index];
    SlotInfo info{slot.state, slot.length, 0, {}};
    for (const DeferredUnmap& loose : slot.deferred) info.deferred += loose.mapping.bytes();
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slot.runs[plane];
      RunInfo row{address_of(index, plane) + run.head - base(), run.head, run.tail, {}, {}};
      for (const Mapping& mapping : run.mappings) {
        row.extents.push_back(mapping.bytes());
        row.shared.push_back(!mapping.writable());
      }
      info.runs.push_back(std::move(row));
    }
    infos.push_back(std::move(info));
  }
  return infos;
}

std::size_t Arena::running_slots() const {
  const Lock lock = locked();
  return options_.slots - bare_.count() - parked_.count();
}

std::optional<std::size_t> Arena::free_slots(std::size_t count) const {
  const Lock lock = locked();
  std::size_t found = 0;
  for (std::size_t index = options_.slots; index-- > 0;) {
    found = slots_[index].state == State::running ? 0 : found + 1;
    if (found >= count) return index;
  }
  return std::nullopt;
}

std::size_t Arena::free_slots_from(std::size_t slot) const {
  const Lock lock = locked();
  std::size_t end = slot;
  while (end < options_.slots && slots_[end].state != State::running) ++end;
  return end - slot;
}

bool Arena::shares(Slots names, std::size_t positions) const {
  const Lock lock = locked();
  for (const std::size_t name : names) {
    const Slot& slot = running(name, "look at");
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      std::size_t end = slot.runs[plane].tail;
      const std::size_t first = positions * geometry_[plane].row_bytes;
      const auto& mappings = slot.runs[plane].mappings;
      for (auto last = mappings.rbegin(); last != mappings.rend() && end > first; ++last) {
        if (last->seen_by_others()) return true;
        end -= last->bytes();
      }
    }
  }
  return false;
}

std::size_t Arena::rows_in_shared(std::size_t name) const {
  const Lock lock = locked();
  const Slot& slot = running(name, "look at");
  std::size_t rows = kNever;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    if (geometry_[plane].window != 0) continue;
    std::size_t bytes = 0;
    for (const Mapping& mapping : slot.runs[plane].mappings) bytes += mapping.writable() ? 0 : mapping.bytes();
    rows = std::min(rows, bytes / geometry_[plane].row_bytes);
  }
  return rows;
}

Stats Arena::stats() const {
  const Lock lock = locked();
  Stats stats{};
  const HostPool::Usage host = host_->usage();
  stats.host = host.charged - host.free;
  stats.host_pooled = host.free;
  stats.reserved = reservation_.bytes();
  stats.adopted = adopted_;
  stats.hits = hits_;
  stats.misses = misses_;
  stats.waited_seconds = static_cast<double>(waited_ns_) * 1e-9;
  stats.background_failures = background_failures_;
  stats.aliases = aliases_;
  stats.copied = copied_;
  std::unordered_set<const Extent*> seen;  // those with several mappings, or exported, that were counted already
  const auto first_sight = [&](const Mapping& mapping) {
    return !mapping.shared() || seen.insert(mapping.extent().get()).second;
  };
  for (const State state : {State::running, State::parked, State::bare}) {
    for (const Slot& slot : slots_) {
      if (slot.state != state) continue;
      for (const Run& run : slot.runs) {
        for (const Mapping& mapping : run.mappings) {
          const bool first = first_sight(mapping);
          stats.mapped += first ? mapping.bytes() : 0;
          stats.parked += first && state == State::parked ? mapping.bytes() : 0;
          stats.shared += first ? 0 : mapping.bytes();
        }
      }
    }
  }
  for (const Slot& slot : slots_) {
    for (const DeferredUnmap& loose : slot.deferred)
      stats.deferred += first_sight(loose.mapping) ? loose.mapping.bytes() : 0;
    stats.parked_slots += slot.state == State::parked ? 1 : 0;
    if (slot.state != State::running) continue;
    stats.running_slots += 1;
    stats.lookahead = std::max(stats.lookahead, slot.lookahead);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slot.runs[plane];
      stats.rows += std::max(run.head, slot.length * geometry_[plane].row_bytes) - run.head;
      const std::size_t needed = std::max(run.head, needed_end(slot, plane, Keep::ahead));
      std::size_t end = run.tail;
      for (auto last = run.mappings.rbegin();
           last != run.mappings.rend() && end - last->bytes() >= needed && !last->shared(); ++last)
        end -= last->bytes();
      stats.spare += run.tail - end;
    }
  }
  const ExtentPool::Usage pool = pool_.usage();
  stats.budget = pool.budget;
  stats.physical = pool.charged;
  stats.peak = pool.peak;
  // An extent that a thread is mapping or unmapping at this moment is in no run and not in the pool. It counts as
  // pooled, since later growth can use it too.
  stats.pooled = stats.physical - std::min(stats.physical, stats.mapped + stats.deferred);
  return stats;
}

void Arena::check() const {
  Lock lock = locked();
  wait_until_idle(lock);
  std::size_t total = 0;
  std::unordered_map<const Extent*, std::size_t> mappings;
  const auto count = [&](const Mapping& mapping) {
    if (++mappings[mapping.extent().get()] == 1) total += mapping.bytes();
  };
  const auto broken = [](std::size_t slot, std::size_t plane, const std::string& what) {
    throw InvariantBroken("slot " + std::to_string(slot) + ", plane " + std::to_string(plane) + ": " + what);
  };
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    const Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Geometry& geometry = geometry_[plane];
      const Run& run = slot.runs[plane];
      const Address start = address_of(index, plane);
      Address next = start + run.head;
      for (const Mapping& mapping : run.mappings) {
        if (mapping.range().at != next) broken(index, plane, "a run has a gap");
        if (!mapping.zeroed()) broken(index, plane, "memory in use was never zeroed");
        next += mapping.bytes();
        count(mapping);
        if (slot.state == State::running && !mapping.writable() && slot.capacity > slot.length &&
            next > start + slot.length * geometry.row_bytes)
          broken(index, plane, "shared memory may be written (invariant 4)");
      }
      if (next != start + run.tail) broken(index, plane, "the run does not end where it says");
      if (run.tail > geometry.stride) broken(index, plane, "the run leaves its slot");
      if (run.mappings.empty() && run.head != run.tail) broken(index, plane, "an empty run has a length");
      if (slot.state == State::running && run.tail < end_of(geometry, slot.length))
        broken(index, plane, "rows of a running sequence are not mapped (invariant 1)");
      const std::size_t first =
          geometry.window == 0 || slot.length < geometry.window ? 0 : slot.length - geometry.window + 1;
      if (slot.state == State::running && run.head > first * geometry.row_bytes)
        broken(index, plane, "rows of a running sequence's window are not mapped (invariant 1)");
      if (slot.state == State::bare && run.tail != 0) broken(index, plane, "a bare slot has memory");
      if (slot.state == State::parked && slot.cached == 0 && run.head != 0)
        broken(index, plane, "a parked slot lacks its first rows");
      if (slot.cached != 0 && run.tail < slot.cached * geometry.row_bytes)
        broken(index, plane, "rows that are known are not mapped");
    }
    for (const DeferredUnmap& loose : slot.deferred) {
      const Run& run = slot.runs[loose.plane];
      const Address start = address_of(index, loose.plane);
      const auto [at, bytes] = loose.mapping.range();
      if (loose.slot != index || at < start || at + bytes > start + geometry_[loose.plane].stride)
        broken(index, loose.plane, "a retired mapping is not in its slot");
      if (at < start + run.tail && at + bytes > start + run.head)
        broken(index, loose.plane, "a retired mapping is also in use (invariant 3)");
      count(loose.mapping);
    }
    if (index < options_.slots && (bare_.contains(index) != (slot.state == State::bare) ||
                                   parked_.contains(index) != (slot.state == State::parked)))
      broken(index, 0, "the slot is not where slots of its state are looked for");
    if (slot.cached > (slot.state == State::running ? slot.length : options_.max_len))
      broken(index, 0, "rows are known that were never written");
  }
  for (const auto& [extent, counted] : mappings)
    if (counted != extent->mappings.load())
      throw InvariantBroken("an extent has " + std::to_string(counted) + " mappings and counts " +
                            std::to_string(extent->mappings.load()) + " (invariant 3)");
  const ExtentPool::Usage usage = pool_.usage();
  if (total + usage.pooled != usage.charged)
    throw InvariantBroken("mapped and retired " + std::to_string(total) + " + pooled " + std::to_string(usage.pooled) +
                          " bytes are not the charged " + std::to_string(usage.charged) + " (invariant 3)");
  if (usage.overdrawn)
    throw InvariantBroken("the budget was exceeded: it is " + std::to_string(usage.budget) + " bytes, at most " +
                          std::to_string(usage.peak) + " were charged (invariant 6)");
}

}  // namespace vattn
