// BLAKE2b (RFC 7693) with a key, for messages of any length and digests of up to 64 bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace radixkv {

class Blake2b {
 public:
  static constexpr std::size_t kBlock = 128, kMostKey = 64;

  // key: up to 64 bytes. Its block is compressed when the first byte of the message comes, so a copy of an object that
  // was given one byte or more begins behind the key.
  Blake2b(const std::uint8_t* key, std::size_t key_size, std::size_t digest_size) : digest_size_(digest_size) {
    h_ = kInit;
    h_[0] ^= 0x01010000ull ^ (static_cast<std::uint64_t>(key_size) << 8) ^ digest_size;
    if (key_size == 0) return;
    std::memcpy(buffer_.data(), key, key_size);
    used_ = kBlock;
  }

  void update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    while (size > 0) {
      if (used_ == kBlock) {  // and more to come: it is not the last block
        compress(kBlock, false);
        used_ = 0;
        buffer_ = {};
      }
      const std::size_t n = std::min(size, kBlock - used_);
      std::memcpy(buffer_.data() + used_, bytes, n);
      used_ += n, bytes += n, size -= n;
    }
  }

  void digest(std::uint8_t* out) {
    compress(used_, true);
    std::memcpy(out, h_.data(), digest_size_);
  }

 private:
  using State = std::array<std::uint64_t, 8>;
  static constexpr State kInit = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  static constexpr std::uint8_t kOrder[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

  static std::uint64_t turn(std::uint64_t x, int n) { return x >> n | x << (64 - n); }

  void compress(std::size_t bytes, bool last) {
    total_ += bytes;
    std::array<std::uint64_t, 16> v, m;
    std::copy(h_.begin(), h_.end(), v.begin());
    std::copy(kInit.begin(), kInit.end(), v.begin() + 8);
    v[12] ^= total_;
    if (last) v[14] = ~v[14];
    std::memcpy(m.data(), buffer_.data(), kBlock);  // little endian
    const auto mix = [&v](int a, int b, int c, int d, std::uint64_t x, std::uint64_t y) {
      v[a] += v[b] + x, v[d] = turn(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turn(v[b] ^ v[c], 24);
      v[a] += v[b] + y, v[d] = turn(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turn(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
      const std::uint8_t* s = kOrder[round % 10];
      for (int i = 0; i < 4; ++i) mix(i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
      for (int i = 0; i < 4; ++i) {
        mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
      }
    }
    for (int i = 0; i < 8; ++i) h_[i] ^= v[i] ^ v[i + 8];
  }

  State h_;
  std::array<std::uint8_t, kBlock> buffer_{};
  std::size_t used_ = 0, digest_size_;
  std::uint64_t total_ = 0;
};

}  // namespace radixkv
