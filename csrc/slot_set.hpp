// A set of slots as a bitmap, so that finding the members among very many slots reads one bit for each slot.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vattn {

class SlotSet {
 public:
  explicit SlotSet(std::size_t slots) : size_(slots), words_((slots + kBits - 1) / kBits) {}

  void set(std::size_t slot, bool member) noexcept {
    const std::uint64_t bit = std::uint64_t{1} << slot % kBits;
    words_[slot / kBits] = member ? words_[slot / kBits] | bit : words_[slot / kBits] & ~bit;
  }
  bool contains(std::size_t slot) const noexcept { return (words_[slot / kBits] >> slot % kBits & 1) != 0; }

  std::size_t count() const noexcept {
    std::size_t members = 0;
    for (const std::uint64_t word : words_) members += static_cast<std::size_t>(std::popcount(word));
    return members;
  }

  // Returns the first member that is at least `slot`, or the number of slots when there is none.
  std::size_t next(std::size_t slot) const noexcept {
    if (slot >= size_) return size_;
    std::size_t word = slot / kBits;
    std::uint64_t bits = words_[word] & ~std::uint64_t{0} << slot % kBits;
    while (bits == 0) {
      if (++word == words_.size()) return size_;
      bits = words_[word];
    }
    return word * kBits + static_cast<std::size_t>(std::countr_zero(bits));
  }

 private:
  static constexpr std::size_t kBits = 64;
  std::size_t size_;
  std::vector<std::uint64_t> words_;
};

}  // namespace vattn
