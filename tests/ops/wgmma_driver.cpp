// Runs one case from stdin through csrc/moe_wgmma_gemm.cu on the emulator. Each buffer is a heap block of its exact size, out poisoned.
// In: the fields of Case, then x, w, bias, tiles, counts, sorted pairs, s, pool, records, ranges, the next product's pool and
// records. Out: out, the tiles, where kernels count, and s of the next product.
#include "../../csrc/moe_wgmma_gemm.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, x_rows, experts, n, k, pairs, top_k, halves, is_bf16, has_bias, tiles, has_addend, s_width, max_rank, records, gather, scatter, group, blocks, tokens, report, behind, queued, next_width, next_s_width;
  float alpha, cubic, limit, shift;
  int64_t pool, next_pool;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const auto x = read<uint16_t>((int64_t)c.x_rows * c.k);
  const auto w = read<uint16_t>((int64_t)c.experts * c.halves * c.n * c.k);
  const auto bias = read<uint16_t>(c.has_bias ? (int64_t)c.experts * c.halves * c.n : 0);
  auto tiles = read<int32_t>(3 * c.tiles);
  const auto counts = read<int32_t>(4);
  const auto sorted = read<int32_t>(c.pairs);
  const auto s = read<uint16_t>(c.has_addend ? (int64_t)c.pairs * c.s_width : 0);
  const auto pool = read<uint16_t>(c.pool);
  const auto records = read<int64_t>(5 * (int64_t)c.records);
  const auto ranges = read<int32_t>(c.has_addend ? 2 * c.tiles : 0);
  const auto next_pool = read<uint16_t>(c.next_pool);
  const auto next_records = read<int64_t>(c.next_width ? 5 * (int64_t)c.records : 0);
  const int columns = c.tokens == 72 ? 64 : 128;
  std::vector<float> parts((int64_t)(c.n + columns - 1) / columns * c.pairs * c.next_width, std::nanf(""));
  std::vector<uint16_t> next_s((int64_t)c.pairs * c.next_s_width, emu::kPoison);
  std::vector<uint16_t> out((int64_t)c.pairs * c.n, emu::kPoison);
  MoeWgmmaGemm a = {x.data(), w.data(), c.has_bias ? bias.data() : nullptr, out.data(), tiles.data(), counts.data(), sorted.data(), c.has_addend ? s.data() : nullptr,
                    pool.data(), records.data(), ranges.data(), {next_pool.data(), next_records.data(), c.next_width ? parts.data() : nullptr, next_s.data(), c.next_width, c.next_s_width},
                    c.s_width, c.max_rank, c.experts, c.n, c.k, c.pairs, c.top_k, c.halves, c.is_bf16, c.halves == 2,
                    c.alpha, c.cubic, c.limit, c.shift, c.gather, c.scatter, c.group, c.blocks, c.tokens, 1, 0, c.report, c.behind, c.queued, 0};
  const int error = moe_wgmma_gemm(&a, nullptr);
  std::fwrite(out.data(), 2, out.size(), stdout);
  std::fwrite(tiles.data(), 4, tiles.size(), stdout);
  if (!next_s.empty()) std::fwrite(next_s.data(), 2, next_s.size(), stdout);
  return error;
}
