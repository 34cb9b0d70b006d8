#include "mapper.hpp"

#include <pthread.h>

#include <algorithm>

#include "driver.hpp"

namespace vattn {

Mapper::Mapper() : forks_(forks()), thread_(std::make_unique<std::thread>([this] { loop(); })) {}

Mapper::~Mapper() {
  if (forks() != forks_) {
    (void)thread_.release();  // destroying it would end the process: its thread can be neither joined nor detached
    return;
  }
  stop();
}

bool Mapper::post(Urgency urgency, const void* owner, Work work, Clock::duration delay) {
  {
    const std::lock_guard lock(mutex_);
    if (stopped_) return false;
    const auto not_before = delay == Clock::duration{} ? Clock::time_point{} : Clock::now() + delay;
    queues_[static_cast<std::size_t>(urgency)].push_back({owner, std::move(work), not_before});
  }
  queued_.notify_one();
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
    const std::lock_guard lock(mutex_);
    finished = true;
  };
  if (!post(Urgency::demand, owner, demand)) {
    work();
    return;
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return finished; });
  if (failure) std::rethrow_exception(failure);
}

void Mapper::cancel(const void* owner) {
  std::unique_lock lock(mutex_);
  for (const Urgency urgency : {Urgency::ahead, Urgency::housekeeping})
    std::erase_if(queues_[static_cast<std::size_t>(urgency)], [&](const Job& job) { return job.owner == owner; });
  done_.wait(lock, [&] { return running_ != owner; });
}

void Mapper::settle(const void* owner) {
  const auto now_due = [&](const Job& job) { return job.owner == owner && job.not_before == Clock::time_point{}; };
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] {
    return running_ != owner && std::none_of(queues_.begin(), queues_.end(), [&](const auto& queue) {
             return std::any_of(queue.begin(), queue.end(), now_due);
           });
  });
}

void Mapper::stop() {
  std::unique_ptr<std::thread> ending;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    ending = std::move(thread_);
  }
  queued_.notify_one();
  if (ending) ending->join();
}

void Mapper::loop() {
  ::pthread_setname_np(::pthread_self(), "vattn-mapper");
  Driver::enter_background();
  std::unique_lock lock(mutex_);
  for (Job job; next(job, lock);) {
    running_ = job.owner;
    lock.unlock();
    job.work();
    job.work = nullptr;
    lock.lock();
    running_ = nullptr;
    done_.notify_all();
  }
}

// The most urgent work that is due, when there is some; false at the end.
bool Mapper::next(Job& job, std::unique_lock<std::mutex>& lock) {
  for (;;) {
    auto wake = Clock::time_point::max();
    for (auto& queue : queues_) {
      if (stopped_ && &queue != &queues_.front()) queue.clear();
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
    done_.notify_all();  // what stop() has dropped is not waited for any more
    if (stopped_) return false;
    if (wake == Clock::time_point::max()) {
      queued_.wait(lock);
    } else {
      queued_.wait_until(lock, wake);
    }
  }
}

}  // namespace vattn
