// Runs one case from stdin through csrc/norm_rope.cu on the emulator. Each buffer is a heap block of its exact size, outputs poisoned.
// In: the fields of Case, then (rotation) qkv, kv_slots, positions, cos, sin, weights or (norm) x, residual, weight; then s, row scales, order,
// slots, pool, offsets, ranks, scalings. Out: q, keys, values or residual, out.
#include "../../csrc/norm_rope.cu"
#include "driver_input.h"

namespace {

constexpr int kMultiprocessors = 2;  // few, so that blocks go over several tiles

struct Case {
  int32_t order_seed, rotates, m, heads, kv_heads, rows, positions, table_stride, columns, is_bf16, has_norm, has_scale, parts, splits, width, part_stride, entries;
  float eps;
  int64_t pool;
};

void write(const std::vector<uint16_t>& values) { std::fwrite(values.data(), 2, values.size(), stdout); }

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const int64_t wide = c.rotates ? (int64_t)c.m * (c.heads + 2 * c.kv_heads) * 128 : (int64_t)c.m * c.columns;
  const auto x = read<uint16_t>(wide);
  const auto kv_slots = read<int64_t>(c.rotates ? c.m : 0), positions = read<int64_t>(c.rotates ? c.m : 0);
  const auto cos = read<float>(c.rotates ? (int64_t)c.positions * c.table_stride : 0), sin = read<float>(cos.size());
  const auto q_weight = read<uint16_t>(c.rotates && c.has_norm ? 128 : 0), k_weight = read<uint16_t>(q_weight.size());
  auto residual = read<uint16_t>(c.rotates ? 0 : wide);
  const auto weight = read<uint16_t>(c.rotates ? 0 : c.columns);
  const auto s = read<float>((int64_t)c.splits * c.m * c.parts * c.width);
  const auto row_scale = read<float>(c.has_scale ? c.m : 0);
  const auto order = read<int32_t>(c.m), slots = read<int32_t>(order.size());
  const auto pool = read<uint16_t>(c.pool);
  const auto offset = read<int64_t>(c.entries);
  const auto rank = read<int32_t>(c.entries);
  const auto scaling = read<float>(c.entries);
  const AddedRows added = {s.data(), c.has_scale ? row_scale.data() : nullptr, order.data(), slots.data(), pool.data(), offset.data(),
                           rank.data(), scaling.data(), c.part_stride, c.parts, c.splits, c.width, c.entries - (c.parts - 1) * c.part_stride};
  if (c.rotates) {
    std::vector<uint16_t> q((int64_t)c.m * c.heads * 128, emu::kPoison), keys((int64_t)c.rows * c.kv_heads * 128, emu::kPoison), values(keys);
    const RotateRows a = {x.data(), q.data(), keys.data(), values.data(), kv_slots.data(), positions.data(), cos.data(), sin.data(),
                          c.has_norm ? q_weight.data() : nullptr, c.has_norm ? k_weight.data() : nullptr, c.eps, c.table_stride, c.m, c.heads, c.kv_heads, c.is_bf16, 0, kMultiprocessors, added};
    const int error = rotate_rows(&a, nullptr);
    write(q), write(keys), write(values);
    return error;
  }
  std::vector<uint16_t> out(wide, emu::kPoison);
  const NormRows a = {x.data(), residual.data(), weight.data(), out.data(), c.eps, c.m, c.columns, c.is_bf16, 0, added};
  const int error = norm_rows(&a, nullptr);
  write(residual), write(out);
  return error;
}
