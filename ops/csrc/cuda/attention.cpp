// Fused attention as PyTorch sees it: checks, allocation, and the tensors as the kernels take them.
//
// With IRPE_ON_HOST the kernels are those of the host harness, and the operators take CPU tensors.

#include "attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>
#ifndef IRPE_ON_HOST
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace irpe {
namespace {

using at::Tensor;
using at::TensorList;

// Relative position as the operators take it: term i is tables[i], read through tiles[i], on
// queries (targets[i] = 0), keys (1) or values (2).
struct Terms {
  TensorList tables, tiles;
  at::IntArrayRef targets;
};

// Rows of D numbers next to each other, each at a multiple of 16 bytes.
Tensor with_rows(const Tensor& x) {
  bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && x.stride(d) % 8 == 0;
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

// (B, H, L, D) in memory as (B, L, H, D), so that the heads of a token lie next to each other.
Tensor empty_like_tokens(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

cuda::Rows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

cuda::Term term_of(const Tensor& table, const Tensor& tiles, bool on_values) {
  const bool is_bias = table.dim() == 2;
  cuda::Term term = {};
  term.table = table.data_ptr();
  term.stride_h = table.size(0) == 1 ? 0 : table.stride(0);
  term.stride_n = table.stride(on_values || is_bias ? 1 : 2);
  term.stride_d = is_bias ? 0 : table.stride(on_values ? 2 : 1);
  term.N = static_cast<int32_t>(table.size(on_values || is_bias ? 1 : 2));
  term.is_bias = is_bias;
  term.ids = tiles[0].data_ptr<uint8_t>();
  term.ids_turned = tiles[1].data_ptr<uint8_t>();
  return term;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Terms& terms,
           const std::optional<Tensor>& hidden, const std::optional<Tensor>& seed,
           double dropout_p) {
  const auto type = q.scalar_type();
  TORCH_CHECK_VALUE(q.dim() == 4 && (type == at::kHalf || type == at::kBFloat16) &&
                        (q.size(3) == 32 || q.size(3) == 64),
                    "q: expected (B, H, L, 32 or 64) of float16 or bfloat16, got ", type, " ",
                    q.sizes());
  for (const Tensor& x : {k, v}) {
    TORCH_CHECK_VALUE(x.sizes() == q.sizes() && x.scalar_type() == type && x.device() == q.device(),
                      "k, v: expected ", type, " ", q.sizes(), " on ", q.device(), " as q, got ",
                      x.scalar_type(), " ", x.sizes(), " on ", x.device());
  }
  const int64_t H = q.size(1), L = q.size(2), D = q.size(3);
  TORCH_CHECK_VALUE(
      terms.tables.size() == terms.tiles.size() && terms.tables.size() == terms.targets.size(),
      "tables, tiles, targets: expected one of each for every term, got ", terms.tables.size(),
      ", ", terms.tiles.size(), ", ", terms.targets.size());
  std::array<int, 3> count = {};
  for (size_t t = 0; t < terms.tables.size(); ++t) {
    const Tensor &table = terms.tables[t], &tiles = terms.tiles[t];
    const int64_t target = terms.targets[t];
    TORCH_CHECK_VALUE(target >= 0 && target < 3 && ++count[target] <= cuda::kMostTerms,
                      "targets: expected 0, 1 or 2, each at most ", cuda::kMostTerms,
                      " times, got ", terms.targets);
    const bool shaped =
        table.dim() == 3 ? table.size(target == 2 ? 2 : 1) == D : table.dim() == 2 && target != 2;
    TORCH_CHECK_VALUE(shaped && (table.size(0) == 1 || table.size(0) == H) && table.numel() > 0 &&
                          table.scalar_type() == type && table.device() == q.device(),
                      "tables: expected ", type, " (1 or ", H,
                      ", D, N), or (1 or H, N, D) on values, or a bias (1 or H, N), on ",
                      q.device(), ", got ", table.scalar_type(), " ", table.sizes());
    const int64_t shape[] = {2, (L + 15) / 16, (L + 31) / 32, 32, 16};
    TORCH_CHECK_VALUE(tiles.sizes() == at::IntArrayRef(shape) && tiles.is_contiguous() &&
                          reinterpret_cast<uintptr_t>(tiles.data_ptr()) % 16 == 0 &&
                          tiles.scalar_type() == at::kByte && tiles.device() == q.device(),
                      "tiles: expected contiguous and aligned uint8 ", at::IntArrayRef(shape),
                      " on ", q.device(), ", got ", tiles.scalar_type(), " ", tiles.sizes());
  }
  if (hidden) {
    const int64_t shape[] = {q.size(0), L};
    TORCH_CHECK_VALUE(hidden->sizes() == at::IntArrayRef(shape) && hidden->is_contiguous() &&
                          hidden->scalar_type() == at::kBool && hidden->device() == q.device(),
                      "hidden: expected contiguous bool ", at::IntArrayRef(shape), ", got ",
                      hidden->scalar_type(), " ", hidden->sizes());
  }
  TORCH_CHECK_VALUE(dropout_p >= 0 && static_cast<float>(dropout_p) < 1,
                    "dropout_p: expected [0, 1), got ", dropout_p);
  TORCH_CHECK_VALUE(
      dropout_p == 0 || (seed && seed->numel() == 1 && seed->scalar_type() == at::kLong &&
                         seed->device() == q.device()),
      "seed: expected one int64 on ", q.device(), " for dropout");
}

cuda::Attention problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Terms& terms,
                           const std::optional<Tensor>& hidden, const std::optional<Tensor>& seed,
                           double scale, double dropout_p) {
  cuda::Attention p = {};
  p.type = q.scalar_type() == at::kHalf ? cuda::Type::kFloat16 : cuda::Type::kBFloat16;
  p.B = static_cast<int32_t>(q.size(0));
  p.H = static_cast<int32_t>(q.size(1));
  p.L = static_cast<int32_t>(q.size(2));
  p.D = static_cast<int32_t>(q.size(3));
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v);
  for (size_t t = 0; t < terms.tables.size(); ++t) {
    cuda::Target& target =
        terms.targets[t] == 0 ? p.on_q : (terms.targets[t] == 1 ? p.on_k : p.on_v);
    target.terms[target.num_terms++] =
        term_of(terms.tables[t], terms.tiles[t], terms.targets[t] == 2);
  }
  if (hidden) p.hidden = reinterpret_cast<const uint8_t*>(hidden->data_ptr<bool>());
  if (dropout_p > 0) p.seed = seed->data_ptr<int64_t>();
  p.scale = static_cast<float>(scale);
  p.dropout_p = static_cast<float>(dropout_p);
  return p;
}

void run(int (*pass)(const cuda::Attention&, void*), const cuda::Attention& p) {
  TORCH_CHECK(cuda::fits(p), "expected tables whose lookups fit into shared memory, got ",
              cuda::padded_buckets(p.on_q), ", ", cuda::padded_buckets(p.on_k), " and ",
              cuda::padded_buckets(p.on_v), " buckets on queries, keys and values");
#ifdef IRPE_ON_HOST
  TORCH_CHECK(pass(p, nullptr) == 0, "the kernel failed on the host");
#else
  const int error = pass(p, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
#endif
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             TensorList tables, TensorList tiles,
                                             at::IntArrayRef targets,
                                             const std::optional<Tensor>& hidden,
                                             const std::optional<Tensor>& seed, double scale,
                                             double dropout_p, int64_t) {
  const Terms terms = {tables, tiles, targets};
  check(q, k, v, terms, hidden, seed, dropout_p);
#ifndef IRPE_ON_HOST
  const c10::cuda::CUDAGuard guard(q.device());
#endif
  const Tensor rows[] = {with_rows(q), with_rows(k), with_rows(v)};
  const Tensor out = empty_like_tokens(q);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  cuda::Attention p = problem_of(rows[0], rows[1], rows[2], terms, hidden, seed, scale, dropout_p);
  p.out = rows_of(out);
  p.lse = lse.data_ptr<float>();
  run(cuda::forward, p);
  return {out, lse};
}

// Partial sums of the tables on one target, (H, slots, padded, D) and (H, slots, padded).
struct Partials {
  Tensor table, bias;

  Partials(cuda::Target& target, const Tensor& q, int slots) {
    bool tables = false, biases = false;
    for (int t = 0; t < target.num_terms; ++t) {
      (target.terms[t].is_bias ? biases : tables) = true;
    }
    const int64_t padded = cuda::padded_buckets(target);
    const auto options = q.options().dtype(at::kFloat);
    if (tables) {
      table = at::empty({q.size(1), slots, padded, q.size(3)}, options);
      target.grad_table = table.data_ptr<float>();
    }
    if (biases) {
      bias = at::empty({q.size(1), slots, padded}, options);
      target.grad_bias = bias.data_ptr<float>();
    }
  }

  // The gradient of a term of this target whose buckets begin at `first`, shaped like its table.
  Tensor grad(const Tensor& like, bool on_values, int64_t first) const {
    const bool is_bias = like.dim() == 2;
    const int64_t N = like.size(on_values || is_bias ? 1 : 2);
    const Tensor part = (is_bias ? bias : table).narrow(2, first, N);
    const Tensor sum = like.size(0) == 1 ? part.sum(at::IntArrayRef{0, 1}).unsqueeze(0)
                                         : part.sum(at::IntArrayRef{1});
    return at::empty_like(like).copy_(is_bias || on_values ? sum : sum.mT());
  }
};

std::vector<Tensor> attention_backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse,
                                       const Tensor& q, const Tensor& k, const Tensor& v,
                                       TensorList tables, TensorList tiles, at::IntArrayRef targets,
                                       const std::optional<Tensor>& hidden,
                                       const std::optional<Tensor>& seed, double scale,
                                       double dropout_p, int64_t skip) {
  const Terms terms = {tables, tiles, targets};
  check(q, k, v, terms, hidden, seed, dropout_p);
  for (const Tensor& x : {grad_out, out}) {
    TORCH_CHECK_VALUE(x.sizes() == q.sizes() && x.scalar_type() == q.scalar_type(),
                      "grad_out, out: expected ", q.scalar_type(), " ", q.sizes(), ", got ",
                      x.scalar_type(), " ", x.sizes());
  }
#ifndef IRPE_ON_HOST
  const c10::cuda::CUDAGuard guard(q.device());
#endif
  const Tensor rows[] = {with_rows(q), with_rows(k), with_rows(v), with_rows(grad_out),
                         with_rows(out)};
  const Tensor log_sums = lse.contiguous(), delta = at::empty_like(log_sums);
  std::vector<Tensor> grads = {empty_like_tokens(q), empty_like_tokens(k), empty_like_tokens(v)};
  cuda::Attention p = problem_of(rows[0], rows[1], rows[2], terms, hidden, seed, scale, dropout_p);
  p.grad_out = rows_of(rows[3]), p.out = rows_of(rows[4]);
  p.grad_q = rows_of(grads[0]), p.grad_k = rows_of(grads[1]), p.grad_v = rows_of(grads[2]);
  p.lse = log_sums.data_ptr<float>();
  p.delta = delta.data_ptr<float>();
  p.skip = static_cast<int32_t>(skip);
  if (q.numel() == 0) {
    for (const Tensor& table : tables) grads.push_back(at::zeros_like(table));
    return grads;
  }
  const cuda::Slots slots = cuda::slots(p);
  const Partials partials[] = {
      {p.on_q, q, slots.on_q}, {p.on_k, q, slots.on_kv}, {p.on_v, q, slots.on_kv}};
  run(cuda::backward, p);
  std::array<int64_t, 3> first = {};
  for (size_t t = 0; t < tables.size(); ++t) {
    const int64_t target = targets[t];
    const bool on_values = target == 2;
    grads.push_back(partials[target].grad(tables[t], on_values, first[target]));
    first[target] += term_of(tables[t], tiles[t], on_values).N;
  }
  return grads;
}

}  // namespace
}  // namespace irpe

#ifdef IRPE_ON_HOST
TORCH_LIBRARY_IMPL(irpe_ds, CPU, library) {
#else
TORCH_LIBRARY_IMPL(irpe_ds, CUDA, library) {
#endif
  library.impl("attention_forward", irpe::attention_forward);
  library.impl("attention_backward", irpe::attention_backward);
}
