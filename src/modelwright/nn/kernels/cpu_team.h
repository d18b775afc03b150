// A team of threads that works through one step together: started once, woken for each job, kept in step by barriers.
// Waiting threads spin for a moment first (a barrier in a step is microseconds away), then yield, then sleep.
#pragma once
#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Team {
 public:
  // Call work(thread) on threads 0 .. num_threads - 1; the caller is thread 0. Returns when all are done.
  void run(int num_threads, const std::function<void(int)>& work) {
    std::lock_guard<std::mutex> one_at_a_time(entrance_);
    if (process_ != getpid()) {  // after a fork the threads of the parent are not here
      new (&workers_) std::vector<std::thread>();
      process_ = getpid();
    }
    size_ = num_threads;
    work_ = &work;
    while (int(workers_.size()) < num_threads - 1) {
      const int index = int(workers_.size()) + 1;
      workers_.emplace_back([this, index, seen = job_.load()] { serve(index, seen); });
      workers_.back().detach();
    }
    num_left_.store(num_threads - 1);
    {
      std::lock_guard<std::mutex> lock(door_);
      job_.store(((job_.load() >> 8) + 1) << 8 | std::uint32_t(num_threads));
    }
    bell_.notify_all();
    work(0);
    wait_until([this] { return num_left_.load(std::memory_order_acquire) == 0; });
  }

  // Every thread of the present job waits here for the others.
  void barrier() {
    if (size_ == 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      num_arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait_until([this, round] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

  // Numbers 0, 1, 2, ... handed out once each, for work of uneven size. Thread 0 resets it between two barriers.
  std::atomic<int> next{0};

  int size() const { return size_; }

 private:
  template <class Condition>
  static bool spin(Condition is_met, int num_tries) {
    for (int i = 0; i < num_tries; ++i) {
      if (is_met()) return true;
      _mm_pause();
    }
    return false;
  }

  template <class Condition>
  static void wait_until(Condition is_met) {
    while (!spin(is_met, 4000)) std::this_thread::yield();
  }

  void serve(int index, std::uint32_t seen) {
    for (;;) {
      const auto called = [&] { return job_.load(std::memory_order_acquire) != seen; };
      if (!spin(called, 20000)) {
        std::unique_lock<std::mutex> lock(door_);
        bell_.wait(lock, called);
      }
      seen = job_.load();
      if (index < int(seen & 255)) {
        (*work_)(index);
        num_left_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex entrance_, door_;
  std::condition_variable bell_;
  std::vector<std::thread> workers_;
  pid_t process_ = getpid();
  const std::function<void(int)>* work_ = nullptr;
  int size_ = 1;
  std::atomic<std::uint32_t> job_{0};  // its number, then 8 bits: how many threads it has
  std::atomic<int> num_left_{0}, num_arrived_{0}, round_{0};
};

inline Team& team() {
  static Team* one = new Team();  // never destroyed: its threads may outlive the statics
  return *one;
}
