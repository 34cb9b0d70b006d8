// The background thread of a device: one queue of work, the most urgent first.
//
// It knows nothing of what it runs, and never calls Python. Several arenas share one; each cancels what is its own
// before it goes.
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
  demand,        // somebody waits for it
  ahead,         // somebody will
  housekeeping,  // nobody does
};

class Mapper {
 public:
  using Clock = std::chrono::steady_clock;
  using Work = std::function<void()>;

  Mapper();
  ~Mapper();  // as stop(); in a forked child, where the thread does not exist, nothing
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Queues work, which must not throw, to be run `delay` from now at the earliest. False when stopped: it will not run.
  bool post(Urgency urgency, const void* owner, Work work, Clock::duration delay = {});
  // Runs work before everything that is queued but not waited for; waits, and throws what it throws. When stopped, it
  // runs in the calling thread.
  void run(const void* owner, Work work);
  // Drops what is queued for an owner, which must wait for nothing, and waits for what is under way for it.
  void cancel(const void* owner);
  // Waits until nothing of an owner is queued or under way, but what was posted with a delay.
  void wait_idle(const void* owner);
  // Finishes what is waited for, drops the rest and ends the thread.
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
    const void* running = nullptr;  // whose work is under way
    bool stopped = false;
    std::unique_ptr<std::thread> thread;
  };

  void loop();
  bool next(Job& job, std::unique_lock<std::mutex>& lock);

  const unsigned forks_;
  std::unique_ptr<State> state_;
};

}  // namespace vattn
