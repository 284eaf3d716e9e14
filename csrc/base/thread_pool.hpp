// A small pool of persistent threads, owned by whoever creates it. There is no global state.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace radixkv {

// Runs the items of one job at a time on `num_threads` threads, of which the caller is one.
//
// - Threads start with the first job that needs them, and again in a child after fork(), which must not happen while a
//   job runs (AttentionPlan's ForkMutex sees to it).
// - Items are handed out one by one, so uneven items balance themselves.
// - A job never waits for a thread that has not woken up yet.
// - Calls from several threads are served one after the other.
class ThreadPool {
 public:
  using Task = std::function<void(std::int64_t item, int worker)>;

  // Throws Error (InvalidArgument) unless 1 <= num_threads <= 1024.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  // Takes effect with the next job; surplus threads are joined.
  void set_num_threads(int num_threads);

  // Calls task(item, worker) once for every item in [0, num_items), with 0 <= worker < num_threads and never two
  // calls with the same worker at a time. Returns when all are done. The first exception stops the hand-out of
  // further items and is rethrown here.
  void for_each(std::int64_t num_items, const Task& task);

 private:
  struct Crew;
  Crew& crew();

  std::mutex mutex_;  // one job at a time
  std::atomic<int> num_threads_;
  long crew_process_ = 0;  // the process that started the crew; threads do not survive fork()
  std::unique_ptr<Crew> crew_;
};

}  // namespace radixkv
