// How the core refuses: one exception, whose kind names the Python class that it becomes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace radixkv {

enum class ErrorKind { PoolExhausted, LeaseError, InvalidTokens, InvalidArgument, NotCached };  // radixkv/errors.py

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  const ErrorKind kind;
};

// Pages that something needs and those that there are; tokens of its prompt that are cached.
struct PageCounts {
  std::int64_t needed, free, evictable, cached;
};

class Exhausted final : public Error {
 public:
  Exhausted(const PageCounts& counts, const std::string& what)
      : Error(ErrorKind::PoolExhausted, what), counts(counts) {}
  const PageCounts counts;
};

[[noreturn]] inline void fail(ErrorKind kind, const std::string& what) { throw Error(kind, what); }
[[noreturn]] inline void invalid(const std::string& what) { fail(ErrorKind::InvalidArgument, what); }

inline std::string str(std::int64_t n) { return std::to_string(n); }

}  // namespace radixkv
