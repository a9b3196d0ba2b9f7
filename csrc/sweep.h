// The reducing sweep: every score of s = a bᵀ passes through a thread's cache once, tile by tile, and
// an epilogue folds each tile into statistics of O(N + M).
//
// An epilogue is a class with
//   void tile(Scalar* s, int64_t i0, int64_t n, int64_t j0, int64_t m)
// where s [n, m], rows kTileMost apart, holds the scores of rows i0.. and columns j0.. and is the
// epilogue's to overwrite; the kTileMost - m places behind each row belong to it too. Tiles come in any
// order and from several threads at once, so an epilogue's merge must give the same bits in any order
// (see Locks), which also makes results independent of the thread count.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#include "types.h"

// MKL's, where PyTorch brings it; a weak reference, null elsewhere.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace gssf {

// Tells the library that this thread's products are its own. Otherwise MKL, even inside a parallel region,
// sums in an order that depends on how many threads there are.
class ProductOnOneThread {
 public:
  ProductOnOneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~ProductOnOneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  ProductOnOneThread(const ProductOnOneThread&) = delete;
  ProductOnOneThread& operator=(const ProductOnOneThread&) = delete;

 private:
  int before_;
};

// One dimension cut into blocks of nearly equal size, multiples of 16 but for the last.
struct Blocks {
  int64_t total, size, count;
  Blocks(int64_t total, int64_t most) : total(total) {
    size = ceil_div(ceil_div(total, ceil_div(total, most)), 16) * 16;
    count = ceil_div(total, size);
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, total - block * size); }
};

// One mutex per block of rows (or columns), for merging tiles into shared statistics.
class Locks {
 public:
  explicit Locks(int64_t count) : mutexes_(new std::mutex[count]) {}
  std::unique_lock<std::mutex> operator()(int64_t block) { return std::unique_lock(mutexes_[block]); }

 private:
  std::unique_ptr<std::mutex[]> mutexes_;
};

// a [N, D] and b [M, D], both fp32 or both fp64; D >= 1, N, M >= 1.
template <class Scalar, class Epilogue>
void sweep(const at::Tensor& a, const at::Tensor& b, const Blocks& rows, const Blocks& cols, Epilogue& epilogue) {
  const int64_t tiles = rows.count * cols.count;
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), tiles);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // worker threads start with autograd on
    const ProductOnOneThread one_thread;
    const at::Tensor s = at::empty({rows.size, kTileMost}, a.options());
    for (int64_t t; (t = next.fetch_add(1)) < tiles;) {
      const int64_t i0 = rows.begin(t / cols.count), n = rows.length(t / cols.count);
      const int64_t j0 = cols.begin(t % cols.count), m = cols.length(t % cols.count);
      at::Tensor out = s.narrow(0, 0, n).narrow(1, 0, m);
      at::mm_out(out, a.narrow(0, i0, n), b.narrow(0, j0, m).t());
      epilogue.tile(s.mutable_data_ptr<Scalar>(), i0, n, j0, m);
    }
  });
}

}  // namespace gssf
