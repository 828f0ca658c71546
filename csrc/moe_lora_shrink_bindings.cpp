// The CUDA implementation of moe_lora_shrink, whose schema is in sglang_lora_moe/ops/moe_lora_shrink.py. Checks and unwrapping only.
#include "bindings.h"

#include "moe_lora_shrink.h"

namespace {

constexpr const char* kName = "moe_lora_shrink";

void shrink(Tensor x, Tensor pool, Tensor offset, Tensor stride, Tensor rank, Tensor split, Tensor scaling, Tensor b_offset, Tensor b_stride, Tensor tiles, Tensor base_tiles,
            Tensor counts, Tensor sorted_pairs, Tensor s, Tensor records, std::optional<Tensor> ranges, std::optional<Tensor> next_records, std::optional<Tensor> next_offset, std::optional<Tensor> next_stride,
            std::optional<Tensor> next_rank, std::optional<Tensor> next_scaling, std::optional<Tensor> next_b_offset, std::optional<Tensor> next_b_stride, int64_t max_rank, int64_t top_k, int64_t lora_block, bool gather, bool early,
            int64_t multiprocessors, bool overlap) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && tiles.dim() == 2 && base_tiles.dim() == 2, kName, ": expected x, tiles and base tiles of 2 dimensions, got ", x.dim(), ", ", tiles.dim(), " and ",
                  base_tiles.dim());
  const int64_t cols = x.size(1), pairs = sorted_pairs.numel(), slots = rank.numel();
  STD_TORCH_CHECK(cols % 8 == 0 && x.size(0) * (cols / 8) < (int64_t)1 << 32, kName, ": expected fewer than 64 GiB of rows of a multiple of 8 columns, got ", x.size(0), " of ", cols);
  STD_TORCH_CHECK(top_k >= 1 && lora_block >= 1 && multiprocessors >= 1, kName, ": expected top_k, lora_block and multiprocessors of at least 1, got ", top_k, ", ", lora_block, " and ",
                  multiprocessors);

  MoeLoraShrink a = {};
  a.x = checked<void>(kName, x, "x", type, device, gather ? pairs / top_k * cols : pairs * cols);
  a.pool = checked<void>(kName, pool, "pool", type, device, 0);
  a.offset = checked<const int64_t>(kName, offset, "offset", ScalarType::Long, device, slots);
  a.stride = checked<const int64_t>(kName, stride, "stride", ScalarType::Long, device, slots);
  a.rank = checked<const int32_t>(kName, rank, "rank", ScalarType::Int, device, slots);
  a.split = checked<const int32_t>(kName, split, "split", ScalarType::Int, device, slots);
  a.scaling = checked<const float>(kName, scaling, "scaling", ScalarType::Float, device, slots);
  a.b_offset = checked<const int64_t>(kName, b_offset, "b_offset", ScalarType::Long, device, slots);
  a.b_stride = checked<const int64_t>(kName, b_stride, "b_stride", ScalarType::Long, device, slots);
  a.tiles = checked<const int32_t>(kName, tiles, "tiles", ScalarType::Int, device, 0);
  a.base_tiles = checked<const int32_t>(kName, base_tiles, "base_tiles", ScalarType::Int, device, 0);
  a.counts = checked<const int32_t>(kName, counts, "counts", ScalarType::Int, device, 3);
  a.sorted_pairs = checked<const int32_t>(kName, sorted_pairs, "sorted_pairs", ScalarType::Int, device, pairs);
  a.width = (int32_t)s.size(s.dim() - 1);
  a.s = checked<void>(kName, s, "s", type, device, pairs * a.width);
  a.records = checked<int64_t>(kName, records, "records", ScalarType::Long, device, 5 * tiles.size(0));
  a.ranges = ranges ? checked<int32_t>(kName, *ranges, "ranges", ScalarType::Int, device, 2 * base_tiles.size(0)) : nullptr;
  if (next_records) {
    STD_TORCH_CHECK(next_offset && next_stride && next_rank && next_scaling && next_b_offset && next_b_stride, kName, ": next_records come with the tables of both its matrices");
    a.next = {checked<const int64_t>(kName, *next_offset, "next_offset", ScalarType::Long, device, slots),
              checked<const int64_t>(kName, *next_stride, "next_stride", ScalarType::Long, device, slots),
              checked<const int32_t>(kName, *next_rank, "next_rank", ScalarType::Int, device, slots),
              checked<const uint32_t>(kName, *next_scaling, "next_scaling", ScalarType::Float, device, slots),
              checked<const int64_t>(kName, *next_b_offset, "next_b_offset", ScalarType::Long, device, slots),
              checked<const int64_t>(kName, *next_b_stride, "next_b_stride", ScalarType::Long, device, slots),
              checked<int64_t>(kName, *next_records, "next_records", ScalarType::Long, device, 5 * tiles.size(0))};
  }
  STD_TORCH_CHECK(((uintptr_t)a.x | (uintptr_t)a.pool | (uintptr_t)a.tiles) % 16 == 0, kName, ": x, pool and tiles must lie at multiples of 16 bytes");
  STD_TORCH_CHECK(max_rank >= 1 && a.width >= max_rank, kName, ": expected s of at least max_rank columns, got ", a.width, " and ", max_rank);
  a.cols = (int32_t)cols, a.max_rank = (int32_t)max_rank, a.top_k = (int32_t)top_k, a.lora_block = (int32_t)lora_block;
  a.is_bf16 = type == ScalarType::BFloat16, a.gather = gather, a.early = early, a.overlap = overlap;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = moe_lora_shrink(&a, (int32_t)tiles.size(0), (int32_t)multiprocessors, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("moe_lora_shrink", TORCH_BOX(&shrink)); }
