// Tensors as the kernels take them: rows of adjacent elements.
#pragma once

#include "cuda/kernels.h"
#include "stable.h"

namespace cachedit {
namespace cuda {

// A tensor, or a slot of a ring. Borrows the shape.
struct Layout {
  void* data;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;

  bool contiguous() const { return contiguous_from(0); }
  // Each sample (index of dimension 0) contiguous, and worth a tile of its own.
  bool in_rows() const;

 private:
  bool contiguous_from(int64_t first) const;
};

Layout whole(const Tensor& tensor);
Layout slot0(const Tensor& ring);

// A contiguous copy, which `held` keeps until the call's launches have been made.
const Tensor& contiguous_copy(const Tensor& tensor, Tensors* held);

// Layouts of one shape as one row where all are contiguous, else as one row per sample (also where `split` asks for it).
struct RowView {
  int64_t rows;
  int64_t columns;
  bool one_row;

  RowView(const std::vector<Layout>& layouts, bool split);
  Rows operator()(const Layout& layout) const { return {layout.data, one_row || rows <= 1 ? 0 : layout.strides[0]}; }
};

}  // namespace cuda
}  // namespace cachedit
