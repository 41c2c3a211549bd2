// A small thread pool: created on first use, sleeping between calls, grown to what callers ask for.
//
// `run(tasks, threads, body)` calls body(0) .. body(tasks - 1) once each, on the caller and up to threads - 1 workers, which
// draw task numbers from one counter. Callers write results by task number, so that results don't depend on who
// computed them. A second caller that finds the pool busy does its tasks alone: never more threads than were asked for.
// After fork() the child starts with a new, empty pool, as threads don't survive a fork.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

namespace otq {

class Pool {
 public:
  static Pool& get() {
    Pool* pool = instance().load();
    if (!pool) {
      static std::once_flag once;
      std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { instance().store(nullptr); }); });
      Pool* fresh = new Pool;  // lives as long as the process: workers must not outlive it at exit
      if (instance().compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  void run(int tasks, int threads, const std::function<void(int)>& body) {
    threads = std::min(threads, tasks);
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads <= 1 || !turn.owns_lock()) {
      for (int i = 0; i < tasks; i++) body(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_) < threads - 1) std::thread(&Pool::work, this, int(workers_++)).detach();
      body_ = &body, tasks_ = tasks, next_ = 0, helpers_ = threads - 1, busy_ = threads - 1, round_++;
    }
    wake_.notify_all();
    draw();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
    body_ = nullptr;
  }

 private:
  static std::atomic<Pool*>& instance() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }
  void draw() {
    for (int i; (i = next_.fetch_add(1)) < tasks_;) (*body_)(i);
  }
  void work(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return body_ && round_ != seen && id < helpers_; });
      seen = round_;
      lock.unlock();
      draw();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<int> next_{0};
  int tasks_ = 0, workers_ = 0, helpers_ = 0, busy_ = 0;
  uint64_t round_ = 0;
};

}  // namespace otq
