// The CUDA implementation of moe_wgmma_gemm, whose schema is in sglang_lora_moe/ops/moe_wgmma_gemm.py. Checks and unwrapping only.
#include "bindings.h"

#include "moe_wgmma_gemm.h"

namespace {

constexpr const char* kName = "moe_wgmma_gemm";

void gemm(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor tiles, Tensor counts, Tensor sorted_pairs, std::optional<Tensor> s, std::optional<Tensor> pool,
          std::optional<Tensor> records, std::optional<Tensor> ranges, Tensor out, std::optional<Tensor> next_pool, std::optional<Tensor> next_records,
          std::optional<Tensor> next_parts, std::optional<Tensor> next_s, int64_t top_k, int64_t halves, int64_t max_rank, double alpha, double cubic, double limit,
          double shift, bool gather, bool scatter, int64_t group, int64_t blocks, int64_t tokens, int64_t cluster, bool stream, int64_t report, int64_t behind, bool queued, bool overlap) {
  const int32_t device = x.get_device_index();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected x of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 3 && out.dim() == 2, kName, ": expected x, w and out of 2, 3 and 2 dimensions, got ", x.dim(), ", ", w.dim(), " and ", out.dim());
  const int64_t k = x.size(1), n = out.size(1), pairs = sorted_pairs.numel();
  STD_TORCH_CHECK(halves == 1 || halves == 2, kName, ": expected halves 1 or 2, got ", halves);
  STD_TORCH_CHECK(k % 8 == 0 && n % 8 == 0 && w.size(1) == halves * n && w.size(2) == k, kName, ": expected w [E, ", halves * n, ", ", k, "] with widths that divide by 8, got [",
                  w.size(0), ", ", w.size(1), ", ", w.size(2), "]");
  STD_TORCH_CHECK(halves == 1 || !scatter, kName, ": scatters with halves 1 alone");
  STD_TORCH_CHECK(top_k >= 1 && group >= 1 && blocks >= 1, kName, ": expected top_k, group and blocks of at least 1, got ", top_k, ", ", group, ", ", blocks);
  STD_TORCH_CHECK(tokens == 144 || (cluster == 1 && (tokens == 32 || tokens == 72)), kName, ": expected tiles of 144 tokens, or of 32 or 72 in blocks of their own, got ", tokens);
  STD_TORCH_CHECK((cluster == 1 || cluster == 2) && blocks % cluster == 0, kName, ": expected clusters of 1 or 2 that divide the grid, got ", cluster, " and ", blocks);
  STD_TORCH_CHECK(x.size(0) * (k / 8) < (int64_t)1 << 32, kName, ": x of ", x.size(0), " x ", k, " is too large");
  const int64_t tile_count = tiles.numel() / 3;

  MoeWgmmaGemm a = {};
  a.x = checked<void>(kName, x, "x", type, device, gather ? pairs / top_k * k : pairs * k);
  a.w = checked<void>(kName, w, "w", type, device, 0);
  a.bias = bias ? checked<void>(kName, *bias, "bias", type, device, w.size(0) * halves * n) : nullptr;
  a.out = checked<void>(kName, out, "out", type, device, pairs * n);
  a.tiles = checked<int32_t>(kName, tiles, "tiles", ScalarType::Int, device, 0);
  a.counts = checked<const int32_t>(kName, counts, "counts", ScalarType::Int, device, 2);
  a.sorted_pairs = checked<const int32_t>(kName, sorted_pairs, "sorted_pairs", ScalarType::Int, device, pairs);
  if (s) {
    STD_TORCH_CHECK(pool && records && ranges, kName, ": s comes with pool, records and ranges");
    a.s_width = (int32_t)s->size(s->dim() - 1);
    a.s = checked<void>(kName, *s, "s", type, device, pairs * a.s_width);
    a.pool = checked<void>(kName, *pool, "pool", type, device, 0);
    STD_TORCH_CHECK(pool->numel() / 8 < (int64_t)1 << 32, kName, ": expected a pool of less than 64 GiB, got ", pool->numel(), " elements");
    a.records = checked<const int64_t>(kName, *records, "records", ScalarType::Long, device, 0);
    a.ranges = checked<const int32_t>(kName, *ranges, "ranges", ScalarType::Int, device, 2 * tile_count);
  }
  if (next_parts) {  // of gate_up, which makes parts of s and adds them up, or without s leaves that to down; of down, which adds them up
    STD_TORCH_CHECK(s && next_records && cluster == 1 && (halves == 2 ? next_pool && report > 0 : next_s && behind > 0), kName,
                    ": parts come with s and records, in blocks of their own, with pool and report of gate_up, or with s of both and behind of down");
    const int64_t columns = tokens == 72 ? 64 : 128, parts = ((halves == 2 ? n : k) + columns - 1) / columns;  // columns: of a block's tile
    a.next.width = (int32_t)next_parts->size(2);
    STD_TORCH_CHECK(a.next.width % 16 == 0 && a.next.width <= 64, kName, ": expected parts of 16 to 64 columns, got ", a.next.width);
    a.next.pool = next_pool ? checked<void>(kName, *next_pool, "next_pool", type, device, 0) : nullptr;
    a.next.records = checked<const int64_t>(kName, *next_records, "next_records", ScalarType::Long, device, records->numel());
    a.next.parts = checked<float>(kName, *next_parts, "next_parts", ScalarType::Float, device, parts * pairs * a.next.width);
  }
  if (next_parts && next_s) {
    a.next.s_width = (int32_t)next_s->size(next_s->dim() - 1);
    STD_TORCH_CHECK(a.next.s_width <= a.next.width, kName, ": expected s of no more columns than its parts, got ", a.next.s_width, " and ", a.next.width);
    a.next.s = checked<void>(kName, *next_s, "next_s", type, device, pairs * a.next.s_width);
  }
  a.max_rank = (int32_t)max_rank;
  a.experts = (int32_t)w.size(0), a.n = (int32_t)n, a.k = (int32_t)k, a.pairs = (int32_t)pairs, a.top_k = (int32_t)top_k;
  a.halves = (int32_t)halves, a.is_bf16 = type == ScalarType::BFloat16;
  a.alpha = (float)alpha, a.cubic = (float)cubic, a.limit = (float)limit, a.shift = (float)shift;
  a.gather = gather, a.scatter = scatter, a.group = (int32_t)group, a.blocks = (int32_t)blocks, a.tokens = (int32_t)tokens, a.cluster = (int32_t)cluster, a.stream = stream, a.report = (int32_t)report, a.behind = (int32_t)behind, a.queued = queued, a.overlap = overlap;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = moe_wgmma_gemm(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("moe_wgmma_gemm", TORCH_BOX(&gemm)); }
