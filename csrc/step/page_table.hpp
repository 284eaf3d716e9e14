// Opens steps over leases of one cache and keeps the arrays of the one that is open, written into reused buffers.
//
// A step is open from begin() to end(). Its leases cannot change in between: they have as many unwritten tokens in the
// end as rows were planned for them, and nobody else gets their pages. So the table points to each lease's own list of
// pages, and entering a step is O(requests + rows), however many pages they have.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "cache/cache.hpp"
#include "step/step_table.hpp"

namespace radixkv {

class PageTable {
 public:
  explicit PageTable(std::shared_ptr<Cache> cache);
  ~PageTable() { let_go(); }
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  // Opens a step over the unwritten tokens of these leases, of each the first `max_rows` at most. They must live until
  // it ends. O(leases + rows).
  // Throws LeaseError (released, another thread's, in a step; or a step of this table is open) or InvalidArgument
  // (empty batch, a lease twice, from another cache, or with nothing to compute); then no step is open.
  void begin(const std::vector<Lease*>& leases, std::int64_t max_rows);
  // Ends it: with `written`, every planned row is, and each lease advances by its own; otherwise none does. Throws
  // LeaseError, and leaves it open, in another thread than the one that opened it.
  void end(bool written);
  // Ends it from any thread, advancing nothing; nothing if none is open. For a step that nobody left. Waits for who
  // reads the lists of pages.
  void let_go() noexcept;

  // Of the last step. Requests are its leases, rows their unwritten tokens that are in it, lengths and positions those of their views.
  const StepTable& table() const { return table_; }
  const StepInputs& inputs() const { return inputs_; }                     // positions are those in the sequences
  const std::vector<PageId>& copy_source() const { return copy_source_; }  // to copy before anything is written
  const std::vector<PageId>& copy_target() const { return copy_target_; }
  // How far back every row may look without missing a dropped page, in keys before its own; -1: as far as it likes.
  std::int64_t window_limit() const { return window_limit_; }

 private:
  void take(const std::vector<Lease*>& leases);
  void assemble(std::int64_t max_rows);
  void add(const Lease& lease, std::int64_t max_rows);
  void add_rows(const Lease& lease, std::int64_t end);

  std::shared_ptr<Cache> cache_;
  std::atomic<bool> open_{false};
  std::thread::id thread_;      // that opened the step
  std::vector<Lease*> leases_;  // of the open step
  StepTable table_;
  StepInputs inputs_;
  std::vector<PageId> copy_source_, copy_target_;
  std::int64_t window_limit_ = -1;
};

}  // namespace radixkv
