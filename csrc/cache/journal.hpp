// The journal: what entered the tree, what left it and which leases ended, in numbered records for any number of
// readers. Off until somebody asks for it; then one branch and one record at each hook.
//
//   tree records    NAMESPACE root name | STORED page parent root tokens | REMOVED page
//   releases        namespace, number of prompt tokens, all tokens of a lease that ended
//
// Tree records are kept in a ring of 4 * num_pages, releases in a queue of as many tokens. Nobody is called and nobody
// waits: a reader that comes too late is told that it lost some. Only full pages are recorded; an open page that a full
// one replaces, or that goes, never was. A page's parent is recorded before it and removed after it.
//
// Replaying the records from the first one on gives the tree's full pages, their tokens and their parents.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/memory.hpp"

namespace radixkv {

enum class Op : std::int32_t { name_space, stored, removed };

// Some tree records, column by column.
struct JournalBatch {
  std::vector<std::int32_t> op, page, parent, root;         // what a record does not have is -1
  std::vector<std::int64_t> request;                        // whose call it was; 0: no request's
  std::vector<Token> tokens;                                // [records * page_size], zero but for STORED
  std::vector<std::pair<std::int64_t, std::string>> names;  // (index into the columns, name) of each NAMESPACE
  std::int64_t cursor = 0;                                  // the number to read from next
  bool lost = false;                                        // records before these were overwritten unread
};

struct Release {
  std::string name;  // of the namespace
  std::int64_t num_prompt = 0;
  std::vector<Token> tokens;
  std::int64_t request = 0;     // its number, from 1 in the order of acquire()
  std::int64_t num_cached = 0;  // tokens found at acquire
  std::int64_t at = 0;          // the number that the next tree record gets
};

struct ReleaseBatch {
  std::vector<Release> releases;
  std::int64_t cursor = 0;
  std::int64_t lost = 0;  // releases since the cursor asked for that are gone
};

class Journal {
 public:
  Journal(std::int32_t num_pages, std::int32_t page_size);

  // --- the cache writes; with its mutex held ----------------------------------------------------------------------
  void serving(std::int64_t request) { request_ = request; }  // whose the records are from here on; 0: no request's
  void name(SpaceId root, std::string_view name);
  // parent: the page before it, kNone where it is a first one. root: its namespace, kNone where it is its parent's.
  void stored(PageId page, PageId parent, SpaceId root, const Token* tokens);
  void removed(PageId page);
  void released(Release&& release);
  void lost_release() noexcept;  // one that there was no memory for: it and those before it are lost

  // --- readers, with the cache's mutex held -----------------------------------------------------------------------
  // Up to `limit` tree records from number `cursor` on.
  JournalBatch read(std::int64_t cursor, std::int64_t limit) const;
  ReleaseBatch read_releases(std::int64_t cursor, std::int64_t limit) const;
  std::int64_t end() const { return end_; }  // the number that the next tree record gets
  std::int64_t releases_end() const { return first_release_ + static_cast<std::int64_t>(releases_.size()); }
  // The number of the record with which this page entered the tree; -1 if it is not there.
  std::int64_t stored_at(PageId page) const { return stored_at_[page] - 1; }

 private:
  struct Record {
    Op op;
    PageId page;
    PageId parent;
    SpaceId root;
    std::int64_t request;
  };
  std::int64_t place() { return end_++ % capacity_; }

  const std::int64_t capacity_;
  const std::int32_t page_size_;
  std::int64_t end_ = 0, request_ = 0;
  LazyArray<Record> records_;
  LazyArray<Token> tokens_;
  std::vector<std::string> names_;     // of NAMESPACE records, at their places
  LazyArray<std::int64_t> stored_at_;  // number + 1; 0: not in the tree
  const std::int64_t most_tokens_;
  std::int64_t first_release_ = 0, release_tokens_ = 0;
  std::deque<Release> releases_;
};

}  // namespace radixkv
