#include "sequence.hpp"

#include <algorithm>
#include <stdexcept>

namespace vattn {

Sequence::Sequence(std::shared_ptr<Arena> arena, std::optional<std::size_t> slot, std::size_t expected, Stream stream,
                   bool empty, std::optional<std::size_t> like, std::size_t positions)
    : arena_(std::move(arena)),
      name_(arena_->name(arena_->acquire(slot, expected, stream, empty, like, positions))),
      slot_(Arena::slot_of(*name_)) {}

Sequence::Sequence(std::shared_ptr<Arena> arena, std::size_t slot)
    : arena_(std::move(arena)), name_(arena_->name(slot)), slot_(slot) {}

Sequence::~Sequence() {
  if (name_) arena_->abandon(*name_);
}

std::size_t Sequence::name() const {
  const std::lock_guard lock(mutex_);
  return require_name();
}

std::size_t Sequence::require_name() const {
  if (name_) return *name_;
  throw std::invalid_argument(swapped_ ? "the sequence is swapped out: swap it in first"
                                       : "the sequence is closed: open a new one with KVCache.open");
}

std::optional<std::size_t> Sequence::slot() const {
  const std::lock_guard lock(mutex_);
  return swapped_ ? std::nullopt : std::optional(slot_);
}

std::size_t Sequence::length() const {
  const std::lock_guard lock(mutex_);
  if (swapped_) return swapped_->length;
  return name_ ? arena_->length(*name_) : 0;
}

bool Sequence::closed() const {
  const std::lock_guard lock(mutex_);
  return !name_ && !swapped_;
}

std::shared_ptr<Swapped> Sequence::swapped() const {
  const std::lock_guard lock(mutex_);
  return swapped_;
}

std::optional<std::size_t> Sequence::try_extend(std::size_t count, Stream stream) {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return std::nullopt;
  const std::size_t name = require_name();
  lock.unlock();
  return arena_->try_extend(name, count, stream);
}

bool Sequence::busy() const {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  return !lock.owns_lock();
}

void Sequence::swap_out(Stream stream) {
  const std::lock_guard lock(mutex_);
  swapped_ = arena_->swap_out(require_name(), stream);
  name_.reset();
}

void Sequence::swap_in(std::optional<std::size_t> slot, Stream stream) {
  const std::lock_guard lock(mutex_);
  if (!swapped_) throw std::invalid_argument("the sequence is not swapped out");
  slot_ = arena_->swap_in(*swapped_, slot, stream);
  name_ = arena_->name(slot_);
  swapped_.reset();
}

void Sequence::close(std::vector<Sequence*> sequences, Stream stream) {
  // Every caller locks in the order of the addresses, so that two callers never wait for each other.
  std::sort(sequences.begin(), sequences.end());
  sequences.erase(std::unique(sequences.begin(), sequences.end()), sequences.end());
  std::vector<std::unique_lock<std::mutex>> locks;
  std::vector<std::size_t> names;
  for (Sequence* const sequence : sequences) {
    locks.emplace_back(sequence->mutex_);
    if (sequence->name_) names.push_back(*sequence->name_);
  }
  if (!names.empty() && !sequences.front()->arena_->closed()) sequences.front()->arena_->release(names, stream);
  for (Sequence* const sequence : sequences) {
    sequence->name_.reset();
    sequence->swapped_.reset();
  }
}

}  // namespace vattn
