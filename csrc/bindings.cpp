// The CUDA implementations of the operators whose schemas sglang_lora_moe/ops/ defines. Checks and unwrapping only; kernels are in the .cu files.
#include "bindings.h"

#include "moe_lora_align.h"

namespace {

constexpr const char* kAlign = "moe_lora_align_block_size";

int64_t most_tiles(int64_t pairs, int64_t groups, int64_t block) {
  const int64_t most = pairs / block + (groups < pairs ? groups : pairs);
  return most < pairs ? most : pairs;
}

void moe_lora_align_block_size(Tensor topk_ids, std::optional<Tensor> token_slots, int64_t num_experts, int64_t num_slots, int64_t base_block, int64_t lora_block,
                               Tensor sorted_pairs, Tensor base_tiles, Tensor lora_tiles, Tensor counts, Tensor workspace, std::optional<Tensor> told) {
  const int32_t device = topk_ids.get_device_index();
  const bool long_ids = topk_ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.is_contiguous() && (long_ids || topk_ids.scalar_type() == ScalarType::Int),
                  kAlign, ": expected topk_ids to be contiguous int32 or int64 [M, K], got ", describe(topk_ids));
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= 1024, kAlign, ": expected num_experts in 1..1024, got ", num_experts);
  STD_TORCH_CHECK(num_slots >= 0 && num_slots <= 256, kAlign, ": expected num_slots in 0..256, got ", num_slots);
  STD_TORCH_CHECK(base_block >= 1 && base_block <= 1 << 20 && lora_block >= 1 && lora_block <= 1 << 20, kAlign, ": expected blocks in 1..2^20, got base_block ",
                  base_block, ", lora_block ", lora_block);
  STD_TORCH_CHECK(topk_ids.size(1) >= 1, kAlign, ": expected top_k of at least 1, got 0");
  const int64_t tokens = topk_ids.size(0), top_k = topk_ids.size(1), pairs = tokens * top_k, slots = token_slots ? num_slots : 0;
  STD_TORCH_CHECK(pairs < (int64_t)1 << 30, kAlign, ": expected fewer than 2^30 pairs, got ", pairs);

  MoeLoraAlign a;
  a.topk_ids = topk_ids.const_data_ptr();
  a.token_slots = token_slots ? checked<int32_t>(kAlign, *token_slots, "token_slots", ScalarType::Int, device, tokens) : nullptr;
  a.sorted_pairs = checked<int32_t>(kAlign, sorted_pairs, "sorted_pairs", ScalarType::Int, device, pairs);
  a.base_tiles = checked<int32_t>(kAlign, base_tiles, "base_tiles", ScalarType::Int, device, 3 * most_tiles(pairs, num_experts, base_block));
  a.lora_tiles = checked<int32_t>(kAlign, lora_tiles, "lora_tiles", ScalarType::Int, device, 4 * most_tiles(pairs, num_experts * slots, lora_block));
  a.counts = checked<int32_t>(kAlign, counts, "counts", ScalarType::Int, device, 4);
  a.workspace = reinterpret_cast<uint32_t*>(checked<int32_t>(kAlign, workspace, "workspace", ScalarType::Int, device, moe_lora_align_workspace(pairs, num_experts)));
  a.told = told ? reinterpret_cast<uint32_t*>(checked<int32_t>(kAlign, *told, "told", ScalarType::Int, device, 1)) : nullptr;
  a.ids_are_64bit = long_ids;
  a.tokens = (int32_t)tokens;
  a.top_k = (int32_t)top_k;
  a.experts = (int32_t)num_experts;
  a.slots = (int32_t)slots;
  a.base_block = (int32_t)base_block;
  a.lora_block = (int32_t)lora_block;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = moe_lora_align(&a, moe_lora_align_default_plan(), current_stream(device));
  STD_TORCH_CHECK(error == 0, kAlign, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("moe_lora_align_block_size", TORCH_BOX(&moe_lora_align_block_size)); }
