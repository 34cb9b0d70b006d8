// How a sequence leaves its slot for host memory, and comes back.
#include <utility>

#include "hold.hpp"

namespace vattn {
namespace {

// Copies some bytes of a plane's rows to their blocks or back, as large pieces as blocks are.
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

Swapped::~Swapped() {
  if (!pool || pool->in_forked_child()) return;  // whose pool may be locked for good, and owns nothing
  for (Part& part : parts) pool->give(std::move(part.blocks), last);
}

bool Swapped::done() const {
  const Fences fences = [&] {
    const std::lock_guard guard(mutex);
    return last;
  }();
  return passed(fences);
}

std::shared_ptr<Swapped> Arena::swap_out(std::size_t name, Stream stream) {
  Lock lock = locked();
  require_open();
  running(name, "swap out");
  const std::size_t index = slot_of(name);
  const Hold hold(*this, Slots(&index, 1), lock);
  require_open();
  running(name, "swap out");
  Slot& slot = slots_[index];
  cover(slot, stream, fences_of(Slots(&index, 1), stream, lock));
  auto swapped = std::make_shared<Swapped>();
  swapped->pool = host_;
  swapped->length = slot.length;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const std::size_t head = slot.runs[plane].head;
    const std::size_t end = slot.length * geometry_[plane].row_bytes;
    swapped->parts.push_back({head, end - std::min(head, end), {}});
  }
  const Fences before = slot.fences;
  lock.unlock();
  for (Swapped::Part& part : swapped->parts) part.blocks = host_->take(part.bytes);
  const Stream out = driver_->own_stream(OwnStream::out);
  try {
    for (const auto& fence : before) fence->order(out);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Swapped::Part& part = swapped->parts[plane];
      copy_blocks(*driver_, address_of(index, plane) + part.head, part.blocks, host_->block_bytes(), 0, part.bytes,
                  true, out);
    }
    swapped->last.push_back(std::make_shared<const Fence>(driver_, out));
  } catch (...) {
    driver_->synchronize();  // the blocks are given back
    throw;
  }
  lock.lock();
  note(slot.fences, swapped->last.front());
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) retire_run(slot, index, plane);
  slot.length = slot.known = 0;
  set_state(slot, has_nothing(slot) ? State::bare : State::parked);
  slot.parked_at = ++clock_;
  slot.streams.clear();
  refresh(slot);
  post_housekeeping({});
  return swapped;
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
  const Hold hold(*this, Slots(&index, 1), lock);
  try {
    bring_back(swapped, index, stream, lock);
  } catch (...) {
    // A run that begins behind the first row is of no use to an empty sequence.
    if (!lock.owns_lock()) lock.lock();
    Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      if (slot.runs[plane].head != 0) retire_run(slot, index, plane);
    refresh(slot);
    throw;
  }
}

// Maps the rows of a held slot and copies them there.
void Arena::bring_back(Swapped& swapped, std::size_t index, Stream stream, Lock& lock) {
  Slot& slot = slots_[index];
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    if (swapped.parts[plane].head == 0) continue;
    retire_run(slot, index, plane);
    clear_the_way(Slots(&index, 1), Urgency::demand, lock);
    slot.runs[plane].head = slot.runs[plane].tail = swapped.parts[plane].head;
  }
  // What was queued with the slot's memory comes first, and so does the way out.
  const Fences before = fences_of(Slots(&index, 1), stream, lock);
  const Stream in = driver_->own_stream(OwnStream::in);
  Fences done;
  try {
    for (const auto& fence : before) fence->order(in);
    for (const auto& fence : swapped.last) fence->order(in);
    // The first rows are on their way while memory for the next is mapped.
    slot.expected = 0;
    const std::size_t step = std::max<std::size_t>(1, pool_.bytes_of(ExtentPool::kClasses - 1) / widest_row());
    for (std::size_t from = 0; from < swapped.length; from += step) {
      const std::size_t to = std::min(swapped.length, from + step);
      map_up_to(Slots(&index, 1), PerSlot(to), Urgency::demand, lock);
      lock.unlock();
      for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
        const std::size_t row_bytes = geometry_[plane].row_bytes;
        const auto& [head, bytes, blocks] = swapped.parts[plane];
        copy_blocks(*driver_, address_of(index, plane) + head, blocks, host_->block_bytes(),
                    std::max(head, from * row_bytes) - head, std::max(head, to * row_bytes) - head, false, in);
      }
      lock.lock();
    }
    lock.unlock();
    done.push_back(std::make_shared<const Fence>(driver_, in));
    done.front()->order(stream);
  } catch (...) {
    if (lock.owns_lock()) lock.unlock();
    driver_->synchronize();
    throw;
  }
  lock.lock();
  advance(index, swapped.length, stream);
  for (Swapped::Part& part : swapped.parts) host_->give(std::exchange(part.blocks, {}), done);
  {
    const std::lock_guard guard(swapped.mutex);
    swapped.last.swap(done);
  }
  refresh(slot);
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

// Ends a sequence, tried again where the driver refuses.
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
