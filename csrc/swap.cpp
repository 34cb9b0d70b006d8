// How a sequence is swapped out of its slot to host memory, and swapped in again.
#include <utility>

#include "slot_lock.hpp"

namespace vattn {
namespace {

// Queues copies of bytes [first, end) from the device to host blocks (`out`) or back, each within one block. Bytes are
// counted from the start of the first block; `device` is the device address of byte 0.
void copy_blocks(Driver& driver, Address device, const std::vector<HostBlock>& blocks, std::size_t block_bytes,
                 std::size_t first, std::size_t end, bool out, Stream stream) {
  for (std::size_t at = first; at < end;) {
    const std::size_t size = std::min(end - at, block_bytes - at % block_bytes);
    const Address here = blocks[at / block_bytes].at() + at % block_bytes;
    const Address there = device + at;
    driver.copy(out ? here : there, out ? there : here, size, stream);
    at += size;
  }
}

}  // namespace

HostCopy::~HostCopy() {
  if (pool && !pool->in_forked_child()) pool->give(std::move(blocks), last);
}

void HostCopy::link(const std::shared_ptr<HostCopy>& copy, std::size_t piece,
                    const std::shared_ptr<Extent>& extent) noexcept {
  if (linked(copy, piece)) return;  // another thread was quicker
  copy->pieces[piece].extent = extent;
  extent->host_copy = copy;
}

std::shared_ptr<Extent> HostCopy::linked(const std::shared_ptr<HostCopy>& copy, std::size_t piece) noexcept {
  std::shared_ptr<Extent> extent = copy->pieces[piece].extent.lock();
  return extent && extent->host_copy.lock() == copy ? extent : nullptr;
}

Swapped::~Swapped() {
  if (!pool || pool->in_forked_child()) return;  // a forked child's pool may be locked for good, and owns nothing
  pool->give(std::move(blocks), last);
}

bool Swapped::done() const {
  const Fences fences = [&] {
    const std::lock_guard guard(mutex);
    return last;
  }();
  return passed(fences);
}

std::shared_ptr<Swapped> Arena::swap_out(std::size_t name, Stream stream) {
  for (;;)
    if (auto swapped = swap_out_as_it_is(name, stream)) return swapped;
}

// Swaps a sequence out with the length that it has now. Returns null where the sequence has grown meanwhile, within
// what was mapped: nothing has changed then.
std::shared_ptr<Swapped> Arena::swap_out_as_it_is(std::size_t name, Stream stream) {
  Lock lock = locked();
  require_open();
  running(name, "swap out");
  const std::size_t index = slot_of(name);
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  require_open();
  running(name, "swap out");
  Slot& slot = slots_[index];
  cover(slot, stream, fences_of(Slots(&index, 1), stream, lock));
  auto swapped = std::make_shared<Swapped>();
  swapped->pool = host_;
  swapped->length = slot.length;
  const auto copy = std::make_shared<HostCopy>();  // of shared extents that host memory has no copy of yet
  copy->pool = host_;
  Linked fresh;
  std::size_t own = 0;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    swapped->parts.push_back(part_of(slot.runs[plane], slot.length * geometry_[plane].row_bytes, copy, fresh));
    swapped->parts.back().offset = std::exchange(own, own + swapped->parts.back().bytes);
  }
  const Fences before = slot.fences;
  lock.unlock();
  swapped->blocks = host_->take(own);
  if (!fresh.empty()) copy->blocks = host_->take(copy->pieces.back().offset + copy->pieces.back().bytes);
  const Stream out = driver_->own_stream(OwnStream::out);
  try {
    for (const auto& fence : before) fence->order(out);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Swapped::Part& part = swapped->parts[plane];
      Address at = address_of(index, plane) + part.head;
      for (const Swapped::Shared& shared : part.shared) {
        const auto& [offset, bytes, extent] = shared.in_copy();
        if (shared.copy == copy)
          copy_blocks(*driver_, at - offset, copy->blocks, host_->block_bytes(), offset, offset + bytes, true, out);
        at += bytes;
      }
      copy_blocks(*driver_, at - part.offset, swapped->blocks, host_->block_bytes(), part.offset,
                  part.offset + part.bytes, true, out);
    }
    swapped->last.push_back(std::make_shared<const Fence>(driver_, out));  // passes after all earlier copies out, too
    copy->last = swapped->last;
  } catch (...) {
    driver_->synchronize();  // the blocks go back to their pool, so no copy may use them
    throw;
  }
  lock.lock();
  note(slot.fences, swapped->last.front());
  if (slot.length != swapped->length) return nullptr;
  for (const auto& [shared, extent] : fresh) HostCopy::link(shared.copy, shared.piece, extent);
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) defer_unmap_of_run(slot, index, plane);
  slot.length = slot.cached = 0;
  set_state(slot, has_nothing(slot) ? State::bare : State::parked);
  slot.parked_at = ++clock_;
  slot.streams.clear();
  refresh(slot);
  post_maintenance({});
  return swapped;
}

// Describes what a run with rows up to byte `end` has in host memory once it is swapped out. The whole extents at its
// beginning that are shared, or that have a host copy, are shared there as well: as pieces of that copy, or else as new
// pieces of `fresh`, which the caller has to fill. Adds the new pieces, with their extents, to `found`.
Swapped::Part Arena::part_of(const Run& run, std::size_t end, const std::shared_ptr<HostCopy>& fresh, Linked& found) {
  Swapped::Part part{run.head, {}, run.head, 0, 0};
  for (const Mapping& mapping : run.mappings) {
    if (part.begin + mapping.bytes() > end) break;
    const std::shared_ptr<Extent>& extent = mapping.extent();
    const auto copy = extent->host_copy.lock();
    std::size_t piece = 0;
    while (copy && piece < copy->pieces.size() && HostCopy::linked(copy, piece) != extent) ++piece;
    if (copy && piece < copy->pieces.size()) {
      part.shared.push_back({copy, piece});
    } else if (mapping.shared()) {
      const std::size_t offset = fresh->pieces.empty() ? 0 : fresh->pieces.back().offset + fresh->pieces.back().bytes;
      part.shared.push_back({fresh, fresh->pieces.size()});
      found.emplace_back(part.shared.back(), extent);
      fresh->pieces.push_back({offset, mapping.bytes(), {}});
    } else {
      break;
    }
    part.begin += mapping.bytes();
  }
  part.bytes = end - std::min(part.begin, end);
  return part;
}

std::size_t Arena::swap_in(Swapped& swapped, std::optional<std::size_t> wanted, Stream stream) {
  if (swapped.pool != host_) throw std::invalid_argument("the sequence was swapped out of another cache");
  if (swapped.claimed.exchange(true)) throw std::invalid_argument("the sequence is being, or was, swapped in");
  std::optional<std::size_t> index;
  try {
    index = acquire(wanted, swapped.length, stream);
    on_mapper([&] { swap_in_with_driver(swapped, *index, stream); });
  } catch (...) {
    if (index) release_quietly(*index, stream);
    swapped.claimed = false;
    throw;
  }
  return *index;
}

void Arena::swap_in_with_driver(Swapped& swapped, std::size_t index, Stream stream) {
  Lock lock = locked();
  require_open();
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  try {
    bring_back(swapped, index, stream, lock);
  } catch (...) {
    // An empty sequence cannot use a run that begins behind the first row, or that has shared extents.
    if (!lock.owns_lock()) lock.lock();
    Slot& slot = slots_[index];
    slot.length = 0;
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      if (slot.runs[plane].head != 0 || !swapped.parts[plane].shared.empty()) defer_unmap_of_run(slot, index, plane);
    refresh(slot);
    throw;
  }
}

// Maps memory for the rows of a swapped sequence at a locked slot and queues the copies to it. When this throws, the
// mutex may be released.
void Arena::bring_back(Swapped& swapped, std::size_t index, Stream stream, Lock& lock) {
  Slot& slot = slots_[index];
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Swapped::Part& part = swapped.parts[plane];
    if (part.head == 0 && part.shared.empty()) continue;
    defer_unmap_of_run(slot, index, plane);
    clear_the_way(Slots(&index, 1), Urgency::demand, lock);
    slot.runs[plane].head = slot.runs[plane].tail = part.head;
    if (!part.shared.empty()) slot.length = swapped.length;  // so that copy_shared() keeps the shared extents
  }
  // The copies wait for the work that was queued on the slot's memory, and for the copies to the host.
  const Fences before = fences_of(Slots(&index, 1), stream, lock);
  const Stream in = driver_->own_stream(OwnStream::in);
  Linked found;
  Fences done;
  try {
    for (const auto& fence : before) fence->order(in);
    for (const auto& fence : swapped.last) fence->order(in);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      bring_back_shared(swapped.parts[plane], index, plane, in, found, lock);
    // Memory for the next rows is mapped while the copies of the rows before them run.
    slot.expected = 0;
    const std::size_t step = std::max<std::size_t>(1, pool_.bytes_of(ExtentPool::kClasses - 1) / widest_row());
    for (std::size_t from = 0; from < swapped.length; from += step) {
      const std::size_t to = std::min(swapped.length, from + step);
      map_up_to(Slots(&index, 1), PerSlot(to), Urgency::demand, lock);
      lock.unlock();
      for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
        const std::size_t row_bytes = geometry_[plane].row_bytes;
        const Swapped::Part& part = swapped.parts[plane];
        const std::size_t first = std::max(part.begin, from * row_bytes) - part.begin;
        const std::size_t end = std::max(part.begin, to * row_bytes) - part.begin;
        copy_blocks(*driver_, address_of(index, plane) + part.begin - part.offset, swapped.blocks, host_->block_bytes(),
                    part.offset + first, part.offset + end, false, in);
      }
      lock.lock();
    }
    lock.unlock();
    done.push_back(std::make_shared<const Fence>(driver_, in));
    done.front()->order(stream);
    if (options_.protect_shared) {
      done.front()->wait();
      for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
        for (std::size_t i = 0; i < swapped.parts[plane].shared.size(); ++i)
          slot.runs[plane].mappings[i].allow(Access::read);
    }
    lock.lock();
    advance(index, swapped.length, stream);
    for (const auto& [shared, extent] : found) {
      HostCopy::link(shared.copy, shared.piece, extent);
      shared.copy->last.push_back(done.front());  // the others stay: another thread's may pass later
    }
  } catch (...) {
    if (lock.owns_lock()) lock.unlock();
    driver_->synchronize();
    throw;
  }
  host_->give(std::exchange(swapped.blocks, {}), done);
  for (Swapped::Part& part : swapped.parts) part.shared.clear();
  {
    const std::lock_guard guard(swapped.mutex);
    swapped.last.swap(done);
  }
  refresh(slot);
}

// Maps the extents that a swapped sequence shares with others: for each piece of a host copy the extent that still has
// its bytes, or else a new extent, to which the piece is copied. Adds the pieces, with these extents, to `found`.
void Arena::bring_back_shared(const Swapped::Part& part, std::size_t index, std::size_t plane, Stream in, Linked& found,
                              Lock& lock) {
  Slot& slot = slots_[index];
  Run& run = slot.runs[plane];
  make_room(run.mappings, part.shared.size());
  make_room(found, part.shared.size());
  for (std::size_t i = 0; i < part.shared.size();) {
    const Swapped::Shared& shared = part.shared[i];
    const Address at = address_of(index, plane) + run.tail;
    const std::shared_ptr<Extent> extent = HostCopy::linked(shared.copy, shared.piece);
    std::vector<DeferredUnmap> made;
    if (extent) {
      made.reserve(1);
      make_room(slot.deferred, 1);
      ++extent->mappings;  // from now on no other slot takes it for unshared
      lock.unlock();
      try {
        made.push_back({index, plane, Mapping(driver_, extent, at), {}});
        made.front().mapping.allow(options_.protect_shared || extent->exported.load() ? Access::read : Access::write);
      } catch (...) {
        lock.lock();
        --extent->mappings;
        defer_again(made);
        throw;
      }
      lock.lock();
      --extent->mappings;
      ++aliases_;
    } else {
      std::vector<Step> steps;  // for this and the following pieces that no extent has
      for (Address next = at; i + steps.size() < part.shared.size(); next += steps.back().bytes) {
        const Swapped::Shared& one = part.shared[i + steps.size()];
        if (HostCopy::linked(one.copy, one.piece)) break;
        steps.push_back({index, plane, next, one.in_copy().bytes});
      }
      made = build_on_demand(steps, Slots(&index, 1), lock);
      lock.lock();
    }
    const std::size_t first = i;
    for (DeferredUnmap& loose : made) {
      found.emplace_back(part.shared[i++], loose.mapping.extent());
      run.tail += loose.mapping.bytes();
      run.mappings.push_back(std::move(loose.mapping));
    }
    if (extent) continue;
    lock.unlock();
    Address next = at;
    for (std::size_t one = first; one < i; ++one) {
      const auto& [offset, bytes, unused] = part.shared[one].in_copy();
      copy_blocks(*driver_, next - offset, part.shared[one].copy->blocks, host_->block_bytes(), offset, offset + bytes,
                  false, in);
      next += bytes;
    }
    lock.lock();
  }
}

void Arena::abandon(std::size_t name) noexcept {
  if (driver_->in_forked_child()) return;
  const std::optional<Stream> stream = [&]() -> std::optional<Stream> {
    const Lock lock = locked();
    if (closed_ || !is_running(name)) return std::nullopt;
    return slots_[slot_of(name)].streams.front();
  }();
  if (stream) release_quietly(name, *stream);
}

// Ends a sequence. Where the driver refuses, this function tries up to kAttempts times and reports the last error.
void Arena::release_quietly(std::size_t name, Stream stream) noexcept {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    try {
      release(Slots(&name, 1), stream);
      return;
    } catch (const std::exception& error) {
      if (attempt + 1 == kAttempts) driver_->report(error);
    }
  }
}

}  // namespace vattn
