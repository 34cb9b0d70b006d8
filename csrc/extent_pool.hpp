// Extents by size class under one byte budget.
//
// Every extent that exists is charged to the budget, from before its create until after its release, so that
// mapped + pooled + retired bytes never exceed it (invariant 6). Driver calls run outside the lock.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "vmm.hpp"

namespace vattn {

class ExtentPool {
 public:
  // Size class c is 2^c granules: 1, 2, 4 ... 64.
  static constexpr std::size_t kClasses = 7;

  ExtentPool(std::shared_ptr<Driver> driver, std::size_t budget);

  // An extent of so many bytes, whole granules: a pooled one where that is a class, or a new one, for which pooled
  // extents of other sizes are released when the budget or the device is short. It is pooled again with its last owner,
  // who must not outlive the pool. Throws BudgetExceeded or DriverError, and then has lost nothing.
  std::shared_ptr<Extent> take(std::size_t bytes);
  // The memory of another process, charged like any. Throws BudgetExceeded or DriverError.
  std::shared_ptr<Extent> import(std::size_t bytes, int descriptor);
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
  std::shared_ptr<Extent> obtain(std::size_t bytes, std::optional<int> descriptor);
  void charge(std::size_t bytes) noexcept;
  std::shared_ptr<Extent> lend(Extent&& extent);
  void give(Extent&& extent) noexcept;
  void drop(Extent& extent) noexcept;
  void keep(Extent&& extent) noexcept;  // under the mutex; it counts as pooled already
  // Where extents of a size are kept: by class, and behind the classes those of any other size.
  std::size_t shelf_of(std::size_t bytes) const noexcept;
  // Releases one pooled extent, of the largest class that has any, before that one of no class; false when none is
  // pooled. Until the driver has let it go it counts as pooled. When the driver refuses, it is in the pool again.
  bool release_largest();

  const std::shared_ptr<Driver> driver_;
  mutable std::mutex mutex_;
  std::array<std::vector<Extent>, kClasses + 1> free_;
  Usage usage_{};
};

}  // namespace vattn
