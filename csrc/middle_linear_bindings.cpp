// The CUDA implementation of middle_linear, whose schema is in sglang_lora_moe/ops/middle_linear.py. Checks and unwrapping only.
#include "bindings.h"

#include "middle_linear.h"

namespace {

constexpr const char* kName = "middle_linear";

void linear(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor out, Tensor s, Tensor slots, Tensor pool, Tensor offset, Tensor rank, Tensor scaling,
            std::vector<int64_t> starts, int64_t part_stride, int64_t max_rank, int64_t tokens, int64_t rows, int64_t splits, bool overlap) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && s.dim() == 4 && s.size(0) == 1, kName, ": expected x and w of 2 dimensions and s [1, m, parts, width], got ", x.dim(), ", ", w.dim(), " and ", s.dim());
  const int64_t m = x.size(0), k = x.size(1), n = w.size(0), parts = (int64_t)starts.size() - 1;
  STD_TORCH_CHECK(k % 64 == 0 && w.size(1) == k, kName, ": expected w [n, ", k, "] with k in sixty-fours, got [", n, ", ", w.size(1), "]");
  STD_TORCH_CHECK(tokens % 8 == 0 && tokens >= 8 && tokens <= 128 && rows % 16 == 0 && rows >= 32 && rows <= 128, kName,
                  ": expected tokens of a block in eights up to 128 and rows in sixteens from 32 to 128, got ", tokens, " and ", rows);
  STD_TORCH_CHECK((splits == 1 || splits == 2 || splits == 4 || splits == 8) && splits * 64 <= k, kName, ": expected 1, 2, 4 or 8 splits of at least 64 columns, got ", splits, " of ", k);
  STD_TORCH_CHECK(parts >= 1 && parts <= 4 && starts[0] == 0 && starts[parts] == n && s.size(2) == parts, kName, ": expected s of at most 4 parts that are the rows of w, got ", s.size(2),
                  " and ", parts);
  STD_TORCH_CHECK(max_rank <= 64 && max_rank <= s.size(3) && s.size(3) % 4 == 0, kName, ": expected ranks up to 64 and a width of s in fours, got ", max_rank, " and ", s.size(3));

  MiddleLinear a = {};
  for (int64_t p = 0; p <= parts; p++) {
    STD_TORCH_CHECK(starts[p] % 8 == 0 && (p == 0 || starts[p] > starts[p - 1]), kName, ": expected parts of rows in eights, got a part that starts at ", starts[p]);
    a.starts[p] = (int32_t)starts[p];
  }
  a.x = checked<void>(kName, x, "x", type, device, m * k);
  a.w = checked<void>(kName, w, "w", type, device, n * k);
  a.bias = bias ? checked<void>(kName, *bias, "bias", type, device, n) : nullptr;
  a.out = checked<void>(kName, out, "out", type, device, m * n);
  a.parts = (int32_t)parts, a.width = (int32_t)s.size(3);
  a.s = checked<float>(kName, s, "s", ScalarType::Float, device, m * parts * a.width);
  a.slots = checked<const int32_t>(kName, slots, "slots", ScalarType::Int, device, m);
  a.pool = checked<void>(kName, pool, "pool", type, device, 0);
  a.offset = static_cast<const int64_t*>(offset.const_data_ptr());  // views of the pool's tables: part p's lie p * part_stride entries behind
  a.num_slots = (int32_t)rank.numel();
  a.rank = static_cast<const int32_t*>(rank.const_data_ptr());
  a.scaling = static_cast<const float*>(scaling.const_data_ptr());
  a.part_stride = (int32_t)part_stride, a.max_rank = (int32_t)max_rank;
  a.m = (int32_t)m, a.n = (int32_t)n, a.k = (int32_t)k, a.is_bf16 = type == ScalarType::BFloat16;
  a.tokens = (int32_t)tokens, a.rows = (int32_t)rows, a.splits = (int32_t)splits, a.overlap = overlap;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = middle_linear(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("middle_linear", TORCH_BOX(&linear)); }
