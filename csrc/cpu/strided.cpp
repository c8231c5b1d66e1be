#include "cpu/strided.h"

#include <algorithm>
#include <cstring>

namespace cachedit {
namespace {

template <class Element>
void copy_run(const char* data, int64_t offset, int64_t stride, int64_t n, void* out) {
  const Element* from = reinterpret_cast<const Element*>(data) + offset;
  Element* to = static_cast<Element*>(out);
  if (stride == 1) {
    std::memcpy(to, from, n * sizeof(Element));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  }
}

}  // namespace

Elements::Elements(const void* data, int element_size, int64_t dim, const int64_t* sizes, const int64_t* strides)
    : data_(static_cast<const char*>(data)), element_size_(element_size) {
  int64_t packed = 1;
  bool contiguous = true;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (sizes[d] == 0) return;  // nothing will be read
    contiguous = contiguous && (sizes[d] == 1 || strides[d] == packed);  // a stride over one element means nothing
    packed *= sizes[d];
  }
  if (contiguous) return;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (!dims_.empty() && strides[d] == dims_.back().size * dims_.back().stride) {
      dims_.back().size *= sizes[d];
    } else {
      dims_.push_back({sizes[d], strides[d]});
    }
  }
}

const void* Elements::read_strided(int64_t begin, int64_t n, void* scratch) const {
  const Dim& inner = dims_.front();
  int64_t column = begin % inner.size;
  int64_t row = begin / inner.size;
  char* out = static_cast<char*>(scratch);
  while (n > 0) {
    int64_t offset = column * inner.stride;
    int64_t rest = row;
    for (size_t d = 1; d < dims_.size(); ++d) {
      offset += rest % dims_[d].size * dims_[d].stride;
      rest /= dims_[d].size;
    }
    const int64_t run = std::min(n, inner.size - column);
    if (run == n && inner.stride == 1 && out == scratch) return data_ + offset * element_size_;
    if (element_size_ == 2) {
      copy_run<uint16_t>(data_, offset, inner.stride, run, out);
    } else {
      copy_run<uint32_t>(data_, offset, inner.stride, run, out);
    }
    out += run * element_size_;
    n -= run;
    column = 0;
    ++row;
  }
  return scratch;
}

}  // namespace cachedit
