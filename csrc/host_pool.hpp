// A pool of page-locked host memory, in blocks of one size and under a budget of its own. It holds the rows of
// sequences that are swapped out.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "vmm.hpp"

namespace vattn {

// A block of host memory. Move-only.
class HostBlock {
 public:
  HostBlock(std::shared_ptr<Driver> driver, std::size_t bytes);
  ~HostBlock();
  HostBlock(HostBlock&& other) noexcept;
  HostBlock& operator=(HostBlock&& other) noexcept;

  Address at() const noexcept { return at_; }

 private:
  std::shared_ptr<Driver> driver_;  // null when moved from
  std::size_t bytes_;
  Address at_;
};

class HostPool {
 public:
  HostPool(std::shared_ptr<Driver> driver, std::size_t budget);

  std::size_t block_bytes() const noexcept { return block_bytes_; }
  bool in_forked_child() const noexcept { return driver_->in_forked_child(); }
  // Returns blocks for so many bytes. Free blocks are taken first, and this waits for the fences of their last use; the
  // rest is allocated. Throws BudgetExceeded or what the driver throws; the blocks are then in the pool again.
  std::vector<HostBlock> take(std::size_t bytes);
  // Takes blocks back. They may be used again once the fences have passed. When the pool is closed, or has no memory to
  // store them, this waits for the fences and frees the blocks.
  void give(std::vector<HostBlock>&& blocks, const Fences& fences) noexcept;
  // Returns the free blocks to the system, after their fences have passed.
  void shrink();
  // Does the same, and frees every block that is given back from now on.
  void close();

  struct Usage {
    std::size_t budget;
    std::size_t charged;  // bytes of all blocks that exist
    std::size_t free;     // the part of `charged` that was given back
  };
  Usage usage() const;

 private:
  struct Given {
    std::vector<HostBlock> blocks;
    Fences fences;
  };

  const std::shared_ptr<Driver> driver_;
  const std::size_t block_bytes_;
  mutable std::mutex mutex_;
  std::vector<Given> given_;
  std::size_t budget_;
  std::size_t charged_ = 0;
  std::size_t free_ = 0;
  bool closed_ = false;
};

}  // namespace vattn
