// The CUDA implementation of moe_wgmma_gemm, whose schema is in sglang_lora_moe/ops/moe_wgmma_gemm.py. Checks and unwrapping only.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "errors.h"
#include "moe_wgmma_gemm.h"

// Only torch with CUDA has this symbol: weak, so that the library loads on CPU torch too (in tests).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "moe_wgmma_gemm";

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

// Contiguous, of `type`, on `device`, with at least `elements`; its data.
template <class T>
T* checked(const Tensor& tensor, const char* name, ScalarType type, int32_t device, int64_t elements) {
  const bool fits = tensor.is_cuda() && tensor.get_device_index() == device && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() >= elements;
  STD_TORCH_CHECK(fits, kName, ": expected ", name, " to be contiguous ", torch::headeronly::toString(type), " of at least ", elements, " elements on cuda:", device, ", got ",
                  torch::headeronly::toString(tensor.scalar_type()), tensor.is_contiguous() ? " of " : ", not contiguous, of ", tensor.numel(),
                  tensor.is_cuda() ? " on cuda:" : " on another device type, ", tensor.get_device_index());
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void gemm(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor tiles, Tensor counts, Tensor sorted_pairs, std::optional<Tensor> s, std::optional<Tensor> pool,
          std::optional<Tensor> records, std::optional<Tensor> ranges, Tensor out, int64_t top_k, int64_t halves, int64_t max_rank, double alpha, double cubic, double limit,
          double shift, bool gather, bool scatter, int64_t group, int64_t blocks, int64_t cluster, bool overlap) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 3 && out.dim() == 2, kName, ": expected x, w and out of 2, 3 and 2 dimensions, got ", x.dim(), ", ", w.dim(), " and ", out.dim());
  const int64_t k = x.size(1), n = out.size(1), pairs = sorted_pairs.numel();
  STD_TORCH_CHECK(halves == 1 || halves == 2, kName, ": expected halves 1 or 2, got ", halves);
  STD_TORCH_CHECK(k % 8 == 0 && n % 8 == 0 && w.size(1) == halves * n && w.size(2) == k, kName, ": expected w [E, ", halves * n, ", ", k, "] with widths that divide by 8, got [",
                  w.size(0), ", ", w.size(1), ", ", w.size(2), "]");
  STD_TORCH_CHECK(top_k >= 1 && group >= 1 && blocks >= 1, kName, ": expected top_k, group and blocks of at least 1, got ", top_k, ", ", group, ", ", blocks);
  STD_TORCH_CHECK((cluster == 1 || cluster == 2) && blocks % cluster == 0, kName, ": expected clusters of 1 or 2 that divide the grid, got ", cluster, " and ", blocks);
  STD_TORCH_CHECK(x.size(0) * (k / 8) < (int64_t)1 << 32, kName, ": x of ", x.size(0), " x ", k, " is too large");
  const int64_t tile_count = tiles.numel() / 3;

  MoeWgmmaGemm a = {};
  a.x = checked<void>(x, "x", type, device, gather ? pairs / top_k * k : pairs * k);
  a.w = checked<void>(w, "w", type, device, 0);
  a.bias = bias ? checked<void>(*bias, "bias", type, device, w.size(0) * halves * n) : nullptr;
  a.out = checked<void>(out, "out", type, device, pairs * n);
  a.tiles = checked<const int32_t>(tiles, "tiles", ScalarType::Int, device, 0);
  a.counts = checked<const int32_t>(counts, "counts", ScalarType::Int, device, 2);
  a.sorted_pairs = checked<const int32_t>(sorted_pairs, "sorted_pairs", ScalarType::Int, device, pairs);
  if (s) {
    STD_TORCH_CHECK(pool && records && ranges, kName, ": s comes with pool, records and ranges");
    a.s_width = (int32_t)s->size(s->dim() - 1);
    a.s = checked<void>(*s, "s", type, device, pairs * a.s_width);
    a.pool = checked<void>(*pool, "pool", type, device, 0);
    a.records = checked<const int64_t>(*records, "records", ScalarType::Long, device, 0);
    a.ranges = checked<const int32_t>(*ranges, "ranges", ScalarType::Int, device, 2 * tile_count);
  }
  a.max_rank = (int32_t)max_rank;
  a.experts = (int32_t)w.size(0), a.n = (int32_t)n, a.k = (int32_t)k, a.pairs = (int32_t)pairs, a.top_k = (int32_t)top_k;
  a.halves = (int32_t)halves, a.is_bf16 = type == ScalarType::BFloat16;
  a.alpha = (float)alpha, a.cubic = (float)cubic, a.limit = (float)limit, a.shift = (float)shift;
  a.gather = gather, a.scatter = scatter, a.group = (int32_t)group, a.blocks = (int32_t)blocks, a.cluster = (int32_t)cluster, a.overlap = overlap;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = moe_wgmma_gemm(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("moe_wgmma_gemm", TORCH_BOX(&gemm)); }
