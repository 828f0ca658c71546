// Runs one case from stdin through csrc/prefill_attention.cu on the emulator. Each buffer is a heap block of its exact size, out poisoned.
// In: the fields of Case, then q, k_cache, v_cache, page_table, query_starts, seq_lens. Out: the tickets, out.
#include "../../csrc/prefill_attention.cu"
#include "driver_input.h"

namespace {

struct Case {
  int32_t order_seed, m, heads, kv_heads, requests, max_pages, page_size, is_bf16, blocks, cache_rows;
  float scale;
};

}  // namespace

int main() {
  const Case c = read<Case>(1)[0];
  emu::order_seed = (uint64_t)c.order_seed;
  const auto q = read<uint16_t>((int64_t)c.m * c.heads * 128);
  const auto keys = read<uint16_t>((int64_t)c.cache_rows * c.kv_heads * 128), values = read<uint16_t>(keys.size());
  const auto table = read<int32_t>((int64_t)c.requests * c.max_pages), starts = read<int32_t>(c.requests + 1), lens = read<int32_t>(c.requests);
  std::vector<uint16_t> out(q.size(), emu::kPoison);
  std::vector<uint32_t> tickets(2, 0);
  const PrefillAttention a = {q.data(), keys.data(), values.data(), table.data(), starts.data(), lens.data(), tickets.data(), out.data(), c.scale, c.m, c.heads, c.kv_heads,
                              c.requests, c.max_pages, c.page_size, c.is_bf16, c.blocks, 0, c.cache_rows};
  const int error = prefill_attention(&a, nullptr);
  std::fwrite(tickets.data(), 4, tickets.size(), stdout);
  std::fwrite(out.data(), 2, out.size(), stdout);
  return error;
}
