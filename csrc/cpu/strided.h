// Reading a tensor's elements in row-major order, whatever its strides.
#pragma once

#include <cstdint>
#include <vector>

namespace cachedit {

class Elements {
 public:
  Elements(const void* data, int element_size, int64_t dim, const int64_t* sizes, const int64_t* strides);

  bool contiguous() const { return dims_.empty(); }

  // Elements [begin, begin + n), one after the other: in place where they lie so, else copied to scratch.
  const void* read(int64_t begin, int64_t n, void* scratch) const {
    return dims_.empty() ? data_ + begin * element_size_ : read_strided(begin, n, scratch);
  }

 private:
  struct Dim {
    int64_t size;
    int64_t stride;  // in elements
  };

  const void* read_strided(int64_t begin, int64_t n, void* scratch) const;

  const char* data_;
  int element_size_;
  std::vector<Dim> dims_;  // innermost first, neighbours merged where that is possible; empty if all is contiguous
};

}  // namespace cachedit
