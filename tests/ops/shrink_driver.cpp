// Runs one case from stdin through csrc/moe_lora_shrink.cu on the emulator. Each buffer is a heap block of its exact size, outputs poisoned.
// In: the fields of Case, then x, pool, offset, stride, rank, split, scaling, B's offset and stride, tiles, base tiles, counts, pairs, with a next projection its A's offset, stride and rank,
// its scaling, its B's offset and stride. Out: s, records, ranges, the next one's records.
#include "../../csrc/moe_lora_shrink.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, rows, cols, width, max_rank, top_k, lora_block, is_bf16, gather, early, slots, tiles, base_tiles, pairs, has_ranges, multiprocessors, has_next;
  int64_t pool;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const auto x = read<uint16_t>((int64_t)c.rows * c.cols);
  const auto pool = read<uint16_t>(c.pool);
  const auto offset = read<int64_t>(c.slots), stride = read<int64_t>(c.slots);
  const auto rank = read<int32_t>(c.slots), split = read<int32_t>(c.slots);
  const auto scaling = read<float>(c.slots);
  const auto b_offset = read<int64_t>(c.slots), b_stride = read<int64_t>(c.slots);
  const auto tiles = read<int32_t>(4 * c.tiles), base_tiles = read<int32_t>(3 * c.base_tiles), counts = read<int32_t>(4), pairs = read<int32_t>(c.pairs);
  const int next = c.has_next ? c.slots : 0;
  const auto next_offset = read<int64_t>(next), next_stride = read<int64_t>(next);
  const auto next_rank = read<int32_t>(next);
  const auto next_scaling = read<uint32_t>(next);
  const auto next_b_offset = read<int64_t>(next), next_b_stride = read<int64_t>(next);
  std::vector<int64_t> next_records(c.has_next ? 5 * c.tiles : 0, -1);
  std::vector<uint16_t> s((int64_t)c.pairs * c.width, emu::kPoison);
  std::vector<int64_t> records(5 * c.tiles, -1);
  std::vector<int32_t> ranges(c.has_ranges ? 2 * c.base_tiles : 0, -1);
  const MoeLoraShrink a = {x.data(), pool.data(), offset.data(), stride.data(), rank.data(), split.data(), scaling.data(), b_offset.data(), b_stride.data(), tiles.data(),
                           base_tiles.data(), counts.data(), pairs.data(), s.data(), records.data(), c.has_ranges ? ranges.data() : nullptr,
                           {next_offset.data(), next_stride.data(), next_rank.data(), next_scaling.data(), next_b_offset.data(), next_b_stride.data(), c.has_next ? next_records.data() : nullptr}, c.cols, c.width, c.max_rank, c.top_k,
                           c.lora_block, c.is_bf16, c.gather, c.early, 0};
  const int error = moe_lora_shrink(&a, c.tiles, c.multiprocessors, nullptr);
  std::fwrite(s.data(), 2, s.size(), stdout);
  std::fwrite(records.data(), 8, records.size(), stdout);
  if (c.has_ranges) std::fwrite(ranges.data(), 4, ranges.size(), stdout);
  if (c.has_next) std::fwrite(next_records.data(), 8, next_records.size(), stdout);
  return error;
}
