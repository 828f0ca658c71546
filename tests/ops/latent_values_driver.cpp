// Runs one case from stdin through csrc/latent_values.cu on the emulator. Each buffer is a heap block of its exact size, out poisoned.
// In: the fields of Case, then parts, lse, w. Out: out.
#include "../../csrc/latent_values.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, m, heads, splits, columns, skipped, rows, is_bf16;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const int64_t units = (int64_t)c.m * c.heads;
  const auto parts = read<float>(units * c.splits * c.columns), lse = read<float>(units * c.splits);
  const auto w = read<uint16_t>((int64_t)c.heads * (c.skipped + c.rows) * c.columns);
  std::vector<uint16_t> out(units * c.rows, 0xCDCD);
  const LatentValues a = {parts.data(), lse.data(), w.data(), out.data(), c.m, c.heads, c.splits, c.columns, c.skipped, c.rows, c.is_bf16, 0};
  const int error = latent_values(&a, nullptr);
  std::fwrite(out.data(), 2, out.size(), stdout);
  return error;
}
