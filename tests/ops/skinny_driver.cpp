// Runs one case from stdin through csrc/skinny_linear.cu on the emulator, with adapters twice, one launch behind the other. Each buffer is a heap block of its exact size, out poisoned.
// In: the fields of Case, then x, w, bias, slots, order, ordered slots, pool, offsets of A and of B, ranks, scalings, starts, a given s. Out: out.
#include "../../csrc/skinny_linear.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, m, n, k, is_bf16, has_bias, has_addend, parts, width, max_rank, part_stride, num_slots, entries, rows, splits, group, shares;
  int64_t pool;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const bool low = c.has_addend;
  const auto x = read<uint16_t>((int64_t)c.m * c.k);
  const auto w = read<uint16_t>((int64_t)c.n * c.k);
  const auto bias = read<uint16_t>(c.has_bias ? c.n : 0);
  const auto slots = read<int32_t>(low ? c.m : 0);
  const auto order = read<int32_t>(low ? c.m : 0);
  const auto ordered = read<int32_t>(low ? c.m : 0);
  const auto pool = read<uint16_t>(c.pool);
  const auto a_offset = read<int64_t>(c.entries);
  const auto b_offset = read<int64_t>(c.entries);
  const auto rank = read<int32_t>(c.entries);
  const auto scaling = read<float>(c.entries);
  const auto starts = read<int32_t>(low ? c.parts + 1 : 0);
  std::vector<uint16_t> out((int64_t)c.m * c.n, emu::kPoison);
  auto given = read<float>((int64_t)c.shares * c.m * c.parts * c.width);
  const int32_t used = low ? (c.k + 1023) / 1024 * c.m * c.parts * c.width : 0, half = (used + 3) / 4 * 4;
  std::vector<uint32_t> sums(2 * half, 0xffffffff);
  uint32_t launches = (uint32_t)(c.order_seed & 1) << 16;  // either half begins
  SkinnyLinear a = {x.data(), w.data(), c.has_bias ? bias.data() : nullptr, out.data(), !low ? nullptr : c.shares ? given.data() : (float*)sums.data(), &launches, slots.data(), order.data(), ordered.data(),
                    pool.data(), a_offset.data(), b_offset.data(), rank.data(), scaling.data(), starts.data(), c.part_stride, c.parts, c.width, c.num_slots, c.max_rank,
                    c.m, c.n, c.k, c.is_bf16, c.rows, c.splits, 0, c.group, half, c.shares};
  int error = skinny_linear(&a, nullptr);
  if (low) {
    const std::vector<uint16_t> first = out;
    std::fill(out.begin(), out.end(), emu::kPoison);
    error |= skinny_linear(&a, nullptr);
    if (first != out) emu::fail("two launches differ");
    if (!c.shares && launches != (uint32_t)((c.order_seed & 1) + 2) << 16) emu::fail("launches are not counted");
    for (int32_t i = 0; i < half; i++)
      if (sums[(c.order_seed & 1) * half + i] != 0xffffffff) emu::fail("the half of the next launch is not empty");
  }
  std::fwrite(out.data(), 2, out.size(), stdout);
  return error;
}
