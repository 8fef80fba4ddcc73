// The operators as PyTorch sees them: schemas, checks, allocation.
//
// Rows (RPE on keys): lookups (B, H, Q, N) belong to the queries, ids is (Q, K). Columns (RPE on
// queries): lookups (B, H, K, N) belong to the keys, ids is (K, Q). Pairs are (B, H, Q, K).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>
#ifdef IRPE_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/rpe.h"
#endif

#include <limits>
#include <vector>

#include "cpu/rpe.h"

namespace irpe {
namespace {

using at::Tensor;
using at::TensorList;

void check_numbers(const char* name, const Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(x.dim() == 4 && (type == at::kDouble || type == at::kFloat ||
                                     type == at::kHalf || type == at::kBFloat16),
                    name, ": expected 4 dimensions of float64, float32, float16 or bfloat16, got ",
                    type, " ", x.sizes());
}

void check_ids(const Tensor& ids, const Tensor& x) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.scalar_type() == at::kInt && ids.device() == x.device(),
                    "ids: expected int32 of 2 dimensions on ", x.device(), ", got ",
                    ids.scalar_type(), " ", ids.sizes(), " on ", ids.device());
}

void check_lookup(const Tensor& lookup, const Tensor& ids) {
  check_numbers("lookup", lookup);
  check_ids(ids, lookup);
  TORCH_CHECK_VALUE(lookup.size(2) == ids.size(0), "lookup: expected ", ids.size(0),
                    " tokens as in ids, got ", lookup.size(2));
}

void check_pairs(const char* name, const Tensor& x, const Tensor& ids, bool columns) {
  check_numbers(name, x);
  check_ids(ids, x);
  const int64_t Q = ids.size(columns ? 1 : 0), K = ids.size(columns ? 0 : 1);
  TORCH_CHECK_VALUE(x.size(2) == Q && x.size(3) == K, name, ": expected (B, H, ", Q, ", ", K,
                    ") as ids say, got ", x.sizes());
}

Tensor pairs_of(const Tensor& lookup, const Tensor& ids, bool columns) {
  const int64_t Q = ids.size(columns ? 1 : 0), K = ids.size(columns ? 0 : 1);
  return at::empty({lookup.size(0), lookup.size(1), Q, K}, lookup.options());
}

// Numbers of one token next to each other.
Tensor dense_tokens(const Tensor& lookup) {
  return lookup.stride(3) == 1 || lookup.size(3) == 1 ? lookup : lookup.contiguous();
}

// ---- CPU: half precision is computed in float32 ----

Tensor computable(const Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kHalf || type == at::kBFloat16 ? x.to(at::kFloat) : x;
}

// The offset of every pair into the lookups of one (b, h), (Q, K); every id was checked.
Tensor offsets(const Tensor& ids, bool columns, int64_t num_buckets) {
  const Tensor dense = ids.contiguous();
  const auto* id = reinterpret_cast<const uint32_t*>(dense.data_ptr<int32_t>());
  const int64_t count = dense.numel();
  uint32_t largest = 0;  // a negative id is larger than any
  for (int64_t n = 0; n < count; ++n) largest = id[n] > largest ? id[n] : largest;
  TORCH_CHECK_INDEX(count == 0 || largest < num_buckets, "ids: expected ids in [0, ",
                    num_buckets, "), got ", static_cast<int32_t>(largest));
  if (!columns) return dense;
  TORCH_CHECK_VALUE(ids.size(0) * num_buckets <= std::numeric_limits<int32_t>::max(),
                    "ids: expected tokens * buckets below 2^31, got ", ids.size(0), " * ",
                    num_buckets);
  const Tensor first = at::arange(ids.size(0), ids.options()) * num_buckets;
  return (ids.t() + first).contiguous();
}

// For columns the lookups of one (b, h) lie in one block.
Tensor dense_for(bool columns, const Tensor& lookup) {
  return columns && lookup.stride(2) != lookup.size(3) ? lookup.contiguous()
                                                       : dense_tokens(lookup);
}

cpu::Sizes sizes_of(const Tensor& pairs) {
  return {pairs.size(0), pairs.size(1), pairs.size(2), pairs.size(3), at::get_num_threads()};
}

template <typename T>
cpu::Term<T> term_of(const Tensor& lookup, const Tensor& index, bool columns) {
  return {static_cast<T*>(lookup.data_ptr()), index.data_ptr<int32_t>(), lookup.stride(0),
          lookup.stride(1), columns ? 0 : lookup.stride(2)};
}

Tensor gather_cpu(const Tensor& lookup, const Tensor& ids, bool columns) {
  check_lookup(lookup, ids);
  const Tensor from = dense_for(columns, computable(lookup));
  const Tensor index = offsets(ids, columns, lookup.size(3));
  const Tensor out = pairs_of(from, ids, columns);
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "irpe_ds::gather", [&] {
    cpu::gather<scalar_t>(sizes_of(out), term_of<const scalar_t>(from, index, columns),
                          out.data_ptr<scalar_t>());
  });
  return out.to(lookup.scalar_type());
}

Tensor bucket_sum_cpu(const Tensor& x, const Tensor& ids, int64_t num_buckets, bool columns) {
  check_pairs("x", x, ids, columns);
  const Tensor from = computable(x).contiguous(), index = offsets(ids, columns, num_buckets);
  const Tensor sums = at::zeros({x.size(0), x.size(1), ids.size(0), num_buckets}, from.options());
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "irpe_ds::bucket_sum", [&] {
    cpu::bucket_sum<scalar_t>(sizes_of(from), from.data_ptr<scalar_t>(),
                              term_of<scalar_t>(sums, index, columns));
  });
  return sums.to(x.scalar_type());
}

// scores become the probabilities; the first num_rows lookups are gathered along rows.
void softmax_cpu(Tensor& scores, TensorList lookups, TensorList ids, int64_t num_rows) {
  check_numbers("scores", scores);
  TORCH_CHECK_VALUE(lookups.size() == ids.size(), "ids: expected ", lookups.size(),
                    " tensors, one per lookup, got ", ids.size());
  const Tensor probs = computable(scores).contiguous();
  std::vector<Tensor> dense, index;
  for (size_t t = 0; t < lookups.size(); ++t) {
    const bool columns = static_cast<int64_t>(t) >= num_rows;
    check_lookup(lookups[t], ids[t]);
    check_pairs("scores", scores, ids[t], columns);
    TORCH_CHECK_VALUE(lookups[t].scalar_type() == scores.scalar_type() &&
                          lookups[t].size(0) == scores.size(0) &&
                          lookups[t].size(1) == scores.size(1),
                      "lookups: expected ", scores.scalar_type(), " (", scores.size(0), ", ",
                      scores.size(1), ", ...) as scores, got ", lookups[t].scalar_type(), " ",
                      lookups[t].sizes());
    dense.push_back(dense_for(columns, computable(lookups[t])));
    index.push_back(offsets(ids[t], columns, lookups[t].size(3)));
  }
  AT_DISPATCH_FLOATING_TYPES(probs.scalar_type(), "irpe_ds::softmax_", [&] {
    std::vector<cpu::Term<const scalar_t>> terms;
    for (size_t t = 0; t < lookups.size(); ++t) {
      const bool columns = static_cast<int64_t>(t) >= num_rows;
      terms.push_back(term_of<const scalar_t>(dense[t], index[t], columns));
    }
    cpu::softmax<scalar_t>(sizes_of(probs), probs.data_ptr<scalar_t>(), terms.data(),
                           terms.size());
  });
  if (!probs.is_same(scores)) scores.copy_(probs);
}

// The gradients of the scores, then of every lookup.
std::vector<Tensor> softmax_backward_cpu(const Tensor& grad, const Tensor& probs, TensorList ids,
                                         at::IntArrayRef num_buckets, int64_t num_rows) {
  check_numbers("probs", probs);
  TORCH_CHECK_VALUE(grad.sizes() == probs.sizes() && grad.scalar_type() == probs.scalar_type(),
                    "grad: expected ", probs.scalar_type(), " ", probs.sizes(), ", got ",
                    grad.scalar_type(), " ", grad.sizes());
  TORCH_CHECK_VALUE(num_buckets.size() == ids.size(), "ids: expected ", num_buckets.size(),
                    " tensors, one per num_buckets, got ", ids.size());
  const Tensor g = computable(grad).contiguous(), p = computable(probs).contiguous();
  std::vector<Tensor> grads{at::empty_like(p)}, index;
  for (size_t t = 0; t < ids.size(); ++t) {
    const bool columns = static_cast<int64_t>(t) >= num_rows;
    check_pairs("probs", probs, ids[t], columns);
    index.push_back(offsets(ids[t], columns, num_buckets[t]));
    grads.push_back(
        at::zeros({p.size(0), p.size(1), ids[t].size(0), num_buckets[t]}, p.options()));
  }
  AT_DISPATCH_FLOATING_TYPES(p.scalar_type(), "irpe_ds::softmax_backward", [&] {
    std::vector<cpu::Term<scalar_t>> sums;
    for (size_t t = 0; t < ids.size(); ++t) {
      const bool columns = static_cast<int64_t>(t) >= num_rows;
      sums.push_back(term_of<scalar_t>(grads[t + 1], index[t], columns));
    }
    cpu::softmax_backward<scalar_t>(sizes_of(p), g.data_ptr<scalar_t>(), p.data_ptr<scalar_t>(),
                                    sums.data(), sums.size(), grads[0].data_ptr<scalar_t>());
  });
  for (Tensor& result : grads) result = result.to(probs.scalar_type());
  return grads;
}

// ---- CUDA ----

#ifdef IRPE_WITH_CUDA
cuda::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return cuda::Type::kFloat64;
    case at::kFloat:
      return cuda::Type::kFloat32;
    case at::kHalf:
      return cuda::Type::kFloat16;
    default:
      return cuda::Type::kBFloat16;
  }
}

// Runs gather or bucket_sum, which check the ids and take them transposed or not.
template <typename Run>
void run_cuda(Run run, const Tensor& lookups, const Tensor& pairs, const Tensor& ids, bool columns,
              bool transpose) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  TORCH_CHECK_VALUE(ids.size(0) < kMost && ids.size(1) < kMost && lookups.size(3) < kMost,
                    "ids: expected fewer than 2^30 tokens and buckets, got ", ids.sizes(), " and ",
                    lookups.size(3));
  TORCH_CHECK_INDEX(lookups.size(3) > 0 || ids.numel() == 0, "ids: expected none of 0 buckets, got ",
                    ids.sizes());
  const c10::cuda::CUDAGuard guard(pairs.device());
  const Tensor dense = (transpose ? ids.t() : ids).contiguous();
  const cuda::Problem problem{type_of(pairs), columns, pairs.size(0), pairs.size(1),
                              static_cast<int32_t>(ids.size(0)), static_cast<int32_t>(ids.size(1)),
                              static_cast<int32_t>(lookups.size(3)), dense.data_ptr<int32_t>(),
                              lookups.data_ptr(),
                              lookups.stride(0), lookups.stride(1), lookups.stride(2),
                              pairs.data_ptr()};
  C10_CUDA_CHECK(
      static_cast<cudaError_t>(run(problem, c10::cuda::getCurrentCUDAStream().stream())));
}

Tensor gather_cuda(const Tensor& lookup, const Tensor& ids, bool columns) {
  check_lookup(lookup, ids);
  const Tensor out = pairs_of(lookup, ids, columns);
  run_cuda(cuda::gather, dense_tokens(lookup), out, ids, columns, columns);
  return out;
}

Tensor bucket_sum_cuda(const Tensor& x, const Tensor& ids, int64_t num_buckets, bool columns) {
  check_pairs("x", x, ids, columns);
  const Tensor sums = at::empty({x.size(0), x.size(1), ids.size(0), num_buckets}, x.options());
  run_cuda(cuda::bucket_sum, sums, x.contiguous(), ids, columns, true);
  return sums;
}
#endif

}  // namespace
}  // namespace irpe

TORCH_LIBRARY(irpe_ds, library) {
  library.def("gather(Tensor lookup, Tensor ids, bool columns=False) -> Tensor");
  library.def("bucket_sum(Tensor x, Tensor ids, int num_buckets, bool columns=False) -> Tensor");
  library.def("softmax_(Tensor(a!) scores, Tensor[] lookups, Tensor[] ids, int num_rows) -> ()");
  library.def(
      "softmax_backward(Tensor grad, Tensor probs, Tensor[] ids, int[] num_buckets, int num_rows)"
      " -> Tensor[]");
}

TORCH_LIBRARY_IMPL(irpe_ds, CPU, library) {
  library.impl("gather", irpe::gather_cpu);
  library.impl("bucket_sum", irpe::bucket_sum_cpu);
  library.impl("softmax_", irpe::softmax_cpu);
  library.impl("softmax_backward", irpe::softmax_backward_cpu);
}

#ifdef IRPE_WITH_CUDA
TORCH_LIBRARY_IMPL(irpe_ds, CUDA, library) {
  library.impl("gather", irpe::gather_cuda);
  library.impl("bucket_sum", irpe::bucket_sum_cuda);
}
#endif

// A Python module too, empty, so that importing it loads the library.
#define IRPE_INIT_(name) PyInit_##name
#define IRPE_INIT(name) IRPE_INIT_(name)
#define IRPE_TEXT_(name) #name
#define IRPE_TEXT(name) IRPE_TEXT_(name)
PyMODINIT_FUNC IRPE_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, IRPE_TEXT(TORCH_EXTENSION_NAME)};
  return PyModule_Create(&module);
}
