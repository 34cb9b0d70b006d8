// Extents by size class under one byte budget.
//
// Every extent that exists is charged to the budget, from before its create until after its release, so that
// mapped + pooled + retired bytes never exceed it (invariant 6). Driver calls run outside the lock.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>

#include "vmm.hpp"

namespace vattn {

class ExtentPool {
 public:
  // Size class c is 2^c granules: 1, 2, 4 ... 64.
  static constexpr std::size_t kClasses = 7;

  ExtentPool(std::shared_ptr<Driver> driver, std::size_t budget);

  // An extent of the size class: a pooled one, or a new one, for which pooled extents of other classes are
  // released when the budget or the device is short. Throws OutOfPages or DriverError, and then has lost nothing.
  Extent take(std::size_t size_class);
  void give(Extent&& extent) noexcept;
  // Creates extents of a class until so many are pooled or an eighth of the budget is left, where one class would be
  // released for another. Throws DriverError.
  void stock(std::size_t size_class, std::size_t count);
  // Releases pooled extents until no more than `bytes` are charged, or none is pooled.
  void shrink(std::size_t bytes);
  // Nothing is taken beyond it from now on; what is charged beyond it is the caller's to bring back.
  void set_budget(std::size_t budget);

  std::size_t granularity() const noexcept { return driver_->granularity(); }
  std::size_t bytes_of(std::size_t size_class) const noexcept { return granularity() << size_class; }
  // The largest class of at most `bytes` (at least one granule).
  std::size_t class_of(std::size_t bytes) const noexcept;

  struct Usage {
    std::size_t budget;
    std::size_t charged;  // bytes of all extents that exist
    std::size_t pooled;   // of those, the ones in the pool
    std::size_t peak;     // the most ever charged
    bool overdrawn;       // whether anything was ever created beyond the budget of its moment
    // Bytes that take() can still hand out.
    std::size_t available() const noexcept { return budget - std::min(budget, in_use()); }
    std::size_t in_use() const noexcept { return charged - pooled; }
  };
  Usage usage() const;
  // Extents of a class in the pool.
  std::size_t pooled(std::size_t size_class) const;

 private:
  void charge(std::size_t bytes) noexcept;
  void keep(Extent&& extent) noexcept;  // under the mutex; it counts as pooled already
  // Releases one pooled extent, of the largest class that has any; false when none is pooled. Until the driver has
  // let it go it counts as pooled. When the driver refuses, it is in the pool again.
  bool release_largest();

  const std::shared_ptr<Driver> driver_;
  mutable std::mutex mutex_;
  std::array<std::vector<Extent>, kClasses> free_;
  Usage usage_{};
};

}  // namespace vattn
