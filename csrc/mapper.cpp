#include "mapper.hpp"

#include <pthread.h>

#include <algorithm>

#include "driver.hpp"

namespace vattn {

Mapper::Mapper() : forks_(forks()), state_(std::make_unique<State>()) {
  state_->thread = std::make_unique<std::thread>([this] { loop(); });
}

Mapper::~Mapper() {
  if (forks() != forks_) {
    // The state is leaked. Its thread can be neither joined nor detached in a forked child, and the destructor of the
    // condition variable that the thread waits on would block.
    (void)state_.release();
    return;
  }
  stop();
}

bool Mapper::post(Urgency urgency, const void* owner, Work work, Clock::duration delay) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->stopped) return false;
    const auto not_before = delay == Clock::duration{} ? Clock::time_point{} : Clock::now() + delay;
    state_->queues[static_cast<std::size_t>(urgency)].push_back({owner, std::move(work), not_before});
  }
  state_->queued.notify_one();
  return true;
}

void Mapper::run(const void* owner, Work work) {
  bool finished = false;
  std::exception_ptr failure;
  const auto demand = [&] {
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    const std::lock_guard lock(state_->mutex);
    finished = true;
  };
  if (!post(Urgency::demand, owner, demand)) {
    work();
    return;
  }
  std::unique_lock lock(state_->mutex);
  state_->done.wait(lock, [&] { return finished; });
  if (failure) std::rethrow_exception(failure);
}

void Mapper::cancel(const void* owner) {
  std::unique_lock lock(state_->mutex);
  for (const Urgency urgency : {Urgency::ahead, Urgency::housekeeping})
    std::erase_if(state_->queues[static_cast<std::size_t>(urgency)],
                  [&](const Job& job) { return job.owner == owner; });
  state_->done.wait(lock, [&] { return state_->running != owner; });
}

void Mapper::wait_idle(const void* owner) {
  const auto now_due = [&](const Job& job) { return job.owner == owner && job.not_before == Clock::time_point{}; };
  std::unique_lock lock(state_->mutex);
  state_->done.wait(lock, [&] {
    return state_->running != owner &&
           std::none_of(state_->queues.begin(), state_->queues.end(),
                        [&](const auto& queue) { return std::any_of(queue.begin(), queue.end(), now_due); });
  });
}

void Mapper::stop() {
  if (forks() != forks_) return;
  std::unique_ptr<std::thread> ending;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopped = true;
    ending = std::move(state_->thread);
  }
  state_->queued.notify_one();
  if (ending) ending->join();
}

void Mapper::loop() {
  ::pthread_setname_np(::pthread_self(), "vattn-mapper");
  Driver::enter_background();
  std::unique_lock lock(state_->mutex);
  for (Job job; next(job, lock);) {
    state_->running = job.owner;
    lock.unlock();
    job.work();
    job.work = nullptr;
    lock.lock();
    state_->running = nullptr;
    state_->done.notify_all();
  }
}

// Waits for work that is due, and takes the most urgent. Returns false after stop(), when no demand is left.
bool Mapper::next(Job& job, std::unique_lock<std::mutex>& lock) {
  for (;;) {
    auto wake = Clock::time_point::max();
    for (auto& queue : state_->queues) {
      if (state_->stopped && &queue != &state_->queues.front()) queue.clear();
      for (auto candidate = queue.begin(); candidate != queue.end(); ++candidate) {
        if (candidate->not_before != Clock::time_point{} && candidate->not_before > Clock::now()) {
          wake = std::min(wake, candidate->not_before);
          continue;
        }
        job = std::move(*candidate);
        queue.erase(candidate);
        return true;
      }
    }
    state_->done.notify_all();  // wait_idle() need not wait for work that was dropped after stop()
    if (state_->stopped) return false;
    if (wake == Clock::time_point::max()) {
      state_->queued.wait(lock);
    } else {
      state_->queued.wait_until(lock, wake);
    }
  }
}

}  // namespace vattn
