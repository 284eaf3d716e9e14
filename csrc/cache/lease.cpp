// Lease: the thread-bound face of a request. The work is done by Cache, under its mutex.
#include <algorithm>
#include <cstring>

#include "cache/cache.hpp"

namespace radixkv {

Lease::Lease(std::shared_ptr<Cache> cache, std::string_view name)
    : cache_(std::move(cache)), name_(name), thread_(std::this_thread::get_id()) {}

Lease::~Lease() {
  if (released()) return;
  Cache::Guard guard(cache_->mutex_);
  cache_->release(*this, false);
}

const Lease* Lease::use() const {
  if (released()) throw Error(ErrorKind::LeaseError, "the lease was released: acquire the tokens again");
  if (thread_.load(std::memory_order_relaxed) != std::this_thread::get_id()) {
    throw Error(ErrorKind::LeaseError,
                "the lease belongs to another thread: call lease.adopt() in the thread that takes it over");
  }
  return this;
}

void Lease::change() const {
  use();
  check_idle();
}

void Lease::check_idle() const {
  switch (state_.load()) {
    case State::idle:
      return;
    case State::in_step:
      throw Error(ErrorKind::LeaseError,
                  "the lease is in an open step, whose rows go into its pages: leave the step first");
    case State::releasing:
      throw Error(ErrorKind::LeaseError, "the lease is being released: on_release may read it, not change it");
  }
}

bool Lease::copy(PageCopy* out) const {
  use();
  *out = copy_;
  return source_ != kNone;
}

const Token* Lease::tokens_of(PageId page) const { return cache_->tree_.pages.tokens(page); }

void Lease::read_tokens(std::int64_t from, std::int64_t to, Token* out) const {
  use();
  const std::int64_t page_size = cache_->page_size();
  if (const auto dropped = std::min(to, num_dropped()); from < dropped) {
    out = std::copy(dropped_.begin() + from, dropped_.begin() + dropped, out);
    from = dropped;
  }
  while (from < to) {
    const std::int64_t offset = from % page_size, part = std::min(page_size - offset, to - from);
    const Token* tokens = tokens_of(pages_[from / page_size]) + offset;
    std::memcpy(out, tokens, part * sizeof(Token));
    out += part;
    from += part;
  }
}

void Lease::extend(const Token* tokens, std::int64_t n) {
  change();
  Cache::Guard guard(cache_->mutex_);
  cache_->extend(*this, tokens, n);
}

void Lease::advance(std::int64_t n) {
  change();
  Cache::Guard guard(cache_->mutex_);
  cache_->advance(*this, n);
}

std::int64_t Lease::num_dropped() const { return static_cast<std::int64_t>(use()->first_page_) * cache_->page_size(); }

std::int64_t Lease::drop(std::int64_t num_tokens) {
  change();
  Cache::Guard guard(cache_->mutex_);
  return cache_->drop(*this, num_tokens);
}

void Lease::commit() {
  change();
  Cache::Guard guard(cache_->mutex_);
  cache_->commit(*this, false);
}

void Lease::release(bool commit) {
  change();
  Cache::Guard guard(cache_->mutex_);
  cache_->release(*this, commit);
}

std::unique_ptr<Lease> Lease::fork() {
  change();
  Cache::Guard guard(cache_->mutex_);
  return cache_->fork(*this);
}

void Lease::adopt() {
  Cache::Guard guard(cache_->mutex_);
  if (released()) throw Error(ErrorKind::LeaseError, "the lease was released: acquire the tokens again");
  check_idle();
  thread_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

}  // namespace radixkv
