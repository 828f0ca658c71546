// The CUDA implementation of marlin_moe_pairs, whose schema is in sglang_lora_moe/ops/marlin_moe_pairs.py. Checks and unwrapping only.
#include "bindings.h"

#include "marlin_moe_pairs.h"

namespace {

void marlin_moe_pairs_op(Tensor x, Tensor packed, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor topk_ids, std::optional<Tensor> topk_weights,
                         std::optional<Tensor> slots, std::optional<Tensor> a_pool, std::optional<Tensor> a_offset, std::optional<Tensor> a_stride, std::optional<Tensor> b_pool,
                         std::optional<Tensor> b_offset, std::optional<Tensor> b_stride, std::optional<Tensor> rank, std::optional<Tensor> split, std::optional<Tensor> scaling,
                         std::optional<Tensor> next_pool, std::optional<Tensor> next_offset, std::optional<Tensor> next_stride, std::optional<Tensor> next_rank,
                         std::optional<Tensor> next_scaling, std::optional<Tensor> then_pool, std::optional<Tensor> then_offset, std::optional<Tensor> then_stride,
                         std::optional<Tensor> s, std::optional<Tensor> other_s, Tensor out, int64_t rows, int64_t group_size, double alpha, double cubic, double limit, double shift, int64_t units, int64_t shrinks, bool alone, bool overlap) {
  const char* const name = "marlin_moe_pairs";
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && topk_ids.dim() == 2 && packed.dim() == 4 && out.dim() == 2, name, ": expected x [.., k], topk_ids [M, K], packed [E, ..], out [.., ..]");
  const bool down = topk_weights.has_value();
  const int64_t bits = packed.size(3) / 32, k = x.size(1), tokens = topk_ids.size(0), pairs = topk_ids.numel(), width_of_out = down ? rows : rows / 2;
  STD_TORCH_CHECK((bits == 4 || bits == 8) && packed.size(3) == 32 * bits, name, ": expected packed [.., 32 * bits] of 4 or 8 bits, got ", packed.size(3));
  STD_TORCH_CHECK(k % 8 == 0 && rows % 16 == 0 && packed.size(1) % 4 == 0 && packed.size(2) % 4 == 0 && packed.size(1) * 32 >= rows && packed.size(2) * 32 >= k, name,
                  ": expected k that divides by 8, rows by 16, and units padded to 128 that hold ", rows, " x ", k, ", got ", packed.size(1), " x ", packed.size(2));
  STD_TORCH_CHECK(x.size(0) == (down ? pairs : tokens), name, ": expected a row of x for each ", down ? "pair" : "token", ", got ", x.size(0));
  STD_TORCH_CHECK(out.size(0) == (down ? tokens : pairs) && out.size(1) == width_of_out, name, ": expected out [", down ? tokens : pairs, ", ", width_of_out, "], got [", out.size(0),
                  ", ", out.size(1), "]");
  STD_TORCH_CHECK(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, name, ": expected groups of 32, 64, 128 or 0 (one), got ", group_size);
  STD_TORCH_CHECK(units >= (down ? 0 : 1) && units <= (down ? 1 : 16) && shrinks >= 1, name, ": no plan of ", units, " units and ", shrinks, " shrinks");
  const int64_t experts = packed.size(0), row_units = packed.size(1), groups = group_size ? packed.size(2) * 32 / group_size : 1, scale_elements = experts * row_units * groups * 32;
  MarlinMoePairs a = {};
  a.x = checked<void>(name, x, "x", type, device, 0);
  a.packed = checked<const uint32_t>(name, packed, "packed", ScalarType::Int, device, 0);
  a.scales = checked<void>(name, scales, "scales", type, device, scale_elements);
  if (zeros) a.zeros = checked<const uint8_t>(name, *zeros, "zeros", ScalarType::Byte, device, scale_elements);
  if (bias) a.bias = checked<void>(name, *bias, "bias", type, device, experts * rows);
  a.topk_ids = checked<const int32_t>(name, topk_ids, "topk_ids", ScalarType::Int, device, 0);
  if (down) a.topk_weights = checked<const float>(name, *topk_weights, "topk_weights", ScalarType::Float, device, pairs);
  a.out = checked<void>(name, out, "out", type, device, 0);
  if (slots) {
    STD_TORCH_CHECK(topk_ids.size(1) <= 32, name, ": expected no more than 32 experts a token with adapters, got ", topk_ids.size(1));
    STD_TORCH_CHECK(b_pool && b_offset && b_stride && rank && split && scaling && s && s->dim() == 3 && other_s && other_s->dim() == 3, name,
                    ": slots need the tables of B, and s of both projections");
    const int64_t num_slots = rank->numel();
    const auto table = [&](const std::optional<Tensor>& pool, const std::optional<Tensor>& offset, const std::optional<Tensor>& stride, const Tensor& ranks, const Tensor& scalings) {  // no split
      STD_TORCH_CHECK(pool && offset && stride, name, ": a table needs pool, offset and stride");
      return MarlinMoeTable{checked<void>(name, *pool, "pool", type, device, 0), checked<const int64_t>(name, *offset, "offset", ScalarType::Long, device, num_slots),
                            checked<const int64_t>(name, *stride, "stride", ScalarType::Long, device, num_slots), checked<const int32_t>(name, ranks, "rank", ScalarType::Int, device, num_slots),
                            nullptr, checked<const float>(name, scalings, "scaling", ScalarType::Float, device, num_slots)};
    };
    a.slots = checked<const int32_t>(name, *slots, "slots", ScalarType::Int, device, tokens);
    a.b = table(b_pool, b_offset, b_stride, *rank, *scaling);
    a.b.split = checked<const int32_t>(name, *split, "split", ScalarType::Int, device, num_slots);
    const Tensor &first = down ? *other_s : *s, &second = down ? *s : *other_s;  // [pairs, 8, width]; [pairs, parts, width]
    STD_TORCH_CHECK(first.size(0) == pairs && second.size(0) == pairs && first.size(1) == 8 && first.size(2) % 16 == 0 && second.size(2) % 16 == 0, name,
                    ": expected s [", pairs, ", 8, ..] and [", pairs, ", .., ..] of sixteens, got [", first.size(0), ", ", first.size(1), ", ", first.size(2), "] and [", second.size(0), ", ..,",
                    second.size(2), "]");
    a.num_slots = (int32_t)num_slots, a.exchanged = (int32_t)first.numel(), a.parts = (int32_t)second.size(1);
    a.width = (int32_t)(down ? second.size(2) : first.size(2)), a.next_width = (int32_t)second.size(2);
    a.s = checked<float>(name, *s, "s", ScalarType::Float, device, 0), a.other_s = checked<float>(name, *other_s, "other_s", ScalarType::Float, device, 0);
    if (!down) {
      STD_TORCH_CHECK(next_rank && next_scaling && a.parts == (packed.size(1) + units - 1) / units, name, ": gate_up needs the tables of A and of the next A, and parts of its s for all blocks, got ",
                      a.parts);
      a.a = table(a_pool, a_offset, a_stride, *rank, *scaling), a.a.split = a.b.split;
      a.next = table(next_pool, next_offset, next_stride, *next_rank, *next_scaling);
      a.then = table(then_pool, then_offset, then_stride, *next_rank, *next_scaling);
    }
  }
  a.experts = (int32_t)experts, a.tokens = (int32_t)tokens, a.top_k = (int32_t)topk_ids.size(1), a.rows = (int32_t)rows, a.k = (int32_t)k;
  a.row_units = (int32_t)row_units, a.k_units = (int32_t)packed.size(2), a.groups = (int32_t)groups, a.group_size = (int32_t)group_size;
  a.bits = (int32_t)bits, a.is_bf16 = type == ScalarType::BFloat16, a.alpha = (float)alpha, a.cubic = (float)cubic, a.limit = (float)limit, a.shift = (float)shift;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = marlin_moe_pairs(&a, {(int32_t)units, (int32_t)shrinks, alone, overlap}, current_stream(device));
  STD_TORCH_CHECK(error == 0, name, ": launch failed: ", cuda_error_text(error));
}

// A linear: down with one expert of weight 1, which `ids` and `weights` say.
void marlin_linear_pairs_op(Tensor x, Tensor packed, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor ids, Tensor weights, std::optional<Tensor> s,
                            std::optional<Tensor> slots, std::optional<Tensor> pool, std::optional<Tensor> offset, std::optional<Tensor> rank, std::optional<Tensor> scaling,
                            std::optional<Tensor> starts, Tensor out, int64_t group_size, int64_t part_stride, int64_t units, bool alone) {
  const char* const name = "marlin_linear_pairs";
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && packed.dim() == 4 && out.dim() == 2, name, ": expected x [M, k], packed [1, ..], out [M, rows]");
  const int64_t bits = packed.size(3) / 32, tokens = x.size(0), k = x.size(1), rows = out.size(1), row_units = packed.size(1), k_units = packed.size(2);
  STD_TORCH_CHECK(packed.size(0) == 1 && (bits == 4 || bits == 8) && packed.size(3) == 32 * bits, name, ": expected packed [1, .., 32 * bits] of 4 or 8 bits, got [", packed.size(0), ", .., ",
                  packed.size(3), "]");
  STD_TORCH_CHECK(k % 8 == 0 && rows % 16 == 0 && row_units % 4 == 0 && k_units % 4 == 0 && row_units * 32 >= rows && k_units * 32 >= k && out.size(0) == tokens, name,
                  ": expected k that divides by 8, rows by 16, and units padded to 128 that hold ", rows, " x ", k, ", got ", row_units, " x ", k_units, " and out [", out.size(0), ", ..]");
  STD_TORCH_CHECK(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, name, ": expected groups of 32, 64, 128 or 0 (one), got ", group_size);
  STD_TORCH_CHECK(units == 0 || units == 1, name, ": no plan of ", units, " units");
  const int64_t groups = group_size ? k_units * 32 / group_size : 1, scale_elements = row_units * groups * 32;
  MarlinMoePairs a = {};
  a.x = checked<void>(name, x, "x", type, device, 0);
  a.packed = checked<const uint32_t>(name, packed, "packed", ScalarType::Int, device, 0);
  a.scales = checked<void>(name, scales, "scales", type, device, scale_elements);
  if (zeros) a.zeros = checked<const uint8_t>(name, *zeros, "zeros", ScalarType::Byte, device, scale_elements);
  if (bias) a.bias = checked<void>(name, *bias, "bias", type, device, rows);
  a.topk_ids = checked<const int32_t>(name, ids, "ids", ScalarType::Int, device, tokens);
  a.topk_weights = checked<const float>(name, weights, "weights", ScalarType::Float, device, tokens);
  a.out = checked<void>(name, out, "out", type, device, 0);
  if (slots) {
    STD_TORCH_CHECK(s && s->dim() == 4 && s->size(1) == tokens && s->size(2) <= 32 && s->size(3) % 4 == 0 && pool && offset && rank && scaling && starts, name,
                    ": slots need s [.., M, parts, fours] and the tables of B");
    const int64_t num_slots = rank->numel();  // of the first part; the tables of the others lie behind
    a.slots = checked<const int32_t>(name, *slots, "slots", ScalarType::Int, device, tokens);
    a.b = {checked<void>(name, *pool, "pool", type, device, 0), checked<const int64_t>(name, *offset, "offset", ScalarType::Long, device, num_slots), nullptr,
           checked<const int32_t>(name, *rank, "rank", ScalarType::Int, device, num_slots), nullptr, checked<const float>(name, *scaling, "scaling", ScalarType::Float, device, num_slots)};
    a.s = checked<float>(name, *s, "s", ScalarType::Float, device, 0), a.starts = checked<const int32_t>(name, *starts, "starts", ScalarType::Int, device, s->size(2) + 1);
    a.num_slots = (int32_t)num_slots, a.parts = (int32_t)s->size(0), a.linear_parts = (int32_t)s->size(2), a.s_width = (int32_t)s->size(3), a.part_stride = (int32_t)part_stride;
    a.width = (a.s_width + 15) / 16 * 16;
  }
  a.experts = 1, a.tokens = (int32_t)tokens, a.top_k = 1, a.rows = (int32_t)rows, a.k = (int32_t)k;
  a.row_units = (int32_t)row_units, a.k_units = (int32_t)k_units, a.groups = (int32_t)groups, a.group_size = (int32_t)group_size;
  a.bits = (int32_t)bits, a.is_bf16 = type == ScalarType::BFloat16;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = marlin_moe_pairs(&a, {(int32_t)units, 1, alone, true}, current_stream(device));
  STD_TORCH_CHECK(error == 0, name, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) {
  m.impl("marlin_moe_pairs", TORCH_BOX(&marlin_moe_pairs_op));
  m.impl("marlin_linear_pairs", TORCH_BOX(&marlin_linear_pairs_op));
}
