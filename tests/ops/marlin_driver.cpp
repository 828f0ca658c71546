// Runs cases from stdin through csrc/marlin_moe.cu on the emulator. Each buffer is a heap block of its exact size, poisoned.
// In: 37 int32 (see Case), then for a repack the codes, for a GEMM the tensors in the order of `run_gemm`. Out: packed, or out and arrivals.
#include "../../csrc/marlin_moe.cu"
#include "driver_input.h"

// int8 with one format for each shape of tiles, two by wgmma: all formats for all shapes would take the compiler as long as those of int4.
template <class T, bool ZEROS>
using Int8 = Shapes<Format<T, 8, ZEROS>>;
int marlin_moe_gemm_int8(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  const int format = 2 * (a.zeros != nullptr) + !a.is_bf16;  // as test_marlin_moe.INT8_FORMATS numbers them
  switch (plan.config) {
    case 0: return format == 0 ? launch_gemm<Int8<BFloat16, false>::S0>(a, plan, stream) : 7;
    case 1: return format == 1 ? launch_gemm<Int8<Float16, false>::S1>(a, plan, stream) : 7;
    case 2: return format == 2 ? launch_gemm<Int8<BFloat16, true>::S2>(a, plan, stream) : 7;
    case 3: return format == 3 ? launch_gemm<Int8<Float16, true>::S3>(a, plan, stream) : 7;
    default: return format == 0 ? launch_gemm<Int8<BFloat16, false>::S4>(a, plan, stream) : format == 3 ? launch_gemm<Int8<Float16, true>::S4>(a, plan, stream) : 7;
  }
}

namespace {

struct Case {
  int32_t is_repack, order_seed, config, sms;
  int32_t experts, rows, k, bits, row_units, k_units, halves;
  int32_t groups, group_size, has_zeros, has_bias, is_bf16, tiles, pairs, top_k, x_rows, out_rows, out_columns, activation, gather, scatter, low_width, low_max_rank, low_pool, low_records;
  int32_t a_pool, slots, lora_tiles, tokens;  // adapters by slot, where there are any
  float alpha, cubic, limit, shift;
};

template <class T>
void write(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int run_repack(const Case& c) {
  const auto codes = read<uint32_t>((int64_t)c.experts * c.rows * ((c.k * c.bits + 31) / 32));
  std::vector<uint32_t> packed((int64_t)c.experts * c.row_units * c.k_units * 32 * c.bits, 0xCDCDCDCD);
  const MarlinMoeRepack arguments = {codes.data(), packed.data(), c.experts, c.rows, c.k, c.bits, c.row_units, c.k_units, c.halves};
  const int error = marlin_moe_repack(&arguments, nullptr);
  write(packed);
  return error;
}

int run_gemm(const Case& c) {
  const int64_t units = (int64_t)c.experts * c.row_units;
  const auto x = read<uint16_t>((int64_t)c.x_rows * c.k);
  const auto packed = read<uint32_t>(units * c.k_units * 32 * c.bits);
  const auto scales = read<uint16_t>(units * c.groups * 32);
  const auto zeros = read<uint8_t>(c.has_zeros ? units * c.groups * 32 : 0);
  const auto bias = read<uint16_t>(c.has_bias ? (int64_t)c.experts * c.rows : 0);
  auto tiles = read<int32_t>(3 * c.tiles);
  const auto sorted = read<int32_t>(c.pairs);
  const auto low = read<uint16_t>((int64_t)c.pairs * c.low_width);
  const auto low_pool = read<uint16_t>(c.low_pool);
  const auto low_records = read<int64_t>(5 * c.low_records);
  const auto low_ranges = read<int32_t>(c.low_width && !c.slots ? 2 * c.tiles : 0);
  const auto token_slots = read<int32_t>(c.slots ? c.tokens : 0), rank = read<int32_t>(c.slots), split = read<int32_t>(c.slots);
  const auto b_offset = read<int64_t>(c.slots), b_stride = read<int64_t>(c.slots);
  const auto a_pool = read<uint16_t>(c.a_pool);
  const auto a_offset = read<int64_t>(c.slots), a_stride = read<int64_t>(c.slots);
  const auto scaling = read<float>(c.slots);
  const auto lora_tiles = read<int32_t>(4 * c.lora_tiles);
  const MarlinMoeSlots by_slot = {token_slots.data(), rank.data(), split.data(), b_offset.data(), b_stride.data(), c.a_pool ? a_pool.data() : nullptr, a_offset.data(), a_stride.data(),
                                  scaling.data(), lora_tiles.data(), c.slots, 2};
  const std::vector<int32_t> counts = {0, c.tiles, c.lora_tiles, 0};
  const MarlinMoePlan plan = {c.config, c.sms, 0};
  std::vector<uint16_t> out((int64_t)c.out_rows * c.out_columns, emu::kPoison);
  std::vector<float> partials(marlin_moe_partials(plan), NAN);
  std::vector<uint32_t> arrivals(marlin_moe_counters(plan), 0);
  MarlinMoeGemm arguments = {x.data(), packed.data(), scales.data(), c.has_zeros ? zeros.data() : nullptr, c.has_bias ? bias.data() : nullptr,
                                   tiles.data(), counts.data(), sorted.data(), out.data(), partials.data(), arrivals.data(), c.low_width ? low.data() : nullptr, low_pool.data(), low_records.data(), low_ranges.data(), c.low_width, c.low_max_rank, c.low_pool / 64, c.slots ? &by_slot : nullptr, {},
                                   c.experts, c.pairs, c.top_k, c.rows, c.k, c.row_units, c.k_units, c.groups, c.group_size, c.bits, c.is_bf16, c.halves,
                                   c.activation, c.alpha, c.cubic, c.limit, c.shift, nullptr, c.scatter, c.gather, c.scatter, 0, 0};
  const MarlinMoeShape shape = marlin_moe_shape(c.config);
  arguments.report = shape.block_tokens == 144 && !c.low_width && c.k > shape.stages * shape.block_k;
  int error = marlin_moe_gemm(&arguments, plan, nullptr);
  write(out);
  if (arguments.report) {  // what is stored is counted, and a GEMM that waits for it computes the same
    arguments.report = 0, arguments.behind = (32 * c.row_units + shape.block_rows - 1) / shape.block_rows;
    for (int32_t i = 0; i < c.tiles; i++)
      if (tiles[3 * i + 2] >> 16 != arguments.behind) return 4;
    const std::vector<uint16_t> first = out;
    std::fill(out.begin(), out.end(), emu::kPoison);
    error = error ? error : marlin_moe_gemm(&arguments, plan, nullptr);
    if (out != first) return 5;
  }
  if (!c.low_width && shape.block_tokens != 144) {  // and one that a word tells when x is complete
    const uint32_t told = 1;
    arguments.told = &told, arguments.early = 2;
    const std::vector<uint16_t> first = out;
    std::fill(out.begin(), out.end(), emu::kPoison);
    error = error ? error : marlin_moe_gemm(&arguments, plan, nullptr);
    if (out != first) return 6;
  }
  for (const uint32_t count : arrivals)
    if (count != 0) return 3;
  return error;
}

}  // namespace

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    emu::order_seed = (uint64_t)c.order_seed;
    if (c.is_repack == 2) {  // the table of shapes
      for (int i = 0; marlin_moe_shape(i).block_tokens > 0; i++) write(std::vector<MarlinMoeShape>{marlin_moe_shape(i)});
      continue;
    }
    const int error = c.is_repack ? run_repack(c) : run_gemm(c);
    if (error != 0) return error;
  }
  return 0;
}
