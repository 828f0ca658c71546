// The CUDA implementation of skinny_linear, whose schema is in sglang_lora_moe/ops/skinny_linear.py. Checks and unwrapping only.
#include "bindings.h"

#include "skinny_linear.h"

namespace {

constexpr const char* kName = "skinny_linear";

void linear(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> s, std::optional<Tensor> slots, std::optional<Tensor> order,
            std::optional<Tensor> ordered, std::optional<Tensor> pool, std::optional<Tensor> a_offset, std::optional<Tensor> b_offset, std::optional<Tensor> rank, std::optional<Tensor> scaling, std::optional<Tensor> starts,
            int64_t part_stride, int64_t width, int64_t max_rank, int64_t rows, int64_t splits, int64_t group, bool overlap) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2, kName, ": expected x and w of 2 dimensions, got ", x.dim(), " and ", w.dim());
  const int64_t m = x.size(0), k = x.size(1), n = w.size(0);
  STD_TORCH_CHECK(m <= 64 && k % 64 == 0 && n % 8 == 0 && w.size(1) == k, kName, ": expected at most 64 tokens and w [n, ", k, "] with n in eights and k in sixty-fours, got ", m,
                  " tokens and [", n, ", ", w.size(1), "]");
  STD_TORCH_CHECK(rows % 8 == 0 && rows >= 8 && rows <= 144, kName, ": expected rows of a block in eights up to 144, got ", rows);
  STD_TORCH_CHECK((splits == 1 || splits == 2 || splits == 4 || splits == 8) && splits * 128 <= k && group >= 2, kName, ": expected 1, 2, 4 or 8 splits of at least 128 columns, got ", splits,
                  " of ", k);

  SkinnyLinear a = {};
  a.x = checked<void>(kName, x, "x", type, device, m * k);
  a.w = checked<void>(kName, w, "w", type, device, n * k);
  a.bias = bias ? checked<void>(kName, *bias, "bias", type, device, n) : nullptr;
  a.out = checked<void>(kName, out, "out", type, device, m * n);
  if (s) {
    STD_TORCH_CHECK(slots && order && ordered && pool && a_offset && b_offset && rank && scaling && starts, kName, ": s comes with slots, tables and starts");
    a.parts = (int32_t)(starts->numel() - 1), a.width = (int32_t)width;
    STD_TORCH_CHECK(a.parts <= 4, kName, ": expected at most 4 parts, got ", a.parts);
    if (s->dim() == 4) {
      a.shares = (int32_t)s->size(0);
      STD_TORCH_CHECK(a.shares > 0 && a.width % 4 == 0, kName, ": expected a given s of some shares, with ranks in fours, got ", a.shares, " shares of ", a.width, " ranks");
      a.s = checked<float>(kName, *s, "s", ScalarType::Float, device, a.shares * m * a.parts * a.width);
    } else {
      const int64_t half = (s->numel() - 1) / 2;
      STD_TORCH_CHECK(s->numel() % 2 == 1 && half % 4 == 0 && half >= ((k + 1023) / 1024) * m * a.parts * a.width, kName,
                      ": expected s of two halves, in fours of at least ceil(k / 1024) * m * parts * width, and a count, got ", s->numel(), " elements");
      a.s = checked<float>(kName, *s, "s", ScalarType::Float, device, 2 * half + 1), a.half = (int32_t)half;
      a.launches = (uint32_t*)(a.s + 2 * half);
    }
    a.slots = checked<const int32_t>(kName, *slots, "slots", ScalarType::Int, device, m);
    a.order = checked<const int32_t>(kName, *order, "order", ScalarType::Int, device, m);
    a.ordered = checked<const int32_t>(kName, *ordered, "ordered", ScalarType::Int, device, m);
    a.pool = checked<void>(kName, *pool, "pool", type, device, 0);
    a.a_offset = static_cast<const int64_t*>(a_offset->const_data_ptr());  // views of the pool's tables: part p's lie p * part_stride entries behind
    a.b_offset = static_cast<const int64_t*>(b_offset->const_data_ptr());
    a.num_slots = (int32_t)rank->numel();
    a.rank = static_cast<const int32_t*>(rank->const_data_ptr());
    a.scaling = static_cast<const float*>(scaling->const_data_ptr());
    a.starts = checked<const int32_t>(kName, *starts, "starts", ScalarType::Int, device, a.parts + 1);
  }
  a.part_stride = (int32_t)part_stride, a.max_rank = (int32_t)max_rank;
  a.m = (int32_t)m, a.n = (int32_t)n, a.k = (int32_t)k, a.is_bf16 = type == ScalarType::BFloat16;
  a.rows = (int32_t)rows, a.splits = (int32_t)splits, a.overlap = overlap;
  a.group = (int32_t)group;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = skinny_linear(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("skinny_linear", TORCH_BOX(&linear)); }
