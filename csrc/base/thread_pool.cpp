#include "base/thread_pool.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"

namespace radixkv {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 400;  // some 10 microseconds of looking before a thread goes to sleep

void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int checked_num_threads(int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) {
    invalid("num_threads is " + str(num_threads) + ": give 1 to " + str(kMaxThreads));
  }
  return num_threads;
}

struct Job {
  std::int64_t num_items;
  const ThreadPool::Task* task;
  std::atomic<std::int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work(int worker) {
    for (;;) {
      const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items) return;
      try {
        (*task)(item, worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(num_items, std::memory_order_relaxed);
      }
    }
  }
};

}  // namespace

// The threads and what they share. A worker joins a job under the mutex; the caller closes the job under the mutex,
// so that a worker that wakes too late finds nothing and never delays the caller.
struct ThreadPool::Crew {
  explicit Crew(int num_workers) {
    threads.reserve(static_cast<std::size_t>(num_workers));
    try {
      for (int worker = 1; worker <= num_workers; ++worker) {
        threads.emplace_back([this, worker] { serve(worker); });
      }
    } catch (...) {
      stop_all();
      throw;
    }
  }
  ~Crew() { stop_all(); }

  void stop_all() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
      epoch.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }

  void serve(int worker) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch.load(std::memory_order_acquire) == seen; ++spin) cpu_relax();
      Job* mine = nullptr;
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return epoch.load(std::memory_order_relaxed) != seen; });
        seen = epoch.load(std::memory_order_relaxed);
        if (stop) return;
        if (job == nullptr) continue;
        mine = job;
        active.fetch_add(1, std::memory_order_relaxed);
      }
      mine->work(worker);
      if (active.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        const std::lock_guard lock(mutex);
        idle.notify_one();
      }
    }
  }

  void run(Job& new_job) {
    {
      const std::lock_guard lock(mutex);
      job = &new_job;
      epoch.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    new_job.work(0);
    std::unique_lock lock(mutex);
    job = nullptr;
    if (active.load(std::memory_order_acquire) == 0) return;
    lock.unlock();
    for (int spin = 0; spin < kSpins; ++spin) {
      if (active.load(std::memory_order_acquire) == 0) return;
      cpu_relax();
    }
    lock.lock();
    idle.wait(lock, [&] { return active.load(std::memory_order_acquire) == 0; });
  }

  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable idle;
  std::atomic<std::uint64_t> epoch{0};
  std::atomic<int> active{0};  // workers inside the current job
  Job* job = nullptr;
  bool stop = false;
  std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(checked_num_threads(num_threads)) {}

ThreadPool::~ThreadPool() {
  // In a forked child the threads do not exist, so the crew can only be forgotten.
  if (crew_ && crew_process_ != static_cast<long>(getpid())) (void)crew_.release();
}

void ThreadPool::set_num_threads(int num_threads) {
  checked_num_threads(num_threads);
  const std::lock_guard lock(mutex_);
  if (num_threads == num_threads_) return;
  if (crew_ && crew_process_ != static_cast<long>(getpid())) (void)crew_.release();
  crew_.reset();
  num_threads_ = num_threads;
}

ThreadPool::Crew& ThreadPool::crew() {
  const auto process = static_cast<long>(getpid());
  if (crew_ && crew_process_ != process) (void)crew_.release();
  if (!crew_) {
    crew_ = std::make_unique<Crew>(num_threads_ - 1);
    crew_process_ = process;
  }
  return *crew_;
}

void ThreadPool::for_each(std::int64_t num_items, const Task& task) {
  if (num_items <= 0) return;
  const std::lock_guard lock(mutex_);
  Job job;
  job.num_items = num_items;
  job.task = &task;
  if (num_items == 1 || num_threads_ == 1) {
    job.work(0);
  } else {
    crew().run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace radixkv
