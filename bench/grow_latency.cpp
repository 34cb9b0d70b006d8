// Prints the median time in nanoseconds of Arena::grow within mapped memory, on the host backend. The arena does the
// same work on every backend, since no driver call is made.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "arena.hpp"

int main() {
  using namespace vattn;
  constexpr std::size_t kGrows = 100000;
  Arena arena(make_host_driver(2 << 20, 0), {{128}}, {.slots = 64, .max_len = kGrows, .budget = std::size_t{1} << 40});
  const std::size_t slot = arena.acquire(std::nullopt, 0, Stream{0});
  arena.grow(std::span(&slot, 1), kGrows, 0, Stream{0});
  std::vector<double> rounds;
  for (int round = 0; round < 21; ++round) {
    arena.truncate(std::span(&slot, 1), 0, Stream{0});
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t length = 1; length <= kGrows; ++length)
      arena.grow(std::span(&slot, 1), length, length - 1, Stream{0});
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    rounds.push_back(took.count() / kGrows);
  }
  std::nth_element(rounds.begin(), rounds.begin() + 10, rounds.end());
  std::printf("%.2f\n", rounds[10]);
}
