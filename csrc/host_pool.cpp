#include "host_pool.hpp"

#include <utility>

namespace vattn {
namespace {

constexpr std::size_t kBlockGranules = 16;

}  // namespace

HostBlock::HostBlock(std::shared_ptr<Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes), at_(driver_->create_host(bytes)) {}

HostBlock::~HostBlock() {
  if (!driver_ || driver_->in_forked_child()) return;
  try {
    driver_->free_host(at_, bytes_);
  } catch (const std::exception& error) {
    driver_->report(error);
  }
}

HostBlock::HostBlock(HostBlock&& other) noexcept
    : driver_(std::move(other.driver_)), bytes_(other.bytes_), at_(other.at_) {}

HostBlock& HostBlock::operator=(HostBlock&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(bytes_, other.bytes_);
  std::swap(at_, other.at_);
  return *this;
}

HostPool::HostPool(std::shared_ptr<Driver> driver, std::size_t budget)
    : driver_(std::move(driver)), block_bytes_(kBlockGranules * driver_->granularity()), budget_(budget) {}

std::vector<HostBlock> HostPool::take(std::size_t bytes) {
  const std::size_t count = (bytes + block_bytes_ - 1) / block_bytes_;
  std::vector<HostBlock> taken;
  taken.reserve(count);
  Fences fences;  // of the blocks that are taken
  std::size_t missing = 0;
  {
    const std::lock_guard lock(mutex_);
    const std::size_t available = budget_ - std::min(budget_, charged_ - free_);
    if (count * block_bytes_ > available) throw BudgetExceeded(count * block_bytes_, available, "host_budget");
    std::size_t most = 0;
    for (const Given& given : given_) most += given.fences.size();
    fences.reserve(most);  // nothing below may throw once blocks are moved
    while (taken.size() < count && !given_.empty()) {
      Given& last = given_.back();
      fences.insert(fences.end(), last.fences.begin(), last.fences.end());
      while (taken.size() < count && !last.blocks.empty()) {
        taken.push_back(std::move(last.blocks.back()));
        last.blocks.pop_back();
      }
      if (last.blocks.empty()) given_.pop_back();
    }
    free_ -= taken.size() * block_bytes_;
    missing = count - taken.size();
    charged_ += missing * block_bytes_;
  }
  try {
    for (; missing != 0; --missing) taken.emplace_back(driver_, block_bytes_);
    for (const auto& fence : fences) fence->wait();
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      charged_ -= missing * block_bytes_;
    }
    give(std::move(taken), fences);
    throw;
  }
  return taken;
}

void HostPool::give(std::vector<HostBlock>&& blocks, const Fences& fences) noexcept {
  // In a forked child the pool owns nothing, and its mutex may be locked by a thread that does not exist there.
  if (blocks.empty() || driver_->in_forked_child()) return;
  const std::size_t bytes = blocks.size() * block_bytes_;
  try {
    Given given{{}, fences};
    const std::lock_guard lock(mutex_);
    if (!closed_) {
      given_.push_back(std::move(given));
      given_.back().blocks = std::move(blocks);
      free_ += bytes;
      return;
    }
  } catch (const std::bad_alloc&) {
    // The pool cannot store the blocks.
  }
  // The blocks are freed as soon as no copy uses them.
  try {
    for (const auto& fence : fences) fence->wait();
  } catch (const std::exception& error) {
    driver_->report(error);
  }
  blocks.clear();
  const std::lock_guard lock(mutex_);
  charged_ -= bytes;
}

void HostPool::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  shrink();
}

void HostPool::shrink() {
  std::vector<Given> going;
  {
    const std::lock_guard lock(mutex_);
    going.swap(given_);
    charged_ -= free_;
    free_ = 0;
  }
  for (const Given& given : going)
    for (const auto& fence : given.fences) fence->wait();
}

HostPool::Usage HostPool::usage() const {
  const std::lock_guard lock(mutex_);
  return {budget_, charged_, free_};
}

}  // namespace vattn
