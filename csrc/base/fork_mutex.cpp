#include "base/fork_mutex.hpp"

#include <pthread.h>

namespace radixkv {

namespace {
// fork() is the process's, and so is the list of what it has to wait for.
std::mutex list_mutex;
ForkMutex* newest = nullptr;
}  // namespace

ForkMutex::ForkMutex() {
  const std::lock_guard lock(list_mutex);
  static const int registered = pthread_atfork(&before_fork, &after_fork, &after_fork);
  (void)registered;
  older_ = newest;
  if (older_ != nullptr) older_->newer_ = this;
  newest = this;
}

ForkMutex::~ForkMutex() {
  const std::lock_guard lock(list_mutex);
  (newer_ != nullptr ? newer_->older_ : newest) = older_;
  if (older_ != nullptr) older_->newer_ = newer_;
}

void ForkMutex::before_fork() {
  list_mutex.lock();
  for (ForkMutex* m = newest; m != nullptr; m = m->older_) m->lock();
}

void ForkMutex::after_fork() {
  for (ForkMutex* m = newest; m != nullptr; m = m->older_) m->unlock();
  list_mutex.unlock();
}

}  // namespace radixkv
