// Running the kernels over whole tensors: every stream is cut into chunks of a fixed size, and chunks go to threads.
// What a chunk computes does not depend on the number of threads, so neither do the results.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/strided.h"
#include "cpu/ulysses_layout.h"

namespace cachedit {

// Asks for huge pages under a large new tensor: its first write otherwise spends more time on page faults than on
// arithmetic. The allocator maps large tensors anew each time.
void advise_new_memory(void* data, int64_t bytes);

// A contiguous result.
struct Target {
  void* data;
  int element_size;
  void* at(int64_t i) const { return static_cast<char*>(data) + i * element_size; }
};

struct SumsStream {
  DType dtype;
  int64_t rows;     // a pair of sums for each: 1, or the batch
  int64_t columns;  // elements of a row
  std::vector<Elements> inputs;
};

// Into [S, rows, 2]. inputs: before, after, anchor.
void residual_l1(const std::vector<SumsStream>& streams, float* out);

// inputs: previous, current.
void l1(const std::vector<SumsStream>& streams, float* out);

struct PushStream {
  DType dtype;
  int64_t rows;
  int64_t columns;
  Elements before;
  Elements after;
  Target out;
};

void residual_push(const std::vector<PushStream>& streams);

struct PushFloat8Stream {
  DType dtype;
  int64_t rows;     // a scale for each
  int64_t columns;  // elements of a row
  Elements before;
  Elements after;
  uint8_t* codes;
  float* scales;
};

void residual_push_float8(const std::vector<PushFloat8Stream>& streams);

struct ForecastStream {
  DType dtype;
  int64_t rows;
  int64_t columns;
  Elements hidden;
  std::vector<Elements> slots;
  Target out;
};

// weights: one for each slot or, per row, [rows, slots].
void residual_forecast(const std::vector<ForecastStream>& streams, const float* weights, bool per_row, float base);

// A contiguous slot of a ring in E4M3.
struct Float8Slot {
  const uint8_t* codes;
  const float* scales;  // one for each row
};

struct ForecastFloat8Stream {
  DType dtype;
  int64_t rows;     // a scale for each
  int64_t columns;  // elements of a row
  Elements hidden;
  std::vector<Float8Slot> slots;
  Target out;
};

// weights: one for each slot or, per sample, [samples, slots].
void residual_forecast_float8(const std::vector<ForecastFloat8Stream>& streams, const float* weights, int64_t samples,
                              float base);

struct GramStream {
  DType dtype;
  int64_t rows;     // a matrix for each: 1, or the batch
  int64_t columns;  // elements of a row
  std::vector<Elements> slots;
  std::vector<Float8Slot> float8_slots = {};  // in their place, as float32
  int64_t width = 0;                          // elements that share a scale
};

// Into [S, rows, slots, slots].
void ring_gram(const std::vector<GramStream>& streams, float* out);

struct Merge {
  DType dtype;   // of out and merged
  DType dtype2;  // of out2; the same, or dtype is float32
  int64_t rows;  // tokens and heads
  int64_t head_dim;
  Elements out, lse, out2, lse2;
  Target merged;
  float* merged_lse;
};

void merge_attention(const Merge& merge);

// dtype is that of the tensors; there is one for each entry of the layout's float8.
void ulysses_pack(const UlyssesLayout& layout, DType dtype, const std::vector<Elements>& tensors, char* buffer);

struct Unpacked {
  char* values;   // contiguous
  float* scales;  // null unless the tensor stays quantised
};

void ulysses_unpack(const UlyssesLayout& layout, DType dtype, const char* buffer,
                    const std::vector<Unpacked>& tensors);

}  // namespace cachedit
