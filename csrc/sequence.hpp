// One sequence of an arena, as an object that owns it: the sequence is in a slot, in host memory, or closed.
//
// Only this object and the arena store the state of a sequence, and each call changes both or neither. So nothing is
// lost when the caller is interrupted between two calls, or drops the object.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "arena.hpp"

namespace vattn {

class Sequence {
 public:
  // Begins a new sequence. The arguments are those of Arena::acquire.
  Sequence(std::shared_ptr<Arena> arena, std::optional<std::size_t> slot, std::size_t expected, Stream stream,
           bool empty, std::optional<std::size_t> like, std::size_t positions = 0);
  // Takes ownership of the sequence that is running in a slot.
  Sequence(std::shared_ptr<Arena> arena, std::size_t slot);
  // Ends the sequence. In a forked child, does nothing to the arena.
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // The name by which the arena knows the sequence. Throws std::invalid_argument when it is closed or swapped out.
  std::size_t name() const;
  // The slot of the sequence or, when it is closed, the last that it had. None while it is swapped out.
  std::optional<std::size_t> slot() const;
  // In positions, also while the sequence is swapped out; 0 when it is closed.
  std::size_t length() const;
  bool closed() const;
  // The sequence's rows in host memory; null when it is not swapped out.
  std::shared_ptr<Swapped> swapped() const;

  std::size_t extend(std::size_t count, Stream stream) { return arena_->extend(name(), count, stream); }
  // As Arena::try_extend; returns none also while another thread swaps the sequence.
  std::optional<std::size_t> try_extend(std::size_t count, Stream stream);
  // Whether another thread is in a call of this sequence, which may take as long as a swap.
  bool busy() const;
  void swap_out(Stream stream);
  void swap_in(std::optional<std::size_t> slot, Stream stream);
  // Closes all the sequences, also those that are swapped out, or none when it throws. Sequences that are closed
  // already are passed over. Requires: all belong to one arena.
  static void close(std::vector<Sequence*> sequences, Stream stream);

 private:
  std::size_t require_name() const;

  const std::shared_ptr<Arena> arena_;
  mutable std::mutex mutex_;
  std::optional<std::size_t> name_;  // none when swapped out or closed
  std::size_t slot_;                 // the slot that the sequence has, or had last
  std::shared_ptr<Swapped> swapped_;
};

}  // namespace vattn
