// Runs one case from stdin through csrc/moe_lora_act.cu on the emulator. Each buffer is a heap block of its exact size, outputs poisoned.
// In: the fields of Case, then gate_up, s, B's pool, offset, stride, rank and split, A's pool, offset, stride and rank, scaling, the next B's offset and stride,
// slots, tiles, counts, pairs. Out: act, s of the second, records.
#include "../../csrc/moe_lora_act.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, pairs, inter, s_width, max_rank, next_width, top_k, lora_block, slots, tiles, is_bf16, gated, activation, parts, multiprocessors;
  float alpha, limit;
  int64_t b_pool, a_pool;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const auto gate_up = read<float>((int64_t)c.pairs * c.inter * (1 + c.gated));
  const auto s = read<uint16_t>((int64_t)c.pairs * c.s_width);
  const auto b_pool = read<uint16_t>(c.b_pool);
  const auto b_offset = read<int64_t>(c.slots), b_stride = read<int64_t>(c.slots);
  const auto b_rank = read<int32_t>(c.slots), b_split = read<int32_t>(c.slots);
  const auto a_pool = read<uint16_t>(c.a_pool);
  const auto a_offset = read<int64_t>(c.slots), a_stride = read<int64_t>(c.slots);
  const auto a_rank = read<int32_t>(c.slots);
  const auto scaling = read<float>(c.slots);
  const auto next_offset = read<int64_t>(c.slots), next_stride = read<int64_t>(c.slots);
  const auto slots = read<int32_t>(c.pairs / c.top_k), tiles = read<int32_t>(4 * c.tiles), counts = read<int32_t>(4), pairs = read<int32_t>(c.pairs);
  std::vector<uint16_t> act((int64_t)c.pairs * c.inter, 0xCDCD), next((int64_t)c.pairs * c.next_width, 0xCDCD);
  std::vector<int64_t> records(5 * c.tiles, -1);
  const MoeLoraAct m = {gate_up.data(), s.data(), b_pool.data(), b_offset.data(), b_stride.data(), b_rank.data(), b_split.data(), a_pool.data(), a_offset.data(), a_stride.data(),
                        a_rank.data(), scaling.data(), next_offset.data(), next_stride.data(), slots.data(), tiles.data(), counts.data(), pairs.data(), act.data(), next.data(),
                        records.data(), c.inter, c.s_width, c.max_rank, c.next_width, c.top_k, c.lora_block, c.slots, c.pairs, c.is_bf16, c.gated, c.activation, c.alpha, c.limit, 0};
  const int error = moe_lora_act(&m, c.tiles, c.parts, c.multiprocessors, nullptr);
  std::fwrite(act.data(), 2, act.size(), stdout);
  std::fwrite(next.data(), 2, next.size(), stdout);
  std::fwrite(records.data(), 8, records.size(), stdout);
  return error;
}
