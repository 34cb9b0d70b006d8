// Page-locked host memory, in blocks of one size, under a budget of its own: where sequences go that are swapped out.
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
  std::shared_ptr<Driver> driver_;  // empty when moved from
  std::size_t bytes_;
  Address at_;
};

class HostPool {
 public:
  HostPool(std::shared_ptr<Driver> driver, std::size_t budget);

  std::size_t block_bytes() const noexcept { return block_bytes_; }
  bool in_forked_child() const noexcept { return driver_->in_forked_child(); }
  // Blocks for so many bytes: such as were given back, when what used them is done, and then new ones. Throws
  // BudgetExceeded or what the driver throws, and then has lost nothing.
  std::vector<HostBlock> take(std::size_t bytes);
  // Blocks that may be used again once the fences have passed.
  void give(std::vector<HostBlock>&& blocks, const Fences& fences) noexcept;
  // Gives what nobody uses back to the system.
  void shrink();
  // The same, also with what is given from now on.
  void close();

  struct Usage {
    std::size_t budget;
    std::size_t charged;  // bytes of all blocks
    std::size_t free;     // of those, the ones that were given back
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
