// A mutex that no child of fork() finds locked by a thread that it does not have.
#pragma once

#include <mutex>

namespace radixkv {

// fork() waits until nobody holds any of these, and parent and child go on with all of them free: what they guard is
// whole in both. So a child may be forked whatever other threads do at the time; only the holder must be able to go on
// (it does not wait for the GIL, nor for another of these).
class ForkMutex {
 public:
  ForkMutex();
  ~ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void before_fork();
  static void after_fork();

  std::mutex mutex_;
  ForkMutex *newer_ = nullptr, *older_ = nullptr;  // the process's list of them
};

}  // namespace radixkv
