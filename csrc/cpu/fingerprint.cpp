// fastcss::fingerprint.cpu: a hash of each tensor's bytes, at the speed of the memory.
//
// A tensor is cut into chunks of a fixed size, so that its hash does not depend on the number of threads. Within a
// chunk, kStreams sums take one word each in turn: state ← rotate(state ⊕ word) · odd. That is a bijection of the word
// and of the state, so that a change of a single word always changes its sum.

#include <array>

#include "parallel.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr int kStreams = 32;
constexpr int64_t kChunk = int64_t{1} << 16, kBlock = kStreams * sizeof(uint64_t);
constexpr uint64_t kOdd = 0x9E3779B185EBCA87, kSeed = 0xC2B2AE3D27D4EB4F;

FASTCSS_INLINE uint64_t mix(uint64_t state, uint64_t word) {
  state ^= word;
  return (state << 31 | state >> 33) * kOdd;
}

FASTCSS_CLONES void mix_blocks(uint64_t* states, const char* data, int64_t blocks) {
  uint64_t state[kStreams];
  for (int i = 0; i < kStreams; ++i) state[i] = states[i];
  for (; blocks > 0; --blocks, data += kBlock) {
    uint64_t word[kStreams];
    std::memcpy(word, data, kBlock);
    for (int i = 0; i < kStreams; ++i) state[i] = mix(state[i], word[i]);
  }
  for (int i = 0; i < kStreams; ++i) states[i] = state[i];
}

uint64_t hash_chunk(const char* data, int64_t bytes) {
  std::array<uint64_t, kStreams> states;
  states.fill(kSeed);
  const int64_t blocks = bytes / kBlock;
  mix_blocks(states.data(), data, blocks);
  if (bytes % kBlock != 0) {
    char rest[kBlock] = {};
    std::memcpy(rest, data + blocks * kBlock, bytes % kBlock);
    mix_blocks(states.data(), rest, 1);
  }
  uint64_t hash = kSeed + bytes;
  for (const uint64_t state : states) hash = mix(mix(hash, state), state >> 29);
  return hash;
}

struct Chunk {
  const char* data;
  int64_t bytes;
};

Tensor fingerprint(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "fingerprint: wants at least one tensor");
  Tensor hashes = torch::stable::new_empty(tensors[0], shape({static_cast<int64_t>(tensors.size())}), ScalarType::Long);
  auto* hash = static_cast<int64_t*>(hashes.mutable_data_ptr());
  std::vector<Tensor> contiguous;  // holds the copies until they are read
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;  // of each tensor
  for (const Tensor& given : tensors) {
    const Tensor& tensor = contiguous.emplace_back(given.is_contiguous() ? given : torch::stable::contiguous(given));
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t bytes = tensor.numel() * tensor.element_size();
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    for (int64_t at = 0; at < bytes; at += kChunk) chunks.push_back({data + at, std::min(kChunk, bytes - at)});
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  std::vector<uint64_t> parts(chunks.size());
  // Small tensors go together: to start a thread for less than a chunk does not pay.
  const int64_t count = static_cast<int64_t>(chunks.size());
  constexpr int64_t kTogether = 16;
  parallel(ceil_div(count, kTogether), [&](int64_t item) {
    for (int64_t i = item * kTogether; i < std::min(count, (item + 1) * kTogether); ++i)
      parts[i] = hash_chunk(chunks[i].data, chunks[i].bytes);
  });
  for (size_t t = 0; t < tensors.size(); ++t) {
    uint64_t sum = mix(kSeed, static_cast<uint64_t>(tensors[t].scalar_type()));
    for (int64_t dim = 0; dim < tensors[t].dim(); ++dim) sum = mix(sum, tensors[t].size(dim));
    for (int64_t i = first_chunk[t]; i < first_chunk[t + 1]; ++i) sum = mix(sum, parts[i]);
    hash[t] = static_cast<int64_t>(sum);
  }
  return hashes;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("fingerprint.cpu", FASTCSS_BOX(&fastcss::cpu::fingerprint)); }
