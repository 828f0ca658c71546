// The CUDA implementations of the operators whose schemas sglang_lora_moe/ops/ defines. Checks and unwrapping only; kernels are in the .cu files.
// LibTorch's stable ABI at target 2.11: one library serves every torch from 2.11 on, with and without CUDA, and every Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "errors.h"
#include "moe_lora_align.h"

// Only torch with CUDA has this symbol: weak, so that the library loads on CPU torch too (in tests).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kAlign = "moe_lora_align_block_size";

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

// "Int [8, 2], not contiguous, on cuda:0"
std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type()) + std::string(" [");
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  text += tensor.is_contiguous() ? "]" : "], not contiguous";
  return text + (tensor.is_cuda() ? " on cuda:" + std::to_string(tensor.get_device_index()) : " not on a GPU");
}

// The data of `tensor`: int32, contiguous, on `device`, of at least `elements`.
int32_t* int32_data(const Tensor& tensor, const char* name, int32_t device, int64_t elements) {
  const bool fits = tensor.is_cuda() && tensor.get_device_index() == device && tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.numel() >= elements;
  STD_TORCH_CHECK(fits, kAlign, ": expected ", name, " to be contiguous int32 of at least ", elements, " elements on cuda:", device, ", got ", describe(tensor));
  return static_cast<int32_t*>(tensor.mutable_data_ptr());
}

int64_t most_tiles(int64_t pairs, int64_t groups, int64_t block) {
  const int64_t most = pairs / block + (groups < pairs ? groups : pairs);
  return most < pairs ? most : pairs;
}

void moe_lora_align_block_size(Tensor topk_ids, std::optional<Tensor> token_slots, int64_t num_experts, int64_t num_slots, int64_t base_block, int64_t lora_block,
                               Tensor sorted_pairs, Tensor base_tiles, Tensor lora_tiles, Tensor counts, Tensor workspace) {
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
  a.token_slots = token_slots ? int32_data(*token_slots, "token_slots", device, tokens) : nullptr;
  a.sorted_pairs = int32_data(sorted_pairs, "sorted_pairs", device, pairs);
  a.base_tiles = int32_data(base_tiles, "base_tiles", device, 3 * most_tiles(pairs, num_experts, base_block));
  a.lora_tiles = int32_data(lora_tiles, "lora_tiles", device, 4 * most_tiles(pairs, num_experts * slots, lora_block));
  a.counts = int32_data(counts, "counts", device, 4);
  a.workspace = reinterpret_cast<uint32_t*>(int32_data(workspace, "workspace", device, moe_lora_align_workspace(pairs, num_experts)));
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
