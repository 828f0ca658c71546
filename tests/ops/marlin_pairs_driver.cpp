// Runs one case from stdin through csrc/marlin_moe_pairs.cu on the emulator. Each buffer is a heap block of its exact size, the output poisoned.
// In: the fields of Case, then the tensors of the operator, those that are there. Out: out, s, the other s.
#include "../../csrc/marlin_moe_pairs.cu"
#include "../../csrc/marlin_moe_pairs_int8.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, experts, tokens, top_k, rows, k, row_units, k_units, groups, group_size, bits, is_bf16, has_zeros, has_bias, down, has_slots, num_slots, width, next_width, parts,
      units, shrinks, linear_parts, part_stride, s_width, alone;
  float alpha, cubic, limit, shift;
  int64_t a_pool, b_pool, next_pool, then_pool;
};

// A table of one projection; what it points to lives as long as it does.
struct Table {
  std::vector<uint16_t> pool;
  std::vector<int64_t> offset, stride;
  Table(int64_t size, int64_t slots, bool of_experts = true)
      : pool(read<uint16_t>(size)), offset(read<int64_t>(size ? slots : 0)), stride(read<int64_t>(size && of_experts ? slots : 0)) {}
  MarlinMoeTable with(const int32_t* rank, const int32_t* split, const float* scaling) const {
    return {pool.empty() ? nullptr : pool.data(), offset.data(), stride.empty() ? nullptr : stride.data(), rank, split, scaling};
  }
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const int64_t units = (int64_t)c.experts * c.row_units, pairs = (int64_t)c.tokens * c.top_k, linear = c.linear_parts,
                slots = c.has_slots ? c.num_slots + (linear ? (linear - 1) * c.part_stride : 0) : 0;
  const auto x = read<uint16_t>((c.down ? pairs : c.tokens) * c.k);
  const auto packed = read<uint32_t>(units * c.k_units * 32 * c.bits);
  const auto scales = read<uint16_t>(units * c.groups * 32);
  const auto zeros = read<uint8_t>(c.has_zeros ? units * c.groups * 32 : 0);
  const auto bias = read<uint16_t>(c.has_bias ? (int64_t)c.experts * c.rows : 0);
  const auto ids = read<int32_t>(pairs);
  const auto weights = read<float>(c.down ? pairs : 0);
  const auto token_slots = read<int32_t>(c.has_slots ? c.tokens : 0);
  const Table a(c.a_pool, slots), b(c.b_pool, slots, linear == 0);
  const auto rank = read<int32_t>(slots), split = read<int32_t>(linear ? 0 : slots);
  const auto scaling = read<float>(slots);
  const Table next(c.next_pool, slots);
  const auto next_rank = read<int32_t>(c.next_pool ? slots : 0);
  const auto next_scaling = read<float>(c.next_pool ? slots : 0);
  const Table then(c.then_pool, slots);
  const auto starts = read<int32_t>(linear ? linear + 1 : 0);
  const int64_t first = linear ? 0 : pairs * c.width * 8, second = linear ? (int64_t)c.parts * c.tokens * linear * c.s_width : pairs * c.parts * c.next_width;
  auto s = read<float>(c.down ? second : first), other_s = read<float>(c.down ? first : second);
  std::vector<uint16_t> out(c.down ? (int64_t)c.tokens * c.rows : pairs * c.rows / 2, emu::kPoison);
  const MarlinMoePairs arguments = {
      x.data(), packed.data(), scales.data(), c.has_zeros ? zeros.data() : nullptr, c.has_bias ? bias.data() : nullptr, ids.data(), c.down ? weights.data() : nullptr, out.data(),
      c.has_slots ? token_slots.data() : nullptr, a.with(rank.data(), split.data(), scaling.data()), b.with(rank.data(), linear ? nullptr : split.data(), scaling.data()),
      next.with(next_rank.data(), nullptr, next_scaling.data()), then.with(next_rank.data(), nullptr, next_scaling.data()), s.data(), other_s.data(), c.num_slots,
      c.down ? c.next_width : c.width, c.next_width, (int32_t)first, c.parts, c.experts, c.tokens, c.top_k, c.rows, c.k, c.row_units, c.k_units, c.groups, c.group_size, c.bits, c.is_bf16, c.alpha, c.cubic, c.limit, c.shift,
      linear ? starts.data() : nullptr, c.linear_parts, c.part_stride, c.s_width};
  const int error = marlin_moe_pairs(&arguments, {c.units, c.shrinks, c.alone, 0}, nullptr);
  std::fwrite(out.data(), 2, out.size(), stdout);
  if (!s.empty()) std::fwrite(s.data(), 4, s.size(), stdout);
  if (!other_s.empty()) std::fwrite(other_s.data(), 4, other_s.size(), stdout);
  return error;
}
