// One sequence of an arena, as its owner holds it: in a slot, in host memory, or closed.
//
// What a sequence is, is written here and in the arena alone, and each call changes both or neither. So an owner that
// is interrupted between two calls, or that forgets the sequence, loses nothing.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "arena.hpp"

namespace vattn {

class Sequence {
 public:
  // A new one, see Arena::acquire.
  Sequence(std::shared_ptr<Arena> arena, std::optional<std::size_t> slot, std::size_t expected, Stream stream,
           bool empty, std::optional<std::size_t> like);
  // The one that a slot has, whose owner from now on this is.
  Sequence(std::shared_ptr<Arena> arena, std::size_t slot);
  // Ends it. In a forked child nothing.
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // By which the arena knows it. Throws std::invalid_argument when it is closed or swapped out.
  std::size_t name() const;
  // The slot that it has, or had when it was closed.
  std::optional<std::size_t> slot() const;
  std::size_t length() const;
  bool closed() const;
  // Where it is in host memory.
  std::shared_ptr<Swapped> swapped() const;

  std::size_t extend(std::size_t count, Stream stream) { return arena_->extend(name(), count, stream); }
  std::optional<std::size_t> try_extend(std::size_t count, Stream stream) {
    return arena_->try_extend(name(), count, stream);
  }
  void swap_out(Stream stream);
  void swap_in(std::optional<std::size_t> slot, Stream stream);
  // Ends all of them, which are one arena's, or none when it throws. Those that are closed already stay so.
  static void close(std::vector<Sequence*> sequences, Stream stream);

 private:
  std::size_t require_name() const;

  const std::shared_ptr<Arena> arena_;
  mutable std::mutex mutex_;
  std::optional<std::size_t> name_;  // none: swapped out, or closed
  std::size_t slot_;                 // the last that it had
  std::shared_ptr<Swapped> swapped_;
};

}  // namespace vattn
