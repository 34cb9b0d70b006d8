// The statistics of an arena. Each is listed here once, and is thereby a member of Stats and a key of the dictionary
// that Python gets; vattn.CacheStats has a field of the same name. Sizes are in bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vattn {

// clang-format off
#define VATTN_STATISTICS(X)                                                                                           \
  X(std::size_t, budget)                  /* the limit on physical memory */                                          \
  X(std::size_t, reserved)                /* reserved addresses */                                                    \
  X(std::size_t, physical)                /* memory of all extents that exist: mapped + deferred + pooled */          \
  X(std::size_t, peak)                    /* the largest value that `physical` has had */                             \
  X(std::size_t, pooled)                  /* memory in the pool, or on its way into or out of it */                   \
  X(std::size_t, mapped)                  /* memory in the runs of running and parked slots */                        \
  X(std::size_t, parked)                  /* the part of `mapped` that only parked slots have */                      \
  X(std::size_t, shared)                  /* what `mapped` would have in addition if no slots shared extents */       \
  X(std::size_t, deferred)                /* memory of deferred unmaps, which wait for their fences */                \
  X(std::size_t, running_slots)           /* slots with a sequence */                                                 \
  X(std::size_t, parked_slots)            /* slots without one that have memory */                                    \
  X(std::size_t, rows)                    /* memory of the rows of running sequences */                               \
  X(std::size_t, spare)                   /* whole unshared extents of running slots past rows and lookahead */        \
  X(std::uint64_t, adopted)               /* how often a sequence started in a parked slot */                         \
  X(std::uint64_t, aliases)               /* extents mapped again by forks and by swapping in */                      \
  X(std::uint64_t, copied)                /* bytes copied by forks, by compacting and by copy on write */             \
  X(std::uint64_t, hits)                  /* growths into memory that was mapped ahead */                             \
  X(std::uint64_t, misses)                /* growths that had to wait for memory */                                   \
  X(double, waited_seconds)               /* time that callers waited for memory, fences and locked slots */          \
  X(std::uint64_t, background_failures)   /* work of the mapper that failed */                                        \
  X(std::size_t, lookahead)               /* positions: the longest lookahead of the running sequences */             \
  X(std::size_t, host)                    /* host memory of sequences that are swapped out */                         \
  X(std::size_t, host_pooled)             /* host memory kept for the next ones */
// clang-format on

struct Stats {
#define VATTN_MEMBER(type, name) type name = 0;
  VATTN_STATISTICS(VATTN_MEMBER)
#undef VATTN_MEMBER
};

}  // namespace vattn
