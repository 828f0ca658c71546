// Runs cases from stdin through csrc/moe_lora_align.cu on the emulator. Each buffer is a heap block of its exact size, poisoned.
// One case in: 16 int32 (see Case), topk_ids, token_slots. Out: sorted_pairs, base_tiles, lora_tiles, counts.
#include <cstdio>
#include <vector>

#include "../../csrc/moe_lora_align.cu"

namespace {

struct Case {
  int32_t ids_are_64bit, tokens, top_k, experts, slots, base_block, lora_block, has_slots;
  int32_t one_block_pairs, cluster_pairs, pairs_per_block, overlap, most_bins, order_seed, max_base_tiles, max_lora_tiles;
};

template <class T>
bool read(std::vector<T>& values) {
  return values.empty() || std::fread(values.data(), sizeof(T), values.size(), stdin) == values.size();
}

void write(const std::vector<int32_t>& values) {
  if (!values.empty()) std::fwrite(values.data(), 4, values.size(), stdout);
}

}  // namespace

int main() {
  for (std::vector<Case> header(1); read(header);) {
    const Case& c = header[0];
    const int pairs = c.tokens * c.top_k;
    const int32_t poison = (int32_t)0xCDCDCDCD;
    std::vector<char> ids((size_t)pairs * (c.ids_are_64bit ? 8 : 4));
    std::vector<int32_t> slots(c.has_slots ? c.tokens : 0), sorted(pairs, poison), base(3 * c.max_base_tiles, poison), lora(4 * c.max_lora_tiles, poison), counts(4, poison);
    std::vector<uint32_t> workspace(moe_lora_align_workspace(pairs, c.experts), 0xCDCDCDCD);
    if (!read(ids) || !read(slots)) return 2;
    emu::order_seed = (uint64_t)c.order_seed;
    uint32_t told = 5;
    const bool asks = c.order_seed % 2 == 0 && pairs <= c.one_block_pairs;
    const MoeLoraAlign arguments = {ids.data(),     c.has_slots ? slots.data() : nullptr, sorted.data(), base.data(), lora.data(), counts.data(), workspace.data(),
                                    c.ids_are_64bit, c.tokens, c.top_k, c.experts, c.slots, c.base_block, c.lora_block, asks ? &told : nullptr};
    if (moe_lora_align(&arguments, {c.one_block_pairs, c.cluster_pairs, c.pairs_per_block, c.overlap, c.most_bins}, nullptr) != 0) return 3;
    if (asks && told != 0) return 4;
    write(sorted), write(base), write(lora), write(counts);
  }
  return 0;
}
