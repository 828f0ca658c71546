// The CUDA implementations of marlin_moe_repack and marlin_moe_gemm, whose schemas are in sglang_lora_moe/ops/marlin_moe.py. Checks and unwrapping only.
#include "bindings.h"

#include "marlin_moe.h"

namespace {

// [E, row units, k units, 32 * bits], the layout's own shape.
void check_packed(const Tensor& packed, int64_t rows, int64_t k, int64_t bits, int64_t halves) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "marlin_moe: expected 4 or 8 bits, got ", bits);
  STD_TORCH_CHECK(halves == 1 || halves == 2, "marlin_moe: expected halves 1 or 2, got ", halves);
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(3) == 32 * bits, "marlin_moe: expected packed [E, row units, k units, ", 32 * bits, "], got ", packed.dim(), " dimensions");
  STD_TORCH_CHECK(packed.size(1) % 4 == 0 && packed.size(2) % 4 == 0 && packed.size(1) * 32 >= rows && packed.size(2) * 32 >= k,
                  "marlin_moe: expected units padded to 128 that hold ", rows, " x ", k, ", got ", packed.size(1), " x ", packed.size(2));
}

void marlin_moe_repack_op(Tensor codes, int64_t k, int64_t bits, int64_t halves, Tensor packed) {
  const int32_t device = codes.get_device_index();
  STD_TORCH_CHECK(codes.dim() == 3 && codes.size(2) == (k * bits + 31) / 32, "marlin_moe_repack: expected codes [E, rows, ", (k * bits + 31) / 32, "], got ", codes.dim(),
                  " dimensions, the last of ", codes.size(codes.dim() - 1));
  check_packed(packed, codes.size(1), k, bits, halves);
  MarlinMoeRepack a;
  a.codes = checked<const uint32_t>("marlin_moe", codes, "codes", ScalarType::Int, device, 0);
  a.packed = checked<uint32_t>("marlin_moe", packed, "packed", ScalarType::Int, device, 0);
  a.experts = (int32_t)codes.size(0), a.rows = (int32_t)codes.size(1), a.k = (int32_t)k, a.bits = (int32_t)bits;
  a.row_units = (int32_t)packed.size(1), a.k_units = (int32_t)packed.size(2), a.halves = (int32_t)halves;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = marlin_moe_repack(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, "marlin_moe_repack: launch failed: ", cuda_error_text(error));
}

void marlin_moe_gemm_op(Tensor x, Tensor packed, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor tiles,
                        Tensor counts, Tensor sorted_pairs, int64_t top_k, std::optional<Tensor> low, std::optional<Tensor> low_pool,
                        std::optional<Tensor> low_records, std::optional<Tensor> low_ranges, int64_t low_max_rank, std::optional<Tensor> slots, std::optional<Tensor> rank,
                        std::optional<Tensor> split, std::optional<Tensor> b_offset, std::optional<Tensor> b_stride, std::optional<Tensor> a_pool, std::optional<Tensor> a_offset,
                        std::optional<Tensor> a_stride, std::optional<Tensor> scaling, std::optional<Tensor> lora_tiles, std::optional<Tensor> next_pool, std::optional<Tensor> next_records,
                        std::optional<Tensor> next_parts, std::optional<Tensor> next_s, std::optional<Tensor> told, Tensor out, Tensor partials, Tensor arrivals, int64_t rows,
                        int64_t group_size, int64_t halves, bool activation, double alpha, double cubic, double limit, double shift, bool gather, bool scatter, int64_t config, int64_t sms,
                        bool overlap, int64_t early, bool report, int64_t behind) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  const int64_t pairs = sorted_pairs.numel(), bits = packed.size(3) / 32, k = x.size(x.dim() - 1), width = activation ? rows / 2 : rows;
  const MarlinMoePlan plan = {(int32_t)config, (int32_t)sms, overlap};
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "marlin_moe_gemm: expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(config >= 0 && marlin_moe_shape((int32_t)config).block_tokens > 0, "marlin_moe_gemm: no shape of tiles ", config);
  STD_TORCH_CHECK(x.dim() == 2 && k % 8 == 0 && rows % (8 * halves) == 0, "marlin_moe_gemm: expected x [.., k] and rows that divide by 8, got k ", k, ", rows ", rows);
  STD_TORCH_CHECK(top_k > 0 && pairs % top_k == 0, "marlin_moe_gemm: expected top_k pairs of each token, got ", pairs, " pairs, top_k ", top_k);
  STD_TORCH_CHECK(x.size(0) >= (gather ? pairs / top_k : pairs), "marlin_moe_gemm: expected a row of x for each ", gather ? "token" : "pair", ", got ", x.size(0), " rows");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) >= pairs && out.size(1) == width, "marlin_moe_gemm: expected out [", pairs, ", ", width, "], got width ", out.size(out.dim() - 1));
  STD_TORCH_CHECK(!activation || halves == 2, "marlin_moe_gemm: an activation needs halves 2, got ", halves);
  STD_TORCH_CHECK(!low || (low_pool && ((low_records && low_ranges) || slots)), "marlin_moe_gemm: adapters need low, low_pool, and low_records and low_ranges or slots");
  STD_TORCH_CHECK(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, "marlin_moe_gemm: expected groups of 32, 64, 128 or 0 (one), got ", group_size);
  check_packed(packed, rows, k, bits, halves);
  const int64_t experts = packed.size(0), row_units = packed.size(1), groups = group_size ? packed.size(2) * 32 / group_size : 1, scale_elements = experts * row_units * groups * 32;

  MarlinMoeGemm a;
  a.x = checked<void>("marlin_moe", x, "x", type, device, 0);
  a.packed = checked<const uint32_t>("marlin_moe", packed, "packed", ScalarType::Int, device, 0);
  a.scales = checked<void>("marlin_moe", scales, "scales", type, device, scale_elements);
  a.zeros = zeros ? checked<const uint8_t>("marlin_moe", *zeros, "zeros", ScalarType::Byte, device, scale_elements) : nullptr;
  a.bias = bias ? checked<void>("marlin_moe", *bias, "bias", type, device, experts * rows) : nullptr;
  a.tiles = checked<const int32_t>("marlin_moe", tiles, "tiles", ScalarType::Int, device, 0);
  a.counts = checked<const int32_t>("marlin_moe", counts, "counts", ScalarType::Int, device, 3);
  a.sorted_pairs = checked<const int32_t>("marlin_moe", sorted_pairs, "sorted_pairs", ScalarType::Int, device, 0);
  a.out = checked<void>("marlin_moe", out, "out", type, device, 0);
  a.partials = checked<float>("marlin_moe", partials, "partials", ScalarType::Float, device, marlin_moe_partials(plan));
  a.arrivals = checked<uint32_t>("marlin_moe", arrivals, "arrivals", ScalarType::Int, device, marlin_moe_counters(plan));
  a.low = low ? checked<void>("marlin_moe", *low, "low", type, device, pairs) : nullptr;
  a.low_pool = low ? checked<void>("marlin_moe", *low_pool, "low_pool", type, device, 0) : nullptr;
  a.low_records = low_records ? checked<const int64_t>("marlin_moe", *low_records, "low_records", ScalarType::Long, device, 0) : nullptr;
  a.low_ranges = low_ranges ? checked<const int32_t>("marlin_moe", *low_ranges, "low_ranges", ScalarType::Int, device, tiles.numel() / 3 * 2) : nullptr;
  a.low_width = low ? (int32_t)low->size(low->dim() - 1) : 0, a.low_max_rank = (int32_t)low_max_rank;
  a.low_lines = low ? (int32_t)(low_pool->numel() / 64) : 0;
  a.next = {};
  a.told = told ? checked<const uint32_t>("marlin_moe", *told, "told", ScalarType::Int, device, 1) : nullptr;
  if (next_parts) {
    STD_TORCH_CHECK(low_records && next_pool && next_records && next_s && activation && report, "marlin_moe_gemm: parts of the next product's s come with its pool, records and s, an addend with records, an activation and report");
    a.next.s_width = (int32_t)next_s->size(next_s->dim() - 1);
    STD_TORCH_CHECK(next_parts->size(next_parts->dim() - 1) == 16 && a.next.s_width <= 16, "marlin_moe_gemm: expected parts of 16 columns and s of no more, got ",
                    next_parts->size(next_parts->dim() - 1), " and ", a.next.s_width);
    a.next.pool = checked<void>("marlin_moe", *next_pool, "next_pool", type, device, 0);
    a.next.records = checked<const int64_t>("marlin_moe", *next_records, "next_records", ScalarType::Long, device, low_records->numel());
    a.next.parts = checked<float>("marlin_moe", *next_parts, "next_parts", ScalarType::Float, device, (packed.size(1) * 32 + 255) / 256 * pairs * 16);
    a.next.s = checked<void>("marlin_moe", *next_s, "next_s", type, device, pairs * a.next.s_width);
  }
  MarlinMoeSlots by_slot = {};
  a.by_slot = nullptr;
  if (slots) {
    const int block_tokens = marlin_moe_shape((int32_t)config).block_tokens;
    STD_TORCH_CHECK(low && rank && split && b_offset && b_stride && block_tokens == (a_pool ? 16 : 32),
                    "marlin_moe_gemm: adapters by slot need low, B's tables, and tiles of 16 tokens with A or of 32 without, got ", block_tokens);
    const int64_t known = rank->numel();
    by_slot.slots = checked<const int32_t>("marlin_moe", *slots, "slots", ScalarType::Int, device, pairs / top_k);
    by_slot.rank = checked<const int32_t>("marlin_moe", *rank, "rank", ScalarType::Int, device, known);
    by_slot.split = checked<const int32_t>("marlin_moe", *split, "split", ScalarType::Int, device, known);
    by_slot.b_offset = checked<const int64_t>("marlin_moe", *b_offset, "b_offset", ScalarType::Long, device, known);
    by_slot.b_stride = checked<const int64_t>("marlin_moe", *b_stride, "b_stride", ScalarType::Long, device, known);
    by_slot.num_slots = (int32_t)known, by_slot.parts = a.low_width > 32 ? 4 : a.low_width > 8 ? 2 : 1;
    a.by_slot = &by_slot;
  }
  if (a_pool) {
    STD_TORCH_CHECK(a.by_slot && a_offset && a_stride && scaling && lora_tiles && !gather, "marlin_moe_gemm: A needs adapters by slot, its tables, LoRA tiles, and a down");
    by_slot.pool = checked<void>("marlin_moe", *a_pool, "a_pool", type, device, 0);
    by_slot.offset = checked<const int64_t>("marlin_moe", *a_offset, "a_offset", ScalarType::Long, device, by_slot.num_slots);
    by_slot.stride = checked<const int64_t>("marlin_moe", *a_stride, "a_stride", ScalarType::Long, device, by_slot.num_slots);
    by_slot.scaling = checked<const float>("marlin_moe", *scaling, "scaling", ScalarType::Float, device, by_slot.num_slots);
    by_slot.tiles = checked<const int32_t>("marlin_moe", *lora_tiles, "lora_tiles", ScalarType::Int, device, 0);
  }
  a.experts = (int32_t)experts, a.pairs = (int32_t)pairs, a.top_k = (int32_t)top_k;
  a.rows = (int32_t)rows, a.k = (int32_t)k, a.row_units = (int32_t)row_units, a.k_units = (int32_t)packed.size(2), a.groups = (int32_t)groups;
  a.group_size = (int32_t)group_size, a.bits = (int32_t)bits, a.is_bf16 = type == ScalarType::BFloat16, a.halves = (int32_t)halves;
  a.activation = activation, a.alpha = (float)alpha, a.cubic = (float)cubic, a.limit = (float)limit, a.shift = (float)shift, a.early = (int32_t)early;
  a.report = report, a.behind = (int32_t)behind, a.gather = gather, a.scatter = scatter;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = marlin_moe_gemm(&a, plan, current_stream(device));
  STD_TORCH_CHECK(error == 0, "marlin_moe_gemm: launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) {
  m.impl("marlin_moe_repack", TORCH_BOX(&marlin_moe_repack_op));
  m.impl("marlin_moe_gemm", TORCH_BOX(&marlin_moe_gemm_op));
}
