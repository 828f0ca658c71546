// Runs one case from stdin through csrc/middle_linear.cu on the emulator. Each buffer is a heap block of its exact size, out poisoned.
// In: the fields of Case, then x, w, bias, s, slots, pool, offsets, ranks, scalings. Out: out.
#include "../../csrc/middle_linear.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, m, n, k, is_bf16, has_bias, parts, width, max_rank, part_stride, num_slots, entries, tokens, rows, splits, starts[5];
  int64_t pool;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const auto x = read<uint16_t>((int64_t)c.m * c.k);
  const auto w = read<uint16_t>((int64_t)c.n * c.k);
  const auto bias = read<uint16_t>(c.has_bias ? c.n : 0);
  const auto s = read<float>((int64_t)c.m * c.parts * c.width);
  const auto slots = read<int32_t>(c.m);
  const auto pool = read<uint16_t>(c.pool);
  const auto offset = read<int64_t>(c.entries);
  const auto rank = read<int32_t>(c.entries);
  const auto scaling = read<float>(c.entries);
  std::vector<uint16_t> out((int64_t)c.m * c.n, emu::kPoison);
  MiddleLinear a = {x.data(), w.data(), c.has_bias ? bias.data() : nullptr, out.data(), s.data(), slots.data(), pool.data(),
                    offset.data(), rank.data(), scaling.data(), {}, c.part_stride, c.parts, c.width, c.num_slots, c.max_rank,
                    c.m, c.n, c.k, c.is_bf16, c.tokens, c.rows, c.splits, 0};
  for (int i = 0; i < 5; i++) a.starts[i] = c.starts[i];
  const int error = middle_linear(&a, nullptr);
  std::fwrite(out.data(), 2, out.size(), stdout);
  return error;
}
