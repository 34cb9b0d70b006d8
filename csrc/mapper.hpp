// The mapper: the background thread of a device, with a queue of work that is run in the order of urgency.
//
// The mapper does not know what its work does, and never calls Python. Several arenas share one mapper. Before an arena
// is destroyed, it cancels its own work.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace vattn {

enum class Urgency : std::size_t {
  demand,        // a caller waits for it
  ahead,         // done in advance, so that a later caller need not wait
  housekeeping,  // maintenance, which no caller waits for
};

class Mapper {
 public:
  using Clock = std::chrono::steady_clock;
  using Work = std::function<void()>;

  Mapper();
  ~Mapper();  // does what stop() does; nothing in a forked child, where the thread does not exist
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Queues work, to be run `delay` from now at the earliest. Requires that the work does not throw. Returns false when
  // the mapper is stopped; the work is then not run.
  bool post(Urgency urgency, const void* owner, Work work, Clock::duration delay = {});
  // Runs work as a demand, that is before all queued work that no caller waits for. Waits for it, and throws what it
  // throws. When the mapper is stopped, the work runs in the calling thread.
  void run(const void* owner, Work work);
  // Drops the queued work of an owner that no caller waits for, and waits for its work that is running. Demands stay
  // queued. Requires that the caller holds no lock which that work needs.
  void cancel(const void* owner);
  // Waits until no work of an owner is queued or running. Work that was posted with a delay does not count while it is
  // queued.
  void wait_idle(const void* owner);
  // Finishes the demands, drops all other work and ends the thread.
  void stop();

 private:
  struct Job {
    const void* owner;
    Work work;
    Clock::time_point not_before;
  };

  struct State {
    std::mutex mutex;
    std::condition_variable queued;
    std::condition_variable done;
    std::array<std::deque<Job>, 3> queues;
    const void* running = nullptr;  // the owner of the work that is running
    bool stopped = false;
    std::unique_ptr<std::thread> thread;
  };

  void loop();
  bool next(Job& job, std::unique_lock<std::mutex>& lock);

  const unsigned forks_;
  std::unique_ptr<State> state_;
};

}  // namespace vattn
