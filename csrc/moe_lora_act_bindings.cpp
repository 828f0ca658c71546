// The CUDA implementation of moe_lora_act, whose schema is in sglang_lora_moe/ops/moe_lora_act.py. Checks and unwrapping only.
#include "bindings.h"

#include "moe_lora_act.h"

namespace {

constexpr const char* kName = "moe_lora_act";

void act(Tensor gate_up, Tensor s, Tensor b_pool, Tensor b_offset, Tensor b_stride, Tensor b_rank, Tensor b_split, Tensor a_pool, Tensor a_offset, Tensor a_stride, Tensor a_rank,
         Tensor scaling, Tensor next_offset, Tensor next_stride, Tensor slots, Tensor tiles, Tensor counts, Tensor sorted_pairs, Tensor out, Tensor next, Tensor records, int64_t max_rank,
         int64_t top_k, int64_t lora_block, bool gated, int64_t activation, double alpha, double limit, int64_t parts, int64_t multiprocessors, bool overlap) {
  const int32_t device = gate_up.get_device_index();
  const ScalarType type = out.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected act of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(out.dim() == 2 && tiles.dim() == 2, kName, ": expected act and tiles of 2 dimensions, got ", out.dim(), " and ", tiles.dim());
  const int64_t pairs = out.size(0), inter = out.size(1), known = b_rank.numel();
  STD_TORCH_CHECK(inter % 8 == 0, kName, ": expected a multiple of 8 columns, got ", inter);
  STD_TORCH_CHECK(top_k >= 1 && lora_block >= 1 && multiprocessors >= 1 && parts >= 1 && max_rank >= 1 && activation >= 1 && activation <= 6, kName,
                  ": expected top_k, lora_block, multiprocessors, parts and max_rank of at least 1 and an activation in 1..6");

  MoeLoraAct m = {};
  m.gate_up = checked<const float>(kName, gate_up, "gate_up", ScalarType::Float, device, pairs * inter * (gated ? 2 : 1));
  m.s_width = (int32_t)s.size(s.dim() - 1), m.next_width = (int32_t)next.size(next.dim() - 1);
  m.s = checked<void>(kName, s, "s", type, device, pairs * m.s_width);
  m.b_pool = checked<void>(kName, b_pool, "b_pool", type, device, 0);
  m.b_offset = checked<const int64_t>(kName, b_offset, "b_offset", ScalarType::Long, device, known);
  m.b_stride = checked<const int64_t>(kName, b_stride, "b_stride", ScalarType::Long, device, known);
  m.b_rank = checked<const int32_t>(kName, b_rank, "b_rank", ScalarType::Int, device, known);
  m.b_split = checked<const int32_t>(kName, b_split, "b_split", ScalarType::Int, device, known);
  m.a_pool = checked<void>(kName, a_pool, "a_pool", type, device, 0);
  m.a_offset = checked<const int64_t>(kName, a_offset, "a_offset", ScalarType::Long, device, known);
  m.a_stride = checked<const int64_t>(kName, a_stride, "a_stride", ScalarType::Long, device, known);
  m.a_rank = checked<const int32_t>(kName, a_rank, "a_rank", ScalarType::Int, device, known);
  m.scaling = checked<const float>(kName, scaling, "scaling", ScalarType::Float, device, known);
  m.next_offset = checked<const int64_t>(kName, next_offset, "next_offset", ScalarType::Long, device, known);
  m.next_stride = checked<const int64_t>(kName, next_stride, "next_stride", ScalarType::Long, device, known);
  m.slots = checked<const int32_t>(kName, slots, "slots", ScalarType::Int, device, pairs / top_k);
  m.tiles = checked<const int32_t>(kName, tiles, "tiles", ScalarType::Int, device, 0);
  m.counts = checked<const int32_t>(kName, counts, "counts", ScalarType::Int, device, 3);
  m.sorted_pairs = checked<const int32_t>(kName, sorted_pairs, "sorted_pairs", ScalarType::Int, device, pairs);
  m.act = checked<void>(kName, out, "act", type, device, 0);
  m.next = checked<void>(kName, next, "next", type, device, pairs * m.next_width);
  m.records = checked<int64_t>(kName, records, "records", ScalarType::Long, device, 5 * tiles.size(0));
  STD_TORCH_CHECK(((uintptr_t)m.gate_up | (uintptr_t)m.s | (uintptr_t)m.b_pool | (uintptr_t)m.a_pool | (uintptr_t)m.tiles | (uintptr_t)m.act) % 16 == 0, kName,
                  ": gate_up, s, pools, tiles and act must lie at multiples of 16 bytes");
  m.inter = (int32_t)inter, m.max_rank = (int32_t)max_rank, m.top_k = (int32_t)top_k, m.lora_block = (int32_t)lora_block, m.num_slots = (int32_t)known, m.pairs = (int32_t)pairs;
  m.is_bf16 = type == ScalarType::BFloat16, m.gated = gated, m.activation = (int32_t)activation, m.alpha = (float)alpha, m.limit = (float)limit, m.overlap = overlap;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = moe_lora_act(&m, (int32_t)tiles.size(0), (int32_t)parts, (int32_t)multiprocessors, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("moe_lora_act", TORCH_BOX(&act)); }
