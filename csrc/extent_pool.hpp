// A pool of extents by size class, under one byte budget.
//
// Every extent that exists is charged to the budget, from before it is created until after it is released. So the bytes
// that are mapped, pooled or waiting for a deferred unmap never exceed the budget in total (invariant 6). The mutex is
// not held during driver calls.
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

  // Returns an extent of `bytes`, a multiple of the granularity. It is taken from the pool when the size is that of a
  // class and such an extent is pooled. Otherwise it is created, and pooled extents are released for it when the budget
  // or the device is short of memory. When the last owner drops the extent, it returns to the pool, or to the driver if
  // it was exported. Requires that the pool outlives the extent. Throws BudgetExceeded or DriverError; then no memory
  // is lost, though pooled extents may have been released.
  std::shared_ptr<Extent> take(std::size_t bytes);
  // Returns an extent with memory of another process. It is charged to the budget like any other. Throws BudgetExceeded
  // or DriverError.
  std::shared_ptr<Extent> import(std::size_t bytes, int descriptor);
  // Creates extents of a class until `count` are pooled, or until another one would leave less than an eighth of the
  // budget: with less left, one class would be released to create another. Throws DriverError.
  void stock(std::size_t size_class, std::size_t count);
  // Releases pooled extents until at most `bytes` are charged, or until the pool is empty. Throws DriverError.
  void shrink(std::size_t bytes);
  // Sets the budget (bytes) for later calls. When more than that is charged already, the caller has to free the excess.
  void set_budget(std::size_t budget);

  std::size_t granularity() const noexcept { return driver_->granularity(); }
  std::size_t bytes_of(std::size_t size_class) const noexcept { return granularity() << size_class; }
  // Returns the largest class whose extents have at most `bytes`, or class 0 for less than one granule.
  std::size_t class_of(std::size_t bytes) const noexcept;

  struct Usage {
    std::size_t budget;
    std::size_t charged;  // bytes of all extents that exist, or that are being created or released
    std::size_t pooled;   // the part of `charged` that is in the pool
    std::size_t peak;     // the largest `charged` so far, in bytes
    bool overdrawn;       // whether `charged` ever rose above the budget of that time
    // The bytes that take() can still return.
    std::size_t available() const noexcept { return budget - std::min(budget, in_use()); }
    std::size_t in_use() const noexcept { return charged - pooled; }
  };
  Usage usage() const;
  // Returns the number of extents of a class in the pool.
  std::size_t pooled(std::size_t size_class) const;

 private:
  std::shared_ptr<Extent> obtain(std::size_t bytes, std::optional<int> descriptor);
  void charge(std::size_t bytes) noexcept;
  std::shared_ptr<Extent> lend(Extent&& extent);
  void give(Extent&& extent) noexcept;
  void drop(Extent& extent) noexcept;
  void keep(Extent&& extent) noexcept;  // requires the mutex; the extent already counts as pooled
  // Returns the index in free_ for extents of a size: the class, or kClasses for a size that is no class.
  std::size_t shelf_of(std::size_t bytes) const noexcept;
  // Releases one pooled extent: one whose size is no class if there is any, otherwise one of the largest class that has
  // any. Returns false when the pool is empty. The extent counts as pooled until the driver has released it. When the
  // driver refuses, this throws and the extent is in the pool again.
  bool release_largest();

  const std::shared_ptr<Driver> driver_;
  mutable std::mutex mutex_;
  std::array<std::vector<Extent>, kClasses + 1> free_;
  Usage usage_{};
};

}  // namespace vattn
