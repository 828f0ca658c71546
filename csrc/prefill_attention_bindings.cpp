// The CUDA implementation of prefill_attention, whose schema is in sglang_lora_moe/ops/paged_attention.py. Checks and unwrapping only.
#include "bindings.h"

#include "prefill_attention.h"

namespace {

constexpr const char* kName = "prefill_attention";

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

void attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor query_starts, Tensor seq_lens, Tensor tickets, Tensor out, int64_t page_size, double scale,
               int64_t blocks, bool overlap) {
  const int32_t device = q.get_device_index();
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": expected q of bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == 128 && k_cache.dim() == 3 && k_cache.size(2) == 128 && page_table.dim() == 2, kName,
                  ": expected q [m, heads, 128], k_cache [rows, kv_heads, 128] and page_table [requests, pages], got ", describe(q), ", ", describe(k_cache), ", ", describe(page_table));
  const int64_t m = q.size(0), heads = q.size(1), kv_heads = k_cache.size(1), requests = page_table.size(0);
  STD_TORCH_CHECK(heads % kv_heads == 0 && is_power_of_two(heads / kv_heads) && heads / kv_heads <= 128 && is_power_of_two(page_size) && page_size >= 8 && blocks > 0, kName,
                  ": expected powers of two of heads in a group (up to 128) and tokens in a page (at least 8), got ", heads, " heads, ", kv_heads, " KV heads and pages of ", page_size);
  PrefillAttention a = {};
  a.q = checked<void>(kName, q, "q", type, device, 0);
  a.k_cache = checked<void>(kName, k_cache, "k_cache", type, device, 0);
  a.v_cache = checked<void>(kName, v_cache, "v_cache", type, device, k_cache.numel());
  a.page_table = checked<const int32_t>(kName, page_table, "page_table", ScalarType::Int, device, 0);
  a.query_starts = checked<const int32_t>(kName, query_starts, "query_starts", ScalarType::Int, device, requests + 1);
  a.seq_lens = checked<const int32_t>(kName, seq_lens, "seq_lens", ScalarType::Int, device, requests);
  a.tickets = reinterpret_cast<uint32_t*>(checked<int32_t>(kName, tickets, "tickets", ScalarType::Int, device, 2));
  a.out = checked<void>(kName, out, "out", type, device, q.numel());
  a.scale = (float)(scale * 1.4426950408889634);
  a.m = (int32_t)m, a.heads = (int32_t)heads, a.kv_heads = (int32_t)kv_heads, a.requests = (int32_t)requests, a.max_pages = (int32_t)page_table.size(1);
  a.page_size = (int32_t)page_size, a.is_bf16 = type == ScalarType::BFloat16, a.blocks = (int32_t)blocks, a.overlap = overlap, a.cache_rows = k_cache.size(0);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = prefill_attention(&a, current_stream(device));
  STD_TORCH_CHECK(error == 0, kName, ": launch failed: ", cuda_error_text(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sglang_lora_moe, CUDA, m) { m.impl("prefill_attention", TORCH_BOX(&attention)); }
