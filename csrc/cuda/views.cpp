#include "cuda/views.h"

#include <algorithm>

namespace cachedit {
namespace cuda {

bool Layout::contiguous_from(int64_t first) const {
  int64_t packed = 1;
  for (int64_t d = dim - 1; d >= first; --d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != packed) return false;
    packed *= sizes[d];
  }
  return true;
}

bool Layout::in_rows() const {
  constexpr int64_t kShort = 256;
  if (contiguous()) return true;
  if (!contiguous_from(1)) return false;
  int64_t columns = 1;
  for (int64_t d = 1; d < dim; ++d) columns *= sizes[d];
  return columns >= kShort;
}

Layout whole(const Tensor& tensor) {
  return {const_cast<void*>(tensor.data()), tensor.dim, tensor.sizes, tensor.strides};
}

Layout slot0(const Tensor& ring) {
  return {const_cast<void*>(ring.data()), ring.dim - 1, ring.sizes + 1, ring.strides + 1};
}

const Tensor& contiguous_copy(const Tensor& tensor, Tensors* held) {
  held->push_back(Tensor::empty(tensor.sizes, tensor.dim, tensor.dtype, &tensor));
  held->back().copy_from(tensor);
  return held->back();
}

RowView::RowView(const std::vector<Layout>& layouts, bool split) : rows(1), columns(1) {
  const Layout& like = layouts[0];
  one_row = !split && std::all_of(layouts.begin(), layouts.end(), [](const Layout& each) { return each.contiguous(); });
  for (int64_t d = 0; d < like.dim; ++d) (d == 0 && !one_row ? rows : columns) *= like.sizes[d];
}

}  // namespace cuda
}  // namespace cachedit
