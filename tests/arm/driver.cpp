// Calls one entry point of the kernels with arguments from a file, and writes what it returns and leaves in memory.
//
//     driver IN OUT     all numbers are of 64 bits
//     IN    name's length, name, number of blocks, number of pointers, number of arguments;
//           blocks: bytes, content;  pointers: block, offset in it, block pointed to;  arguments: is a block, number
//     OUT   the function's value, then the blocks' content
//
// Each block ends where memory does: a kernel that reads or writes beyond its last byte ends the process.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define ENTRIES(F)                                                                                                   \
  F(uniad_attention_splits) F(uniad_attention_forward) F(uniad_attention_backward)                                   \
  F(uniad_jitter_splits) F(uniad_jitter_forward) F(uniad_jitter_backward)                                            \
  F(uniad_norm_splits) F(uniad_norm_forward) F(uniad_norm_backward) F(uniad_dropout_forward) F(uniad_dropout_backward) \
  F(uniad_panel) F(uniad_has_pairs) F(uniad_has_tiles) F(uniad_reconstruct)                                          \
  F(uniad_linear_has_pairs) F(uniad_linear_output) F(uniad_linear_token_gradient) F(uniad_linear_weight_gradient)

// Integers and pointers take a register or a slot of the stack each, whatever their type, so that one type serves all.
using Word = uint64_t;
using Entry = Word (*)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);
#define DECLARE(name) extern "C" Word name(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);
ENTRIES(DECLARE)
#define NAMED(name) {#name, name},
static const std::map<std::string, Entry> entries = {ENTRIES(NAMED)};

struct Block {
  Word bytes;
  char* data;
};

static Block before_the_end(Word bytes) {
  const Word page = 4096, pages = (bytes + page - 1) / page * page;
  char* all = (char*)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(all + pages, page, PROT_NONE)) abort();
  return {bytes, all + pages - bytes};
}

int main(int, char** arguments) {
  FILE* in = fopen(arguments[1], "rb");
  const auto read = [&](void* to, Word bytes) {
    if (bytes && fread(to, bytes, 1, in) != 1) abort();
  };
  const auto next = [&] {
    Word value;
    read(&value, sizeof value);
    return value;
  };
  std::string name(next(), ' ');
  read(name.data(), name.size());
  std::vector<Block> blocks(next());
  Word pointers = next(), values = next();
  for (Block& block : blocks) {
    block = before_the_end(next());
    read(block.data, block.bytes);
  }
  for (; pointers > 0; pointers--) {
    const Word block = next(), offset = next(), target = next();
    memcpy(blocks.at(block).data + offset, &blocks.at(target).data, sizeof(char*));
  }
  Word a[10] = {};
  for (Word i = 0; i < values; i++) {
    const Word is_block = next(), value = next();
    a[i] = is_block ? (Word)blocks.at(value).data : value;
  }
  const Word result = entries.at(name)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
  FILE* out = fopen(arguments[2], "wb");
  fwrite(&result, sizeof result, 1, out);
  for (const Block& block : blocks) fwrite(block.data, 1, block.bytes, out);
  return fclose(out);
}
