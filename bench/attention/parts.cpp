// Where a decode step's time can go, on a CPU with AVX512-BF16: cycles of the kernel's parts for one key-value head and
// tile of 64 keys, with keys and values in cache; and GB/s of reading runs of memory that lie scattered.
//
//   g++ -std=c++20 -O3 -march=native -ffp-contract=off -Icsrc bench/attention/parts.cpp -o build/attention_parts
//   build/attention_parts
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define RADIXKV_ISA avx512bf16
#define RADIXKV_SIMD_AVX512
#define RADIXKV_SIMD_PAIRS
#include "attention/kernel/block.hpp"
#include "base/memory.hpp"

using namespace radixkv::attention;
using namespace radixkv::attention::avx512bf16;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The fastest of nine rounds of n calls, in seconds a call.
template <class Call>
double seconds(int n, const Call& call) {
  double best = 1e9;
  for (int round = 0; round < 9; ++round) {
    const double start = now();
    for (int i = 0; i < n; ++i) call();
    best = std::min(best, (now() - start) / n);
  }
  return best;
}

// Additions that wait for each other take a cycle each.
double hertz() {
  std::uint64_t x = 0;
  return 4.0 / seconds(10'000'000, [&] { asm volatile("add $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0" : "+r"(x)); });
}

template <class T>
T* aligned(std::size_t count) {
  void* const memory = std::aligned_alloc(std::size_t{2} << 20, (count * sizeof(T) / (2 << 20) + 1) * (2 << 20));
  radixkv::prefer_huge_pages(reinterpret_cast<std::uintptr_t>(memory), count * sizeof(T));
  return static_cast<T*>(std::memset(memory, 0, count * sizeof(T)));
}

void parts(int kv_heads, int group, int head_dim, double clock) {
  constexpr int kTiles = 8, kPage = 16;
  const int pages = kTiles * kTileKeys / kPage, row = kv_heads * head_dim, heads = kv_heads * group;
  std::vector<std::int32_t> indices(pages);
  for (int i = 0; i < pages; ++i) indices[i] = i;
  const std::int32_t rows_of[] = {0, 1}, counts[] = {pages}, last[] = {kPage};
  const std::int32_t* const lists[] = {indices.data()};
  const auto cache = [&] {
    auto* const data = reinterpret_cast<char*>(aligned<std::uint16_t>(pages * kPage * row));
    return Cache{data, DType::bf16, head_dim, 1.0f, false, 2 * kPage * row, 2 * row, 2 * head_dim};
  };
  const LayerKV layer{heads, kv_heads, cache(), cache()};
  auto *q = aligned<std::uint16_t>(heads * head_dim), *out = aligned<std::uint16_t>(heads * head_dim);
  const Batch batch{
      layer, DType::bf16, {1, kPage, rows_of, lists, counts, last, nullptr}, {0.1f}, {q, row * group, head_dim}, out};
  const Block block{0, 0, kv_heads, 0, 1};
  auto* const scratch = aligned<char>(scratch_bytes(heads, head_dim, head_dim));
  auto* const carried = aligned<float>(state_floats(heads, head_dim));
  const RowState state{carried + heads * head_dim, carried + heads * head_dim + heads, carried, group};
  const double all = seconds(
      1000, [&] { BlockKernel<FormatPairs>(batch, block, scratch).attend({0, kTiles * kTileKeys, {}, {}}, state); });
  BlockKernel<FormatPairs> kernel(batch, block, scratch);  // its next tile is empty: nothing is fetched
  kernel.tiles.start(0, kTileKeys);
  kernel.pack_queries();
  kernel.reset_chunk();
  kernel.tiles.advance(0, 0);
  kernel.values_in_place = true;
  const double scores = seconds(10'000, [&] {
    for (int first = 0; first < kTileKeys; first += kLanes) kernel.score(kernel.key_rows(first), 0, group, first);
  });
  const double rest = seconds(10'000, [&] { kernel.consume(0, group, 0); });
  const double weigh = seconds(10'000, [&] { kernel.accumulate(0, group, 0, kTileKeys); });
  const double each = all / (kTiles * kv_heads);
  std::printf(
      "%d/%d heads, head_dim %d: %.0f cycles = Q K %.0f + softmax %.0f + P V %.0f + fetching and the rest %.0f; "
      "products alone %d\n",
      heads, kv_heads, head_dim, each * clock, scores * clock, (rest - weigh) * clock, weigh * clock,
      (each - scores - rest) * clock, 2 * group * kTileKeys * head_dim / 32);
}

// Every run of `bytes` bytes once, in the order given; with prefetch, 96 lines ahead in the same order.
template <bool kPrefetch>
void read(const std::vector<const char*>& runs, std::size_t bytes) {
  F sums[2] = {zero(), zero()};
  std::size_t next = 96 / (bytes / 64), ahead = 96 % (bytes / 64) * 64;
  for (const char* const run : runs) {
    for (std::size_t byte = 0; byte < bytes; byte += 128) {
      for (int i = 0; i < 2; ++i) {
        if (kPrefetch && next < runs.size()) __builtin_prefetch(runs[next] + ahead, 0, 2);
        if ((ahead += 64) == bytes) ahead = 0, ++next;
        sums[i] = add(sums[i], load(reinterpret_cast<const float*>(run + byte + 64 * i)));
      }
    }
  }
  asm volatile("" : : "v"(sums[0]), "v"(sums[1]));
}

void reads() {
  constexpr std::size_t kBytes = std::size_t{192} << 20;
  const char* const memory = aligned<char>(kBytes);
  for (const std::size_t bytes : {std::size_t{6} << 10, std::size_t{16} << 10, std::size_t{64} << 10, kBytes}) {
    std::vector<const char*> runs;
    for (std::size_t at = 0; at < kBytes; at += bytes) runs.push_back(memory + at);
    std::shuffle(runs.begin(), runs.end(), std::mt19937(1));
    std::printf("runs of %zu KiB: %.1f GB/s, with prefetch %.1f GB/s\n", bytes >> 10,
                kBytes / seconds(1, [&] { read<false>(runs, bytes); }) / 1e9,
                kBytes / seconds(1, [&] { read<true>(runs, bytes); }) / 1e9);
  }
}

}  // namespace

int main() {
  const double clock = hertz();
  std::printf("%.2f GHz\n", clock / 1e9);
  parts(3, 3, 64, clock);
  parts(4, 8, 128, clock);
  reads();
}
