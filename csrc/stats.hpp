// What an arena counts: each statistic is named here once, and so is a member of Stats, a key of what Python is given
// and a field of vattn.CacheStats. Sizes are bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vattn {

// clang-format off
#define VATTN_STATISTICS(X)                                                                                    \
  X(std::size_t, budget)                  /* the limit on physical memory */                                   \
  X(std::size_t, reserved)                /* addresses */                                                      \
  X(std::size_t, physical)                /* memory of all extents that exist: mapped + retired + pooled */    \
  X(std::size_t, peak)                    /* the most that was ever physical */                                \
  X(std::size_t, pooled)                  /* memory for the next growth, or on its way there */                \
  X(std::size_t, mapped)                  /* memory in runs of running and parked slots */                     \
  X(std::size_t, parked)                  /* of that, in parked slots only */                                  \
  X(std::size_t, shared)                  /* what would be mapped too if every run had its own */              \
  X(std::size_t, deferred)                 /* memory that waits for its fences */                               \
  X(std::size_t, running_slots)                                                                                \
  X(std::size_t, parked_slots)                                                                                 \
  X(std::size_t, rows)                    /* rows of running sequences */                                      \
  X(std::size_t, spare)                   /* whole extents past what running sequences need, lookahead too */  \
  X(std::uint64_t, adopted)               /* times a parked slot was taken over */                             \
  X(std::uint64_t, aliases)               /* extents mapped again by forks */                                  \
  X(std::uint64_t, copied)                /* copied by forks, by compacting, before writing behind shared rows */ \
  X(std::uint64_t, hits)                  /* growths into memory that was mapped ahead */                      \
  X(std::uint64_t, misses)                /* growths that had to wait for memory */                            \
  X(double, waited_seconds)               /* time that callers waited: for memory, for fences, for slots */    \
  X(std::uint64_t, background_failures)   /* work of the mapper that the driver refused */                     \
  X(std::size_t, lookahead)               /* positions, the longest of the running sequences */                \
  X(std::size_t, host)                    /* host memory under sequences that are swapped out */               \
  X(std::size_t, host_pooled)             /* host memory kept for the next ones */
// clang-format on

struct Stats {
#define VATTN_MEMBER(type, name) type name = 0;
  VATTN_STATISTICS(VATTN_MEMBER)
#undef VATTN_MEMBER
};

}  // namespace vattn
