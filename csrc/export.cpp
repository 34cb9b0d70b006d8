// How the extents of a sequence are exported to another process, and imported from one.
#include <unistd.h>

#include <utility>

#include "slot_lock.hpp"

namespace vattn {

std::vector<Arena::ExportedRun> Arena::export_rows(std::size_t name, Stream stream) {
  Lock lock = locked();
  require_open();
  running(name, "export");
  const std::size_t index = slot_of(name);
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  running(name, "export");
  const Fences fences = fences_of(Slots(&index, 1), stream, lock);
  Slot& slot = slots_[index];
  const std::size_t length = slot.length;  // the sequence may grow within its memory meanwhile
  lock.unlock();
  for (const auto& fence : fences) fence->wait();
  std::vector<ExportedRun> runs;
  try {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slot.runs[plane];
      const std::size_t end = length * geometry_[plane].row_bytes;
      runs.push_back({run.head, {}});
      std::size_t at = run.head;
      for (std::size_t i = 0; i < run.mappings.size() && at < end; ++i) {
        Extent& extent = *run.mappings[i].extent();
        runs.back().extents.push_back({extent.bytes(), driver_->export_handle(extent.handle())});
        extent.exported.store(true);
        at += extent.bytes();
      }
    }
  } catch (...) {
    for (const ExportedRun& run : runs)
      for (const ExportedExtent& extent : run.extents) ::close(extent.descriptor);
    lock.lock();
    refresh(slot);
    throw;
  }
  lock.lock();
  refresh(slot);
  return runs;
}

void Arena::import_rows(std::size_t name, std::size_t positions, const std::vector<ExportedRun>& runs) {
  require_possible(positions);
  if (runs.size() != geometry_.size()) throw Error("what is imported has another layout");
  Lock lock = locked();
  require_open();
  running(name, "import into");
  const std::size_t index = slot_of(name);
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  Slot& slot = running(name, "import into");
  if (slot.length != 0) throw std::invalid_argument("cannot import into slot " + std::to_string(index) + ": not empty");
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const auto& [row_bytes, window, offset, stride] = geometry_[plane];
    std::size_t end = runs[plane].head;
    for (const ExportedExtent& extent : runs[plane].extents) {
      if (extent.bytes == 0 || extent.bytes % driver_->granularity() != 0 ||
          extent.bytes > stride - std::min(stride, end))
        throw Error("what is imported does not fit a slot");
      end += extent.bytes;
    }
    const std::size_t first = window == 0 || positions < window ? 0 : positions - window + 1;
    if (runs[plane].head % driver_->granularity() != 0 || runs[plane].head > first * row_bytes ||
        end < positions * row_bytes)
      throw Error("what is imported lacks rows");
  }
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) defer_unmap_of_run(slot, index, plane);
  refresh(slot);
  clear_the_way(Slots(&index, 1), Urgency::demand, lock);
  std::size_t needed = 0;
  for (const ExportedRun& run : runs)
    for (const ExportedExtent& extent : run.extents) needed += extent.bytes;
  for (std::size_t available = pool_.usage().available(); needed > available; available = pool_.usage().available())
    if (!reclaim(needed - available, {}, Slots(&index, 1), Keep::rows, Urgency::demand, lock))
      throw BudgetExceeded(needed, pool_.usage().available());
  std::vector<std::vector<Mapping>> mapped(geometry_.size());
  lock.unlock();
  try {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      Address at = address_of(index, plane) + runs[plane].head;
      for (const ExportedExtent& extent : runs[plane].extents) {
        mapped[plane].emplace_back(driver_, pool_.import(extent.bytes, extent.descriptor), at);
        mapped[plane].back().allow(Access::read);
        at += extent.bytes;
      }
    }
  } catch (...) {
    lock.lock();
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      for (Mapping& mapping : mapped[plane]) slot.deferred.push_back({index, plane, std::move(mapping), {}});
    post_maintenance({});
    throw;
  }
  lock.lock();
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    Run& run = slot.runs[plane];
    run.mappings = std::move(mapped[plane]);
    run.head = run.tail = runs[plane].head;
    for (const Mapping& mapping : run.mappings) run.tail += mapping.bytes();
  }
  slot.length = positions;
  refresh(slot);
  if (options_.tail_rows == 0) return;
  try {
    map_up_to(Slots(&index, 1), PerSlot(positions), Urgency::demand, lock);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) defer_unmap_of_run(slot, index, plane);
    slot.length = 0;
    refresh(slot);
    throw;
  }
}

}  // namespace vattn
