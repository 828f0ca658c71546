// The CUDA implementations of rotate_rows and norm_rows, whose schemas are in sglang_lora_moe/ops/norm_rope.py. Checks and unwrapping only.
#include "bindings.h"

#include "norm_rope.h"

namespace {

AddedRows added_rows(const char* name, ScalarType type, int32_t device, int64_t m, const Tensor& s, const std::optional<Tensor>& row_scale, const Tensor& order, const Tensor& slots,
                     const Tensor& pool, const Tensor& offset, const Tensor& rank, const Tensor& scaling, int64_t part_stride) {
  AddedRows a = {};
  STD_TORCH_CHECK(s.dim() == 4, name, ": expected s [splits, m, parts, width], got ", describe(s));
  a.splits = (int32_t)s.size(0), a.parts = (int32_t)s.size(2), a.width = (int32_t)s.size(3), a.part_stride = (int32_t)part_stride;
  a.s = checked<const float>(name, s, "s", ScalarType::Float, device, a.splits * m * a.parts * a.width);
  a.row_scale = row_scale ? checked<const float>(name, *row_scale, "row_scale", ScalarType::Float, device, m) : nullptr;
  a.order = checked<const int32_t>(name, order, "order", ScalarType::Int, device, m);
  a.slots = checked<const int32_t>(name, slots, "slots", ScalarType::Int, device, m);
  a.pool = checked<void>(name, pool, "pool", type, device, 0);
  a.offset = static_cast<const int64_t*>(offset.const_data_ptr());  // views of the pool's tables: part p's lie p * part_stride entries behind
  a.rank = static_cast<const int32_t*>(rank.const_data_ptr());
  a.scaling = static_cast<const float*>(scaling.const_data_ptr());
  a.num_slots = (int32_t)rank.numel();
  return a;
}

void check_type(const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected bfloat16 or float16, got ", torch::headeronly::toString(type));
}

void rotate(Tensor qkv, Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_slots, Tensor positions, Tensor cos, Tensor sin, std::optional<Tensor> q_weight,
            std::optional<Tensor> k_weight, Tensor s, std::optional<Tensor> row_scale, Tensor order, Tensor slots, Tensor pool, Tensor offset, Tensor rank, Tensor scaling,
            int64_t part_stride, double eps, bool overlap, int64_t multiprocessors) {
  constexpr const char* kName = "rotate_rows";
  const int32_t device = qkv.get_device_index();
  const ScalarType type = qkv.scalar_type();
  check_type(kName, type);
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == 128 && k_cache.dim() == 3 && k_cache.size(2) == 128 && cos.dim() == 2 && cos.size(1) >= 64 && cos.size(1) % 4 == 0, kName,
                  ": expected heads of 128 columns and tables of at least 64, a multiple of 4, got ", describe(q), ", ", describe(k_cache), ", ", describe(cos));
  const int64_t m = q.size(0), heads = q.size(1), kv_heads = k_cache.size(1);
  STD_TORCH_CHECK(k_cache.size(0) < (1ll << 31) && cos.numel() < (1ll << 31), kName, ": rows of the cache and elements of the tables are counted in 32 bits");
  STD_TORCH_CHECK((q_weight && k_weight) || (!q_weight && !k_weight), kName, ": q and k are both normed or neither");
  RotateRows a = {};
  a.qkv = checked<const void>(kName, qkv, "qkv", type, device, m * (heads + 2 * kv_heads) * 128);
  a.q = checked<void>(kName, q, "q", type, device, 0);
  a.k_cache = checked<void>(kName, k_cache, "k_cache", type, device, 0);
  a.v_cache = checked<void>(kName, v_cache, "v_cache", type, device, k_cache.numel());
  a.kv_slots = checked<const int64_t>(kName, kv_slots, "kv_slots", ScalarType::Long, device, m);
  a.positions = checked<const int64_t>(kName, positions, "positions", ScalarType::Long, device, m);
  a.cos = checked<const float>(kName, cos, "cos", ScalarType::Float, device, 0);
  a.sin = checked<const float>(kName, sin, "sin", ScalarType::Float, device, cos.numel());
  a.q_weight = q_weight ? checked<const void>(kName, *q_weight, "q_weight", type, device, 128) : nullptr;
  a.k_weight = k_weight ? checked<const void>(kName, *k_weight, "k_weight", type, device, 128) : nullptr;
  a.added = added_rows(kName, type, device, m, s, row_scale, order, slots, pool, offset, rank, scaling, part_stride);
  STD_TORCH_CHECK(a.added.width % 4 == 0, kName, ": expected s in pieces of four ranks, got ", describe(s));
  a.eps = (float)eps, a.table_stride = (int32_t)cos.size(1), a.m = (int32_t)m, a.heads = (int32_t)heads, a.kv_heads = (int32_t)kv_heads;
  a.is_bf16 = type == ScalarType::BFloat16, a.overlap = overlap, a.multiprocessors = (int32_t)multiprocessors;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = rotate_rows(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

void norm(Tensor x, Tensor residual, Tensor weight, Tensor out, Tensor s, std::optional<Tensor> row_scale, Tensor order, Tensor slots, Tensor pool, Tensor offset, Tensor rank,
          Tensor scaling, int64_t part_stride, double eps, bool overlap) {
  constexpr const char* kName = "norm_rows";
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  check_type(kName, type);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 128 == 0 && x.size(1) <= 4096 && x.numel() < (1ll << 31), kName,
                  ": expected x [m, columns] of less than 2^31 elements, columns a multiple of 128 up to 4096, got ", describe(x));
  const int64_t m = x.size(0), columns = x.size(1);
  NormRows a = {};
  a.x = checked<const void>(kName, x, "x", type, device, 0);
  a.residual = checked<void>(kName, residual, "residual", type, device, m * columns);
  a.weight = checked<const void>(kName, weight, "weight", type, device, columns);
  a.out = checked<void>(kName, out, "out", type, device, m * columns);
  a.added = added_rows(kName, type, device, m, s, row_scale, order, slots, pool, offset, rank, scaling, part_stride);
  STD_TORCH_CHECK(columns <= 2048 || a.added.width <= 16, kName, ": expected at most 2048 columns with more than 16 ranks, got ", columns);
  a.eps = (float)eps, a.m = (int32_t)m, a.columns = (int32_t)columns, a.is_bf16 = type == ScalarType::BFloat16, a.overlap = overlap;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = norm_rows(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) {
  m.impl("rotate_rows", TORCH_BOX(&rotate));
  m.impl("norm_rows", TORCH_BOX(&norm));
}
