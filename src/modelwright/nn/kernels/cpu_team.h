// A team of threads that works through one step together: started once, woken for each job, kept in step by barriers.
// Waiting threads spin for a moment first (a barrier in a step is microseconds away), then sleep. They never yield: on a
// busy machine a thread that yields waits for a whole turn of the other program, one that is woken comes next.
#pragma once
#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// Pieces 0, 1, 2, ... of one phase's work, handed out once each: a thread that is held up leaves more to the others.
struct alignas(64) Counter {
  std::atomic<int64_t> next{0};

  // Take the next pieces: a share of what is left, so that the last ones are small. False when none is left.
  bool take(int64_t count, int num_threads, int64_t* begin, int64_t* end) {
    int64_t from = next.load(std::memory_order_relaxed), size;
    do {
      if (from >= count) return false;
      size = num_threads == 1 ? count - from : (count - from + 2 * num_threads - 1) / (2 * num_threads);
    } while (!next.compare_exchange_weak(from, from + size, std::memory_order_relaxed));
    *begin = from;
    *end = from + size;
    return true;
  }
};

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
    job_.store(((job_.load() >> 8) + 1) << 8 | std::uint32_t(num_threads));
    job_.notify_all();
    work(0);
    for (int left; (left = num_left_.load(std::memory_order_acquire)) != 0;) wait(num_left_, left, 4000);
  }

  // Every thread of the present job waits here for the others.
  void barrier() {
    if (size_ == 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      num_arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      round_.notify_all();  // a system call only if somebody sleeps
    } else {
      wait(round_, round, 4000);
    }
  }

  int size() const { return size_; }

 private:
  template <class Number>
  static void wait(std::atomic<Number>& word, Number old, int num_tries) {  // until it is no longer `old`
    for (int i = 0; i < num_tries; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      _mm_pause();
    }
    word.wait(old);
  }

  void serve(int index, std::uint32_t seen) {
    for (;;) {
      wait(job_, seen, 20000);
      seen = job_.load();
      if (index < int(seen & 255)) {
        (*work_)(index);
        if (num_left_.fetch_sub(1) == 1) num_left_.notify_all();
      }
    }
  }

  std::mutex entrance_;
  std::vector<std::thread> workers_;
  pid_t process_ = getpid();
  const std::function<void(int)>* work_ = nullptr;
  int size_ = 1;
  // Each on a cache line of its own: who waits for one of them is not disturbed by changes of another.
  alignas(64) std::atomic<std::uint32_t> job_{0};  // its number, then 8 bits: how many threads it has
  alignas(64) std::atomic<int> num_left_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

static Team& team() {
  static Team* one = new Team();  // never destroyed: its threads may outlive the statics
  return *one;
}
