// The CUDA implementation of latent_values, whose schema is in sglang_lora_moe/ops/latent_attention.py. Checks and unwrapping only.
#include "bindings.h"

#include "latent_values.h"

namespace {

constexpr const char* kName = "latent_values";

bool is_power_of_two(int64_t value, int64_t least, int64_t most) { return value >= least && value <= most && (value & (value - 1)) == 0; }

void values(Tensor parts, Tensor lse, Tensor w, Tensor out, bool overlap) {
  const int32_t device = w.get_device_index();
  const ScalarType type = w.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected w of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(lse.dim() == 3 && w.dim() == 2 && out.dim() == 2, kName, ": expected lse [m, heads, splits], w and out of 2 dimensions, got ", describe(lse), ", ", describe(w), ", ",
                  describe(out));
  const int64_t m = lse.size(0), heads = lse.size(1), splits = lse.size(2), columns = w.size(1);
  STD_TORCH_CHECK(heads > 0 && w.size(0) % heads == 0 && out.size(1) % heads == 0 && out.size(1) <= w.size(0), kName, ": expected rows of w and columns of out for ", heads, " heads, got ",
                  w.size(0), " and ", out.size(1));
  const int64_t rows = out.size(1) / heads;
  STD_TORCH_CHECK(is_power_of_two(splits, 2, 32) && is_power_of_two(rows, 16, 256) && columns % 32 == 0 && columns > 0 && columns <= 512, kName,
                  ": expected 2 to 32 splits and 16 to 256 rows of a head, both powers of two, and columns in thirty-twos up to 512, got ", splits, ", ", rows, " and ", columns);
  LatentValues a = {};
  a.parts = checked<const float>(kName, parts, "parts", ScalarType::Float, device, m * heads * splits * columns);
  a.lse = checked<const float>(kName, lse, "lse", ScalarType::Float, device, 0);
  a.w = checked<const void>(kName, w, "w", type, device, 0);
  a.out = checked<void>(kName, out, "out", type, device, m * heads * rows);
  a.m = (int32_t)m, a.heads = (int32_t)heads, a.splits = (int32_t)splits, a.columns = (int32_t)columns;
  a.skipped = (int32_t)(w.size(0) / heads - rows), a.rows = (int32_t)rows, a.is_bf16 = type == ScalarType::BFloat16, a.overlap = overlap;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = latent_values(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("latent_values", TORCH_BOX(&values)); }
