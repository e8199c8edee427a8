// Reads single rows of a matrix as float32, whatever their element type and stride, and sums over them in a fixed
// order.
#pragma once

#include "pack.h"

namespace fastcss::cpu {

// Returns the first term of the first lane.
inline float value_at(Matrix m) {
  if (m.dtype == DType::f32) return *static_cast<const float*>(m.data);
  if (m.dtype == DType::f16) return static_cast<float>(*static_cast<const Float16*>(m.data));
  const uint32_t bits = static_cast<uint32_t>(static_cast<const BFloat16*>(m.data)->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Reads or writes the first n terms of the first lane.
void read_row(float* dst, Matrix m, int64_t n);
void write_row(void* dst, DType dtype, const float* src, int64_t n);

float dot(const float* x, const float* y, int64_t n);
void add_scaled(float* sum, float factor, const float* term, int64_t n);  // sum += factor · term

// Returns 1 / max(‖row‖, 1e-12), the factor that gives a row the length 1 and leaves a row of zeros as it is.
float inverse_length(const float* row, int64_t n);
// The result for a row that counts as 1e-12 long: it is divided by a constant, so that its own length has no slope.
constexpr float kLargestInverse = 1.f / 1e-12f;
// Computes the same for each lane of a packed panel.
void inverse_lengths(const float* panel, int width, int lanes, int64_t words, bool pairs, float* inverse);

}  // namespace fastcss::cpu
